"""Benchmarks that a judge scores (MM-Vet, LLaVA-Bench): predictions are written now and judged later.

A judge is a function that the caller brings; none is built in, and nothing here opens a connection. Its name and the
hash of its prompt belong to the result, since another judge gives other scores.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from mllm_cl.errors import EvaluationError


class Judge(Protocol):
    """Scores one answer. MM-Vet: 0 to 1. LLaVA-Bench: two numbers from 1 to 10, of the reference and of the answer."""

    def __call__(
        self, *, question: str, reference: str, answer: str, row: Mapping[str, Any]
    ) -> float | Sequence[float]: ...


@dataclass(frozen=True)
class JudgedBy:
    """Which judge scored a set: `model` and the prompt's hash go into the result."""

    judge: Judge
    model: str
    prompt: str

    @property
    def identity(self) -> str:
        return f"{self.model}/{hashlib.sha256(self.prompt.encode()).hexdigest()[:12]}"


@dataclass(frozen=True)
class Judged:
    """Scores of a judged set, in percent; `by` names the judge, `groups` the means per capability or category."""

    score: float
    per_row: dict[str, float]
    groups: dict[str, float]
    by: str


def mm_vet(rows: Sequence[Mapping[str, Any]], answers: Mapping[str, str], judged_by: JudgedBy) -> Judged:
    """Returns 100 × the mean grade, also per capability (a row counts for each of its own; arXiv 2308.02490).

    Args:
        rows: with `id`, `question`, `answers` and `capability` (names with commas between).
        answers: of the model, by id.

    Raises:
        EvaluationError: an answer is missing, or the judge returned no grade between 0 and 1.
    """
    grades: dict[str, float] = {}
    members: dict[str, list[float]] = {}
    for row in rows:
        grade = _ask(row, answers, judged_by, low=0.0, high=1.0, count=1)[0]
        grades[row["id"]] = 100 * grade
        for capability in str(row.get("capability", "")).split(","):
            members.setdefault(capability.strip() or "all", []).append(100 * grade)
    return Judged(
        _mean(grades.values()), grades, {name: _mean(own) for name, own in members.items()}, judged_by.identity
    )


def llava_bench(rows: Sequence[Mapping[str, Any]], answers: Mapping[str, str], judged_by: JudgedBy) -> Judged:
    """Returns 100 × mean(answer) / mean(reference) of grades from 1 to 10, also per category.

    Raises:
        EvaluationError: an answer is missing, or the judge returned other than two grades from 1 to 10.
    """
    pairs = {row["id"]: _ask(row, answers, judged_by, low=1.0, high=10.0, count=2) for row in rows}
    members: dict[str, list[Sequence[float]]] = {}
    for row in rows:
        members.setdefault(str(row.get("category", "all")), []).append(pairs[row["id"]])
    return Judged(
        _relative(list(pairs.values())),
        {row_id: 100 * own / reference for row_id, (reference, own) in pairs.items()},
        {name: _relative(own) for name, own in members.items()},
        judged_by.identity,
    )


def _ask(
    row: Mapping[str, Any], answers: Mapping[str, str], judged_by: JudgedBy, *, low: float, high: float, count: int
) -> list[float]:
    if row["id"] not in answers:
        raise EvaluationError(f"{row['id']}: has no answer to judge.", fix="evaluate every row first.")
    reference = next(iter(row["answers"]), "")
    found = judged_by.judge(
        question=str(row.get("question", "")), reference=reference, answer=answers[row["id"]], row=row
    )
    grades = [float(grade) for grade in ([found] if isinstance(found, (int, float)) else found)]
    if len(grades) != count or not all(math.isfinite(grade) and low <= grade <= high for grade in grades):
        raise EvaluationError(
            f"{row['id']}: the judge {judged_by.model} returned {found!r}.",
            expected=f"{count} number(s) from {low:g} to {high:g}",
            fix="let the judge ask again, or correct how it reads the reply.",
        )
    return grades


def _mean(values: Any) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers) if numbers else math.nan


def _relative(pairs: Sequence[Sequence[float]]) -> float:
    return 100 * _mean(own for _, own in pairs) / _mean(reference for reference, _ in pairs)
