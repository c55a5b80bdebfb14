"""Whole weights, wherever they are: sharded by DeepSpeed ZeRO-3, a DTensor of FSDP2, or in 4 or 8 bits.

Every process has to call these functions for sharded weights (they communicate); each gets the whole tensor.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from mllm_cl.models.quantize import dequantised, is_quantised


def full_shape(parameter: Tensor) -> torch.Size:
    """Returns the shape of the whole parameter; under ZeRO-3 the local one is empty."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def full_tensor(parameter: Any) -> Tensor:
    """Returns the whole parameter, detached, in its own dtype: the parameter itself where it is whole already, else a
    copy."""
    if isinstance(parameter, DTensor):
        return parameter.full_tensor().detach()
    if not hasattr(parameter, "ds_id"):
        return parameter.detach()
    with gathered([parameter]):
        return parameter.detach().clone()


def full_weight(module: nn.Module) -> Tensor:
    """Returns the whole weight of a linear layer as float32, (out, in), also of one in 4 or 8 bits."""
    if is_quantised(module):
        return dequantised(module)
    return full_tensor(module.weight).float()  # type: ignore[arg-type]


@torch.no_grad()
def write_full(parameter: Tensor, value: Tensor) -> None:
    """Writes a whole tensor into a parameter, in place; every process gives the same value.

    Args:
        value: of the shape that `full_shape` returns.
    """
    if isinstance(parameter, DTensor):
        value = value.to(parameter.device, parameter.dtype)
        parameter.copy_(distribute_tensor(value, parameter.device_mesh, parameter.placements))
        return
    with gathered([parameter], write=True):
        parameter.copy_(value)


@contextlib.contextmanager
def gathered(parameters: Sequence[Any], write: bool = False) -> Iterator[None]:
    """Within the context ZeRO-3 parameters are whole; with `write` what the first process makes of them is kept."""
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        yield
        return
    import deepspeed  # type: ignore[import-not-found]  # optional

    with deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=0 if write else None):
        yield
