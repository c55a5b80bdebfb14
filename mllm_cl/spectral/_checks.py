"""Checks of what callers hand in; every function raises `SpectralError` or returns nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import SpectralError, suggest


def check_matrix(name: str, tensor: Tensor, rank_dim: int | None = None) -> None:
    """Refuses what is not a floating point matrix with rows and columns; only `rank_dim` of a LoRA factor may be 0."""
    if tensor.dim() != 2 or any(size == 0 for dim, size in enumerate(tensor.shape) if dim != rank_dim):
        raise SpectralError(
            f"{name} has shape {tuple(tensor.shape)}.",
            expected="a matrix with at least one row and one column.",
            fix="gather weights that are sharded (ZeRO-3, FSDP) first; use consolidate_vector for norms and biases.",
        )
    if not tensor.is_floating_point():
        raise SpectralError(
            f"{name} has dtype {tensor.dtype}.",
            expected="a floating point dtype.",
            fix="convert quantized weights to floating point first.",
        )


def check_finite(tensor: Tensor) -> None:
    """Refuses NaN and infinite values."""
    if not bool(torch.isfinite(tensor).all()):
        raise SpectralError(
            "the update contains NaN or infinite values.",
            expected="finite numbers.",
            fix="training has diverged: lower the learning rate, or continue from the last good checkpoint.",
        )


def check_range(name: str, value: float, low: float, high: float = math.inf, *, open_low: bool = False) -> None:
    """Refuses a number outside `[low, high]`, or outside `(low, high]` with `open_low`; infinity is always refused."""
    number = isinstance(value, (int, float)) and math.isfinite(value)
    if not number or not (low < value <= high if open_low else low <= value <= high):
        upper = "" if math.isinf(high) else f" and at most {high:g}"
        raise SpectralError(
            f"{name} is {value!r}.", expected=f"a number {'above' if open_low else 'of at least'} {low:g}{upper}."
        )


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Refuses a word that is none of the choices."""
    if value not in choices:
        raise SpectralError(f"{name} {value!r} is unknown.", expected=", ".join(choices), fix=suggest(value, choices))
