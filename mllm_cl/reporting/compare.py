"""Compares runs: one line per method and setting (seeds grouped), and every difference in budget and setting beside it.

Nothing is refused. Two runs that had different budgets can be looked at together, but never without being told so.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mllm_cl.errors import RunError
from mllm_cl.evaluation.statistics import Spread, mean_and_std
from mllm_cl.files import write_text
from mllm_cl.reporting import formatting
from mllm_cl.reporting.behaviour import final_drift, final_obedience
from mllm_cl.reporting.paired import PairedDerived, PairedTask, paired_derived, paired_tests
from mllm_cl.reporting.run import RunSummary, read_run, run_labels


@dataclass(frozen=True)
class Column:
    """One measured quantity of a run: how it is called, read and written, and whether more is better."""

    key: str
    label: str
    read: Callable[[RunSummary], float | None]
    write: Callable[[float | None], str]
    higher_is_better: bool | None = None


@dataclass(frozen=True)
class ComparisonRow:
    """One method with one setting: the runs that differ in their seed only, and mean and spread of each column."""

    label: str
    runs: tuple[str, ...]
    seeds: tuple[int | None, ...]
    values: dict[str, Spread | None]
    final: dict[str, Spread | None]


@dataclass(frozen=True)
class Difference:
    """A setting, a budget or a version that is not the same in all runs; one value per run."""

    kind: str
    name: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    Args:
        labels, runs: the runs, in the order given.
        rows (`tuple[ComparisonRow, ...]`): grouped over seeds.
        differences (`tuple[Difference, ...]`): everything that is not equal, budget and stream first.
        notes (`tuple[str, ...]`): runs that are not finished, numbers that only some runs have.
        paired (`tuple[PairedTask, ...]`): tests of the first run against each other one on the same rows.
        derived (`tuple[PairedDerived, ...]`): the same for derived metrics, by a joint bootstrap.
    """

    labels: tuple[str, ...]
    runs: tuple[RunSummary, ...]
    rows: tuple[ComparisonRow, ...]
    differences: tuple[Difference, ...]
    notes: tuple[str, ...]
    paired: tuple[PairedTask, ...]
    derived: tuple[PairedDerived, ...] = ()


def _derived(name: str) -> Callable[[RunSummary], float | None]:
    return lambda run: run.matrix.derived()[name].value if run.matrix else None


def _total(field: str) -> Callable[[RunSummary], float | None]:
    return lambda run: run.total(field)


def _largest(field: str) -> Callable[[RunSummary], float | None]:
    return lambda run: run.largest(field)


def _drift(field: str) -> Callable[[RunSummary], float | None]:
    return lambda run: final_drift(run, field)


def _general_final(run: RunSummary) -> float | None:
    values = run.matrix.general_values[-1] if run.matrix else []
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


COLUMNS: tuple[Column, ...] = (
    Column("mean_final_accuracy", "final accuracy", _derived("mean_final_accuracy"), formatting.score, True),
    Column("mean_finetune_accuracy", "fine-tune accuracy", _derived("mean_finetune_accuracy"), formatting.score, True),
    Column("backward_transfer", "backward transfer", _derived("backward_transfer"), formatting.change, True),
    Column("forgetting", "forgetting", _derived("forgetting"), formatting.score, False),
    Column("general_final", "general, final", _general_final, formatting.score, True),
    Column("general_ability_delta", "general, change", _derived("general_ability_delta"), formatting.change, True),
    Column("one_word_share", "one-word answers", _drift("one_word_share"), formatting.score, False),
    Column("mean_words", "words per answer", _drift("mean_words"), formatting.decimal),
    Column("feature_shift", "feature shift", _drift("feature_shift"), formatting.decimal, False),
    Column("form_followed", "answers in the form asked for", final_obedience, formatting.score, True),
    Column("seconds", "training time", _total("seconds"), formatting.duration, False),
    Column("flops", "training FLOPs", _total("flops"), formatting.flops, False),
    Column("trainable_parameters", "trainable parameters", _largest("trainable_parameters"), formatting.count),
    Column("stored_bytes", "stored", lambda run: run.final("stored_bytes"), formatting.size, False),
    Column("stored_per_task", "stored per task", RunSummary.stored_per_task, formatting.size, False),
    Column("peak_memory_mib", "peak memory", _largest("peak_memory_mib"), formatting.mebibytes, False),
    Column("train_rows", "train rows", _total("train_rows"), formatting.count),
    Column("inquiry_ratio", "inquiries per row", lambda run: run.per_train_row("inquiry_rows"), formatting.ratio),
    Column("steps", "steps", _total("steps"), formatting.count),
    Column("extra_forward_passes", "extra forward passes", _total("extra_forward_passes"), formatting.count, False),
    Column("tokens", "tokens", _total("tokens"), formatting.count),
)
BEHAVIOUR_SHOWN = ("one_word_share", "mean_words", "feature_shift", "form_followed")
"""Keys of the columns that say how the model answers after the last stage, right or wrong."""

COSTS_SHOWN = (
    *("seconds", "flops", "trainable_parameters", "stored_bytes", "stored_per_task", "peak_memory_mib"),
    *("train_rows", "inquiry_ratio", "steps", "extra_forward_passes", "tokens"),
)
"""Keys of the columns that say what a method cost."""


def compare(run_folders: Sequence[str | os.PathLike[str]]) -> Comparison:
    """Reads runs and puts them side by side.

    Args:
        run_folders (`Sequence[str]`): folders of runs, finished or not. Runs whose recipes differ in `seed`, `name` and
            `output_dir` only become one row with mean ± standard deviation over seeds.

    Raises:
        RunError: no folder was given, or one is not that of a run.
    """
    if not run_folders:
        raise RunError("no run to compare.", expected="one or more run folders")
    runs = tuple(read_run(folder) for folder in run_folders)
    labels = run_labels(runs)
    groups: dict[str, list[int]] = {}
    for position, run in enumerate(runs):
        groups.setdefault(_group_key(run), []).append(position)
    tasks = list(dict.fromkeys(task for run in runs if run.matrix for task in run.matrix.tasks))
    notes = [f"{label}: {sentence}" for label, run in zip(labels, runs) for sentence in (*run.missing, *run.problems)]
    rows = []
    for members in groups.values():
        chosen = [runs[i] for i in members]
        names = tuple(labels[i] for i in members)
        values = {c.key: _spread([c.read(run) for run in chosen], c.label, names, notes) for c in COLUMNS}
        final = {task: _spread([_final(run, task) for run in chosen], task, names, notes) for task in tasks}
        rows.append(ComparisonRow(chosen[0].method, names, tuple(run.seed for run in chosen), values, final))
    rows = [_unique(row, rows) for row in rows]
    notes += _unequal(rows)
    tests = (paired_tests(labels, runs), paired_derived(labels, runs))
    return Comparison(tuple(labels), runs, tuple(rows), differences(runs), tuple(notes), *tests)


def differences(runs: Sequence[RunSummary]) -> tuple[Difference, ...]:
    """Returns every setting of the recipe, budget in the ledger, stream and version that is not equal in all runs."""
    described = [_describe(run) for run in runs]
    found = []
    for kind in ("budget", "stream", "setting", "version"):
        for name in sorted({name for description in described for name in description[kind]}):
            values = tuple(formatting.plain(description[kind].get(name, "not set")) for description in described)
            if len(set(values)) > 1:
                found.append(Difference(kind, name, values))
    return tuple(found)


def comparison_table(comparison: Comparison, columns: Sequence[str] | None = None) -> list[list[str]]:
    """Returns header and rows as text, for a terminal or a file.

    Args:
        comparison (`Comparison`): from `compare`.
        columns (`Sequence[str]`, *optional*): keys of `COLUMNS` to show; all by default.
    """
    shown = [column for column in COLUMNS if columns is None or column.key in columns]
    header = ["method", "seeds", *(column.label for column in shown)]
    rows = [header]
    for row in comparison.rows:
        seeds = ", ".join("?" if seed is None else str(seed) for seed in row.seeds)
        rows.append([row.label, seeds, *(_written(row.values[column.key], column.write) for column in shown)])
    return rows


def final_table(comparison: Comparison) -> list[list[str]]:
    """Returns header and rows: the score on each task after the last stage."""
    tasks = list(comparison.rows[0].final)
    rows = [["method", *tasks]]
    return rows + [
        [row.label, *(_written(row.final[task], formatting.score) for task in tasks)] for row in comparison.rows
    ]


def write_comparison(run_folders: Sequence[str | os.PathLike[str]], out_dir: str | os.PathLike[str]) -> Path:
    """Writes `compare.html` and `compare.md` into `out_dir` and returns the path of the first."""
    from mllm_cl.reporting.report import render

    comparison = compare(run_folders)
    content = {
        "comparison": comparison,
        "table": comparison_table(comparison),
        "final": final_table(comparison),
        "several_seeds": any(len(row.runs) > 1 for row in comparison.rows),
    }
    write_text(Path(out_dir) / "compare.md", render("compare.md.jinja", content))
    write_text(Path(out_dir) / "compare.html", render("compare.html.jinja", content))
    return Path(out_dir) / "compare.html"


def _describe(run: RunSummary) -> dict[str, dict[str, object]]:
    """Returns what may differ between runs, as dotted names, by kind."""
    settings = {k: v for k, v in run.recipe.items() if k not in ("name", "output_dir", "methods", "seed")}
    methods = {
        f"methods.{name}.{k}": v for name, options in run.methods for k, v in formatting.flatten(options).items()
    }
    budget = ("train_rows", "inquiry_rows", "memory_rows", "steps", "tokens", "extra_forward_passes")
    totals = {field: run.total(field) for field in budget}
    totals |= {"trainable_parameters": run.largest("trainable_parameters")}
    finished = [stage for stage in run.stages if run.complete or not stage.unmeasured]
    stream: dict[str, object] = {"stages finished": len(finished)}
    if run.stream_fingerprint:
        stream["fingerprint"] = run.stream_fingerprint
    if run.matrix:
        stream |= {"tasks": run.matrix.tasks, "metric": run.matrix.metric, "test rows": run.matrix.n}
        stream["general benchmarks"] = ", ".join(run.matrix.general_names) or "none"
    versions = run.environment.get("versions", run.environment)
    return {
        "budget": {
            **{k.replace("_", " "): formatting.NOT_MEASURED if v is None else f"{v:.12g}" for k, v in totals.items()},
            "training FLOPs": formatting.flops(run.total("flops")),
            "stored bytes": formatting.size(run.final("stored_bytes")),
        },
        "stream": stream,
        "setting": {"methods": run.method, "seed": run.seed, **formatting.flatten(settings), **methods},
        "version": formatting.flatten(versions),
    }


def _group_key(run: RunSummary) -> str:
    """Runs with the same key differ in their seed only; an unfinished run stands alone, its sums cover less."""
    kept = {key: value for key, value in run.recipe.items() if key not in ("name", "output_dir", "seed")}
    tasks = run.matrix.tasks if run.matrix else []
    return json.dumps([kept, run.methods, tasks, run.missing, run.seed is None], sort_keys=True, default=str)


def _final(run: RunSummary, task: str) -> float | None:
    return run.matrix.row(len(run.matrix.tasks)).get(task) if run.matrix else None


def _spread(values: list[float | None], label: str, runs: tuple[str, ...], notes: list[str]) -> Spread | None:
    known = [value for value in values if value is not None]
    if known and len(known) < len(values):
        lacking = [run for run, value in zip(runs, values) if value is None]
        notes.append(f"{label}: mean over {len(known)} of {len(values)} runs; {', '.join(lacking)} lack it.")
    return mean_and_std(known) if known else None


def _written(spread: Spread | None, write: Callable[[float | None], str]) -> str:
    if spread is None or spread.std is None:
        return write(None if spread is None else spread.mean)
    return f"{write(spread.mean)} ± {write(spread.std).lstrip('+')}"


def _unequal(rows: Sequence[ComparisonRow]) -> list[str]:
    """One sentence per method that was given another amount of computing than the first one (2 % are no difference)."""
    found = []
    for row in rows[1:]:
        own, first = (each.values["flops"] for each in (row, rows[0]))
        if own and first and first.mean and abs(own.mean / first.mean - 1) > 0.02:
            found.append(f"{row.label}: {own.mean / first.mean:.2f} × the training FLOPs of {rows[0].label}.")
    return found


def _unique(row: ComparisonRow, rows: Sequence[ComparisonRow]) -> ComparisonRow:
    """The same method with other settings is told apart by the names of its runs."""
    if [other.label for other in rows].count(row.label) == 1:
        return row
    return ComparisonRow(f"{row.label} ({', '.join(row.runs)})", row.runs, row.seeds, row.values, row.final)
