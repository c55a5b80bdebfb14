"""Runs every method on the quickstart stream over several seeds and writes docs/results.md.

    python benchmarks/results.py --output runs/results --jobs 2          # everything; interrupted, it continues
    python benchmarks/results.py --output runs/results --report-only     # only the page, from the runs that exist

Seeds change the initialisation, the order of the rows and every random choice of a method; rows and their order of tasks stay.
Each run is one process with one thread.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from run_grid import ROOT, TRAINING, Job, general_at, read_all, run_all, spread, table

METHODS: dict[str, list[Any]] = {
    "finetune": ["finetune"],
    "joint": ["joint"],
    "LLaVA-c (SAC + UIR)": ["spectral_consolidation", "inquiry_regularization"],
    "SAC with saturate + UIR": [{"spectral_consolidation": {"rate": "saturate"}}, "inquiry_regularization"],
    "SAC with power_up + UIR": [{"spectral_consolidation": {"rate": "power_up"}}, "inquiry_regularization"],
    "replay": [{"replay": {"size": 192, "share": 0.25, "policy": "balanced"}}],
    "ModelMix": [{"spectral_consolidation": {"rate": "uniform", "strength": 0.5}}],
    "single": ["single"],
    "task_adapters": [{"task_adapters": {"router": "prototype", "reject": 4.0}}],
    "ewc": ["ewc"],
    "lwf": ["lwf"],
}
COLUMNS = {
    "final average": "mean_final_accuracy",
    "just learnt": "mean_finetune_accuracy",
    "backward transfer": "backward_transfer",
    "forgetting": "forgetting",
}
EXTRA = ("general, last stage", "feature shift", "seconds of training", "stored, last stage (kB)", "seeds")


def page(output: Path, jobs: list[Job]) -> str:
    """The results page."""
    runs = read_all(jobs, output)
    example = next(found[0] for found in runs.values() if found)
    rows, tasks = sum(example["n"]), ", ".join(example["tasks"])
    settings = ", ".join(f"`{key}: {value}`" for key, value in TRAINING.items())
    lines = [
        "<!-- Written by benchmarks/results.py; run it again rather than editing this page. -->",
        "# Results on the quickstart stream",
        "",
        f"Tasks in order: {tasks}; {rows} test rows in all, exact match in percent, mean ± standard deviation over",
        f"seeds. tiny-llava, LoRA r 8 on the language part, {settings}; every method with its defaults unless",
        "`benchmarks/results.py` says otherwise. The general benchmark (`quickstart-general`) is at",
        f"{spread([general_at(example, 0)])} % before the first task. Nothing here was chosen on test rows.",
        "Seconds depend on what else the machine did: `benchmarks/step_overhead.py` compares the cost of steps.",
        "",
        "```bash",
        "python benchmarks/results.py --output runs/results --jobs 2",
        "```",
        "",
    ]
    cells = []
    for name, found in runs.items():
        if not found:
            continue
        own = [spread([matrix["derived"][key] for matrix in found]) for key in COLUMNS.values()]
        own.append(spread([general_at(matrix, -1) for matrix in found]))
        own.append(spread([matrix["drift"][-1]["feature_shift"] if matrix["drift"] else None for matrix in found], 3))
        own.append(spread([sum(stage["seconds"] for stage in matrix["trained"]) for matrix in found]))
        own.append(spread([matrix["trained"][-1]["stored_bytes"] / 1000 for matrix in found]))
        cells.append([name, *own, str(len(found))])
    return "\n".join([*lines, *table(["method", *COLUMNS, *EXTRA], cells)]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/results"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time, one thread each")
    parser.add_argument("--report-only", action="store_true")
    given = parser.parse_args()
    if not given.report_only:
        wanted = [Job(name, METHODS[name], seed=seed) for seed in given.seeds for name in given.methods]
        run_all(wanted, given.output, given.jobs)
    jobs = [Job(name, methods, seed=seed) for name, methods in METHODS.items() for seed in given.seeds]
    (ROOT / "docs" / "results.md").write_text(page(given.output, jobs), encoding="utf-8")


if __name__ == "__main__":
    main()
