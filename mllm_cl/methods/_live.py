"""Tensors that a method trains itself (gates, prompts): parameters while a task is learnt, plain tensors between tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

Live = dict[str, nn.Parameter]


def revived(kept: Mapping[str, Tensor], device: torch.device) -> Live:
    """Returns copies of what is kept as parameters on the device, none of them trained."""
    return {name: nn.Parameter(own.clone().to(device), requires_grad=False) for name, own in kept.items()}


def trained(live: Live, trains: Callable[[str], bool]) -> Live:
    """Returns those that `trains` names, from now on with gradients."""
    chosen = {name: own for name, own in live.items() if trains(name)}
    for own in chosen.values():
        own.requires_grad_(True)
    return chosen


def frozen(live: Live) -> dict[str, Tensor]:
    """Returns copies of the values, which are no longer trained."""
    for own in live.values():
        own.requires_grad_(False)
    return {name: own.detach().clone() for name, own in live.items()}


def restore(live: Live, kept: Mapping[str, Tensor]) -> None:
    """Writes what is kept into parameters that exist already, in the middle of a task."""
    with torch.no_grad():
        for name, own in live.items():
            own.copy_(kept[name])
