"""Writes the report of one run: `report.html` (one file, no network, no script), `report.md` and `figures/*.png`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from mllm_cl.evaluation.matrix import BASE_STAGE
from mllm_cl.evaluation.metrics import DEFINITIONS
from mllm_cl.files import write_text
from mllm_cl.reporting import formatting
from mllm_cl.reporting.answers import find_changes
from mllm_cl.reporting.behaviour import drift_by_stage, form_shares
from mllm_cl.reporting.charts import general_panels, task_panels
from mllm_cl.reporting.compare import compare, comparison_table
from mllm_cl.reporting.figures import write_figures
from mllm_cl.reporting.run import RunSummary, read_run, run_labels

HEADLINES = (
    *("mean_final_accuracy", "mean_finetune_accuracy", "backward_transfer", "forgetting"),
    "general_ability_delta",
)
DIFFERENCES = frozenset(
    {"backward_transfer", "backward_transfer_over_all_tasks", "forward_transfer", "forward_transfer_to_learning"}
    | {"general_ability_delta", "intransigence", "intransigence_last"}
)
"""Metrics that are differences in percentage points, written with a sign."""


@dataclass(frozen=True)
class Cell:
    """One field of the heat map: its text, its change since the task was learnt, its shade and its kind."""

    text: str
    change: str
    shade: int
    kind: str
    title: str


@dataclass(frozen=True)
class MetricRow:
    """One line of the table of derived metrics."""

    key: str
    label: str
    value: str
    measured: bool
    reason: str
    divisor: str
    sentence: str
    formula: str
    higher_is_better: bool


def write_report(run_folder: str | os.PathLike[str], *, baselines: Sequence[str | os.PathLike[str]] = ()) -> Path:
    """Writes `report.html`, `report.md` and `figures/` into the folder of a finished or unfinished run.

    Args:
        run_folder (`str`): the run.
        baselines (`Sequence[str]`): other runs to draw behind its curves and to compare with.

    Returns:
        `Path`: the `report.html`.

    Raises:
        RunError: a folder is not that of a run.
        EvaluationError: a `matrix.json` is not one of ours, or was cut off.
    """
    run, others = read_run(run_folder), [read_run(folder) for folder in baselines]
    content = report_content(run, others)
    content["figures"] = [path.name for path in write_figures(run)]
    write_text(run.folder / "report.md", render("report.md.jinja", content))
    write_text(run.folder / "report.html", render("report.html.jinja", content))
    return run.folder / "report.html"


def report_content(run: RunSummary, others: Sequence[RunSummary] = ()) -> dict[str, Any]:
    """Returns what the templates show; every number is already text."""
    labelled = list(zip(run_labels([run, *others])[1:], others))
    metrics, through = metric_rows(run)
    changes, examples = find_changes(run)
    comparison = compare([run.folder, *(other.folder for other in others)]) if others else None
    tasks = run.matrix.tasks if run.matrix else [stage.task for stage in run.stages]
    return {
        "run": run,
        "facts": facts(run),
        "tasks": tasks,
        "through": through,
        "headlines": [row for row in metrics if row.key in HEADLINES],
        "metrics": metrics,
        "mixed_metrics": sorted(set(run.matrix.metric)) if run.matrix else [],
        "heat": heat_rows(run),
        "panels": task_panels(run, labelled),
        "general_panels": general_panels(run, labelled),
        "general": general_table(run),
        "drift": drift_table(run),
        "instructions": instruction_table(run),
        "curve_names": [run.name, *(label for label, _ in labelled)],
        "costs": cost_table(run),
        "comparison": comparison,
        "comparison_rows": comparison_table(comparison) if comparison else [],
        "changes": changes,
        "examples": examples,
        "versions": [(key, formatting.plain(value)) for key, value in formatting.flatten(run.environment).items()],
    }


def facts(run: RunSummary) -> list[tuple[str, str]]:
    """Returns what identifies the run, for the head of the report."""
    training = run.recipe.get("training") or {}
    known = {
        "Method": run.method,
        "Model": run.model,
        "Stream": run.stream,
        "Stream fingerprint": run.stream_fingerprint,
        "Seed": run.seed,
        "Learning rate": training.get("learning_rate"),
        "Epochs": training.get("num_train_epochs"),
        "Recipe hash": (run.matrix.run if run.matrix else {}).get("recipe_sha256"),
    }
    for name, options in run.methods:
        for key, value in formatting.flatten(options).items():
            known[f"{name}.{key}"] = value
    return [(key, "not recorded" if value is None else formatting.plain(value)) for key, value in known.items()]


def metric_rows(run: RunSummary) -> tuple[list[MetricRow], int]:
    """Returns the derived metrics over the stages that are complete, and how many those are."""
    through = 0 if run.matrix is None else len(run.matrix.tasks) if run.complete else run.matrix.complete_stages()
    if run.matrix is None or through == 0:
        return [], 0
    metrics, errors = run.matrix.derived(through), run.matrix.derived_stderr(through)
    rows = []
    for name, definition in DEFINITIONS.items():
        metric = metrics[name]
        write = formatting.change if name in DIFFERENCES else formatting.score
        rows.append(
            MetricRow(
                name,
                definition.label,
                write(metric.value, errors[name]),
                metric.value is not None,
                (metric.reason or "")[:1].upper() + (metric.reason or "")[1:],
                "" if metric.divisor is None else str(metric.divisor),
                definition.sentence,
                definition.formula,
                definition.higher_is_better,
            )
        )
    return rows, through


def heat_rows(run: RunSummary) -> list[tuple[str, list[Cell]]]:
    """Returns the accuracy matrix as text; below the diagonal with the change since the task was learnt."""
    matrix = run.matrix
    if matrix is None:
        return []
    rows, top = [], max([100.0, *(value for row in matrix.values for value in row if value is not None)])
    for i, (stage, values) in enumerate(zip(matrix.stages, matrix.values)):
        index = i + 1 - matrix.has_base
        cells = []
        for j, (task, value) in enumerate(zip(matrix.tasks, values)):
            kind = "learnt" if j == index - 1 else "before" if j >= index else "after"
            learnt = matrix.row(j + 1)[task]
            moved = value - learnt if kind == "after" and value is not None and learnt is not None else None
            title = f"{task} at {stage}: {formatting.score(value, matrix.stderr[i][j])}"
            shade = 0 if value is None else round(100 * max(value, 0.0) / top)
            text = "" if value is None else formatting.score(value)
            cells.append(Cell(text, "" if moved is None else formatting.change(moved), shade, kind, title))
        rows.append((stage, cells))
    return rows


def general_table(run: RunSummary) -> list[list[str]]:
    """Returns header and rows: stage, each general benchmark, and against the untouched model: mean change, share kept.

    The share is the mean over benchmarks of score / score before, in percent; empty where one of them is missing or 0.
    """
    matrix = run.matrix
    if matrix is None or not matrix.general_names:
        return []
    deltas = matrix.general_deltas()
    rows = [["stage", *matrix.general_names, "mean change", "kept, percent"]]
    before = matrix.general_values[0] if matrix.has_base else []
    for i, stage in enumerate(matrix.stages):
        index = i + 1 - matrix.has_base
        scores = [formatting.score(v, e) for v, e in zip(matrix.general_values[i], matrix.general_stderr[i])]
        kept = [now / old for now, old in zip(matrix.general_values[i], before) if now is not None and old]
        share = formatting.score(100 * sum(kept) / len(kept)) if len(kept) == len(matrix.general_names) else ""
        against = ("", "") if index == 0 else (formatting.change(deltas[index - 1].value), share)
        rows.append([stage, *scores, *against])
    return rows


def instruction_table(run: RunSummary) -> list[list[str]]:
    """Returns header and rows: stage, and of each test set whose questions ask for a form of answer, the percent in it."""
    shares, stages = form_shares(run), run.matrix.stages if run.matrix else []
    measured = [stage for stage in stages if any(stage in own for own in shares.values())]
    rows = [[stage, *(formatting.score(own.get(stage)) for own in shares.values())] for stage in measured]
    return [["stage", *shares], *rows] if rows else []


def drift_table(run: RunSummary) -> list[list[str]]:
    """Returns header and rows: stage, language feature shift, share of one-word answers, mean length of an answer."""
    names = [BASE_STAGE, *(stage.name for stage in run.stages)]
    rows = [
        [
            names[stage],
            formatting.decimal(entry["feature_shift"]),
            formatting.score(entry["one_word_share"]),
            formatting.decimal(entry["mean_words"]),
        ]
        for stage, entry in drift_by_stage(run).items()
    ]
    return [["stage", "feature shift", "one-word answers", "words per answer"], *rows] if rows else []


COST_COLUMNS = (
    ("training", "seconds", formatting.duration, True),
    ("evaluation", "evaluation_seconds", formatting.duration, True),
    ("train rows", "train_rows", formatting.count, False),
    ("inquiry rows", "inquiry_rows", formatting.count, False),
    ("steps", "steps", formatting.count, False),
    ("tokens", "tokens", formatting.count, True),
    ("memory rows", "memory_rows", formatting.count, False),
    ("training FLOPs", "flops", formatting.flops, True),
    ("extra forward passes", "extra_forward_passes", formatting.count, False),
    ("rows answered by a reference", "reference_rows", formatting.count, False),
    ("trainable parameters", "trainable_parameters", formatting.count, True),
    ("stored after the stage", "stored_bytes", formatting.size, True),
    ("peak memory", "peak_memory_mib", formatting.mebibytes, True),
    ("mean train loss", "train_loss", formatting.decimal, False),
)
"""Heading, field, how it is written, and whether the column is shown when no stage has it."""


def cost_table(run: RunSummary) -> list[list[str]]:
    """Returns header and rows: one per stage, and one with sums (time, rows, steps, tokens) and peaks (the rest)."""
    if not run.stages:
        return []
    columns = [c for c in COST_COLUMNS if c[3] or any(getattr(stage, c[1]) is not None for stage in run.stages)]
    rows = [["stage", *(heading for heading, *_ in columns)]]
    for stage in run.stages:
        rows.append([stage.name, *(write(getattr(stage, field)) for _, field, write, _ in columns)])
    whole = {"trainable_parameters": run.largest, "peak_memory_mib": run.largest, "stored_bytes": run.final}
    last = [
        "" if field == "train_loss" else write(whole.get(field, run.total)(field)) for _, field, write, _ in columns
    ]
    return [*rows, ["whole run", *last]]


@cache
def _templates() -> Environment:
    environment = Environment(
        loader=PackageLoader("mllm_cl", "reporting/templates"),
        autoescape=select_autoescape(enabled_extensions=("html.jinja",), default=False),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"cell": formatting.markdown_cell, "change": formatting.change}
    environment.globals |= {"markdown_table": formatting.markdown_table, "not_measured": formatting.NOT_MEASURED}
    return environment


def render(template: str, content: dict[str, Any]) -> str:
    """Returns a template of `templates/` filled in; those ending in `.html.jinja` escape every value."""
    return _templates().get_template(template).render(content)
