"""Merges that work on the singular values and vectors of several updates: sum, TSV-M, OPCM, Iso-C, STAR, KnOTS.

    task_arithmetic  scale * sum D_i
    star             mean of U diag(c sigma) V^T: the leading directions with `share` of the nuclear norm, rescaled to
                     the whole of it
    iso              sum D_i = U diag(sigma) V^T  ->  mean(sigma) U V^T
    tsv              leading triplets of every D_i side by side, U and V replaced by their nearest orthonormal factors
    opcm             one D_i after another: without what it has in the leading singular block of the merge so far, and
                     on its diagonal; rescaled to the mean norm of the updates
    knots            [D_1 ... D_T] = U diag(sigma) [V_1 ... V_T]^T, the V_i merged with TIES or their mean

Nothing of size out x in is formed: all of them need only the factors, concatenated.

Notation used for tensor shapes: see `mllm_cl.spectral`; an update is D_i `(out, in)` of rank r_i, i = 1 ... T.

References: task arithmetic, Ilharco et al. 2022 (arXiv 2212.04089); STAR, Lee et al. 2025 (arXiv 2502.10339); Iso-C,
Marczak et al. 2025 (arXiv 2502.04959); TSV-M, Gargiulo et al. 2024 (arXiv 2412.00081); OPCM, Tang et al. 2025 (arXiv
2501.09522); KnOTS, Stoica et al. 2024 (arXiv 2410.19735).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._checks import check_choice, check_range
from .low_rank import LowRankDelta
from .merge_entrywise import disjoint_mean, trimmed


def task_arithmetic(updates: Sequence[LowRankDelta], *, scale: float = 1.0) -> LowRankDelta:
    """Returns `scale` times the exact sum of the updates.

    Example:

    ```python
    >>> one, two = (LowRankDelta.from_dense(torch.diag(torch.tensor(d))) for d in ([1.0, 0.0], [0.0, 3.0]))
    >>> task_arithmetic([one, two], scale=0.5).dense().round(decimals=4).tolist()
    [[0.5, 0.0], [0.0, 1.5]]

    ```
    """
    check_range("task_arithmetic: scale", scale, 0)
    return _sum(updates) * scale


def star(updates: Sequence[LowRankDelta], *, share: float = 0.4, scale: float = 1.0) -> LowRankDelta:
    """Returns the mean of the updates, each cut to the directions that hold `share` of its nuclear norm and rescaled.

    Example:

    ```python
    >>> delta = LowRankDelta.from_dense(torch.diag(torch.tensor([6.0, 3.0, 1.0])))
    >>> [round(s, 4) for s in star([delta], share=0.9).singular_values().tolist()]  # 6 and 3, times 10 / 9
    [6.6667, 3.3333]

    ```
    """
    check_range("star: share", share, 0, 1, open_low=True)
    check_range("star: scale", scale, 0)
    cut = []
    for update in updates:
        kept = update.truncate(rank=_leading(update.sigma, share))[0] if update.rank else update
        cut.append(kept * float(update.sigma.sum() / kept.sigma.sum()) if update.rank else update)
    return _sum(cut) * (scale / len(updates))


def iso(updates: Sequence[LowRankDelta], *, scale: float = 1.0) -> LowRankDelta:
    """Returns the sum with all its positive singular values replaced by their mean.

    The paper's updates have full rank; where the sum has not, its null directions are arbitrary and are left out.

    Example:

    ```python
    >>> one, two = (LowRankDelta.from_dense(torch.diag(torch.tensor(d))) for d in ([1.0, 0.0], [0.0, 3.0]))
    >>> iso([one, two]).dense().round(decimals=4).tolist()
    [[2.0, 0.0], [0.0, 2.0]]

    ```
    """
    check_range("iso: scale", scale, 0)
    total = _sum(updates)
    return total.with_sigma(total.sigma.mean().expand(total.rank).clone() * scale) if total.rank else total


def tsv(updates: Sequence[LowRankDelta], *, scale: float = 1.0) -> LowRankDelta:
    """Returns the TSV-M merge.

    Of each update the leading min(out, in) / T triplets are kept (at least one): with LoRA usually all of them.

    Example:

    ```python
    >>> one, two = (LowRankDelta.from_dense(torch.tensor(d)) for d in ([[2.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [3.0, 0.0]]))
    >>> merged = tsv([one, two])  # both read the first input; V becomes orthonormal, sigma stays
    >>> [round(s, 4) for s in merged.singular_values().tolist()]
    [3.0, 2.0]

    ```
    """
    check_range("tsv: scale", scale, 0)
    share = max(1, min(updates[0].shape) // len(updates))
    kept = [update.truncate(rank=share)[0] for update in updates if update.rank]
    if not kept:
        return updates[0]
    sigma = torch.cat([update.sigma for update in kept])  # (K,)
    left = _orthonormal(torch.cat([update.left.double() for update in kept], dim=1))  # (out, K)
    right = _orthonormal(torch.cat([update.right.double() for update in kept], dim=1))  # (in, K)
    return _from_triplets(left, sigma * scale, right, kept[0].dtype)


def opcm(updates: Sequence[LowRankDelta], *, share: float = 0.5, scale: float = 1.0) -> LowRankDelta:
    """Returns the OPCM merge: `opcm_step` over the updates in their order, then rescaled to their mean Frobenius norm.

    The recursion does not depend on the length of the merge so far, so the rescaling of the paper, which follows each
    step, is done once. The paper takes the norms over all parameters of the model: `merge_many` does that.

    Example:

    ```python
    >>> one, two = (LowRankDelta.from_dense(torch.tensor(d)) for d in ([[2.0, 0.0], [0.0, 0.0]], [[9.0, 0.0], [0.0, 2.0]]))
    >>> round(opcm([one, one]).norm(), 4)  # the second brings nothing new
    2.0
    >>> (opcm([one, two]).dense() / opcm([one, two]).dense()[0, 0]).round(decimals=4).tolist()
    [[1.0, 0.0], [0.0, 1.0]]

    ```
    """
    check_range("opcm: scale", scale, 0)
    merged = updates[0]
    for update in updates[1:]:
        merged = opcm_step(merged, update, share)
    mean = sum(update.norm() for update in updates) / len(updates)
    return merged * (scale * mean / merged.norm()) if merged.rank else merged


def opcm_step(merged: LowRankDelta, update: LowRankDelta, share: float = 0.5) -> LowRankDelta:
    """Returns `merged` plus the update without its part in the leading block of `merged` and on its diagonal.

    With merged = U diag(sigma) V^T and C = U^T D V: the leading block C[:k, :k] holds the first k directions, whose
    singular values make up `share` of their sum; the diagonal is that of the directions that `merged` has.

    Example:

    ```python
    >>> merged = LowRankDelta.from_dense(torch.diag(torch.tensor([3.0, 1.0])))
    >>> update = LowRankDelta.from_dense(torch.tensor([[5.0, 7.0], [1.0, 2.0]]))
    >>> opcm_step(merged, update).dense().round(decimals=4).tolist()
    [[3.0, 7.0], [1.0, 1.0]]

    ```
    """
    check_range("opcm: share", share, 0, 1, open_low=True)
    if not (merged.rank and update.rank):
        return merged + update
    left, right = merged.left.double(), merged.right.double()
    inside = (left.mT @ update.left.double() * update.sigma) @ (update.right.double().mT @ right)  # C (R, R)
    removed = torch.diag(inside.diagonal())
    k = _leading(merged.sigma, share)
    removed[:k, :k] = inside[:k, :k]
    part = LowRankDelta._from_factors(left @ removed, right, merged.dtype)
    return merged + (update - part)


def knots(
    updates: Sequence[LowRankDelta], *, then: str = "ties", density: float = 0.2, scale: float = 1.0
) -> LowRankDelta:
    """Returns the KnOTS merge: the updates are aligned by one SVD of all of them, and merged in that basis.

    Args:
        updates (`Sequence[LowRankDelta]`): one update per task.
        then (`str`, *optional*, defaults to `"ties"`): merge of the aligned V_i `(in, R)`: `ties` or `mean`.
        density (`float`, *optional*, defaults to `0.2`): see `ties`.
        scale (`float`, *optional*, defaults to `1.0`): factor of the result.

    Example:

    ```python
    >>> one, two = (LowRankDelta.from_dense(torch.diag(torch.tensor(d))) for d in ([1.0, 0.0], [0.0, 3.0]))
    >>> knots([one, two], then="mean").dense().round(decimals=4).tolist()  # the mean of the updates
    [[0.5, 0.0], [0.0, 1.5]]

    ```
    """
    check_range("knots: scale", scale, 0)
    check_choice("knots: then", then, ("ties", "mean"))
    inputs = updates[0].shape[1]
    left = torch.cat([update.left.double() * update.sigma for update in updates], dim=1)  # (out, sum r)
    right = torch.block_diag(*[update.right.double() for update in updates])  # (T in, sum r)
    together = LowRankDelta._from_factors(left, right, updates[0].dtype)
    parts = together.right.double().reshape(len(updates), inputs, together.rank)  # (T in, R) -> (T, in, R)
    if then == "ties":
        merged = disjoint_mean(torch.stack([trimmed(part, density) for part in parts]))  # -> (in, R)
    else:
        merged = parts.mean(dim=0)
    return LowRankDelta._from_factors(together.left.double() * together.sigma, merged, updates[0].dtype) * scale


def _sum(updates: Sequence[LowRankDelta]) -> LowRankDelta:
    total = updates[0]
    for update in updates[1:]:
        total = total + update
    return total


def _leading(sigma: Tensor, share: float) -> int:
    """How many leading singular values make up `share` of their sum."""
    return min(int((sigma.cumsum(0) < share * (1 - 1e-12) * sigma.sum()).sum()) + 1, sigma.numel())


def _orthonormal(columns: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns (polar factor): `(n, K)` with K <= n."""
    left, _, right_t = torch.linalg.svd(columns, full_matrices=False)
    return left @ right_t


def _from_triplets(left: Tensor, sigma: Tensor, right: Tensor, dtype: torch.dtype) -> LowRankDelta:
    """A delta of orthonormal vectors that are in no order."""
    order = torch.sort(sigma, descending=True, stable=True).indices
    order = order[sigma[order] > 0]
    return LowRankDelta._finish(left[:, order], sigma[order], right[:, order], dtype)
