"""Counts the work of training: floating-point operations and passes of the model, whichever method asks for them.

Formula, for each linear layer or convolution with N weights that R positions (tokens, patches) go through:
forward 2·N·R; backward 2·N·R for the input's gradient where the input has one (all layers above the lowest trained one),
and 2·N·R for the weight's where it is trained. Hence the frozen base of a LoRA costs 4·N·R and full training 6·N·R. A pass
without gradients (a teacher, a rollout, statistics) costs its forward; with activation checkpointing it is paid twice.

It is what really runs that is counted, layer by layer: rows of memories and inquiries, references, generated tokens,
statistics before and after the task, padding. Left out: products of attention scores (4·L·width per token and layer, a
few percent), norms and activations, optimizer, merging of adapters, experts held in one tensor of three dimensions.
A forward pass with gradients is taken to have one backward pass. Evaluation is not training and is not counted.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, cast

import torch
from accelerate.utils import gather_object
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback

_WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Work(TrainerCallback):
    """Within its context, adds to `cost`: `flops`, and `passes` of the decoder over more than one token per row.

    Tokens that are generated one by one count in `flops` alone. As a callback of a trainer it knows where the steps end.

    Args:
        model: the base model, with LoRA already on it where it will be; adapters may be added, removed and switched.
        cost: where it counts; see `move_to`.

    Attributes:
        flops_of_steps: count when the last step was done.
    """

    def __init__(self, model: PreTrainedModel, cost: Counter[str] | None = None) -> None:
        self.cost: Counter[str] = Counter() if cost is None else cost
        self.flops_of_steps = 0
        self._model = model
        self._handles: list[Any] = []
        self._known: dict[tuple[Any, ...], int] = {}
        self._training = False

    def __enter__(self) -> Work:
        adapted = [module for module in self._model.modules() if isinstance(module, LoraLayer)]
        inner = {part for module in adapted for part in cast(nn.Module, module).modules() if part is not module}
        for module in self._model.modules():
            if isinstance(module, LoraLayer):
                self._handles.append(module.register_forward_pre_hook(self._adapted))
            elif isinstance(module, _WEIGHTED) and module not in inner:
                self._handles.append(module.register_forward_hook(self._plain))
        self._handles.append(self._model.get_decoder().register_forward_hook(self._pass))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def move_to(self, cost: Counter[str]) -> None:
        """Goes on counting in another place, from what has been counted so far."""
        cost.update(self.cost)
        self.cost = cost

    def facts(self, batches: int) -> dict[str, int]:
        """Returns what a ledger says of a task: everything in `cost`, with the FLOPs of all processes.

        Args:
            batches: micro-batches that were trained on this process; passes beyond one for each are extra.
        """
        found = {"flops": self.cost["flops"], "flops_after_steps": self.cost["flops"] - self.flops_of_steps}
        everyone = gather_object([found])
        other = {name: count for name, count in self.cost.items() if name not in ("flops", "passes")}
        passes = {"extra_forward_passes": self.cost["passes"] - batches}
        return other | passes | {name: sum(own[name] for own in everyone) for name in found}

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._training = True

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.flops_of_steps = self.cost["flops"]
        self._training = False
        self._known.clear()

    def _pass(self, decoder: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if output[0].shape[1] > 1:  # (batch, length, width)
            self.cost["passes"] += 1

    def _plain(self, module: Any, args: tuple[Any, ...], output: Tensor) -> None:
        key = (module, output.requires_grad, not args or args[0].requires_grad, _recomputing())
        work = self._known.get(key)
        if work is None:
            backward = key[1] and not key[3]
            work = 2 * _size(module) * (1 + backward * (key[2] + module.weight.requires_grad))
            self._keep(key, work)
        channels = output.shape[-1 if isinstance(module, nn.Linear) else 1]
        self.cost["flops"] += work * (output.numel() // max(1, channels))

    def _adapted(self, module: Any, args: tuple[Any, ...]) -> None:
        """The frozen base and the two factors of every adapter that is on; before the layer runs, as activation
        checkpointing leaves the last one in the middle."""
        inputs: Tensor = args[0]
        backward = torch.is_grad_enabled() and not _recomputing()
        names = () if module._disable_adapters else tuple(module._active_adapter)
        key = (module, inputs.requires_grad, backward, names)
        work = self._known.get(key)
        if work is None:
            work = 2 * _work_of(module, inputs.requires_grad, backward, names)
            self._keep(key, work)
        self.cost["flops"] += work * (inputs.numel() // max(1, inputs.shape[-1]))

    def _keep(self, key: tuple[Any, ...], work: int) -> None:
        """While steps are made, adapters and what is trained stay as they are."""
        if self._training:
            self._known[key] = work


def _work_of(layer: Any, given: bool, backward: bool, names: tuple[str, ...]) -> int:
    """Products per position of a layer with its adapters; `given`: its input has a gradient."""
    work = _size(layer.base_layer) * (1 + (given and backward))
    for name in names:
        if name in layer.lora_A:
            first, second = layer.lora_A[name], layer.lora_B[name]
            trained = (first.weight.requires_grad, second.weight.requires_grad)
            work += _size(first) * (1 + backward * (given + trained[0]))
            work += _size(second) * (1 + backward * ((given or trained[0]) + trained[1]))
    return work


def _size(module: Any) -> int:
    """Number of weights; those of quantised layers are packed, so it is not that of their tensor."""
    return module.in_features * module.out_features if isinstance(module, nn.Linear) else module.weight.numel()


def _recomputing() -> bool:
    """True within a backward pass: there activation checkpointing runs layers again whose backward has been counted."""
    return torch._C._current_graph_task_id() >= 0
