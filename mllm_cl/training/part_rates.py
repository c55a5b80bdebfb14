"""Learning rates of the parts: language, bridge and vision of one model may learn at different speeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn
from torch.optim import Optimizer

Prefixes = Mapping[str, Sequence[str]]


def part_of(name: str, prefixes: Prefixes) -> str:
    """Returns the part that a parameter belongs to; what is in none of them is `language`.

    Args:
        name: name of the parameter in the base model, with or without what PEFT puts before it.
        prefixes: module names per part; the first part that matches wins.
    """
    plain = name.removeprefix("base_model.model.")
    for part, modules in prefixes.items():
        if any(plain.startswith(f"{module}.") for module in modules):
            return part
    return "language"


def split_groups(optimizer: Optimizer, model: nn.Module, prefixes: Prefixes, rates: Mapping[str, float]) -> None:
    """Gives the parameters of some parts groups of their own, with their own learning rate, in place.

    To be called before the learning-rate schedule is made, which then scales every group alike.

    Args:
        optimizer: over parameters of `model`, not yet stepped.
        prefixes: module names per part.
        rates: learning rate per part; parts that are not in it keep the optimizer's.
    """
    owner = {id(parameter): part_of(name, prefixes) for name, parameter in model.named_parameters()}
    groups = []
    for group in optimizer.param_groups:
        by_part: dict[str, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            part = owner[id(parameter)]
            by_part.setdefault(part if part in rates else "language", []).append(parameter)
        for part, parameters in by_part.items():
            groups.append({**group, "params": parameters, "lr": rates.get(part, group["lr"])})
    optimizer.param_groups[:] = groups
