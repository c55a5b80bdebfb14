"""sd_lora: directions of past tasks stay, only how far the model goes along each is learnt again (SD-LoRA).

Idea: a LoRA update is a direction and a magnitude; past directions are worth keeping as they are, their magnitudes are
not.
Formula: ΔW = Σ_{i<t} a_i B_i A_i / (‖B_i‖ ‖A_i‖) + a_t s B_t A_t, Frobenius norms, one magnitude per task and layer. A_t,
B_t and all a are trained, past A_i and B_i never again. a_t starts at 1 and a_i at a_i s ‖B_i‖ ‖A_i‖ as task i left it,
so that a task starts from the function the last one ended with; trained is the factor by which each has changed.
Stored: the pairs of all tasks and their magnitudes, beside the adapter that is deployed: their sum, which is a plain
LoRA, needs no router and merges. It is cut back to `model.max_rank` (the error is in the ledger), the pairs are not: give
tasks × r for none. Cost per step: as stacked adapters of rank t × r.
Reference: Wu et al. 2025, SD-LoRA (ICLR, arXiv 2501.13198; WuYichen-97/SD-Lora-CL). Fidelity: the paper's formula, for
image classes there; where magnitudes start is ours. Not its two variants that shrink or merge the rank of later tasks.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mllm_cl.methods._experts import gate_adapter, spread
from mllm_cl.methods.base import WITHIN_STEPS, Context, Method, MethodState
from mllm_cl.models.adapters import DEFAULT, TASK, add_adapter, factors, lora_layers, remove_adapter, set_active
from mllm_cl.models.gather import write_full
from mllm_cl.models.lora_folders import plain_config

A, B, MAGNITUDES = "directions_a/", "directions_b/", "magnitudes/"


class SDLoRA(Method):
    """SD-LoRA."""

    name = "sd_lora"
    summary = "past directions frozen, their magnitudes learnt again with each new task"
    supports = WITHIN_STEPS
    adapters = "stacked"
    roles = frozenset({"consolidation"})

    def __init__(self) -> None:
        self.directions_a: dict[str, Tensor] = {}  # module -> (t × r, in), every r rows of norm 1
        self.directions_b: dict[str, Tensor] = {}  # module -> (out, t × r), every r columns of norm 1
        self.magnitudes: dict[str, Tensor] = {}  # module -> (t,)
        self._changed: dict[str, nn.Parameter] = {}  # module -> (t,) factors, the newest last
        self._handles: list[RemovableHandle] = []

    def begin_task(self, ctx: Context) -> None:
        layers = dict(lora_layers(ctx.model))
        past = len(next(iter(self.magnitudes.values()), ()))
        device = ctx.model.device
        self._changed = {module: nn.Parameter(torch.ones(past + 1, device=device)) for module in layers}
        self._handles = gate_adapter(ctx.model, TASK, lambda m, x, states, scaled: states * self._changed[m][-1])
        if not past:
            return
        rank = len(next(iter(self.directions_a.values())))
        config = ctx.model.peft_config[TASK]
        assert isinstance(config, LoraConfig)
        remove_adapter(ctx.model, DEFAULT)
        add_adapter(ctx.model, DEFAULT, plain_config(config, rank), seed=0)
        with torch.no_grad():
            for module, layer in layers.items():
                lora_a, lora_b = factors(layer, DEFAULT)
                write_full(lora_a.weight, self.directions_a[module])
                write_full(lora_b.weight, self.directions_b[module] * spread(self.magnitudes[module], rank))
        set_active(ctx.model, [DEFAULT, TASK])

        def past_gate(module: str, inputs: Tensor, states: Tensor, scaled: Tensor) -> Tensor:
            if TASK not in layers[module].active_adapters:  # the last stage as reference
                return states
            return states * spread(self._changed[module][:-1], states.shape[-1])

        self._handles += gate_adapter(ctx.model, DEFAULT, past_gate)

    def parameters(self, ctx: Context) -> Mapping[str, nn.Parameter]:
        return self._changed

    @torch.no_grad()
    def end_task(self, ctx: Context) -> None:
        for handle in self._handles:
            handle.remove()
        for module, layer in lora_layers(ctx.model):
            changed = self._changed[module].detach()
            lora_a, lora_b = (factor.weight for factor in factors(layer, TASK))
            lora_b *= changed[-1]
            own_a, own_b, size = direction(lora_a, lora_b, layer.scaling[TASK])
            if module in self.magnitudes:
                past = factors(layer, DEFAULT)[1].weight
                past *= spread(changed[:-1], past.shape[1])
                last = self.magnitudes[module].to(size) * changed[:-1]
                self.directions_a[module] = torch.cat([self.directions_a[module].to(own_a), own_a])
                self.directions_b[module] = torch.cat([self.directions_b[module].to(own_b), own_b], dim=1)
                self.magnitudes[module] = torch.cat([last, size])
            else:
                self.directions_a[module], self.directions_b[module], self.magnitudes[module] = own_a, own_b, size
        self._changed = {}

    def state_dict(self) -> MethodState:
        kinds = {A: self.directions_a, B: self.directions_b, MAGNITUDES: self.magnitudes}
        return MethodState({kind + module: tensor for kind, own in kinds.items() for module, tensor in own.items()})

    def load_state_dict(self, state: MethodState) -> None:
        self.directions_a, self.directions_b, self.magnitudes = (
            {key.removeprefix(kind): tensor for key, tensor in state.tensors.items() if key.startswith(kind)}
            for kind in (A, B, MAGNITUDES)
        )


def direction(lora_a: Tensor, lora_b: Tensor, scaling: float) -> tuple[Tensor, Tensor, Tensor]:
    """Returns A / ‖A‖, B / ‖B‖ and the magnitude s ‖A‖ ‖B‖ (1,); a zero factor stays zero."""
    norms = [factor.norm() for factor in (lora_a, lora_b)]
    own_a, own_b = (factor / norm.clamp_min(1e-30) for factor, norm in zip((lora_a, lora_b), norms))
    return own_a.clone(), own_b.clone(), (scaling * norms[0] * norms[1]).reshape(1)
