"""Merges that compare the updates of several tasks entry by entry: TIES, DARE, MagMax.

    ties      keep the `density` largest entries of each update, elect the sign with the larger total mass, average the
              entries that agree with it
    dare      drop every entry with probability `drop`, divide the survivors by 1 - drop, then sum or TIES
    magmax    entry by entry the update with the largest magnitude

All of them form the dense `(out, in)` matrix, of one weight matrix at a time: an entry of `B A` is not an entry of B or
of A, so nothing can be done on the factors (PEFT's `add_weighted_adapter` with `ties` or `dare_linear` does it on the
factors separately; for two unrelated adapters its result is as far from the true merge as the merge is long).

Notation used for tensor shapes: see `mllm_cl.spectral`; an update is D_i `(out, in)`, i = 1 ... T.

References: TIES, Yadav et al. 2023 (arXiv 2306.01708); DARE, Yu et al. 2023 (arXiv 2311.03099); MagMax, Marczak et al.
2024 (arXiv 2407.06322).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._checks import check_choice, check_range
from .low_rank import LowRankDelta


def ties(updates: Sequence[LowRankDelta], *, density: float = 0.2, scale: float = 1.0) -> Tensor:
    """Returns the TIES merge: trim, elect sign, disjoint mean.

    Args:
        updates (`Sequence[LowRankDelta]`): one update per task.
        density (`float`, *optional*, defaults to `0.2`): share of the entries of each update that is kept; the paper
            ranks the entries of all matrices together, here (as in PEFT) each matrix is trimmed by itself.
        scale (`float`, *optional*, defaults to `1.0`): factor of the result.

    Example:

    ```python
    >>> one = LowRankDelta.from_dense(torch.tensor([[4.0, -1.0], [0.5, 3.0]]))
    >>> two = LowRankDelta.from_dense(torch.tensor([[2.0, 3.0], [0.5, -4.0]]))
    >>> ties([one, two], density=0.5).round(decimals=4).tolist()  # signs + + 0 -, then the mean of those that agree
    [[4.0, 3.0], [0.0, -4.0]]

    ```
    """
    check_range("ties: scale", scale, 0)
    return scale * disjoint_mean(torch.stack([trimmed(update.dense().double(), density) for update in updates]))


def dare(
    updates: Sequence[LowRankDelta],
    *,
    drop: float = 0.9,
    then: str = "sum",
    density: float = 1.0,
    scale: float = 1.0,
    seed: int = 0,
) -> Tensor:
    """Returns the DARE merge; what is dropped depends on `seed` and the place of the update alone.

    Args:
        updates (`Sequence[LowRankDelta]`): one update per task.
        drop (`float`, *optional*, defaults to `0.9`): probability with which an entry is dropped, in [0, 1).
        then (`str`, *optional*, defaults to `"sum"`): what is done with the sparse updates, `sum`, `mean` or `ties`.
        density (`float`, *optional*, defaults to `1.0`): see `ties`.
        scale (`float`, *optional*, defaults to `1.0`): factor of the result.
        seed (`int`, *optional*, defaults to `0`): of the random choice.

    Example:

    ```python
    >>> merged = dare([LowRankDelta.from_dense(torch.ones(40, 50))], drop=0.5)
    >>> sorted(set(merged.round(decimals=4).flatten().tolist())), 0.9 < merged.mean().item() < 1.1
    ([0.0, 2.0], True)

    ```
    """
    check_range("dare: drop", drop, 0, 1 - 1e-9)
    check_range("dare: scale", scale, 0)
    check_choice("dare: then", then, ("sum", "mean", "ties"))
    sparse = []
    for place, update in enumerate(updates):
        drawn = torch.rand(update.shape, generator=torch.Generator().manual_seed(seed * 1009 + place))
        dense = update.dense().double()
        sparse.append(dense * (drawn >= drop).to(dense) / (1 - drop))
    stacked = torch.stack(sparse)  # (T, out, in)
    if then == "ties":
        return scale * disjoint_mean(torch.stack([trimmed(matrix, density) for matrix in stacked]))
    return scale * (stacked.sum(dim=0) if then == "sum" else stacked.mean(dim=0))


def magmax(updates: Sequence[LowRankDelta], *, scale: float = 1.0) -> Tensor:
    """Returns entry by entry the update of largest magnitude (the earliest of equal ones), times `scale`.

    Example:

    ```python
    >>> one = LowRankDelta.from_dense(torch.tensor([[4.0, -1.0]]))
    >>> two = LowRankDelta.from_dense(torch.tensor([[-2.0, 3.0]]))
    >>> magmax([one, two]).round(decimals=4).tolist()
    [[4.0, 3.0]]

    ```
    """
    check_range("magmax: scale", scale, 0)
    merged = updates[0].dense().double()
    for update in updates[1:]:
        dense = update.dense().double()
        merged = torch.where(dense.abs() > merged.abs(), dense, merged)
    return scale * merged


def trimmed(matrix: Tensor, density: float) -> Tensor:
    """Returns the matrix with all but the `density` entries of largest magnitude set to zero.

    At least one entry is kept; ties at the threshold are all kept.

    Example:

    ```python
    >>> trimmed(torch.tensor([[3.0, -5.0], [1.0, 2.0]]), 0.5).tolist()
    [[3.0, -5.0], [0.0, 0.0]]

    ```
    """
    check_range("density", density, 0, 1, open_low=True)
    keep = max(1, round(density * matrix.numel()))
    if keep >= matrix.numel():
        return matrix
    magnitude = matrix.abs()
    threshold = magnitude.flatten().kthvalue(matrix.numel() - keep + 1).values
    return torch.where(magnitude >= threshold, matrix, torch.zeros_like(matrix))


def disjoint_mean(matrices: Tensor) -> Tensor:
    """Returns entry by entry the mean of the values that are not zero and have the sign of the sum.

    Shapes:
        matrices `(T, ...)`, result `(...)`

    Example:

    ```python
    >>> disjoint_mean(torch.tensor([[4.0, 1.0, 0.0], [2.0, -3.0, 0.0]])).tolist()
    [3.0, -3.0, 0.0]

    ```
    """
    elected = matrices.sum(dim=0).sign()  # (T, ...) -> (...)
    agreeing = (matrices.sign() == elected) & (elected != 0)
    count = agreeing.sum(dim=0).clamp_min(1)
    return (matrices * agreeing).sum(dim=0) / count
