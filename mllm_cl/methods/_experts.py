"""Experts as slices of one LoRA adapter's rank, and the gates on them in the forward pass.

    y = W x + s Σ_e g_e(x) B_e A_e x = W x + s B (g(x) ⊙ A x)

A (R, in) holds the experts' A one below the other, B (out, R) their B side by side, and every gate acts on the R / E entries of
A x that are its expert's: two matrix products whatever the number of experts, and one adapter as PEFT knows it. The gates are
hooks on `lora_A` of that adapter, so without the adapter the base is what it was, to the bit.

Notation: N rows, L tokens, E experts, R rank, T tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mllm_cl.errors import MethodError
from mllm_cl.methods._layers import decoder_blocks
from mllm_cl.methods._live import frozen, restore, revived, trained
from mllm_cl.methods.base import WITHIN_STEPS, Context, Method, MethodState, RouteBatch
from mllm_cl.models.adapters import DEFAULT, PREVIOUS, adapter_names, factors, lora_layers

Gate = Callable[[str, Tensor, Tensor, Tensor], Tensor]
"""Module, its input (..., in), A x (..., R), s B (out, R), all float32 -> what B is given instead of A x."""


def gate_adapter(model: PeftModel, adapter: str, gate: Gate) -> list[RemovableHandle]:
    """Puts `gate` between A and B of an adapter in every layer; returns what takes the gates away again."""
    handles = []
    for module, layer in lora_layers(model):
        if adapter in layer.lora_A:
            handles += _gate_layer(layer, adapter, partial(gate, module))
    return handles


def _gate_layer(layer: LoraLayer, adapter: str, gate: Callable[..., Tensor]) -> list[RemovableHandle]:
    seen: list[Tensor] = []

    def before(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen[:] = [args[0]] if adapter in layer.active_adapters and not layer.disable_adapters else []

    def after(_: nn.Module, args: tuple[Tensor, ...], states: Tensor) -> Tensor:
        inputs = seen.pop()  # as the layer got them, before the adapter's dropout
        scaled = factors(layer, adapter)[1].weight * layer.scaling[adapter]
        with torch.autocast(states.device.type, enabled=False):
            return gate(inputs.float(), states.float(), scaled.float()).to(states.dtype)

    listening = layer.register_forward_pre_hook(before)  # type: ignore[attr-defined]
    return [listening, factors(layer, adapter)[0].register_forward_hook(after)]


def spread(gates: Tensor, rank: int) -> Tensor:
    """Repeats every expert's gate over its entries of the rank: (..., E) -> (..., R)."""
    return gates.repeat_interleave(rank // gates.shape[-1], dim=-1)


class Experts(Method):
    """What mixtures of experts share: one adapter that all tasks continue, gates that are learnt beside it.

    A subclass says what is trained (`prepare`, `trains`) and how it acts (`gate`).

    Args:
        experts: E; must divide the rank.
    """

    adapters = "one"
    needs = frozenset({"continued"})
    supports = WITHIN_STEPS
    roles = frozenset({"routing"})

    def __init__(self, experts: int) -> None:
        self.experts = experts
        self.gates: dict[str, Tensor] = {}  # what has been learnt up to the last task
        self._live: dict[str, nn.Parameter] = {}
        self._gated: nn.Module | None = None
        self._handles: dict[str, list[RemovableHandle]] = {}

    # what a subclass says ----------------------------------------------------------------------------------------------

    def prepare(self, ctx: Context) -> None:
        """Adds to `gates` what this task needs: name -> what it starts from. Here one router (E, in) per layer."""
        if not self.gates:
            for module, layer in lora_layers(ctx.model):
                self.gates[module] = first_router(self.experts, layer.in_features, ctx.rng)

    def gate(self, own: Mapping[str, Tensor], module: str, inputs: Tensor, states: Tensor, scaled: Tensor) -> Tensor:
        """As `Gate`, from the gates `own` by name."""
        raise NotImplementedError

    def trains(self, name: str, index: int) -> bool:
        """True if the gate `name` is trained in task number `index`."""
        return True

    # hooks ---------------------------------------------------------------------------------------------------------------

    def begin_task(self, ctx: Context) -> None:
        rank = next(factors(layer, DEFAULT)[0].out_features for _, layer in lora_layers(ctx.model))
        if rank % self.experts:
            raise MethodError(
                f"methods.{self.name}: rank {rank} cannot be split over {self.experts} experts.",
                expected="a rank that is a multiple of the experts",
                fix=f"set model.lora.r to a multiple of {self.experts}, or `experts` to a divisor of {rank}.",
            )
        self.prepare(ctx)
        self._live = {}
        self._attach(ctx.model)
        if PREVIOUS in adapter_names(ctx.model):
            last = {name: value.detach().clone() for name, value in self._live.items()}
            self._gate(ctx.model, PREVIOUS, partial(self.gate, last))

    def parameters(self, ctx: Context) -> Mapping[str, nn.Parameter]:
        return trained(self._live, lambda name: self.trains(name, ctx.index))

    def end_task(self, ctx: Context) -> None:
        self.gates = frozen(self._live)

    def route(self, ctx: Context, batch: RouteBatch) -> list[dict[str, float]] | None:
        """The gates are inside the layers: nothing is left to choose, but they must be there."""
        self._attach(ctx.model)
        return None

    def _attach(self, model: PeftModel) -> None:
        """Puts the gates on the adapter, unless this very adapter has them already."""
        if not self._live:
            self._live = revived(self.gates, next(model.parameters()).device)
        place = factors(next(lora_layers(model))[1], DEFAULT)[0]
        if self._gated is not place:
            self._gate(model, DEFAULT, lambda *args: self.gate(self._live, *args))
            self._gated = place

    def _gate(self, model: PeftModel, adapter: str, gate: Gate) -> None:
        for handle in self._handles.get(adapter, ()):  # of the adapter that had this name before
            handle.remove()
        self._handles[adapter] = gate_adapter(model, adapter, gate)

    def state_dict(self) -> MethodState:
        return MethodState({f"gate/{name}": tensor for name, tensor in self.gates.items()}, {"gated": True})

    def load_state_dict(self, state: MethodState) -> None:
        found = {name.removeprefix("gate/"): t for name, t in state.tensors.items() if name.startswith("gate/")}
        self.gates = found
        if found.keys() != self._live.keys():
            self._live = {}
        restore(self._live, found)


def language_only(ctx: Context, name: str) -> None:
    """Refuses adapters outside of the language model, whose layers do not see one row per sample.

    Raises:
        MethodError: there are some.
    """
    blocks = decoder_blocks(ctx.model)
    others = [module for module, _ in lora_layers(ctx.model) if module not in blocks]
    if others:
        raise MethodError(
            f"methods.{name}: the gates of a row reach the language model only, and there is LoRA on {others[0]}.",
            fix="remove model.train_vision, model.train_bridge and other target_modules.",
        )


def first_router(experts: int, features: int | None, rng: torch.Generator) -> Tensor:
    """Uniform in ±1/√features, as a linear layer of torch starts: (E, features)."""
    assert features is not None  # PEFT knows the sizes of linear layers
    return (torch.rand(experts, features, generator=rng) * 2 - 1) / features**0.5
