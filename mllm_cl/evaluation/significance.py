"""Is checkpoint B better than A on the same rows? Tests for every kind of score, and the correction for several tasks.

* right or wrong: exact McNemar (`mcnemar_exact`), or the t test below when rows share images;
* soft scores of rows: paired t test, clusters as observations;
* scores of whole sets (F1, CIDEr, MME): paired bootstrap of the same clusters (`paired_tally_bootstrap`);
* several tasks at once: Holm's step-down correction of their p values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from mllm_cl.errors import EvaluationError
from mllm_cl.evaluation.resampling import clustered_standard_error


@dataclass(frozen=True)
class PairedT:
    """Mean of B minus A with its standard error, t, degrees of freedom and two-sided p value."""

    difference: float
    stderr: float | None
    t: float | None
    degrees: int
    p_value: float


def paired_t(scores_a: ArrayLike, scores_b: ArrayLike, clusters: Sequence[str] | None = None) -> PairedT:
    """Returns the paired t test of two score sets to the same rows, in the same order.

    With `clusters` the difference is summed within each, and degrees of freedom are clusters − 1. Equal score sets
    give p = 1; a difference without any spread gives p = 0.

    Example:

    ```python
    >>> from mllm_cl.evaluation.significance import paired_t
    >>> round(paired_t([0.2, 0.5, 0.1, 0.9], [0.4, 0.6, 0.4, 0.9]).p_value, 4)
    0.1027

    ```
    """
    a, b = np.asarray(scores_a, dtype=np.float64), np.asarray(scores_b, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise EvaluationError(
            f"scores of shapes {a.shape} and {b.shape} cannot be paired.",
            expected="one score per row, in the same order",
        )
    names = [str(index) for index in range(len(a))] if clusters is None else clusters
    estimate = clustered_standard_error(b - a, names)
    degrees = len(set(names)) - 1
    if estimate.stderr is None:
        return PairedT(estimate.mean, None, None, degrees, 1.0)
    if estimate.stderr == 0:
        return PairedT(estimate.mean, 0.0, None, degrees, float(estimate.mean == 0))
    from scipy.stats import t as student  # scipy takes a while to import and little else here needs it

    value = estimate.mean / estimate.stderr
    return PairedT(estimate.mean, estimate.stderr, value, degrees, float(2 * student.sf(abs(value), degrees)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns p values corrected for being looked at together, in the order given (Holm 1979).

    The k-th smallest of m is multiplied by m − k + 1, and none becomes smaller than one before it.

    Example:

    ```python
    >>> from mllm_cl.evaluation.significance import holm
    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]

    ```
    """
    if any(not 0 <= p <= 1 or math.isnan(p) for p in p_values):
        raise EvaluationError(f"p values {list(p_values)}.", expected="numbers between 0 and 1")
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted
