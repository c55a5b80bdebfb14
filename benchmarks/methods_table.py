"""Runs every method of the catalogue on three streams and writes docs/methods_table.md, which docs/methods.md shows.

    python benchmarks/methods_table.py --output runs/methods                          # everything; interrupted, it continues
    python benchmarks/methods_table.py --output runs/methods --epochs 4 --rows 640    # another budget, another table
    python benchmarks/methods_table.py --output runs/methods --streams quickstart --seeds 0 --orders given    # these first
    python benchmarks/methods_table.py --output runs/methods --report-only            # only the page, from what was measured
    python benchmarks/methods_table.py --output runs/again --measured again.jsonl     # does not read what others have measured
    python benchmarks/methods_table.py --output runs/methods --reduced                # one short run each, in minutes, no page

Streams in two orders, over seeds, every method with its defaults. The budget (epochs, train rows of a task) is the same
for all runs of a table and part of a run's folder; a run whose recipe is not the one asked for is not read.
Each run is one process with one thread. A run that fails is named at the end; the others go on. The numbers of each
finished run become a line of docs/measured/runs.jsonl, so that the table grows over days and machines: the page shows all
that was measured with its budget, whichever part of it was asked for now.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from measured import MEASURED, Measured, Numbers, cells, column
from methods_plot import Point, write_pareto
from run_grid import NOT_RUN, ROOT, Job, table
from study import LLAVA_C
from study import METHODS as STUDIED
from study import TASKS as STREAMS

from mllm_cl.methods import METHODS as CATALOGUE

PAGE = ROOT / "docs" / "methods_table.md"
FIGURE = ROOT / "docs" / "figures" / "methods_pareto.png"
READING = ("<!-- reading -->", "<!-- /reading -->")
METHODS: dict[str, list[Any]] = {
    LLAVA_C: STUDIED[LLAVA_C],
    **{name: [name] for name in CATALOGUE},
}
ORDERS, SEEDS = ("given", "reversed"), (0, 1, 2)
COLUMNS = {  # name in the measured runs, decimals
    "final average": ("mean_final_accuracy", 1),
    "learning accuracy": ("mean_finetune_accuracy", 1),
    "backward transfer": ("backward_transfer", 1),
    "forgetting": ("forgetting", 1),
    "change of general ability": ("general_change", 1),
    "training TFLOP": ("tflop", 2),
    "seconds of training": ("seconds", 0),
    "stored, last stage (kB)": ("stored_kb", 0),
}
SHOWN = {"num_train_epochs": "epochs", "per_device_train_batch_size": "per batch", "learning_rate": "rate"}
# the rate was chosen by `joint` on the quickstart stream's validation split
BUDGET = {"num_train_epochs": 2, "per_device_train_batch_size": 4, "learning_rate": 2e-3}
ROWS, TEST_ROWS = 256, 80


def jobs_of(
    methods: Sequence[str],
    streams: Sequence[str],
    orders: Sequence[str],
    seeds: Sequence[int],
    changed: Mapping[str, float] | None = None,
    rows: int = ROWS,
    test_rows: int = TEST_ROWS,
) -> list[Job]:
    """The runs of a table, all methods of one setting together, so that what exists can be compared early.

    Args:
        changed: training settings that are not those of `BUDGET`.
        rows: most training rows of a task.
        test_rows: most test rows of a task.
    """
    training = BUDGET | dict(changed or {})
    changes = {"training": training, "stream": {"limit": {"train": rows, "validation": 80, "test": test_rows}}}
    parts = [f"{training[name]:g} {shown}" for name, shown in SHOWN.items()]
    budget = f", {', '.join(parts)}, {rows} rows, {test_rows} test rows"
    return [
        Job(
            name + budget,
            METHODS[name],
            stream,
            STREAMS[stream][::-1] if order == "reversed" else None,
            order,
            seed,
            changes=changes,
        )
        for seed in seeds
        for order in orders
        for stream in streams
        for name in methods
    ]


def of_stream(jobs: Iterable[Job], stream: str, measured: Measured) -> dict[str, tuple[int, list[Numbers]]]:
    """Returns method -> number of runs asked for, and the numbers of those that are finished."""
    found: dict[str, tuple[int, list[Numbers]]] = {}
    for job in jobs:
        if job.stream == stream:
            wanted, runs = found.get(job.label.split(",")[0], (0, []))
            numbers = measured.get(job)
            found[job.label.split(",")[0]] = (wanted + 1, [*runs, numbers] if numbers else runs)
    return found


def table_of(found: dict[str, tuple[int, list[Numbers]]]) -> list[str]:
    """Lines of one stream's table: mean ± standard deviation over the runs that exist, best final average first."""
    rows: list[tuple[float, list[str]]] = []
    for name, (wanted, runs) in found.items():
        if not runs:
            continue
        known = [value for value in column(runs, "mean_final_accuracy") if value is not None]
        place = sum(known) / len(known) if known else -1.0
        rows.append((-place, [name, *cells(runs, COLUMNS), f"{len(runs)} of {wanted}"]))
    missing = [name for name, (_, runs) in found.items() if not runs]
    lines = table(["method", *COLUMNS, "runs"], [row for _, row in sorted(rows, key=lambda row: row[0])])
    if not rows:
        return NOT_RUN
    return [*lines, "", f"Not run yet: {', '.join(missing)}."] if missing else lines


def points_of(found: dict[str, tuple[int, list[Numbers]]]) -> list[Point]:
    """Returns what the plot shows: means over runs of the methods that have all three numbers."""
    points = []
    for name, (_, runs) in found.items():
        axes: list[float] = []
        for axis in ("mean_final_accuracy", "general_change", "stored_kb"):
            values = [value for value in column(runs, axis) if value is not None]
            axes += [sum(values) / len(values)] if values and len(values) == len(runs) else []
        if len(axes) == 3:
            points.append(Point(name, axes[0], axes[1], 1000 * axes[2]))
    return points


def page(jobs: Sequence[Job], measured: Measured, reading: str = "") -> str:
    """The fragment that docs/methods.md shows.

    Args:
        reading: the paragraph that a person has written about the numbers, kept when the page is written again.
    """
    lines = [
        "<!-- Written by benchmarks/methods_table.py; only what stands between the marks of the reading is kept. -->"
    ]
    if jobs:
        section = jobs[0].recipe(Path())
        limit, training = section["stream"]["limit"], section["training"]
        settings = ", ".join(f"`{key}: {value:g}`" for key, value in training.items())
        lines += [
            f"tiny-llava, LoRA r 8 on the language part, {settings}, at most {limit['train']} train rows and "
            f"at most {limit['test']} test rows per task; every method with its defaults and as many epochs. Exact match in "
            "percent, mean ± standard deviation over orders and seeds; a line with fewer runs than others covers fewer of "
            "them. Epochs are equal, computing is not: teachers, inquiries and replayed rows come on top (see training "
            "TFLOP; `budget: {kind: flops}` makes it equal). Seconds were taken on shared cores: only large "
            "factors mean anything. Nothing was chosen on these test rows for this table.",
        ]
    lines += ["", READING[0], *([reading] if reading else []), READING[1]]
    for stream in dict.fromkeys(job.stream for job in jobs):
        lines += ["", f"### {stream}", "", *table_of(of_stream(jobs, stream, measured))]
    return "\n".join(lines) + "\n"


def reading_of(text: str) -> str:
    """Returns the paragraph between the marks."""
    start, _, rest = text.partition(READING[0])
    return rest.partition(READING[1])[0].strip() if start or rest else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/methods"))
    parser.add_argument("--measured", type=Path, help=f"numbers of earlier runs; {MEASURED.relative_to(ROOT)}")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="METHOD")
    parser.add_argument("--streams", nargs="+", choices=list(STREAMS), default=list(STREAMS))
    parser.add_argument("--orders", nargs="+", choices=ORDERS, default=list(ORDERS))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--epochs", type=int, default=BUDGET["num_train_epochs"])
    parser.add_argument("--batch-size", type=int, default=BUDGET["per_device_train_batch_size"])
    parser.add_argument("--learning-rate", type=float, default=BUDGET["learning_rate"])
    parser.add_argument("--rows", type=int, default=ROWS, help="most train rows per task")
    parser.add_argument("--test-rows", type=int, default=TEST_ROWS, help="most test rows per task")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time, one thread each")
    parser.add_argument(
        "--reduced", action="store_true", help="quickstart, one seed, few rows; nothing written to docs/"
    )
    parser.add_argument("--report-only", action="store_true")
    given = parser.parse_args()
    if given.reduced:
        jobs = jobs_of(given.methods, ["quickstart"], ["given"], [0], {"num_train_epochs": 1}, rows=48, test_rows=24)
        shown = jobs
    else:
        training = dict(zip(SHOWN, (given.epochs, given.batch_size, given.learning_rate)))
        budget = (training, given.rows, given.test_rows)
        jobs = jobs_of(given.methods, given.streams, given.orders, given.seeds, *budget)
        seeds = sorted({*SEEDS, *given.seeds})
        shown = jobs_of(list(METHODS), list(STREAMS), ORDERS, seeds, *budget)
    usual = given.output / MEASURED.name if given.reduced else MEASURED
    measured = Measured(given.measured or usual)
    failures: list[str] = []
    if not given.report_only:
        failures = measured.run_missing(jobs, given.output, given.jobs)
    text = page(shown, measured, reading_of(PAGE.read_text(encoding="utf-8")) if PAGE.exists() else "")
    panels = {
        stream: points_of(of_stream(shown, stream, measured)) for stream in dict.fromkeys(j.stream for j in shown)
    }
    print(text)
    if not given.reduced:
        if any(panels.values()):
            write_pareto(panels, FIGURE)
            text += f"\n![Final average, general ability and stored bytes](figures/{FIGURE.name})\n"
        PAGE.write_text(text, encoding="utf-8")
    if failures:
        raise SystemExit("\n".join([f"{len(failures)} run(s) failed:", *failures]))


if __name__ == "__main__":
    main()
