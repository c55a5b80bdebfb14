"""How sure a number is: standard errors, paired tests between two sets of predictions, spread over seeds.

Three different questions, never mixed into one `±`:

* *Would other test rows give another score?* `standard_error` of a cell; `derived_standard_errors` and
  `bootstrap_derived` of a metric.
* *Is checkpoint B better than A on these rows?* `paired_bootstrap` and `mcnemar_exact`. Checkpoints of one run agree on
  most rows, so a paired test sees differences that two error bars hide (Miller 2024, arXiv 2411.00640).
* *Would another seed give another score?* `mean_and_std` over runs; usually the largest of the three.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from mllm_cl.errors import EvaluationError
from mllm_cl.evaluation.metrics import Array, derive


@dataclass(frozen=True)
class Estimate:
    """A mean with its standard error; `stderr` is `None` where it is not defined (fewer than two rows)."""

    mean: float
    stderr: float | None
    n: int


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation over runs; `std` is `None` for a single run."""

    mean: float
    std: float | None
    n: int


@dataclass(frozen=True)
class PairedDifference:
    """Mean of B minus A over the same rows, with a percentile interval and a two-sided p value of `difference = 0`."""

    difference: float
    stderr: float
    low: float
    high: float
    p_value: float
    n: int


@dataclass(frozen=True)
class McNemar:
    """Rows that only A, or only B, has right, and the exact two-sided p value that both are equally likely."""

    only_a: int
    only_b: int
    p_value: float
    n: int


def standard_error(scores: ArrayLike) -> Estimate:
    """Returns the mean of per-row scores and its standard error s/√n, s² = Σ(x − mean)²/(n − 1).

    Right for any score, soft ones included. Rows are taken as independent; rows that share an image are not quite.

    Example:

    ```python
    >>> from mllm_cl.evaluation.statistics import standard_error
    >>> standard_error([0.0, 1.0, 1.0, 0.0, 1.0]).mean
    0.6

    ```
    """
    rows = _as_scores(scores, "scores")
    stderr = float(rows.std(ddof=1) / math.sqrt(len(rows))) if len(rows) > 1 else None
    return Estimate(float(rows.mean()), stderr, len(rows))


def binomial_standard_error(accuracy: float, n: int) -> float:
    """Returns √(p(1 − p)/n) for an accuracy p in [0, 1] over n right-or-wrong rows.

    Needs no per-row scores: for published numbers. Equals `standard_error` up to the factor √((n − 1)/n).

    Example:

    ```python
    >>> from mllm_cl.evaluation.statistics import binomial_standard_error
    >>> round(100 * binomial_standard_error(0.6, 3000), 2)
    0.89

    ```
    """
    if not 0 <= accuracy <= 1 or n < 1:
        raise EvaluationError(
            f"accuracy {accuracy} over {n} rows.", expected="an accuracy between 0 and 1 over at least one row"
        )
    return math.sqrt(accuracy * (1 - accuracy) / n)


def derived_standard_errors(
    values: ArrayLike,
    stderr: ArrayLike,
    *,
    zero_shot: ArrayLike | None = None,
    zero_shot_stderr: ArrayLike | None = None,
    single: ArrayLike | None = None,
    joint: ArrayLike | None = None,
    general: ArrayLike | None = None,
    general_stderr: ArrayLike | None = None,
) -> dict[str, float | None]:
    """Returns the standard error of each derived metric, propagated from those of the cells.

    var(f) = Σ_cells (∂f/∂cell)² · se(cell)², by central differences (exact for the linear metrics; the maximum in
    forgetting is taken as fixed). **Assumption: cells are independent.** Cells of one column share their test rows, so
    differences along a column (backward transfer, forgetting, retention) have in truth a *smaller* error than given
    here and means along a column (mean average accuracy) a larger one; `bootstrap_derived` needs the per-row scores and
    no such assumption. Neither knows the spread over seeds.

    A metric without a value, or one that reads a cell without an error (single-task and joint references always), gets
    `None`.

    Shapes:
        values, stderr (T, T); zero_shot, zero_shot_stderr, single, joint (T,); general, general_stderr (T + 1, M).
    """
    given = {
        "values": (values, stderr),
        "zero_shot": (zero_shot, zero_shot_stderr),
        "single": (single, None),
        "joint": (joint, None),
        "general": (general, general_stderr),
    }
    cells = {name: np.array(scores, dtype=np.float64) for name, (scores, _) in given.items() if scores is not None}
    errors = {
        name: np.full(cells[name].shape, np.nan)
        if given[name][1] is None
        else np.array(given[name][1], dtype=np.float64)
        for name in cells
    }
    metrics = derive(cells.pop("values"), **cells)
    cells["values"] = np.array(values, dtype=np.float64)
    variance = {name: 0.0 for name, metric in metrics.items() if metric.value is not None}
    step = 1e-4
    for argument, scores in cells.items():
        for place in np.argwhere(~np.isnan(scores)):
            index = tuple(place)
            sides = []
            for sign in (1, -1):
                moved = {**cells, argument: scores.copy()}
                moved[argument][index] += sign * step
                sides.append(derive(moved.pop("values"), **moved))
            for name in variance:
                above, below = sides[0][name].value, sides[1][name].value
                slope = 0.0 if above is None or below is None else (above - below) / (2 * step)
                if abs(slope) > 1e-9:
                    variance[name] += float(slope * errors[argument][index]) ** 2
    found = {name: math.sqrt(value) if not math.isnan(value) else None for name, value in variance.items()}
    return {name: found.get(name) for name in metrics}


def bootstrap_derived(
    scores: Sequence[Sequence[ArrayLike | None]], *, draws: int = 1000, seed: int = 0
) -> dict[str, Estimate | None]:
    """Returns each derived metric with the standard error of a bootstrap over test rows.

    A draw takes the same rows of a task at all its stages, so that the dependence between cells of a column is kept.

    Args:
        scores (`Sequence`): scores[i][j] are the per-row scores in [0, 1] of task j after stage i + 1, in the
            same row order at every stage (see `pair_by_id`), or `None` where not measured.
        draws (`int`, defaults to 1000): bootstrap samples.
        seed (`int`, defaults to 0): same seed, same numbers.

    Shapes:
        scores (T, T, n_j) -> means in percent of shape (draws, T, T).
    """
    tasks = len(scores)
    rng = np.random.default_rng(seed)
    point, sampled = np.full((tasks, tasks), np.nan), np.full((draws, tasks, tasks), np.nan)
    counts: list[int] = []
    for task in range(tasks):
        column = {
            i: _as_scores(row[task], f"scores[{i}][{task}]") for i, row in enumerate(scores) if row[task] is not None
        }
        lengths = {len(rows) for rows in column.values()}
        if len(lengths) > 1:
            raise EvaluationError(
                f"task {task + 1}: {sorted(lengths)} rows in different stages.",
                expected="the same test rows, in the same order, at every stage",
            )
        counts += lengths
        for draw in range(draws if column else 0):
            chosen = rng.integers(0, counts[-1], counts[-1])
            for stage, rows in column.items():
                sampled[draw, stage, task] = 100 * rows[chosen].mean()
        for stage, rows in column.items():
            point[stage, task] = 100 * rows.mean()
    metrics, several = derive(point), [derive(sample) for sample in sampled]
    found: dict[str, Estimate | None] = {}
    for name, metric in metrics.items():
        values = [sample[name].value for sample in several]
        drawn = np.array([value for value in values if value is not None])
        known = metric.value is not None and len(drawn) > 1
        found[name] = Estimate(metric.value, float(drawn.std(ddof=1)), sum(counts)) if known else None  # type: ignore[arg-type]
    return found


def pair_by_id(first: Mapping[str, float], second: Mapping[str, float]) -> tuple[Array, Array]:
    """Returns the scores of two prediction sets in one order; both must hold exactly the same ids.

    Example:

    ```python
    >>> from mllm_cl.evaluation.statistics import pair_by_id
    >>> pair_by_id({"x": 1.0, "y": 0.0}, {"y": 1.0, "x": 1.0})
    (array([1., 0.]), array([1., 1.]))

    ```
    """
    odd = sorted(set(first) ^ set(second))
    if odd:
        raise EvaluationError(
            f"{len(odd)} row ids are in one of the two prediction sets only, {odd[0]!r} first.",
            expected="predictions of two checkpoints on the same test rows",
            fix="evaluate both on the same test split, with the same limit.",
        )
    ids = sorted(first)
    return np.array([first[i] for i in ids], dtype=np.float64), np.array([second[i] for i in ids], dtype=np.float64)


def paired_bootstrap(
    scores_a: ArrayLike,
    scores_b: ArrayLike,
    *,
    clusters: Sequence[str] | None = None,
    draws: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> PairedDifference:
    """Returns mean(B − A) over the same rows, drawing rows with replacement.

    With `clusters` whole clusters are drawn, such as all questions on one image. The p value is
    2 · min(share of draws ≤ 0, share of draws ≥ 0), and at least 1/draws, the least that these draws can show.
    """
    a, b = _as_scores(scores_a, "scores_a"), _as_scores(scores_b, "scores_b")
    if len(a) != len(b) or (clusters is not None and len(clusters) != len(a)):
        raise EvaluationError(
            f"{len(a)} and {len(b)} scores cannot be paired.", expected="one score per row, in the same order"
        )
    difference = b - a
    names = np.arange(len(a)) if clusters is None else np.unique(np.array(clusters), return_inverse=True)[1]
    # (n,) -> per cluster: sum of differences and number of rows
    sums, sizes = np.bincount(names, weights=difference), np.bincount(names)
    rng = np.random.default_rng(seed)
    means = np.empty(draws)
    for draw in range(draws):
        chosen = rng.integers(0, len(sums), len(sums))
        means[draw] = sums[chosen].sum() / sizes[chosen].sum()
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    p_value = 2 * min((means <= 0).mean(), (means >= 0).mean())
    p_value = float(min(1.0, max(p_value, 1 / draws)))
    return PairedDifference(
        float(difference.mean()), float(means.std(ddof=1)), float(low), float(high), p_value, len(a)
    )


def mcnemar_exact(correct_a: ArrayLike, correct_b: ArrayLike) -> McNemar:
    """Returns McNemar's exact test for two sets of right-or-wrong answers to the same rows.

    Only discordant rows count: under equal accuracy, `only_b` ~ Binomial(only_a + only_b, 1/2).

    Example:

    ```python
    >>> from mllm_cl.evaluation.statistics import mcnemar_exact
    >>> mcnemar_exact([1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0]).p_value
    0.0625

    ```
    """
    a, b = _as_scores(correct_a, "correct_a"), _as_scores(correct_b, "correct_b")
    if len(a) != len(b):
        raise EvaluationError(f"{len(a)} and {len(b)} answers cannot be paired.", expected="the same rows, in order")
    if not (np.isin(a, (0, 1)).all() and np.isin(b, (0, 1)).all()):
        raise EvaluationError(
            "a score is neither 0 nor 1.",
            expected="right-or-wrong answers",
            fix="use paired_bootstrap for soft scores.",
        )
    only_a, only_b = int(((a == 1) & (b == 0)).sum()), int(((a == 0) & (b == 1)).sum())
    if only_a + only_b == 0:
        return McNemar(0, 0, 1.0, len(a))
    from scipy.stats import binomtest  # scipy takes a while to import and little else here needs it

    return McNemar(only_a, only_b, float(binomtest(only_b, only_a + only_b).pvalue), len(a))


def mean_and_std(values: Sequence[float]) -> Spread:
    """Returns mean and sample standard deviation (divisor n − 1) over runs that differ in their seed only.

    Example:

    ```python
    >>> from mllm_cl.evaluation.statistics import mean_and_std
    >>> mean_and_std([70.0, 72.0, 74.0])
    Spread(mean=72.0, std=2.0, n=3)

    ```
    """
    numbers = _as_scores(values, "values")
    return Spread(float(numbers.mean()), float(numbers.std(ddof=1)) if len(numbers) > 1 else None, len(numbers))


def _as_scores(values: ArrayLike | None, name: str) -> Array:
    numbers = np.array(values, dtype=np.float64)
    if numbers.ndim != 1 or numbers.size == 0:
        raise EvaluationError(f"{name} has shape {numbers.shape}.", expected="a list of one or more scores")
    if not np.isfinite(numbers).all():
        raise EvaluationError(
            f"{name} holds a score that is not a number.",
            expected="a finite score for every row",
            fix="score every row.",
        )
    return numbers
