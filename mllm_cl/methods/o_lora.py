"""o_lora: learn every task in a subspace of inputs that is orthogonal to those of earlier tasks.

Idea: the rows of A span what a task reads; tasks that read different directions do not disturb each other.
Formula: L = CE + strength · Σ_layers Σ_{i<t} Σ |A_i A_tᵀ| + norm_strength · Σ_layers (‖A_t‖₂ + ‖B_t‖₂); earlier adapters
stay active in the forward pass (consolidated adapter).
Stored per task: its A as trained. Cost per step: 1×, one product (t·r × in) · (in × r) per layer.
Reference: Wang et al. 2023 (arXiv 2310.14152). Fidelity: as in the paper; the earlier A are stacked to one matrix. The
penalty is small beside the cross-entropy: its share is logged as `cl/o_lora`.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from mllm_cl.methods.base import WITHIN_STEPS, Context, Method, MethodState, TrainBatch
from mllm_cl.models.adapters import TASK, factors, lora_layers


class OLora(Method):
    """Orthogonal LoRA.

    Args:
        strength: λ1, of the overlap with earlier tasks.
        norm_strength: λ2, of the norms of the fresh factors.
    """

    name = "o_lora"
    summary = "keep each task's A orthogonal to those of earlier tasks"
    needs = frozenset({"adapter"})
    supports = WITHIN_STEPS
    adapters = "stacked"

    def __init__(
        self, *, strength: Annotated[float, Field(ge=0)] = 0.5, norm_strength: Annotated[float, Field(ge=0)] = 0.0
    ) -> None:
        self.strength, self.norm_strength = strength, norm_strength
        self.past: dict[str, Tensor] = {}  # module -> A of all earlier tasks (t·r, in)

    def loss_terms(self, ctx: Context, model: nn.Module, batch: TrainBatch, outputs: Any) -> dict[str, Tensor]:
        overlap, norms = [], []
        for module, layer in lora_layers(ctx.model):
            a, b = (factor.weight for factor in factors(layer, TASK))
            if module in self.past and self.strength:
                self.past[module] = self.past[module].to(a.device)
                overlap.append((self.past[module] @ a.float().mT).abs().sum())  # (t·r, in) @ (in, r)
            if self.norm_strength:
                norms.append(a.float().norm() + b.float().norm())
        terms = {}
        if overlap:
            terms["o_lora"] = self.strength * torch.stack(overlap).sum() * batch.share("step")
        if norms:
            terms["o_lora_norm"] = self.norm_strength * torch.stack(norms).sum() * batch.share("step")
        return terms

    def end_task(self, ctx: Context) -> None:
        for module, layer in lora_layers(ctx.model):
            own = factors(layer, TASK)[0].weight.detach().float()
            past = [self.past[module].to(own.device)] if module in self.past else []
            self.past[module] = torch.cat([*past, own.clone()])

    def state_dict(self) -> MethodState:
        return MethodState(tensors=dict(self.past))

    def load_state_dict(self, state: MethodState) -> None:
        self.past = dict(state.tensors)
