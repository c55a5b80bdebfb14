"""Is the memory estimate of `mllm-cl doctor RECIPE` right? Estimates a run, runs it in a fresh process, compares the peaks.

    python benchmarks/memory.py              # tiny-llava
    python benchmarks/memory.py --mid        # a LLaVA of 320 million random weights (about 4 GiB of memory)

Figures: docs/performance.md. The measured peak is the resident memory of the whole process, libraries included.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

LLAVA_C = ["spectral_consolidation", {"inquiry_regularization": {"ratio": 0.25}}]
CASES = {
    "tiny finetune": {"methods": ["finetune"], "batch": 16},
    "tiny llava_c": {"methods": LLAVA_C, "batch": 16},
    "mid finetune": {"methods": ["finetune"], "batch": 2},
    "mid llava_c": {"methods": LLAVA_C, "batch": 4},
    "mid llava_c, checkpointed": {"methods": LLAVA_C, "batch": 4, "training": {"activation_checkpointing": True}},
    "mid finetune, 4bit": {"methods": ["finetune"], "batch": 2, "model": {"quantization": "4bit", "dtype": "float32"}},
}


def build_mid(folder: Path) -> None:
    """Writes a LLaVA with random weights: 24 layers of width 1024, 308 million of 320 in the language part."""
    from mllm_cl.models.tiny import FIXTURE_TEXTS, build_model, build_processor, train_tokenizer

    processor = build_processor(train_tokenizer(FIXTURE_TEXTS, vocab_size=300))
    sizes = {"vision_hidden": 256, "vision_layers": 12, "vision_heads": 4}
    model = build_model(
        processor, **sizes, text_hidden=1024, text_intermediate=2816, text_layers=24, text_heads=16, max_positions=512
    )
    print(f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.0f} million parameters", flush=True)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def write_stream(folder: Path, rows: int) -> Path:
    """Writes two tasks of one picture each row."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (64, 64), (200, 30, 30)).save(folder / "red.png")
    lines = ["name: two", "tasks:"]
    for task, question in (("colours", "What is this? Answer with one word."), ("names", "Name it in a few words.")):
        for split, count in (("train", rows), ("test", 2)):
            turns = [
                {"from": "human", "value": f"<image>\n{question}"},
                {"from": "gpt", "value": "a photo of a red cat"},
            ]
            made = [{"id": f"{task}-{split}-{i}", "image": "red.png", "conversations": turns} for i in range(count)]
            (folder / f"{task}-{split}.json").write_text(json.dumps(made), encoding="utf-8")
        lines += [
            f"  - {{name: {task}, train: {task}-train.json, test: {task}-test.json, image_folder: ., metric: exact_match}}"
        ]
    (folder / "stream.yaml").write_text("\n".join(lines), encoding="utf-8")
    return folder / "stream.yaml"


def recipe_of(case: str, model: str, folder: Path) -> dict:
    settings = CASES[case]
    batch, name = settings["batch"], case.replace(" ", "-").replace(",", "")
    return {
        "name": name,
        "output_dir": str(folder / name),
        "model": {"name_or_path": model, "lora": {"r": 16, "lora_alpha": 32}, **settings.get("model", {})},
        "stream": {"path": str(write_stream(folder / f"stream-{batch}", 2 * batch))},
        "methods": settings["methods"],
        "training": {
            "per_device_train_batch_size": batch,
            "use_cpu": True,
            "save_strategy": "no",
            **settings.get("training", {}),
        },
        "evaluation": {"batch_size": 4, "max_new_tokens": 4, "stage_zero": False, "drift": 0},
    }


def resident() -> int:
    """Resident bytes of this process now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def child(what: str, recipe: dict) -> None:
    """Runs in a fresh process: prints the estimate, or the measured peak of the run."""
    import torch

    torch.set_num_threads(1)
    from mllm_cl.recipe import load_recipe
    from mllm_cl.streams import stream_of_section
    from mllm_cl.training.capabilities import build_methods
    from mllm_cl.training.loop import run_stream

    loaded = load_recipe(recipe)
    if what == "measure":
        run_stream(loaded)
        print(json.dumps({"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))
        return
    from mllm_cl.training.memory import estimate_memory

    stream = stream_of_section(loaded.stream)
    first, held = stream[0], resident()
    found = estimate_memory(loaded, build_methods(loaded), first.train, first.test, on_cpu=True, libraries=held)
    print(json.dumps({**vars(found), "total": found.total}))


def ask(what: str, recipe: dict) -> dict:
    done = subprocess.run(
        [sys.executable, __file__, "--child", what, json.dumps(recipe)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    if "--child" in sys.argv:
        child(sys.argv[2], json.loads(sys.argv[3]))
        return
    prefix = "mid" if "--mid" in sys.argv else "tiny"
    only = [argument for argument in sys.argv[1:] if not argument.startswith("--")]
    with tempfile.TemporaryDirectory() as place:
        folder, model = Path(place), "tiny-llava"
        if prefix == "mid":
            model = str(folder / "model")
            build_mid(Path(model))
        print("| run | estimate MiB | measured MiB | ratio |\n|---|---|---|---|")
        for case in CASES:
            if not case.startswith(prefix) or (only and case not in only):
                continue
            recipe = recipe_of(case, model, folder)
            estimate = ask("estimate", recipe)
            peak = ask("measure", recipe)["peak"]
            parts = {key: round(value / 2**20) for key, value in estimate.items() if key not in ("rows", "length")}
            print(f"| {case} | {parts['total']} | {round(peak / 2**20)} | {estimate['total'] / peak:.2f} |", flush=True)
            print(f"    {parts}, {estimate['rows']} rows of {estimate['length']} tokens", flush=True)


if __name__ == "__main__":
    main()
