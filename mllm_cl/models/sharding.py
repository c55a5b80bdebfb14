"""FSDP2: the frozen weights of the language part lie in shards on all processes while a task is trained.

Only they are sharded: vision tower, bridge, embeddings and head stay whole, and so do the adapters, which are few. Hence
everything that reads, writes or optimizes adapters is what it is without shards, and their gradients are averaged by DDP.

Gathering is a collective operation: every process has to run the layers equally often. Where that is not so (evaluation,
the methods between tasks) the weights are `whole`; then the layers run without communication.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from peft import PeftModel
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor


class Shards:
    """The shards of one model over all processes; the weights are whole until `sharded` is entered.

    Args:
        model: with its adapters, on its device; every process has the same weights.
    """

    def __init__(self, model: PeftModel) -> None:
        base: Any = model.get_base_model()
        decoder = base.get_decoder()
        # a group of its own: gathers must not wait for gradients that DDP sends, in another order on each process
        group: Any = dist.new_group()
        mesh = DeviceMesh.from_group(group, next(model.parameters()).device.type)
        layers = decoder_layers(model)
        trained = {parameter for name, parameter in model.named_parameters() if ".lora_" in name}
        for layer in layers:
            fully_shard(layer, mesh=mesh, ignored_params=trained)
        kind = type(decoder)
        # the root holds no weights: it ties the layers together, so that each is gathered before it is reached
        fully_shard(decoder, mesh=mesh, ignored_params=set(decoder.parameters()))
        decoder.__class__ = kind  # by its class transformers knows which hidden states can be asked of it
        self._modules: list[FSDPModule] = layers  # type: ignore[assignment]  # `fully_shard` made them so
        names = [name for name, parameter in model.named_parameters() if isinstance(parameter, DTensor)]
        model._ddp_params_and_buffers_to_ignore = names  # type: ignore[assignment]  # DDP reads it
        self.stay_whole()

    @contextlib.contextmanager
    def sharded(self) -> Iterator[None]:
        """Within the context each layer is gathered for its own forward and backward pass only."""
        self._go_to_pieces()
        try:
            yield
        finally:
            self.stay_whole()

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """Within the context, inside of `sharded`, the weights are whole on every process."""
        self.stay_whole()
        try:
            yield
        finally:
            self._go_to_pieces()

    def stay_whole(self) -> None:
        """Gathers all weights; moving the model to a device, as a new trainer does, puts them in pieces."""
        self._free_after_use(False)
        for module in self._modules:
            module.unshard()

    def _go_to_pieces(self) -> None:
        self._free_after_use(True)
        for module in self._modules:
            module.reshard()

    def _free_after_use(self, free: bool) -> None:
        for module in self._modules:
            module.set_reshard_after_forward(free, recurse=False)
            module.set_reshard_after_backward(free, recurse=False)


def decoder_layers(model: PeftModel) -> list[nn.Module]:
    """Returns the layers of the language part, in order."""
    base: Any = model.get_base_model()
    return [layer for stack in _stacks(base.get_decoder()) for layer in stack]


def _stacks(decoder: nn.Module) -> Iterator[nn.ModuleList]:
    """The outermost lists of layers."""
    for child in decoder.children():
        if isinstance(child, nn.ModuleList):
            yield child
        else:
            yield from _stacks(child)
