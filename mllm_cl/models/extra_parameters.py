"""What methods train beside the adapters (gates, prompts): part of the model while a task is learnt, and only then.

As part of the model they are found by the optimizer, averaged by DDP, clipped and counted with all other parameters.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from peft import PeftModel
from torch import Tensor, nn

from mllm_cl.errors import ModelError

_NAME = "method_parameters"


def attach(model: PeftModel, parameters: Mapping[str, nn.Parameter]) -> None:
    """Makes the parameters part of the model, on its device; each keeps its identity, dtype and `requires_grad`.

    In the order of their names: sums over all gradients are rounded in an order, and it must be that of a resumed run.
    """
    detach(model)
    if not parameters:
        return
    device = next(model.parameters()).device
    held = nn.ParameterDict()
    for name, parameter in sorted(parameters.items()):
        parameter.data = parameter.data.to(device)
        held[_key(name)] = parameter
    model.add_module(_NAME, held)


def attached(model: PeftModel) -> dict[str, nn.Parameter]:
    """Returns the parameters that are part of the model now."""
    held = dict(model.named_children()).get(_NAME)
    return {} if held is None else dict(held.named_parameters())


def load(model: PeftModel, values: Mapping[str, Tensor]) -> None:
    """Copies values into the parameters that are part of the model.

    Raises:
        ModelError: they are not the ones that the values were taken from.
    """
    own = attached(model)
    wrong = [name for name in own.keys() | values.keys() if name not in own or name not in values]
    wrong += [name for name in own.keys() & values.keys() if own[name].shape != values[name].shape]
    if wrong:
        raise ModelError(
            f"parameters of the methods: {sorted(wrong)[0]} is not what was saved.",
            expected="the methods and options that the checkpoint was written with",
            fix="restore the recipe, or start the task again.",
        )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(values[name])


def detach(model: PeftModel) -> None:
    """Takes them out of the model again."""
    if _NAME in dict(model.named_children()):
        delattr(model, _NAME)


def _key(name: str) -> str:
    """torch allows no dots in the names of parameters."""
    return name.replace(".", "+")
