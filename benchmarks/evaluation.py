"""How much faster is the evaluation engine than a batch-1 generate loop, on the same model and machine?

    python benchmarks/evaluation.py                         # tiny-llava, short answers and captions
    python benchmarks/evaluation.py --model 300m --rows 16  # LLaVA of 300 million random weights, 336 x 336 images
    python benchmarks/evaluation.py --model 300m --rows 16 --image_size 56 --questions_per_image 4
    python benchmarks/evaluation.py --device cuda --dtype bfloat16 --model 7b --rows 256

The loop is what the drivers of LLaVA, CoIN and MCITlib do: one row at a time, decoded, prepared and generated in turn. Short
answers stop by themselves after at most 4 tokens; captions have exactly 30 (`min_new_tokens`), since random weights do not stop
where trained ones would. In float32 every answer must be the same; in bfloat16 the share of equal answers is reported.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mllm_cl.data.collate import Collator
from mllm_cl.data.rows import Row, user_message
from mllm_cl.evaluation.engine import GenerationSettings, generate
from mllm_cl.models.load import load_model
from mllm_cl.models.tiny import FIXTURE_TEXTS, TINY_LLAVA, build_model, build_processor, train_tokenizer
from mllm_cl.streams import load_benchmark

SHAPES = {  # text hidden, layers, heads; vision hidden, layers, heads
    "300m": (1024, 16, 16, 768, 12, 12),
    "7b": (4096, 32, 32, 1024, 24, 16),
}
KINDS = {"short answers": (4, ()), "captions": (30, (("min_new_tokens", 30),))}


def random_model(name: str, dtype: torch.dtype, image_size: int) -> tuple[Any, Any]:
    """A LLaVA of this shape with random weights, and a processor for images of so many pixels a side."""
    text, layers, heads, vision, vision_layers, vision_heads = SHAPES[name]
    processor = build_processor(train_tokenizer(FIXTURE_TEXTS, vocab_size=300), image_size=image_size, patch_size=14)
    model: Any = build_model(
        processor,
        vision_hidden=vision,
        vision_layers=vision_layers,
        vision_heads=vision_heads,
        text_hidden=text,
        text_layers=layers,
        text_heads=heads,
        max_positions=1024,
        seed=0,
    )
    return model.to(dtype).eval(), processor


def batch_of_one(model: Any, processor: Any, rows: Sequence[Row], settings: GenerationSettings) -> list[str]:
    """The loop of the peers."""
    collate, answers = Collator(processor, for_generation=True), []
    options = dict(settings.options)
    for row in rows:
        inputs = {name: value.to(model.device) for name, value in collate([row]).items()}
        with torch.inference_mode():
            tokens = model.generate(
                **inputs,
                max_new_tokens=settings.max_new_tokens,
                do_sample=False,
                num_beams=1,
                pad_token_id=processor.tokenizer.pad_token_id,
                **options,
            )
        new = tokens[:, inputs["input_ids"].shape[1] :]
        answers.append(processor.batch_decode(new, skip_special_tokens=True)[0].strip())
    return answers


def timed(work: Callable[[], list[str]], repeats: int) -> tuple[list[str], float]:
    """Returns what the work gives and the least seconds of so many runs."""
    best, answers = float("inf"), []
    for _ in range(repeats):
        started = time.perf_counter()
        answers = work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return answers, best


def made_up_rows(folder: Path, count: int, image_size: int, questions_per_image: int) -> list[Row]:
    """Rows of three lengths over images of noise, so that no two answers need be the same."""
    generator = np.random.default_rng(0)
    rows: list[Row] = []
    for index in range(count):
        path = folder / f"{index // questions_per_image}.png"
        if not path.exists():
            Image.fromarray(generator.integers(0, 256, (image_size, image_size, 3), dtype=np.uint8)).save(path)
        question = user_message("What is this? " * (1 + index % 3), 1)
        rows.append({"id": str(index), "messages": [question], "images": [str(path)], "answers": [""]})
    return rows


def main() -> None:
    with contextlib.ExitStack() as scratch:
        measure(scratch)


def measure(scratch: contextlib.ExitStack) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["tiny", *SHAPES], default="tiny")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--image_size", type=int, default=336, help="pixels a side, for random weights")
    parser.add_argument("--questions_per_image", type=int, default=1, help="for random weights")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    dtype = getattr(torch, arguments.dtype)
    if arguments.model == "tiny":
        model, processor = load_model(TINY_LLAVA, dtype=arguments.dtype)
        benchmark = load_benchmark("quickstart-general")
        rows = [benchmark[index * len(benchmark) // arguments.rows] for index in range(arguments.rows)]
    else:
        model, processor = random_model(arguments.model, dtype, arguments.image_size)
        folder = Path(scratch.enter_context(tempfile.TemporaryDirectory()))  # files, since rows name their images
        rows = made_up_rows(folder, arguments.rows, arguments.image_size, arguments.questions_per_image)
    model.to(arguments.device).eval()
    report: dict[str, Any] = {key: str(value) for key, value in vars(arguments).items() if key != "output"}
    report |= {
        "torch": torch.__version__,
        "cores": os.cpu_count(),
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    for kind, (longest, options) in KINDS.items():
        settings = GenerationSettings(longest, batch_size=arguments.batch_size, num_workers=0, options=options)
        generate(model, processor, rows[: arguments.batch_size], settings)  # warm up
        slow, loop = timed(lambda s=settings: batch_of_one(model, processor, rows, s), arguments.repeats)
        fast, engine = timed(lambda s=settings: generate(model, processor, rows, s), arguments.repeats)
        equal = sum(a.strip() == b.strip() for a, b in zip(slow, fast))
        report[kind] = {
            "rows": len(rows),
            "loop_rows_per_second": round(len(rows) / loop, 2),
            "engine_rows_per_second": round(len(rows) / engine, 2),
            "ratio": round(loop / engine, 2),
            "equal_answers": f"{equal}/{len(rows)}",
        }
        print(f"{kind}: {report[kind]}")
        if arguments.dtype == "float32" and equal != len(rows):
            raise SystemExit(f"{kind}: {len(rows) - equal} answers differ in float32")
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
