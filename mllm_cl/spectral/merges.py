"""The named merges: several updates of one weight matrix -> one. Used in the stream (after each task) and post hoc.

`MERGES` holds the functions; `merge_many` applies one of them to all matrices of a model. All work on the full updates
D_i = scaling B_i A_i, never on the factors by themselves. Their formulas are in `merge_entrywise.py` and
`merge_spectral.py`.

Notation used for tensor shapes: see `mllm_cl.spectral`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..errors import SpectralError, suggest
from ._checks import check_range
from .low_rank import LowRankDelta
from .merge_entrywise import dare, magmax, ties
from .merge_spectral import iso, knots, opcm, opcm_step, star, task_arithmetic, tsv

MERGES: dict[str, Callable[..., Tensor | LowRankDelta]] = {
    "task_arithmetic": task_arithmetic,
    "ties": ties,
    "dare": dare,
    "magmax": magmax,
    "tsv": tsv,
    "opcm": opcm,
    "iso": iso,
    "star": star,
    "knots": knots,
}

_EXACT_SIZE = 1024  # up to here the SVD of a dense merge is exact whatever the rank
_OVERSAMPLING, _ITERATIONS = 16, 4


def find_merge(name: str, options: Mapping[str, float | int | str]) -> Callable[..., Tensor | LowRankDelta]:
    """Returns the merge called `name`, having checked that it knows all `options`.

    Raises:
        `SpectralError`: if the name or an option is unknown.

    Example:

    ```python
    >>> find_merge("ties", {"density": 0.1}).__name__
    'ties'

    ```
    """
    if name not in MERGES:
        raise SpectralError(f"merge {name!r} is unknown.", expected=", ".join(MERGES), fix=suggest(name, MERGES))
    known = set(inspect.signature(MERGES[name]).parameters) - {"updates"}
    for option in options:
        if option not in known:
            raise SpectralError(
                f"merge {name!r} has no option {option!r}.",
                expected=", ".join(sorted(known)),
                fix=suggest(option, known),
            )
    return MERGES[name]


@torch.no_grad()
def merge(
    updates: Sequence[LowRankDelta], name: str, *, rank: int | None = None, **options: float | int | str
) -> tuple[LowRankDelta, float]:
    """Merges the updates of one matrix; returns the result and the relative error that the limit on its rank makes.

    Args:
        updates (`Sequence[LowRankDelta]`): one update per task, in the order of the tasks.
        name (`str`): one of `MERGES`.
        rank (`int`, *optional*): the largest rank of the result; the entrywise merges have full rank by nature.
        options: parameters of the named merge.

    Raises:
        `SpectralError`: if there is nothing to merge, the shapes differ, or a name, option or number is unknown.

    Example:

    ```python
    >>> one, two = (LowRankDelta.from_dense(torch.tensor(d)) for d in ([[3.0, 0.0]], [[0.0, -4.0]]))
    >>> merged, error = merge([one, two], "magmax", rank=1)
    >>> merged.dense().round(decimals=4).tolist(), error
    ([[3.0, -4.0]], 0.0)

    ```
    """
    compute = find_merge(name, options)
    if not updates or any(update.shape != updates[0].shape for update in updates):
        raise SpectralError(
            f"updates of the shapes {[update.shape for update in updates]} cannot be merged.",
            expected="at least one update, all of the same weight matrix.",
        )
    return limited(compute(updates, **options), rank, updates[0].dtype)


@torch.no_grad()
def merge_many(
    tasks: Sequence[Mapping[str, LowRankDelta]], name: str, *, rank: int | None = None, **options: float | int | str
) -> tuple[dict[str, LowRankDelta], float]:
    """Merges the updates of all matrices; returns the results by name and the largest relative error of any.

    `opcm` takes its norms over all matrices together, `dare` draws other entries for every matrix.

    Args:
        tasks (`Sequence[Mapping[str, LowRankDelta]]`): per task, in their order, the update of each matrix by name.
        name, rank, options: see `merge`.

    Raises:
        `SpectralError`: as `merge`, or if the tasks do not have the same matrices.

    Example:

    ```python
    >>> one = {"q": LowRankDelta.from_dense(torch.eye(2)), "k": LowRankDelta.from_dense(torch.eye(2) * 3)}
    >>> merged, error = merge_many([one, one], "task_arithmetic", scale=0.5)
    >>> merged["k"].dense().round(decimals=4).tolist(), error
    ([[3.0, 0.0], [0.0, 3.0]], 0.0)

    ```
    """
    find_merge(name, options)
    if not tasks or any(updates.keys() != tasks[0].keys() for updates in tasks):
        raise SpectralError(
            f"{len(tasks)} adapters of {sorted({len(updates) for updates in tasks})} matrices cannot be merged.",
            expected="at least one adapter, all on the same modules of the same base model.",
        )
    if name == "opcm":
        return _opcm_together(tasks, rank, **options)  # type: ignore[arg-type]
    merged: dict[str, LowRankDelta] = {}
    worst = 0.0
    for place, module in enumerate(sorted(tasks[0])):
        own = {**options, "seed": int(options.get("seed", 0)) + 7919 * place} if name == "dare" else options
        merged[module], error = merge([updates[module] for updates in tasks], name, rank=rank, **own)
        worst = max(worst, error)
    return merged, worst


def _opcm_together(
    tasks: Sequence[Mapping[str, LowRankDelta]], rank: int | None, share: float = 0.5, scale: float = 1.0
) -> tuple[dict[str, LowRankDelta], float]:
    """OPCM whose result has the mean norm of the tasks' whole updates, as in the paper."""
    check_range("opcm: scale", scale, 0)
    merged = dict(tasks[0])
    for updates in tasks[1:]:
        merged = {module: opcm_step(merged[module], updates[module], share) for module in merged}
    norms = [math.sqrt(sum(float(update.sigma.square().sum()) for update in updates.values())) for updates in tasks]
    whole = math.sqrt(sum(float(update.sigma.square().sum()) for update in merged.values()))
    factor = scale * sum(norms) / len(norms) / whole if whole else scale
    results = {module: limited(update * factor, rank, update.dtype) for module, update in merged.items()}
    return {module: result for module, (result, _) in results.items()}, max(error for _, error in results.values())


def limited(result: Tensor | LowRankDelta, rank: int | None, dtype: torch.dtype) -> tuple[LowRankDelta, float]:
    """Returns a merge as a `LowRankDelta` of at most `rank`, and the relative Frobenius error of that.

    Dense matrices above 1024 x 1024 are cut by a randomised subspace iteration (Halko et al. 2011, arXiv 0909.4061) with
    a fixed seed; its error is measured, not estimated.

    Example:

    ```python
    >>> delta, error = limited(torch.diag(torch.tensor([4.0, 3.0])), 1, torch.float32)
    >>> delta.rank, round(error, 6)
    (1, 0.6)

    ```
    """
    if isinstance(result, LowRankDelta):
        return (result, 0.0) if rank is None else result.truncate(rank=rank)
    if rank is None or min(result.shape) <= max(_EXACT_SIZE, rank + _OVERSAMPLING):
        delta = LowRankDelta.from_dense(result.to(dtype))
        return (delta, 0.0) if rank is None else delta.truncate(rank=rank)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(result.shape[1], rank + _OVERSAMPLING, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(result @ start.to(result)).Q  # (out, in) @ (in, q) -> (out, q)
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(result @ torch.linalg.qr(result.mT @ basis).Q).Q
    delta = LowRankDelta._from_factors(basis, result.mT @ basis, dtype).truncate(rank=rank)[0]
    whole = float(result.square().sum())
    return delta, math.sqrt(max(0.0, 1 - float(delta.sigma.square().sum()) / whole)) if whole else 0.0
