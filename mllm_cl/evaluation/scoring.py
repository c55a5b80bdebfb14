"""Answers to a set of rows -> its score with standard error, the score of each row, and every named score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mllm_cl.data.rows import Row, reference_answers
from mllm_cl.errors import EvaluationError
from mllm_cl.evaluation.resampling import cluster_of, clustered_standard_error, tally_standard_errors
from mllm_cl.evaluation.scorers import ScorerEntry, find_metric, scorer_identity
from mllm_cl.evaluation.scorers.tally import Aggregate, Tally

_NO_FIELDS = ("messages", "images", "answers", "id", "prediction", "references")


@dataclass(frozen=True)
class Scored:
    """The score of a set.

    Args:
        value: in percent, or in points for a metric that counts points.
        stderr: its standard error in the same unit, clustered by image; `None` where it is not defined.
        rows: a score of each row, in the order of the rows, not multiplied.
        metrics: every named score as the scorer gives it, with its standard error; `None` where it is missing here.
        identity: name, profile and version of the scorer.
        clusters: how many independent groups of rows there are.
    """

    value: float
    stderr: float | None
    rows: Sequence[float]
    metrics: Mapping[str, Mapping[str, float | None]]
    identity: str
    clusters: int
    profile: str = "strict"
    unit: str = field(default="percent")


def score_answers(metric: str, rows: Sequence[Row], answers: Sequence[str]) -> Scored:
    """Scores the answers to rows, given in the order of the rows.

    Raises:
        EvaluationError: no such metric, a row without what it needs, or a score that cannot be computed here.
    """
    name, entry = find_metric(metric)
    check_fields(metric, rows)
    references = [_references(row) for row in rows]
    clusters = [cluster_of(row) for row in rows]
    common: dict[str, Any] = {
        "identity": scorer_identity(metric),
        "clusters": len(set(clusters)),
        "profile": entry.profile,
        "unit": "percent" if entry.scale == 100 else "points",
    }
    if isinstance(entry.scorer, Aggregate):
        tally = tally_of(entry.scorer, rows, references, answers)
        return _of_set(name, entry, entry.scorer, tally, clusters, common)
    scores = [
        entry.scorer(answer, given, **scorer_fields(row)) for row, given, answer in zip(rows, references, answers)
    ]
    estimate = clustered_standard_error(scores, clusters)
    stderr = None if estimate.stderr is None else entry.scale * estimate.stderr
    metrics = {name: {"value": estimate.mean, "stderr": estimate.stderr}}
    return Scored(entry.scale * estimate.mean, stderr, scores, metrics, **common)


def check_fields(metric: str, rows: Sequence[Row]) -> None:
    """Refuses rows that lack a field which the metric reads; without generating an answer first.

    Raises:
        EvaluationError: there is one.
    """
    name, entry = find_metric(metric)
    for row in rows:
        for key, values in entry.fields.items():
            if row.get(key) not in values:
                raise EvaluationError(
                    f"row {row['id']}: metric {name} reads `{key}`, which is {row.get(key)!r}.",
                    expected=f"one of {', '.join(values)}",
                    fix=f"give every row its `{key}`, or choose another metric.",
                )


def tally_of(
    aggregate: Aggregate, rows: Sequence[Mapping[str, Any]], references: Sequence[Sequence[str]], answers: Sequence[str]
) -> Tally:
    """Returns the statistics of a set; row fields become lists in the order of the rows."""
    names = dict.fromkeys(name for row in rows for name in scorer_fields(row))
    columns = {name: [row.get(name) for row in rows] for name in names}
    return aggregate.tally(list(answers), references, **columns)


def _of_set(
    name: str, entry: ScorerEntry, aggregate: Aggregate, tally: Tally, clusters: list[str], common: dict[str, Any]
) -> Scored:
    values, errors = tally.values(), tally_standard_errors(tally, clusters)
    value = values[aggregate.primary]
    if value is None:
        missing = ", ".join(sorted(other for other, given in values.items() if given is None))
        raise EvaluationError(
            f"metric {name}: {missing} cannot be computed here.",
            expected="a Java runtime and the extra [caption] for METEOR",
            fix="install both (`pip install mllm_cl[caption]`), or choose the metric coco_caption, which needs neither.",
        )
    error = errors.get(aggregate.primary)
    metrics = {other: {"value": given, "stderr": errors.get(other)} for other, given in values.items()}
    stderr = None if error is None else entry.scale * error
    return Scored(entry.scale * value, stderr, tally.row_scores, metrics, **common)


def scorer_fields(row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a row has besides question, images and answers; scorers get it by name.

    `prediction` and `references` are names of the scorers' own arguments, so no row field can have them.
    """
    return {name: value for name, value in row.items() if name not in _NO_FIELDS}


def cluster_numbers(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    """Returns the number of each row's cluster, counted in the order of the rows."""
    numbers: dict[str, int] = {}
    return [numbers.setdefault(cluster_of(row), len(numbers)) for row in rows]


def _references(row: Mapping[str, Any]) -> list[str]:
    found = reference_answers(row)
    if not found:
        raise EvaluationError(f"row {row['id']}: has no accepted answers to compare with.", fix="give it `answers`.")
    return found
