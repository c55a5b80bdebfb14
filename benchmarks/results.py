"""Runs every method on the quickstart stream over several seeds and writes docs/results.md.

    python benchmarks/results.py --output runs/results --jobs 2          # everything; interrupted, it continues
    python benchmarks/results.py --output runs/results --report-only     # only the page, from what was measured

Seeds change the initialisation, the order of the rows and every random choice of a method; rows and their order of tasks stay.
Each run is one process with one thread.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from measured import MEASURED, Measured, cells
from run_grid import ROOT, TRAINING, Job, spread, table
from study import LLAVA_C, OLD, SAC, SATURATE, SHARED, TASKS
from study import METHODS as STUDIED

METHODS: dict[str, list[Any]] = {
    "finetune": ["finetune"],
    "joint": ["joint"],
    **{label: STUDIED[label] for label in (LLAVA_C, OLD)},
    f"{OLD}, SAC saturate": [SATURATE, SHARED],
    f"{OLD}, SAC power_up": [{SAC: {"rate": "power_up"}}, SHARED],
    "replay": [{"replay": {"size": 192, "share": 0.25, "policy": "balanced"}}],
    "ModelMix": [{"spectral_consolidation": {"rate": "uniform", "strength": 0.5}}],
    "single": ["single"],
    "task_adapters": [{"task_adapters": {"router": "prototype", "reject": 4.0}}],
    "ewc": ["ewc"],
    "lwf": ["lwf"],
}
COLUMNS = {  # name in the measured runs, decimals
    "final average": ("mean_final_accuracy", 1),
    "just learnt": ("mean_finetune_accuracy", 1),
    "backward transfer": ("backward_transfer", 1),
    "forgetting": ("forgetting", 1),
    "general, last stage": ("general", 1),
    "feature shift": ("feature_shift", 3),
    "seconds of training": ("seconds", 1),
    "stored, last stage (kB)": ("stored_kb", 1),
}


def page(jobs: list[Job], measured: Measured) -> str:
    """The results page."""
    runs = {label: own for label, own in measured.by_label(jobs).items() if own}
    first = next(own[0] for own in runs.values())
    before = [(first["general"] or 0.0) - (first["general_change"] or 0.0)]
    settings = ", ".join(f"`{key}: {value}`" for key, value in TRAINING.items())
    lines = [
        "<!-- Written by benchmarks/results.py; run it again rather than editing this page. -->",
        "# Results on the quickstart stream",
        "",
        f"Tasks in order: {', '.join(TASKS['quickstart'])}; at most 160 test rows each, exact match in percent, mean ±",
        f"standard deviation over seeds. tiny-llava, LoRA r 8 on the language part, {settings};",
        "every method with its defaults unless `benchmarks/results.py` says otherwise. The general benchmark",
        f"(`quickstart-general`) is at {spread(before)} % before the first task. Nothing here was chosen on test rows.",
        "Seconds depend on what else the machine did: `benchmarks/step_overhead.py` compares the cost of steps.",
        "",
        "```bash",
        "python benchmarks/results.py --output runs/results --jobs 2",
        "```",
        "",
    ]
    rows = [[label, *cells(own, COLUMNS), str(len(own))] for label, own in runs.items()]
    return "\n".join([*lines, *table(["method", *COLUMNS, "seeds"], rows)]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/results"))
    parser.add_argument("--measured", type=Path, default=MEASURED, help="numbers of earlier runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time, one thread each")
    parser.add_argument("--report-only", action="store_true")
    given = parser.parse_args()
    measured = Measured(given.measured)
    jobs = [Job(name, methods, seed=seed) for name, methods in METHODS.items() for seed in given.seeds]
    failures: list[str] = []
    if not given.report_only:
        wanted = [job for job in jobs if job.label in given.methods]
        failures = measured.run_missing(wanted, given.output, given.jobs)
    (ROOT / "docs" / "results.md").write_text(page(jobs, measured), encoding="utf-8")
    if failures:
        raise SystemExit("\n".join([f"{len(failures)} run(s) failed:", *failures]))


if __name__ == "__main__":
    main()
