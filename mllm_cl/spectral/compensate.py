"""Sparse updates whose kept entries make up for the dropped ones (Model Tailor's patch and compensation).

Of an update D of a weight W_0, only a share of the entries is kept, chosen by how large they are and how much the layer's
output depends on them. With H = sum x x^T over calibration inputs, column after column is fixed; what a dropped entry
did to the output is handed to the columns that come later (optimal brain surgeon, as SparseGPT sweeps it):

    H^-1 = U^T U (upper Cholesky)       err_j = dropped entry / U_jj       D[:, j'] -= err_j U[j, j'],  j' > j

The sign is the one that lowers |(D' - D) X|; the code that the method was released with adds instead, which raises it.

Notation used for tensor shapes: weight, D `(out, in)`; H `(in, in)`.

References: Model Tailor, Zhu et al. 2024 (arXiv 2402.12048); SparseGPT, Frantar and Alistarh 2023 (arXiv 2301.00774).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._checks import check_range

_BLOCK = 128


@torch.no_grad()
def tailored(
    weight: Tensor,
    update: Tensor,
    moment: Tensor,
    *,
    keep: float = 0.1,
    mix: float = 0.5,
    damping: float = 0.01,
    compensate: bool = True,
) -> Tensor:
    """Returns the sparse, compensated update.

    Args:
        weight (`Tensor`): W_0, before the task.
        update (`Tensor`): D, what the task changed.
        moment (`Tensor`): H, mean or sum of x x^T over calibration inputs; its scale does not matter.
        keep (`float`, *optional*, defaults to `0.1`): share of the entries kept in every block of 128 columns.
        mix (`float`, *optional*, defaults to `0.5`): weight of z(|D|) in the score; the rest is z(W^2 / U_jj^2), W =
            W_0 + D, z standardises the rows of a block.
        damping (`float`, *optional*, defaults to `0.01`): times mean(diag H), added to the diagonal.
        compensate (`bool`, *optional*, defaults to `True`): `False` only drops.

    Shapes:
        weight, update, result `(out, in)`; moment `(in, in)`

    Example:

    ```python
    >>> weight, update = torch.zeros(1, 2), torch.tensor([[1.0, 3.0]])
    >>> together = torch.tensor([[1.0, 1.0], [1.0, 1.0]])  # both inputs always equal: entry 2 can do the work of 1
    >>> tailored(weight, update, together, keep=0.5, mix=1.0, damping=1e-6).round(decimals=3).tolist()
    [[0.0, 4.0]]

    ```
    """
    check_range("keep", keep, 0, 1, open_low=True)
    check_range("mix", mix, 0, 1)
    check_range("damping", damping, 0, open_low=True)
    work, base = update.double().clone(), weight.double()
    count = work.shape[1]
    hessian = moment.double().clone()
    hessian.diagonal().add_(damping * hessian.diagonal().mean().clamp_min(1e-30))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    factor = torch.linalg.cholesky(inverse, upper=True)  # U (in, in)
    scale = factor.diagonal()  # (in,)
    for start in range(0, count, _BLOCK):
        end = min(start + _BLOCK, count)
        block = work[:, start:end]
        score = mix * _standardised(block.abs()) + (1 - mix) * _standardised(
            (base[:, start:end] + block).square() / scale[start:end].square()
        )
        kept = max(1, round(keep * score.numel()))
        threshold = score.flatten().kthvalue(score.numel() - kept + 1).values
        mask = score >= threshold  # (out, block)
        errors = torch.zeros_like(block)
        for column in range(start, end):
            dropped = torch.where(mask[:, column - start], torch.zeros_like(work[:, column]), work[:, column])
            work[:, column] -= dropped
            errors[:, column - start] = dropped / scale[column]
            if compensate:
                later = factor[column, column + 1 : end]
                work[:, column + 1 : end] -= errors[:, column - start].outer(later)
        if compensate:
            work[:, end:] -= errors @ factor[start:end, end:]
    return work.to(update.dtype)


def _standardised(matrix: Tensor) -> Tensor:
    """(value - mean) / deviation, row by row; 0 in rows without any spread."""
    centred = matrix - matrix.mean(dim=1, keepdim=True)
    return centred / centred.square().mean(dim=1, keepdim=True).sqrt().clamp_min(1e-12)
