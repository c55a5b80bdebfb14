"""Is the difference between two runs more than chance? Paired tests on the test rows that both answered."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mllm_cl.evaluation.statistics import mcnemar_exact, pair_by_id, paired_bootstrap
from mllm_cl.reporting.run import RunSummary, predictions_path, read_json_lines


@dataclass(frozen=True)
class PairedTask:
    """One task after the last stage: another run minus the first run, on the same rows.

    Args:
        task, first, other: names.
        rows (`int`): test rows.
        difference, low, high (`float`): mean difference in percentage points, with a 95 % interval.
        p_value (`float`): exact McNemar for right-or-wrong scores, paired bootstrap for soft ones; not corrected for
            testing several tasks.
        test (`str`): which of the two.
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


def paired_tests(labels: Sequence[str], runs: Sequence[RunSummary], draws: int = 2000) -> tuple[PairedTask, ...]:
    """Returns the tests of the first run against every other one; tasks whose rows are not the same are left out."""
    found = []
    for label, run in zip(labels[1:], runs[1:]):
        for stage in runs[0].stages:
            first, other = _final_scores(runs[0], stage.task), _final_scores(run, stage.task)
            if not first or first.keys() != other.keys():
                continue
            a, b = pair_by_id(first, other)
            interval = paired_bootstrap(a, b, draws=draws)
            binary = set(a.tolist()) | set(b.tolist()) <= {0.0, 1.0}
            p_value = mcnemar_exact(a, b).p_value if binary else interval.p_value
            points = (100 * interval.difference, 100 * interval.low, 100 * interval.high)
            test = "exact McNemar" if binary else "paired bootstrap"
            found.append(PairedTask(stage.task, labels[0], label, len(a), *points, p_value, test))
    return tuple(found)


def _final_scores(run: RunSummary, task: str) -> dict[str, float]:
    if not run.stages or task not in [stage.task for stage in run.stages]:
        return {}
    lines = read_json_lines(predictions_path(run, run.stages[-1].name, task), [])
    return {
        str(line["id"]): float(line["score"])
        for line in lines
        if "id" in line and isinstance(line.get("score"), (int, float)) and math.isfinite(line["score"])
    }
