"""Is the difference between two runs more than chance? Paired tests on the test rows that both answered."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mllm_cl.evaluation.resampling import paired_bootstrap_derived, paired_tally_bootstrap
from mllm_cl.evaluation.scorers import BENCHMARK_SCORERS, SCORERS, find_scorer
from mllm_cl.evaluation.scorers.tally import Aggregate, Tally
from mllm_cl.evaluation.scoring import tally_of
from mllm_cl.evaluation.significance import holm, paired_t
from mllm_cl.evaluation.statistics import PairedDifference, mcnemar_exact, pair_by_id, paired_bootstrap
from mllm_cl.reporting.run import RunSummary, predictions_path, read_json_lines


@dataclass(frozen=True)
class PairedTask:
    """One task after the last stage: another run minus the first run, on the same rows.

    Args:
        task, first, other: names.
        rows (`int`): test rows.
        difference, low, high (`float`): difference in percentage points (in points for a metric that counts points),
            with a 95 % interval of a bootstrap over images.
        p_value (`float`): of this task alone.
        test (`str`): exact McNemar for right-or-wrong scores, paired t for soft ones and for rows that share images,
            paired bootstrap for a score of the whole set.
        adjusted (`float`): the p value corrected for the tasks of this pair of runs (Holm).
    """

    task: str
    first: str
    other: str
    rows: int
    difference: float
    low: float
    high: float
    p_value: float
    test: str
    adjusted: float = math.nan


def paired_tests(labels: Sequence[str], runs: Sequence[RunSummary], draws: int = 2000) -> tuple[PairedTask, ...]:
    """Returns the tests of the first run against every other one; tasks whose rows are not the same are left out."""
    found: list[PairedTask] = []
    for label, run in zip(labels[1:], runs[1:]):
        tests = []
        for stage in runs[0].stages:
            first, other = _final_lines(runs[0], stage.task), _final_lines(run, stage.task)
            if not first or first.keys() != other.keys():
                continue
            interval, p_value, test, scale = _test(first, other, _metric(runs[0], stage.task), draws)
            points = (scale * interval.difference, scale * interval.low, scale * interval.high)
            tests.append(PairedTask(stage.task, labels[0], label, len(first), *points, p_value, test))
        corrected = holm([test.p_value for test in tests])
        found += [replace(test, adjusted=p_value) for test, p_value in zip(tests, corrected)]
    return tuple(found)


@dataclass(frozen=True)
class PairedDerived:
    """A derived metric: another run minus the first run, in percentage points, with a 95 % interval."""

    name: str
    first: str
    other: str
    difference: float
    low: float
    high: float
    p_value: float


DERIVED = ("mean_final_accuracy", "mean_finetune_accuracy", "backward_transfer", "forgetting")


def paired_derived(labels: Sequence[str], runs: Sequence[RunSummary]) -> tuple[PairedDerived, ...]:
    """Returns how sure the differences in derived metrics are: the same test rows drawn at all stages of both runs.

    Runs that lack predictions, or have others than right-or-soft scores of the same rows, are left out.
    """
    found: list[PairedDerived] = []
    for label, run in zip(labels[1:], runs[1:]):
        tables = _score_tables(runs[0], run)
        if tables is not None:
            for name, estimate in paired_bootstrap_derived(*tables, DERIVED).items():
                numbers = (estimate.difference, estimate.low, estimate.high, estimate.p_value)
                found.append(PairedDerived(name, labels[0], label, *numbers))
    return tuple(found)


Table = list[list[list[float] | None]]


def _score_tables(first: RunSummary, other: RunSummary) -> tuple[Table, Table, list[list[str]]] | None:
    """Per-row scores of all stages of both runs in one order of rows, and the clusters; `None` where they differ."""
    tasks = [stage.task for stage in first.stages]
    sets = any(isinstance(SCORERS[name].scorer, Aggregate) for name in (_metric(first, task) for task in tasks) if name)
    if not tasks or tasks != [stage.task for stage in other.stages] or sets:
        return None
    tables: list[Table] = []
    ids: dict[str, list[str]] = {}
    clusters: dict[str, list[str]] = {}
    for run in (first, other):
        table: Table = []
        for stage in run.stages:
            row: list[list[float] | None] = []
            for task in tasks:
                lines = _lines_of(run, stage.name, task)
                order = ids.setdefault(task, sorted(lines)) if lines else []
                if lines and order != sorted(lines):
                    return None
                row.append([float(lines[i]["score"]) for i in order] if lines else None)
                if lines:
                    clusters.setdefault(task, [str(lines[i].get("cluster", f"row {i}")) for i in order])
            table.append(row)
        tables.append(table)
    if list(clusters) != tasks and set(clusters) != set(tasks):
        return None
    return tables[0], tables[1], [clusters[task] for task in tasks]


Lines = Mapping[str, Mapping[str, Any]]


def _test(first: Lines, other: Lines, metric: str, draws: int) -> tuple[PairedDifference, float, str, float]:
    """Returns the difference with its interval, the p value, the name of the test, and what to multiply by."""
    ids = sorted(first)
    clusters = [str(first[i].get("cluster", f"row {i}")) for i in ids]
    entry = SCORERS.get(metric)
    if entry is not None and isinstance(entry.scorer, Aggregate):
        before, after = _tally(entry.scorer, first, ids), _tally(entry.scorer, other, ids)
        if before is not None and after is not None:
            interval = paired_tally_bootstrap(before, after, entry.scorer.primary, clusters, draws=draws)
            return interval, interval.p_value, f"paired bootstrap of {entry.scorer.primary}", entry.scale
    scores = [{i: float(line["score"]) for i, line in lines.items()} for lines in (first, other)]
    a, b = pair_by_id(*scores)
    interval = paired_bootstrap(a, b, clusters=clusters, draws=draws)
    right_or_wrong = set(np.unique(np.concatenate([a, b])).tolist()) <= {0.0, 1.0}
    if right_or_wrong and len(set(clusters)) == len(ids):
        return interval, mcnemar_exact(a, b).p_value, "exact McNemar", 100.0
    return interval, paired_t(a, b, clusters).p_value, "paired t", 100.0


def _tally(scorer: Aggregate, lines: Lines, ids: Sequence[str]) -> Tally | None:
    """The statistics of written predictions; `None` if they lack what the scorer needs, or if it draws nothing."""
    if not all("references" in lines[i] and "prediction" in lines[i] for i in ids):
        return None
    rows = [{"id": i, "messages": [], "images": [], **lines[i].get("fields", {})} for i in ids]
    tally = tally_of(scorer, rows, [lines[i]["references"] for i in ids], [lines[i]["prediction"] for i in ids])
    return None if scorer.primary in tally.fixed else tally


def _metric(run: RunSummary, task: str) -> str:
    """The plain name of a task's scorer; empty where the matrix does not say it or it is not known here."""
    if run.matrix is None or task not in run.matrix.tasks:
        return ""
    name = run.matrix.metric[run.matrix.tasks.index(task)]
    benchmark, _, profile = name.partition(":")
    own = BENCHMARK_SCORERS.get(benchmark, {})
    known = name in SCORERS or (own and profile in ("", *own))
    return find_scorer(name)[0] if known else ""


def _final_lines(run: RunSummary, task: str) -> dict[str, Mapping[str, Any]]:
    if not run.stages or task not in [stage.task for stage in run.stages]:
        return {}
    return _lines_of(run, run.stages[-1].name, task)


def _lines_of(run: RunSummary, stage: str, task: str) -> dict[str, Mapping[str, Any]]:
    lines = read_json_lines(predictions_path(run, stage, task), [])
    return {
        str(line["id"]): line
        for line in lines
        if "id" in line and isinstance(line.get("score"), (int, float)) and math.isfinite(line["score"])
    }
