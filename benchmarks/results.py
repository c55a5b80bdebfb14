"""Runs every method on the quickstart stream over several seeds and writes docs/results.md.

    python benchmarks/results.py --output runs/results --jobs 2          # everything; interrupted, it continues
    python benchmarks/results.py --output runs/results --report-only     # only the page, from the runs that exist

Seeds change the initialisation, the order of the rows and every random choice of a method; rows and their order of tasks stay.
Each run is one process with one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TRAINING = {"learning_rate": 5e-3, "num_train_epochs": 2, "per_device_train_batch_size": 16}
METHODS: dict[str, list[Any]] = {
    "finetune": ["finetune"],
    "joint": ["joint"],
    "LLaVA-c (SAC + UIR)": ["spectral_consolidation", "inquiry_regularization"],
    "replay": [{"replay": {"size": 192, "share": 0.25, "policy": "balanced"}}],
    "single": ["single"],
    "task_adapters": [{"task_adapters": {"router": "prototype"}}],
    "ewc": ["ewc"],
    "lwf": ["lwf"],
}
COLUMNS = {
    "final average": "mean_final_accuracy",
    "just learnt": "mean_finetune_accuracy",
    "backward transfer": "backward_transfer",
    "forgetting": "forgetting",
}

EXTRA = ("general, last stage", "seconds of training", "stored, last stage (kB)", "seeds")


def slug(name: str) -> str:
    """Folder name of a method."""
    return "".join(c if c.isalnum() else "-" for c in name.lower()).strip("-")


def recipe(name: str, seed: int, output: Path) -> dict[str, Any]:
    """The recipe of one run."""
    return {
        "name": f"{name}, seed {seed}",
        "output_dir": str(output / f"{slug(name)}-{seed}"),
        "seed": seed,
        "stream": {"name": "quickstart", "limit": {"test": 160}},  # the limit is for the general benchmark's 525 rows
        "methods": METHODS[name],
        "training": TRAINING,
        "evaluation": {"general": ["quickstart-general"]},
    }


def run(job: dict[str, Any]) -> str:
    """Runs one recipe in a process of its own; returns a line about it."""
    folder = Path(job["output_dir"])
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.with_suffix(".yaml")
    path.write_text(json.dumps(job), encoding="utf-8")  # JSON is YAML
    command = [sys.executable, str(ROOT / "recipes" / "train.py"), str(path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{job['name']} failed:\n{done.stdout}\n{done.stderr}")
    return f"{job['name']}: done"


def read(output: Path, name: str, seeds: list[int]) -> list[dict[str, Any]]:
    """Returns matrix and seconds of the complete runs of a method."""
    found = []
    for seed in seeds:
        folder = Path(recipe(name, seed, output)["output_dir"])
        ledger = folder / "ledger.jsonl"
        if not ledger.exists():
            continue
        entries = [json.loads(line) for line in ledger.read_text(encoding="utf-8").splitlines()]
        if any(entry["event"] == "run_complete" for entry in entries):
            stages = [entry for entry in entries if entry["event"] == "stage_trained"]
            found.append(json.loads((folder / "matrix.json").read_text(encoding="utf-8")) | {"trained": stages})
    return found


def spread(values: Sequence[float | None]) -> str:
    """Mean ± standard deviation over seeds."""
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    deviation = f" ± {statistics.stdev(known):.1f}" if len(known) > 1 else ""
    return f"{statistics.mean(known):.1f}{deviation}"


def last(row: list[list[float | None]]) -> float | None:
    """Last measured value of the first column."""
    known = [values[0] for values in row if values[0] is not None]
    return known[-1] if known else None


def page(output: Path, seeds: list[int]) -> str:
    """The results page."""
    runs = {name: read(output, name, seeds) for name in METHODS}
    example = next(found[0] for found in runs.values() if found)
    rows, tasks = sum(example["n"]), ", ".join(example["tasks"])
    base = spread([last(example["general"]["values"][:1])])
    settings = ", ".join(f"`{key}: {value}`" for key, value in TRAINING.items())
    lines = [
        "<!-- Written by benchmarks/results.py; run it again rather than editing this page. -->",
        "# Results on the quickstart stream",
        "",
        f"Tasks in order: {tasks}; {rows} test rows in all, exact match in percent, seeds {seeds}, mean ±",
        f"standard deviation over seeds. tiny-llava, LoRA r 8 on the language part, {settings}; every method with its",
        "defaults unless `benchmarks/results.py` says otherwise. The general benchmark (`quickstart-general`) is at",
        f"{base} % before the first task. Nothing here was chosen on test rows.",
        "",
        "```bash",
        "python benchmarks/results.py --output runs/results --jobs 2",
        "```",
        "",
        "| method | "
        + " | ".join(COLUMNS)
        + " | general, last stage | seconds of training | stored, last stage (kB) | seeds |",
        "|---|" + "---|" * (len(COLUMNS) + len(EXTRA)),
    ]
    for name, found in runs.items():
        cells = [spread([matrix["derived"][key] for matrix in found]) for key in COLUMNS.values()]
        cells.append(spread([last(matrix["general"]["values"][::-1][:1]) for matrix in found]))
        seconds = [sum(stage["seconds"] for stage in matrix["trained"]) for matrix in found]
        cells.append(spread(seconds))
        cells.append(spread([matrix["trained"][-1]["stored_bytes"] / 1000 for matrix in found]))
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {len(found)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/results"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time, one thread each")
    parser.add_argument("--report-only", action="store_true")
    arguments = parser.parse_args()
    if not arguments.report_only:
        jobs = [recipe(name, seed, arguments.output) for seed in arguments.seeds for name in arguments.methods]
        with ThreadPoolExecutor(arguments.jobs) as pool:
            for line in pool.map(run, jobs):
                print(line, flush=True)
    (ROOT / "docs" / "results.md").write_text(page(arguments.output, arguments.seeds), encoding="utf-8")


if __name__ == "__main__":
    main()
