"""Metrics of continual learning, computed from an accuracy matrix. Imports numpy only.

Notation, used in every formula below:
    T        number of tasks
    a[i,j]   score on task j after training stage i; i, j = 1..T; rows of `values`
    a[0,j]   score of the untouched model on task j; `zero_shot`
    S_j      score on task j of a model trained on task j alone; `single`
    J_j      score on task j of a model trained on all tasks jointly; `joint`
    g[i,m]   score on general benchmark m at stage i, i = 0..T; `general`

A cell that was not measured is NaN (or `None`) on the way in. A metric that needs such a cell comes out with value
`None` and a reason that names the cells; it is never computed as if the cell were 0.

References: GEM (arXiv 1706.08840) for backward and forward transfer; Chaudhry et al. (arXiv 1801.10112) for forgetting
and intransigence; SAPT (arXiv 2401.08295) for the /T variants; ZSCL (arXiv 2303.06628) for MTIL Transfer / Avg / Last;
TRACE (arXiv 2310.06762) for the general ability delta.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

ONE_TASK = "a stream of one task has no earlier task to remember and no later one to transfer to"


@dataclass(frozen=True)
class Metric:
    """One derived number, or the reason why there is none.

    Args:
        value (`float`, *optional*): percent or percentage points; `None` when a cell it needs was not measured.
        reason (`str`, *optional*): why `value` is `None`.
        divisor (`int`, *optional*): what the sum of terms is divided by.
        needs (`str`): the cells that the formula reads.
    """

    value: float | None
    reason: str | None
    divisor: int | None
    needs: str


@dataclass(frozen=True)
class Definition:
    """How a metric is called, computed and read."""

    label: str
    formula: str
    sentence: str
    higher_is_better: bool = True


DEFINITIONS: dict[str, Definition] = {
    "mean_final_accuracy": Definition(
        "Mean final accuracy (MFN, AA_T, Last)",
        "(1/T) Σ_j a[T,j]",
        "Mean score over all tasks after the last one has been learnt.",
    ),
    "mean_finetune_accuracy": Definition(
        "Mean fine-tune accuracy (MFT, learning accuracy)",
        "(1/T) Σ_j a[j,j]",
        "Mean score on each task measured right after learning it: how well the model still learns.",
    ),
    "mean_average_accuracy": Definition(
        "Mean average accuracy (MAA, AIA, Avg)",
        "(1/T) Σ_t (1/t) Σ_{j≤t} a[t,j]",
        "Mean over stages of the mean score on the tasks seen so far.",
    ),
    "backward_transfer": Definition(
        "Backward transfer (BWT)",
        "(1/(T−1)) Σ_{j<T} (a[T,j] − a[j,j])",
        "Mean change of earlier tasks between learning them and the end; negative means forgetting.",
    ),
    "backward_transfer_over_all_tasks": Definition(
        "Backward transfer, divided by T",
        "(1/T) Σ_{j<T} (a[T,j] − a[j,j])",
        "The same sum divided by T, as SAPT, SEEKR, OPR and TRACE tables print it.",
    ),
    "forgetting": Definition(
        "Forgetting (FM)",
        "(1/(T−1)) Σ_{j<T} (max_{j≤l<T} a[l,j] − a[T,j])",
        "Mean drop of earlier tasks from their best score since they were learnt to the end.",
        higher_is_better=False,
    ),
    "forgetting_from_any_stage": Definition(
        "Forgetting, best of any stage",
        "(1/(T−1)) Σ_{j<T} (max_{1≤l<T} a[l,j] − a[T,j])",
        "Forgetting where the best score may also come from before the task was learnt.",
        higher_is_better=False,
    ),
    "relative_forgetting": Definition(
        "Relative forgetting",
        "(100/(T−1)) Σ_{j<T} (max_{j≤l<T} a[l,j] − a[T,j]) / max_{j≤l<T} a[l,j]",
        "Forgetting as a share of each task's best score.",
        higher_is_better=False,
    ),
    "retention": Definition(
        "Retention",
        "(100/(T−1)) Σ_{j<T} a[T,j] / a[j,j]",
        "Share of each earlier task's score, as it was right after learning, that is left at the end.",
    ),
    "forward_transfer": Definition(
        "Forward transfer (FWT, GEM)",
        "(1/(T−1)) Σ_{j≥2} (a[j−1,j] − a[0,j])",
        "Mean gain on a task, before it is learnt, over the untouched model.",
    ),
    "forward_transfer_to_learning": Definition(
        "Forward transfer to learning (SAPT)",
        "(1/T) Σ_j (a[j,j] − S_j)",
        "Mean gain right after learning a task over a model that was trained on that task alone.",
    ),
    "zero_shot_transfer": Definition(
        "Zero-shot transfer (ZT)",
        "(1/(T−1)) Σ_{i<T} mean_{j>i} a[i,j]",
        "Mean score on the tasks that are still to come, averaged over stages.",
    ),
    "mtil_transfer": Definition(
        "MTIL Transfer",
        "(1/(T−1)) Σ_{j≥2} mean_{1≤i<j} a[i,j]",
        "Mean score on tasks before they are learnt, averaged over tasks.",
    ),
    "mtil_average": Definition(
        "MTIL Avg", "(1/T) Σ_j (1/T) Σ_i a[i,j]", "Mean of all cells of the matrix, learnt or not."
    ),
    "mtil_last": Definition(
        "MTIL Last", "(1/T) Σ_j a[T,j]", "The same number as mean final accuracy, by its MTIL name."
    ),
    "intransigence": Definition(
        "Intransigence",
        "(1/T) Σ_j (J_j − a[j,j])",
        "Mean shortfall right after learning a task against joint training.",
        higher_is_better=False,
    ),
    "intransigence_last": Definition(
        "Intransigence of the last task",
        "J_T − a[T,T]",
        "Shortfall on the last task against joint training.",
        higher_is_better=False,
    ),
    "general_ability_delta": Definition(
        "General ability delta (ΔG)",
        "(1/M) Σ_m (g[T,m] − g[0,m])",
        "Mean change on benchmarks that no task trains, against the untouched model.",
    ),
}


def derive(
    values: ArrayLike | Sequence[Sequence[float | None]],
    *,
    zero_shot: ArrayLike | Sequence[float | None] | None = None,
    single: ArrayLike | Sequence[float | None] | None = None,
    joint: ArrayLike | Sequence[float | None] | None = None,
    general: ArrayLike | Sequence[Sequence[float | None]] | None = None,
) -> dict[str, Metric]:
    """Returns every metric of `DEFINITIONS`, each with its value or the reason why it has none.

    Args:
        values (`ArrayLike`): a[i,j] in percent; NaN or `None` where not measured.
        zero_shot (`ArrayLike`, *optional*): a[0,j].
        single, joint (`ArrayLike`, *optional*): S_j and J_j.
        general (`ArrayLike`, *optional*): g[i,m], the untouched model in row 0.

    Shapes:
        values (T, T); zero_shot, single, joint (T,); general (T + 1, M).

    Example:

    ```python
    >>> from mllm_cl.evaluation.metrics import derive
    >>> metrics = derive([[80, None], [70, 75]])
    >>> metrics["backward_transfer"].value, metrics["mean_final_accuracy"].value
    (-10.0, 72.5)
    >>> metrics["forward_transfer"].value, metrics["forward_transfer"].reason
    (None, 'not measured: a[1,2]; scores of the untouched model')

    ```
    """
    a = _as_square(values)
    tasks = len(a)
    diagonal, lower, upper = _masks(tasks)
    last = np.zeros_like(diagonal)
    last[-1] = True
    learnt, final, earlier = np.diagonal(a), a[-1], slice(0, tasks - 1)
    corner, final_column = diagonal & last, last.T
    missing_lower, missing_upper = _gaps("a", a, lower), _gaps("a", a, upper)
    missing_ends = _gaps("a", a, (diagonal | last) & ~corner)
    missing_since = _gaps("a", a, lower & ~corner)
    rows = {"a[0,·]": zero_shot, "S": single, "J": joint}
    base, alone, together = (_as_row(name, row, tasks) for name, row in rows.items())
    missing_base, missing_alone, missing_together = (
        "scores of the untouched model" if zero_shot is None else _gaps("a[0,·]", base, np.arange(tasks) > 0),
        "scores of single-task training" if single is None else _gaps("S", alone),
        "scores of joint training" if joint is None else _gaps("J", together),
    )
    best = _column_max(np.where(lower, a, -np.inf)[earlier, earlier])
    best_any = _column_max(a[earlier, earlier])
    drop, change = best - final[earlier], (final - learnt)[earlier]
    pairs = max(tasks - 1, 0)

    found = {
        "mean_final_accuracy": _average(final, tasks, "last row", _gaps("a", a, last)),
        "mean_finetune_accuracy": _average(learnt, tasks, "diagonal", _gaps("a", a, diagonal)),
        "mean_average_accuracy": _average(_row_means(a, lower), tasks, "lower triangle", missing_lower),
        "backward_transfer": _average(change, pairs, "diagonal and last row", missing_ends, tasks=tasks),
        "backward_transfer_over_all_tasks": _average(change, tasks, "diagonal and last row", missing_ends, tasks=tasks),
        "forgetting": _average(drop, pairs, "lower triangle", missing_since, tasks=tasks),
        "forgetting_from_any_stage": _average(
            best_any - final[earlier],
            pairs,
            "all rows of all columns but the last",
            _gaps("a", a, ~final_column),
            tasks=tasks,
        ),
        "relative_forgetting": _average_share(drop, best, pairs, "lower triangle", missing_since, tasks),
        "retention": _average_share(
            final[earlier], learnt[earlier], pairs, "diagonal and last row", missing_ends, tasks
        ),
        "forward_transfer": _average(
            np.diagonal(a, offset=1) - base[1:],
            pairs,
            "cells right above the diagonal and row 0",
            _join(_gaps("a", a, np.eye(tasks, k=1, dtype=bool)), missing_base),
            tasks=tasks,
        ),
        "forward_transfer_to_learning": _average(
            learnt - alone,
            tasks,
            "diagonal and single-task runs",
            _join(_gaps("a", a, diagonal), missing_alone),
        ),
        "zero_shot_transfer": _average(
            _row_means(a, upper)[earlier], pairs, "upper triangle", missing_upper, tasks=tasks
        ),
        "mtil_transfer": _average(_row_means(a.T, upper.T)[1:], pairs, "upper triangle", missing_upper, tasks=tasks),
        "mtil_average": _average(a.mean(axis=0), tasks, "full matrix", _join(missing_lower, missing_upper)),
        "mtil_last": _average(final, tasks, "last row", _gaps("a", a, last)),
        "intransigence": _average(
            together - learnt, tasks, "diagonal and a joint run", _join(_gaps("a", a, diagonal), missing_together)
        ),
        "intransigence_last": _average(
            (together - learnt)[-1:],
            1,
            "last cell of the diagonal and a joint run",
            _join(_gaps("a", a, corner), missing_together),
        ),
    }
    deltas = general_ability_deltas(general, tasks)
    return {**found, "general_ability_delta": deltas[-1]}


def average_accuracies(values: ArrayLike | Sequence[Sequence[float | None]]) -> list[Metric]:
    """Returns AA_t = (1/t) Σ_{j≤t} a[t,j] for t = 1..T (also Last_t, OP_t, AP): the mean over the tasks seen so far.

    Shapes:
        values (T, T) -> T metrics.
    """
    a = _as_square(values)
    found = []
    for stage in range(1, len(a) + 1):
        mask = np.zeros_like(a, dtype=bool)
        mask[stage - 1, :stage] = True
        found.append(_average(a[stage - 1, :stage], stage, f"row {stage} up to the diagonal", _gaps("a", a, mask)))
    return found


def general_ability_deltas(
    general: ArrayLike | Sequence[Sequence[float | None]] | None, tasks: int | None = None
) -> list[Metric]:
    """Returns ΔG_t = (1/M) Σ_m (g[t,m] − g[0,m]) for t = 1..T.

    Args:
        general (`ArrayLike`, *optional*): g[i,m] with the untouched model in row 0; `None` when no benchmark was run.
        tasks (`int`, *optional*): T, checked against the number of rows.

    Shapes:
        general (T + 1, M) -> T metrics.
    """
    needs = "general benchmarks at stage 0 and at this stage"
    if general is None:
        return [Metric(None, "no general benchmark was evaluated", None, needs)] * (tasks or 1)
    g = np.array(general, dtype=np.float64)
    if g.ndim != 2 or (tasks is not None and len(g) != tasks + 1):
        raise ValueError(f"general has shape {g.shape}; expected (T + 1, M), row 0 being the untouched model")
    if g.shape[1] == 0:
        return [Metric(None, "no general benchmark was evaluated", None, needs)] * max(len(g) - 1, 1)
    found = []
    for stage in range(1, len(g)):
        gaps = [f"g[{i},{m + 1}]" for i in (0, stage) for m in np.flatnonzero(np.isnan(g[i]))]
        found.append(_average(g[stage] - g[0], g.shape[1], needs, _shorten(gaps)))
    return found


def _as_square(values: ArrayLike | Sequence[Sequence[float | None]]) -> Array:
    matrix = np.array(values, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or matrix.size == 0:
        raise ValueError(
            f"values has shape {matrix.shape}; expected (T, T), one row per stage after training, "
            "the untouched model in zero_shot"
        )
    if np.isinf(matrix).any():
        raise ValueError("values holds an infinite score; a cell that was not measured is NaN or None")
    return matrix


def _as_row(name: str, row: ArrayLike | Sequence[float | None] | None, tasks: int) -> Array:
    if row is None:
        return np.full(tasks, np.nan)
    scores = np.array(row, dtype=np.float64)
    if scores.shape != (tasks,):
        raise ValueError(f"{name} has shape {scores.shape}; expected ({tasks},), one score per task")
    return scores


def _masks(tasks: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_], NDArray[np.bool_]]:
    """Returns where the diagonal, the lower triangle (with it) and the upper triangle (without it) are."""
    full = np.ones((tasks, tasks), dtype=bool)
    return np.eye(tasks, dtype=bool), np.tril(full), np.triu(full, k=1)


def _gaps(name: str, scores: Array, mask: NDArray[np.bool_] | None = None) -> str:
    """Returns the names of the cells under `mask` that were not measured, or an empty string."""
    empty = np.isnan(scores) if mask is None else np.isnan(scores) & mask
    if scores.ndim == 1:
        return _shorten(
            [name.replace("·", str(j + 1)) if "·" in name else f"{name}_{j + 1}" for j in np.flatnonzero(empty)]
        )
    return _shorten([f"{name}[{i + 1},{j + 1}]" for i, j in np.argwhere(empty)])


def _shorten(cells: list[str], limit: int = 4) -> str:
    return ", ".join(cells[:limit]) + (f" and {len(cells) - limit} more" if len(cells) > limit else "")


def _join(*gaps: str) -> str:
    return "; ".join(gap for gap in gaps if gap)


def _average(terms: Array, divisor: int, needs: str, gaps: str, tasks: int | None = None) -> Metric:
    """Returns the sum of `terms` over `divisor`; `tasks` is given by metrics that need two of them."""
    if tasks == 1:
        return Metric(None, ONE_TASK, None, needs)
    if gaps:
        return Metric(None, f"not measured: {gaps}", divisor, needs)
    return Metric(float(terms.sum() / divisor), None, divisor, needs)


def _average_share(part: Array, whole: Array, divisor: int, needs: str, gaps: str, tasks: int) -> Metric:
    """Returns the mean of part / whole in percent, where that is defined."""
    if tasks > 1 and not gaps and (whole == 0).any():
        columns = ", ".join(str(j + 1) for j in np.flatnonzero(whole == 0))
        return Metric(None, f"the score to compare with is 0 for task {columns}", divisor, needs)
    with np.errstate(divide="ignore", invalid="ignore"):
        return _average(100 * part / whole, divisor, needs, gaps, tasks=tasks)


def _column_max(scores: Array) -> Array:
    # (T - 1, T - 1) -> (T - 1,); NaN wins, and metrics that read it have gaps
    return scores.max(axis=0) if scores.size else np.zeros(0)


def _row_means(scores: Array, mask: NDArray[np.bool_]) -> Array:
    """Returns the mean of each row over `mask`; 0 for a row without any (the caller drops those)."""
    counts = mask.sum(axis=1)
    return np.where(mask, scores, 0.0).sum(axis=1) / np.maximum(counts, 1)
