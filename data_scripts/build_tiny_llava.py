"""Trains the tiny LLaVA that ships with the package, from nothing, on one processor core.

    python data_scripts/build_tiny_llava.py [--seed 0] [--out mllm_cl/models/tiny_llava]

Same seed, same versions, same machine: same weights. Everything comes from installed packages (`pip install
"mllm_cl[demo]"`); nothing is downloaded. How it trains: `_tiny_llava_training.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any, cast

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch
import transformers
from _tiny_llava_training import prepare, train_all, train_eyes
from rich.console import Console
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from mllm_cl.data.builders.general import KINDS, general_pictures, general_rows
from mllm_cl.data.rows import Rows
from mllm_cl.evaluation.engine import GenerationSettings, generate
from mllm_cl.models.tiny import build_model, build_processor, tiny_llava_folder, train_tokenizer


def benchmark(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, rows: Rows
) -> tuple[float, dict[str, float]]:
    """Returns the exact match in percent, overall and per kind."""
    hits = defaultdict(list)
    answers = generate(model, processor, rows, GenerationSettings(max_new_tokens=24))
    for row, answer in zip(cast("list[dict[str, Any]]", list(rows)), answers):
        hits[row["kind"]].append(answer in row["answers"])
    return 100 * float(np.mean([hit for hits_of_kind in hits.values() for hit in hits_of_kind])), {
        kind: 100 * float(np.mean(hit)) for kind, hit in hits.items()
    }


README = """\
# tiny-llava

A `LlavaForConditionalGeneration` with {parameters:,} parameters (CLIP vision tower, MLP projector, Llama decoder,
byte-level BPE of {vocabulary} tokens), trained from nothing on the general mixture of
`mllm_cl/data/builders/general.py`. It exists for demos, tests and studies of forgetting; it is of no other use. Half
precision on disk, float32 once loaded.

    {command}

Seed {seed}; {steps} steps of {batch_size} pictures; {minutes:.1f} minutes with {threads} thread(s); torch {torch},
transformers {transformers}.

Exact match on the benchmark `quickstart-general` ({rows} rows: images and paraphrases not seen in training), greedy
generation: **{overall:.1f} %**.

| kind | exact match, % |
|---|---|
{table}

Sources of the images: see `mllm_cl/data/builders/sources.py`. Licence of the weights: Apache-2.0, as the package.
"""


def save(model: LlavaForConditionalGeneration, processor: LlavaProcessor, folder: Path, readme: str) -> None:
    """Writes weights (half precision), processor and README; the folder appears at once or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    model.half().save_pretrained(temporary)
    processor.save_pretrained(temporary)
    # Transformers writes the dtype of the weights; this is the one that loading without `dtype` shall give.
    config = json.loads((temporary / "config.json").read_text(encoding="utf-8")) | {"dtype": "float32"}
    (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (temporary / "README.md").write_text(readme, encoding="utf-8")
    temporary.chmod(0o755)
    for file in temporary.iterdir():
        file.chmod(0o644)
    old = None
    if folder.exists():
        old = folder.with_name(f".{folder.name}-old-{os.getpid()}")
        folder.rename(old)
    temporary.rename(folder)
    if old is not None:
        shutil.rmtree(old)


def main() -> None:
    """Parses the command line and builds the weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pictures", type=int, default=38_000)
    parser.add_argument("--questions", type=int, default=4, help="asked about each picture")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), help="ask nothing else (default: everything)")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--vocabulary", type=int, default=640)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=tiny_llava_folder())
    args = parser.parse_args()
    started, console = time.monotonic(), Console()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    torch.use_deterministic_algorithms(True)
    transformers.utils.logging.disable_progress_bar()

    console.print(f"drawing {args.pictures} pictures")
    pictures = list(general_pictures("train", args.pictures, args.questions, args.seed, args.kinds))
    everything = general_pictures("train", 8000, 4, args.seed)  # whatever is asked, the vocabulary is the same
    texts = (text for _, questions in everything for question in questions for text in (question.text, question.answer))
    processor = build_processor(train_tokenizer(texts, args.vocabulary))
    model = build_model(processor, seed=args.seed)
    samples, pixels = prepare(processor, pictures, args.seed)
    tokens = sum(len(sample.tokens) for sample in samples) / len(samples)
    parameters = sum(p.numel() for p in model.parameters())
    console.print(
        f"{parameters:,} parameters, {len(processor.tokenizer)} tokens in the vocabulary, "
        f"{tokens:.1f} tokens per picture; ready after {time.monotonic() - started:.0f} s"
    )
    options = {"seed": args.seed, "console": console}
    train_eyes(model, [picture for picture, _ in pictures], samples, pixels, batch_size=64, **options)
    train_all(model, samples, pixels, batch_size=args.batch_size, epochs=args.epochs, **options)

    # Measure what is shipped: the weights as rounded to half precision.
    model = model.half().float()
    rows = general_rows("test")
    overall, kinds = benchmark(model, processor, rows)
    minutes = (time.monotonic() - started) / 60
    for kind, value in kinds.items():
        console.print(f"{kind:>16} {value:5.1f} %")
    console.print(f"{'overall':>16} {overall:5.1f} %   ({minutes:.1f} minutes)")
    readme = README.format(
        parameters=parameters,
        vocabulary=len(processor.tokenizer),
        command="python data_scripts/build_tiny_llava.py " + " ".join(sys.argv[1:]),
        seed=args.seed,
        steps=args.epochs * -(-len(samples) // args.batch_size),
        batch_size=args.batch_size,
        minutes=minutes,
        threads=args.threads,
        torch=torch.__version__,
        transformers=transformers.__version__,
        rows=len(rows),
        overall=overall,
        table="\n".join(f"| {kind} | {value:.0f} |" for kind, value in kinds.items()),
    )
    save(model, processor, args.out, readme)
    console.print(f"written to {args.out} ({sum(f.stat().st_size for f in args.out.iterdir()) / 1e6:.2f} MB)")


if __name__ == "__main__":
    main()
