"""The update of one weight matrix as an exact low-rank matrix, `U diag(sigma) V^T`.

Why it exists: the SVD of a dense 4096 x 4096 update takes minutes, but an update made by LoRA has rank r << 4096, and
its exact SVD needs only the two tall factors. Nothing of size out x in is formed on that route.

With `D = B A^T`, the QR of the tall factors, `B = Q_B R_B` and `A = Q_A R_A`, and the SVD of the r x r core
`R_B R_A^T = u sigma v^T`:

    U = Q_B u = B (R_A^T v / sigma)        V = Q_A v = A (R_B^T u / sigma)

- The second form needs no Q, which halves the cost. Its rounding error in column i is about eps * |B| |A| / sigma_i, so
  it is used for results kept in float32 while the smallest sigma is above `_FAST_LIMIT` * |B| |A|; else Q is formed.
- The core is float64. A Gram route (`R` from the Cholesky factor of `B^T B`) is faster, but it squares the condition
  number: at 1e6 the small singular values are off by 1e-5 instead of 3e-12, so it is not used.
- Singular vectors are kept in float32 (float64 for float64 input), singular values in float64: bfloat16 adapters are
  decomposed, added and scaled without loss; `dense()` and `to_lora()` cast to the dtype that came in.

Notation used for tensor shapes: see `mllm_cl.spectral`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import SpectralError, suggest
from ._checks import check_finite, check_matrix, check_range

_EPS = torch.finfo(torch.float64).eps
_NOISE = 8 * _EPS  # singular values below this share of |B| |A| are rounding errors, not directions
_FAST_LIMIT = 1e-8  # keeps the rounding error of the route without Q below that of float32

_NORMS = ("fro", "nuclear", "spectral")


@dataclass(frozen=True, eq=False)
class LowRankDelta:
    """One weight update `D = left @ diag(sigma) @ right.T`, exact and never dense.

    Build it with `from_lora`, `from_dense` or `zeros`. Objects are immutable; arithmetic returns new ones, with the
    numerical rank of the result. The sign of each pair of singular vectors is fixed (the entry of largest
    magnitude in each left vector is positive), so that the same input gives the same bytes on the same machine.

    Args:
        left (`Tensor`): `U`, left singular vectors as columns.
        sigma (`Tensor`): singular values, positive, descending, float64.
        right (`Tensor`): `V`, right singular vectors as columns.
        dtype (`torch.dtype`): dtype of what came in, and of what `dense` and `to_lora` return.

    Shapes:
        left `(out, rank)`, sigma `(rank,)`, right `(in, rank)`

    Raises:
        `SpectralError`: if the three shapes do not fit together.

    Example:

    ```python
    >>> import torch
    >>> from mllm_cl.spectral import LowRankDelta
    >>> A, B = torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0], [0.0]])
    >>> delta = LowRankDelta.from_lora(A, B, scaling=2.0)
    >>> delta.shape, delta.rank, delta.singular_values().tolist()
    ((2, 2), 1, [10.0])

    ```
    """

    left: Tensor
    sigma: Tensor
    right: Tensor
    dtype: torch.dtype

    def __post_init__(self) -> None:
        shapes = [tuple(self.left.shape), tuple(self.sigma.shape), tuple(self.right.shape)]
        if [len(s) for s in shapes] != [2, 1, 2] or len({shapes[0][1], shapes[1][0], shapes[2][1]}) != 1:
            raise SpectralError(
                f"left, sigma and right have the shapes {shapes}.",
                expected="(out, rank), (rank,) and (in, rank).",
                fix="build the update with LowRankDelta.from_lora, from_dense or zeros.",
            )

    @classmethod
    @torch.no_grad()
    def from_lora(cls, lora_A: Tensor, lora_B: Tensor, scaling: float = 1.0) -> LowRankDelta:
        """Returns the exact SVD of `scaling * lora_B @ lora_A` without forming that product.

        Args:
            lora_A (`Tensor`): the factor next to the input.
            lora_B (`Tensor`): the factor next to the output.
            scaling (`float`, *optional*, defaults to `1.0`): PEFT's `scaling[adapter_name]`; may be negative.

        Shapes:
            lora_A `(rank, in)`, lora_B `(out, rank)`; rank may exceed out and in.

        Raises:
            `SpectralError`: if the shapes do not fit, a factor is empty, not floating point, or not finite.

        Example:

        ```python
        >>> A, B = torch.eye(2, 3), torch.tensor([[0.0, 2.0], [1.0, 0.0]])
        >>> LowRankDelta.from_lora(A, B).dense().tolist()
        [[0.0, 2.0, 0.0], [1.0, 0.0, 0.0]]

        ```
        """
        check_matrix("lora_A", lora_A, rank_dim=0)
        check_matrix("lora_B", lora_B, rank_dim=1)
        if lora_A.shape[0] != lora_B.shape[1]:
            raise SpectralError(
                f"lora_A has shape {tuple(lora_A.shape)} and lora_B has shape {tuple(lora_B.shape)}.",
                expected="lora_A (rank, in) and lora_B (out, rank) with the same rank.",
                fix="check the order of the arguments: lora_A comes first.",
            )
        dtype = torch.promote_types(lora_A.dtype, lora_B.dtype)
        # (rank, in) -> (in, rank)
        return cls._from_factors(lora_B.double() * float(scaling), lora_A.double().mT, dtype)

    @classmethod
    @torch.no_grad()
    def from_dense(cls, matrix: Tensor) -> LowRankDelta:
        """Returns the SVD of a dense update; for full fine-tuning and small matrices: O(out in min(out, in)).

        Args:
            matrix (`Tensor`): the update `D`.

        Shapes:
            matrix `(out, in)`

        Raises:
            `SpectralError`: if `matrix` is not a non-empty, finite, floating point matrix.

        Example:

        ```python
        >>> LowRankDelta.from_dense(torch.tensor([[0.0, -2.0], [0.0, 0.0]])).singular_values().tolist()
        [2.0]

        ```
        """
        check_matrix("matrix", matrix)
        check_finite(matrix)
        left, sigma, right_t = torch.linalg.svd(matrix.double(), full_matrices=False)
        largest = float(sigma[0]) if sigma.numel() else 0.0
        rank = int((sigma > max(matrix.shape) * _EPS * largest).sum())
        return cls._finish(left[:, :rank], sigma[:rank], right_t[:rank].mT, matrix.dtype)

    @classmethod
    def zeros(
        cls,
        out_features: int,
        in_features: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> LowRankDelta:
        """Returns the update that changes nothing, of rank 0.

        Example:

        ```python
        >>> LowRankDelta.zeros(3, 2).dense().abs().sum().item()
        0.0

        ```
        """
        left = torch.zeros(out_features, 0, dtype=_kept_dtype(dtype), device=device)
        right = torch.zeros(in_features, 0, dtype=_kept_dtype(dtype), device=device)
        return cls(left, torch.zeros(0, dtype=torch.float64, device=device), right, dtype)

    @classmethod
    def _from_factors(cls, left: Tensor, right: Tensor, dtype: torch.dtype) -> LowRankDelta:
        """SVD of `left @ right.T` for float64 factors `(out, r)` and `(in, r)`: formulas in the module docstring."""
        if left.shape[1] == 0:
            return cls.zeros(left.shape[0], right.shape[0], dtype=dtype, device=left.device)
        core_left = torch.linalg.qr(left, mode="r").R  # (out, r) -> (min(out, r), r)
        core_right = torch.linalg.qr(right, mode="r").R  # (in, r) -> (min(in, r), r)
        core = core_left @ core_right.mT  # -> (min(out, r), min(in, r))
        check_finite(core)
        u, sigma, v_t = torch.linalg.svd(core, full_matrices=False)
        size = float(core_left.norm() * core_right.norm())
        rank = int((sigma > _NOISE * size).sum())
        u, sigma, v = u[:, :rank], sigma[:rank], v_t[:rank].mT  # the rest is zero to rounding
        if rank and _kept_dtype(dtype) == torch.float32 and float(sigma[-1]) > _FAST_LIMIT * size:
            big_left = left @ (core_right.mT @ v / sigma)  # (out, r) @ (r, rank) -> (out, rank)
            big_right = right @ (core_left.mT @ u / sigma)  # (in, r) @ (r, rank) -> (in, rank)
        else:
            big_left = torch.linalg.qr(left).Q @ u  # -> (out, rank)
            big_right = torch.linalg.qr(right).Q @ v  # -> (in, rank)
        return cls._finish(big_left, sigma, big_right, dtype)

    @classmethod
    def _finish(cls, left: Tensor, sigma: Tensor, right: Tensor, dtype: torch.dtype) -> LowRankDelta:
        """Casts float64 singular vectors to the dtype they are kept in and fixes their signs."""
        left = left.to(_kept_dtype(dtype)).contiguous()
        right = right.to(_kept_dtype(dtype)).contiguous()
        if left.shape[1]:
            largest = left.abs().argmax(dim=0, keepdim=True)  # (out, rank) -> (1, rank)
            signs = left.gather(0, largest).sign()  # (1, rank)
            left, right = left * signs, right * signs
        return cls(left, sigma.contiguous(), right, dtype)

    @property
    def shape(self) -> tuple[int, int]:
        """`(out, in)` of the matrix."""
        return self.left.shape[0], self.right.shape[0]

    @property
    def rank(self) -> int:
        """Number of singular values kept, all positive."""
        return self.sigma.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the factors are."""
        return self.left.device

    def singular_values(self) -> Tensor:
        """Returns the positive singular values, descending, float64, `(rank,)`."""
        return self.sigma.clone()

    def dense(self) -> Tensor:
        """Returns the matrix itself, `(out, in)`, in the dtype that came in; nothing else forms it."""
        scaled = self.left * self.sigma.to(self.left.dtype)
        return (scaled @ self.right.mT).to(self.dtype)  # (out, rank) @ (rank, in) -> (out, in)

    def norm(self, kind: str = "fro") -> float:
        """Returns a norm of the matrix: `fro` sqrt(sum sigma^2), `nuclear` sum sigma, `spectral` max sigma.

        Raises:
            `SpectralError`: if `kind` is unknown.

        Example:

        ```python
        >>> delta = LowRankDelta.from_dense(torch.diag(torch.tensor([3.0, 4.0])))
        >>> delta.norm(), delta.norm("nuclear"), delta.norm("spectral")
        (5.0, 7.0, 4.0)

        ```
        """
        return spectrum_norm(self.sigma, kind)

    def to_lora(self, rank: int | None = None) -> tuple[Tensor, Tensor]:
        """Returns `(lora_A, lora_B)` with `lora_B @ lora_A` equal to this update at scaling 1.

        Both factors carry the square root of the singular values, so that neither overflows in half precision.

        Args:
            rank (`int`, *optional*): rank of the result, filled up with zeros; the rank of the update when omitted.

        Shapes:
            lora_A `(rank, in)`, lora_B `(out, rank)`

        Raises:
            `SpectralError`: if `rank` is smaller than the rank of the update, as that would change it.

        Example:

        ```python
        >>> lora_A, lora_B = LowRankDelta.from_dense(torch.diag(torch.tensor([4.0, 0.0]))).to_lora(rank=3)
        >>> lora_A.tolist(), tuple(lora_B.shape)
        ([[2.0, 0.0], [0.0, 0.0], [0.0, 0.0]], (2, 3))

        ```
        """
        padding = 0 if rank is None else rank - self.rank
        if padding < 0:
            raise SpectralError(
                f"rank {rank} was asked for, and the update has rank {self.rank}.",
                expected=f"a rank of at least {self.rank}.",
                fix=f"call truncate(rank={rank}) first; it reports the error this makes.",
            )
        root = self.sigma.sqrt().to(self.left.dtype)
        lora_B = torch.nn.functional.pad(self.left * root, (0, padding))  # (out, r) -> (out, r + padding)
        lora_A = torch.nn.functional.pad((self.right * root).mT, (0, 0, 0, padding))  # (r, in) -> (r + padding, in)
        return lora_A.to(self.dtype).contiguous(), lora_B.to(self.dtype).contiguous()

    def truncate(self, rank: int | None = None, energy: float | None = None) -> tuple[LowRankDelta, float]:
        """Returns the best approximation of lower rank, and its relative error in the Frobenius norm.

        Error (Eckart-Young): `sqrt(sum of the dropped sigma^2 / sum of all sigma^2)`. Of two limits the tighter counts.

        Args:
            rank (`int`, *optional*): the largest rank allowed.
            energy (`float`, *optional*): share of `sum sigma^2` to keep, in (0, 1]; the smallest rank that reaches it.

        Raises:
            `SpectralError`: if no limit is given or one is out of range.

        Example:

        ```python
        >>> delta = LowRankDelta.from_dense(torch.diag(torch.tensor([4.0, 3.0])))
        >>> smaller, error = delta.truncate(rank=1)
        >>> smaller.rank, error
        (1, 0.6)

        ```
        """
        if rank is None and energy is None:
            raise SpectralError("truncate() was given no limit.", expected="rank, or energy in (0, 1].")
        check_range("truncate: rank", 0 if rank is None else rank, 0)
        check_range("truncate: energy", 1.0 if energy is None else energy, 0, 1, open_low=True)
        keep = self.rank if rank is None else min(rank, self.rank)
        squares = self.sigma.square()
        if energy is not None and energy < 1.0 and self.rank:
            short_of_it = squares.cumsum(0) < energy * squares.sum()
            keep = min(keep, int(short_of_it.sum()) + 1)
        if keep == self.rank:
            return self, 0.0
        error = math.sqrt(float(squares[keep:].sum() / squares.sum()))
        parts = self.left[:, :keep].contiguous(), self.sigma[:keep].clone(), self.right[:, :keep].contiguous()
        return LowRankDelta(*parts, self.dtype), error

    def with_sigma(self, sigma: Tensor) -> LowRankDelta:
        """Returns the update with the same directions and other singular values `(rank,)`, all >= 0; zeros are dropped.

        Raises:
            `SpectralError`: if the shape differs, or a value is negative or not finite.
        """
        if sigma.shape != self.sigma.shape or not bool((torch.isfinite(sigma) & (sigma >= 0)).all()):
            raise SpectralError(
                f"new singular values of shape {tuple(sigma.shape)}, or negative or not finite.",
                expected=f"{self.rank} finite values >= 0.",
            )
        if torch.equal(sigma, self.sigma):
            return self
        new, order = torch.sort(sigma.double(), descending=True, stable=True)
        order = order[new > 0]
        parts = self.left[:, order].contiguous(), new[new > 0], self.right[:, order].contiguous()
        return LowRankDelta(*parts, self.dtype)

    def transpose(self) -> LowRankDelta:
        """Returns the update of the transposed matrix, `(in, out)`."""
        return LowRankDelta._finish(self.right, self.sigma, self.left, self.dtype)

    def to(self, device: torch.device | str) -> LowRankDelta:
        """Returns the update with its factors on `device`."""
        return replace(self, left=self.left.to(device), sigma=self.sigma.to(device), right=self.right.to(device))

    @torch.no_grad()
    def __add__(self, other: LowRankDelta) -> LowRankDelta:
        """Exact sum; its rank is the numerical rank of the sum, at most the sum of the two ranks."""
        if not isinstance(other, LowRankDelta):
            return NotImplemented
        if self.shape != other.shape:
            raise SpectralError(
                f"updates of shape {self.shape} and {other.shape} cannot be added.",
                expected="two updates of the same weight matrix.",
            )
        dtype = torch.promote_types(self.dtype, other.dtype)
        for one, empty in ((self, other), (other, self)):
            if empty.rank == 0 and one.dtype == dtype:
                return one
        left = torch.cat([d.left.double() * d.sigma for d in (self, other)], dim=1)  # -> (out, r1 + r2)
        right = torch.cat([d.right.double() for d in (self, other)], dim=1)  # -> (in, r1 + r2)
        return LowRankDelta._from_factors(left, right, dtype)

    def __neg__(self) -> LowRankDelta:
        return replace(self, right=-self.right)  # the sign convention is about the left vectors

    def __sub__(self, other: LowRankDelta) -> LowRankDelta:
        return self + (-other) if isinstance(other, LowRankDelta) else NotImplemented

    def __mul__(self, factor: float) -> LowRankDelta:
        if not isinstance(factor, (int, float)):
            return NotImplemented
        if not math.isfinite(factor):
            raise SpectralError(f"an update cannot be multiplied by {factor}.", expected="a finite number.")
        scaled = self.with_sigma(self.sigma * abs(factor))
        return -scaled if factor < 0 else scaled

    __rmul__ = __mul__


def spectrum_norm(sigma: Tensor, kind: str = "fro") -> float:
    """Returns the `fro`, `nuclear` or `spectral` norm of a matrix from its singular values `(rank,)`, in any order."""
    if kind not in _NORMS:
        raise SpectralError(f"norm {kind!r} is unknown.", expected=", ".join(_NORMS), fix=suggest(kind, _NORMS))
    if sigma.numel() == 0:
        return 0.0
    if kind == "fro":
        return float(torch.linalg.vector_norm(sigma))
    return float(sigma.sum() if kind == "nuclear" else sigma.max())


def _kept_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
