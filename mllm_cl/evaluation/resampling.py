"""Standard errors and differences when rows belong together (questions on one image), and for scores of whole sets.

Rows of one cluster rise and fall together, so a cluster is one observation: the analytic error of a mean sums within
clusters first (Miller 2024, arXiv 2411.00640), and a bootstrap draws whole clusters.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mllm_cl.errors import EvaluationError
from mllm_cl.evaluation.metrics import derive
from mllm_cl.evaluation.scorers.tally import Array, Tally
from mllm_cl.evaluation.statistics import Estimate, PairedDifference, standard_error

DRAWS = 1000
_NUMBERS_AT_ONCE = 4_000_000  # of a bootstrap's weights, 32 MB


def cluster_of(row: Mapping[str, Any]) -> str:
    """Returns what a row shares with others: its images, or its id when it has none."""
    return "|".join(map(_identity, row["images"])) or f"row {row['id']}"


def _identity(reference: Any) -> str:
    if isinstance(reference, Mapping):
        if reference.get("tiles"):
            return "+".join(map(_identity, reference["tiles"]))
        if reference.get("bytes") is not None:
            return hashlib.sha256(reference["bytes"]).hexdigest()
        return f"{reference.get('path')}{reference.get('crop') or ''}"
    return str(reference) if isinstance(reference, (str, Path)) else f"object {id(reference)}"


def clustered_standard_error(scores: ArrayLike, clusters: Sequence[str]) -> Estimate:
    """Returns the mean of per-row scores and its standard error with clusters as observations.

    se² = C/(C − 1) · Σ_c (Σ_{i∈c} (x_i − mean))² / n². With one row per cluster that is s²/n exactly.

    Example:

    ```python
    >>> from mllm_cl.evaluation.resampling import clustered_standard_error
    >>> alike = clustered_standard_error([1.0, 1.0, 0.0, 0.0], ["x", "x", "y", "y"])
    >>> apart = clustered_standard_error([1.0, 1.0, 0.0, 0.0], ["a", "b", "c", "d"])
    >>> round(alike.stderr, 4), round(apart.stderr, 4)
    (0.5, 0.2887)

    ```
    """
    whole = standard_error(scores)
    rows = np.asarray(scores, dtype=np.float64)
    sums = np.bincount(_numbered(clusters, len(rows)), weights=rows - whole.mean)
    count = len(sums)
    if count < 2:
        return Estimate(whole.mean, None, whole.n)
    variance = count / (count - 1) * float((sums**2).sum()) / len(rows) ** 2
    return Estimate(whole.mean, math.sqrt(variance), whole.n)


def tally_standard_errors(
    tally: Tally, clusters: Sequence[str], *, draws: int = DRAWS, seed: int = 0
) -> dict[str, float | None]:
    """Returns the bootstrap standard error of every score of a tally; `None` for those it cannot draw.

    Document frequencies of CIDEr are those of the whole set in every draw.
    """
    sums = _cluster_sums(tally, clusters)
    found: dict[str, float | None] = dict.fromkeys(tally.fixed)
    if len(sums) < 2:
        return {**dict.fromkeys(tally.values()), **found}
    drawn = tally.measures(_drawn_sums(sums, draws, seed))
    return {**{name: float(values.std(ddof=1)) for name, values in drawn.items()}, **found}


def paired_tally_bootstrap(
    first: Tally,
    second: Tally,
    measure: str,
    clusters: Sequence[str],
    *,
    draws: int = DRAWS,
    confidence: float = 0.95,
    seed: int = 0,
) -> PairedDifference:
    """Returns the difference (second − first) of a score of the whole set, for two answer sets to the same rows.

    A draw takes the same clusters of both. Interval and p value as in `paired_bootstrap`.
    """
    before, after = _cluster_sums(first, clusters), _cluster_sums(second, clusters)
    if len(before) != len(after):
        raise EvaluationError(
            f"{len(before)} and {len(after)} clusters cannot be paired.",
            expected="two answers to each of the same rows",
        )
    values = [float(tally.measures(sums.sum(axis=0))[measure]) for tally, sums in ((first, before), (second, after))]
    drawn = [
        tally.measures(_drawn_sums(sums, draws, seed))[measure] for tally, sums in ((first, before), (second, after))
    ]
    return _interval(values[1] - values[0], drawn[1] - drawn[0], confidence, len(clusters))


def paired_bootstrap_derived(
    first: Sequence[Sequence[ArrayLike | None]],
    second: Sequence[Sequence[ArrayLike | None]],
    clusters: Sequence[Sequence[str]],
    names: Sequence[str],
    *,
    draws: int = 200,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, PairedDifference]:
    """Returns the difference (second − first) of derived metrics, in percentage points, by a joint bootstrap.

    A draw takes the same images of a task at all its stages and in both runs, so that whatever the cells share is
    kept. A metric that lacks a cell in either run is left out. The spread over seeds is not in here.

    Args:
        first, second: scores[i][j], per-row scores in [0, 1] of task j after stage i + 1, or `None`; rows in one order.
        clusters: per task, the cluster of every row.
        names: which derived metrics.
    """
    tasks = len(clusters)
    point, drawn = np.full((2, tasks, tasks), np.nan), np.full((draws, 2, tasks, tasks), np.nan)
    for task, own in enumerate(clusters):
        numbers = _numbered(own, len(own))
        cells = [
            (run, stage) for run in (0, 1) for stage in range(tasks) if (first, second)[run][stage][task] is not None
        ]
        columns = [np.asarray((first, second)[run][stage][task], dtype=np.float64) for run, stage in cells]
        # (clusters, cells) of sums, and the rows of each cluster beside them
        columns_and_rows = [*columns, np.ones(len(own))]
        sums = np.stack([np.bincount(numbers, weights=values) for values in columns_and_rows], axis=1).astype(
            np.float64
        )
        means = _drawn_sums(sums, draws, seed + task)
        for place, (run, stage) in enumerate(cells):
            point[run, stage, task] = 100 * columns[place].mean()
            drawn[:, run, stage, task] = 100 * means[:, place] / means[:, -1]
    whole = [derive(point[run]) for run in (0, 1)]
    found: dict[str, PairedDifference] = {}
    each = [[derive(sample[run]) for run in (0, 1)] for sample in drawn]
    for name in names:
        before, after = whole[0][name].value, whole[1][name].value
        if before is None or after is None:
            continue
        differences = np.array([(b[name].value or 0.0) - (a[name].value or 0.0) for a, b in each])
        found[name] = _interval(after - before, differences, confidence, sum(map(len, clusters)))
    return found


def _interval(difference: float, drawn: Array, confidence: float, rows: int) -> PairedDifference:
    """A percentile interval, and 2 · min(share of draws ≤ 0, share ≥ 0), at least 1/draws, as p value."""
    tail = (1 - confidence) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    p_value = 2 * min((drawn <= 0).mean(), (drawn >= 0).mean())
    p_value = float(min(1.0, max(p_value, 1 / len(drawn))))
    return PairedDifference(difference, float(drawn.std(ddof=1)), float(low), float(high), p_value, rows)


def _numbered(clusters: Sequence[str], rows: int) -> NDArray[np.intp]:
    if len(clusters) != rows:
        raise EvaluationError(f"{len(clusters)} clusters for {rows} scores.", expected="one per row")
    numbers: dict[str, int] = {}  # in the order of the rows, so that the same rows draw the same
    return np.array([numbers.setdefault(cluster, len(numbers)) for cluster in clusters], dtype=np.intp)


def _cluster_sums(tally: Tally, clusters: Sequence[str]) -> Array:
    """Adds the statistics of units whose first rows share a cluster. Shape (clusters, k)."""
    if not len(tally.units):
        return tally.statistics
    numbers = _numbered([clusters[unit[0]] for unit in tally.units], len(tally.units))
    sums = np.zeros((int(numbers.max()) + 1, tally.statistics.shape[1]))
    np.add.at(sums, numbers, tally.statistics)
    return sums


def _drawn_sums(sums: Array, draws: int, seed: int) -> Array:
    """Draws clusters with replacement. Shapes (clusters, k) -> (draws, k)."""
    rng, count, parts = np.random.default_rng(seed), len(sums), []
    step = max(1, _NUMBERS_AT_ONCE // count)
    for start in range(0, draws, step):
        weights = rng.multinomial(count, np.full(count, 1 / count), size=min(step, draws - start))
        parts.append(weights @ sums)
    return np.concatenate(parts)
