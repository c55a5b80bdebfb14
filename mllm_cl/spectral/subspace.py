"""Subspaces of layer inputs: sketches of what flows through a layer, and bases that are protected or allowed.

A sketch is Y = G Omega, `(in, width)`, of a matrix G with `in` rows that is only ever seen as a sum of outer products:
G = sum x x^T (inputs) or G = sum x d^T (gradients of the weight, transposed). It is linear, so batches and processes
add up, and its leading left singular vectors approach those of G (Halko et al. 2011, arXiv 0909.4061). With a width of
at least the number of columns of G, Omega is the identity and nothing is approximated.

Notation used for tensor shapes: basis `(in, k)` with orthonormal columns, k may be 0; sketch `(in, width)`.

References: gradient projection memory, Saha et al. 2021 (arXiv 2103.09762), for the energy rule.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._checks import check_range


def sketch_matrix(columns: int, width: int, seed: int = 0) -> Tensor | None:
    """Returns Omega `(columns, min(width, columns))` with E[Omega Omega^T] = I; `None` stands for the identity.

    Example:

    ```python
    >>> sketch_matrix(8, 8) is None, sketch_matrix(100, 20).shape
    (True, torch.Size([100, 20]))

    ```
    """
    if width >= columns:
        return None
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(columns, width, generator=generator) / math.sqrt(width)


def project_out(matrix: Tensor, basis: Tensor) -> Tensor:
    """Returns (I - M M^T) X for the basis M `(in, k)` and X `(in, n)`.

    Example:

    ```python
    >>> project_out(torch.tensor([[3.0], [4.0]]), torch.tensor([[1.0], [0.0]])).tolist()
    [[0.0], [4.0]]

    ```
    """
    return matrix - basis @ (basis.mT @ matrix)


def extend_basis(basis: Tensor, sketch: Tensor, energy: float) -> Tensor:
    """Returns the basis with the fewest further directions that capture `energy` of the sketch's squared norm.

    Directions come from the SVD of what the basis leaves of the sketch, strongest first. What the basis captures
    already counts.

    Example:

    ```python
    >>> old, sketch = torch.eye(3)[:, :1], torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    >>> extend_basis(old, sketch, 0.6).shape[1], extend_basis(old, sketch, 0.9).shape[1]  # (9, 13, 14) of 14
    (1, 2)
    >>> extend_basis(old, sketch, 0.9)[:, 1].abs().tolist()
    [0.0, 1.0, 0.0]

    ```
    """
    check_range("energy", energy, 0, 1)
    basis, sketch = basis.double(), sketch.double()
    total = float(sketch.square().sum())
    rest = project_out(project_out(sketch, basis), basis)  # twice: the rounding errors of the first are projected too
    captured = total - float(rest.square().sum())
    if total == 0 or captured >= energy * total * (1 - 1e-12):
        return basis
    left, sigma, _ = torch.linalg.svd(rest, full_matrices=False)
    reached = captured + sigma.square().cumsum(0)
    count = int((reached < energy * total * (1 - 1e-12)).sum()) + 1
    room = min(basis.shape[0] - basis.shape[1], int((sigma > 1e-9 * math.sqrt(total)).sum()))
    return torch.cat([basis, left[:, : min(count, room)]], dim=1)


def allowed_directions(basis: Tensor, sketch: Tensor, rank: int) -> Tensor:
    """Returns the leading left singular vectors of (I - M M^T) Y as rows `(rank, in)`; zeros where none are left.

    Example:

    ```python
    >>> allowed_directions(torch.eye(3)[:, :1], torch.diag(torch.tensor([3.0, 2.0, 1.0])), 3).abs().tolist()
    [[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]]

    ```
    """
    basis, sketch = basis.double(), sketch.double()
    rest = project_out(project_out(sketch, basis), basis)
    left, sigma, _ = torch.linalg.svd(rest, full_matrices=False)
    count = min(rank, int((sigma > 1e-9 * float(sketch.norm())).sum()))
    rows = torch.zeros(rank, basis.shape[0], dtype=torch.float64, device=sketch.device)
    chosen = left[:, :count]
    if count:
        largest = chosen.abs().argmax(dim=0, keepdim=True)
        chosen = chosen * chosen.gather(0, largest).sign()  # the same bytes for the same input
    rows[:count] = chosen.mT
    return rows


def minor_directions(matrix: Tensor, count: int) -> Tensor:
    """Returns the left singular vectors of the smallest singular values as columns `(rows, count)`, weakest first.

    Example:

    ```python
    >>> minor_directions(torch.diag(torch.tensor([3.0, 1.0, 2.0])), 1).abs().tolist()
    [[0.0], [1.0], [0.0]]

    ```
    """
    _, vectors = torch.linalg.eigh(matrix.double() @ matrix.double().mT)  # ascending
    chosen = vectors[:, :count]
    largest = chosen.abs().argmax(dim=0, keepdim=True)
    return chosen * chosen.gather(0, largest).sign()
