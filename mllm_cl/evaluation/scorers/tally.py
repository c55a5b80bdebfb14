"""Scores of a whole test set that are no mean over rows (F1, BLEU, MME): statistics that add up over units of rows.

Every such score is a function of sums: F1 of four counts, BLEU of matches and lengths, MME of points per category. So
a bootstrap draws units, adds their statistics and applies the function, without scoring anything again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Measures = Callable[[Array], dict[str, Array]]


@dataclass(frozen=True)
class Tally:
    """The statistics of a test set.

    Args:
        statistics: one row of numbers per unit. Shape (units, k).
        units: the rows (positions) that make up each unit: one row, the questions on one image, the rotations of one.
        measures: sums -> named scores; works on any leading dimensions. Shapes (..., k) -> (...).
        row_scores: a score of each row alone, for listings and paired tests.
        fixed: scores that are known for the whole set only; `None` where they cannot be computed here.
    """

    statistics: Array
    units: Sequence[Sequence[int]]
    measures: Measures
    row_scores: Sequence[float]
    fixed: Mapping[str, float | None] = field(default_factory=dict)

    def values(self) -> dict[str, float | None]:
        """Returns the named scores of the whole set."""
        found = {name: float(value) for name, value in self.measures(self.statistics.sum(axis=0)).items()}
        return {**found, **self.fixed}


@dataclass(frozen=True)
class Aggregate:
    """A scorer of a whole test set: takes lists, returns its scores.

    Args:
        tally: `(predictions, references, **row fields as lists) -> Tally`.
        primary: which of the scores stands for the set.
        single: return the primary score alone instead of all of them.
    """

    tally: Callable[..., Tally]
    primary: str
    single: bool = False

    def __call__(
        self, prediction: Sequence[str], references: Sequence[object], **row_fields: object
    ) -> dict[str, float | None] | float:
        values = self.tally(prediction, references, **row_fields).values()
        return (values[self.primary] or 0.0) if self.single else values


def ratio(part: Array, whole: Array) -> Array:
    """Returns part / whole, and 0 where `whole` is 0."""
    return np.divide(part, whole, out=np.zeros(np.broadcast(part, whole).shape), where=np.asarray(whole) != 0)


def one_by_one(count: int) -> list[list[int]]:
    """Returns units of one row each."""
    return [[index] for index in range(count)]


def column(values: object, count: int) -> list[object]:
    """Returns a row field as a list of `count` values; `None` for what is missing."""
    given = list(values) if isinstance(values, Sequence) and not isinstance(values, str) else []
    return (given + [None] * count)[:count]
