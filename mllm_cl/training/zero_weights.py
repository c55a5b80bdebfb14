"""DeepSpeed ZeRO-3: the weights of the language part in shards while a task is trained, and whole again afterwards.

DeepSpeed shards every parameter and gathers it when its module is run, on all processes together. Vision tower, bridge,
embeddings and head need not be run on all of them (rows without images): they stay whole, as buffers, which it leaves alone.
Nor does it see them run: it wants all processes to run the same modules, in the same order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, TrainerCallback

from mllm_cl.models.gather import gathered
from mllm_cl.models.sharding import decoder_layers

_KIND = "_kind"  # a module that is never run
# what DeepSpeed 0.19 writes on modules, beside hooks, which it removes
_LEFT_BEHIND = (
    *("_external_params", "_original_parameters", "all_parameters", "applied_pre_backward_ref_cnt", "post_bwd_fn"),
    *("ds_external_parameters", "ds_grads_remaining", "ds_id", "ds_inflight_param_registry", "ds_recompute_parameters"),
    "pre_bwd_fn",
)


@contextlib.contextmanager
def weights_in_shards(model: PeftModel) -> Iterator[None]:
    """Within the context an engine may be made of the model, and be freed; afterwards the model is as if there had been none.

    After an error the weights stay where they are: the processes may be at different places.
    """
    modules = [(part, dict(part._parameters)) for part in model.modules()]
    tensors = [(parameter, set(vars(parameter))) for parameter in model.parameters()]
    marked = _to_buffers(model, {parameter for layer in decoder_layers(model) for parameter in layer.parameters()})
    yield
    _take_off_hooks(model.modules())
    for parameter, names in tensors:
        with gathered([parameter]):
            whole = parameter.detach().clone() if hasattr(parameter, "ds_id") else parameter.data
        _forget(parameter, names)
        parameter.grad, parameter.data = None, whole
    for part in marked:
        del part._modules[_KIND]
    for part, parameters in modules:
        for name in _LEFT_BEHIND:
            vars(part).pop(name, None)
        for name in parameters:
            part._buffers.pop(name, None)
        part._parameters = parameters


class OnlyLayers(TrainerCallback):
    """Takes DeepSpeed's hooks off the modules outside of the layers, once there is an engine."""

    def __init__(self, model: PeftModel) -> None:
        self.model = model

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        seen = {module for layer in decoder_layers(self.model) for module in layer.modules()} | {self.model}
        _take_off_hooks(set(self.model.modules()) - seen)


@contextlib.contextmanager
def weights_on_all(model: PeftModel) -> Iterator[None]:
    """The same for an engine that leaves the weights whole."""
    tensors = [(parameter, set(vars(parameter))) for parameter in model.parameters()]
    yield
    _take_off_hooks(model.modules())
    for parameter, names in tensors:
        _forget(parameter, names)
        if parameter.requires_grad:
            parameter.grad = None
            parameter.data = parameter.data.clone()  # it was a view into a buffer of all of them


def _take_off_hooks(modules: Iterable[nn.Module]) -> None:
    """Takes off what DeepSpeed runs before and after a module (those of a freed engine hold it, and wrap parameters again)."""
    for module in modules:
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if hook.__module__.startswith("deepspeed.")]:
                del hooks[key]


def _forget(parameter: nn.Parameter, names: set[str]) -> None:
    """Removes all attributes of a parameter but these."""
    for name in set(vars(parameter)) - names:
        del vars(parameter)[name]


def _to_buffers(model: PeftModel, sharded: set[nn.Parameter]) -> list[nn.Module]:
    """Makes buffers of the other frozen parameters; returns the modules that got a parameter to be known by."""
    kinds = {part: (part.device, part.dtype) for part in model.modules() if isinstance(part, PreTrainedModel)}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and parameter not in sharded and not parameter.requires_grad:
                del module._parameters[name]
                module._buffers[name] = parameter.data
    bare: list[nn.Module] = [part for part in kinds if next(part.parameters(), None) is None]
    for part in bare:  # transformers reads a part's device and type from its first parameter
        device, dtype = kinds[part]  # type: ignore[index]
        part.add_module(_KIND, nn.ParameterList([torch.zeros(1, device=device, dtype=dtype)]).requires_grad_(False))
    return bare
