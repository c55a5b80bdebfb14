"""n_lora: make every task's update sparse, so that updates of different tasks rarely meet.

Idea: two updates collide where both are not zero; few non-zeros, few collisions.
Formula: L = CE + strength · mean over matrices and rows of ‖row of ΔW_t‖₁, ΔW_t = scaling · B_t A_t.
Stored per task: nothing beyond the consolidated adapter. Cost per step: 1×, plus B A per layer, 64 rows at a time.
Reference: Yang et al. 2024 (arXiv 2410.10179). Fidelity: `paper` penalises ΔW = B A as the paper writes; `released` is ‖A B‖₁
of the published code, a (rank, rank) matrix that exists only where in = out and is not the update: kept for comparison.
The paper sums over all entries; the mean over rows keeps `strength` comparable between models.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mllm_cl.methods._terms import mean_in_chunks
from mllm_cl.methods.base import WITHIN_STEPS, Context, Method, TrainBatch
from mllm_cl.models.adapters import TASK, factors, lora_layers


class NLora(Method):
    """Non-collision LoRA.

    Args:
        strength: λ.
        variant: `paper` or `released`.
    """

    name = "n_lora"
    summary = "L1 penalty on each task's full update"
    needs = frozenset({"adapter"})
    supports = WITHIN_STEPS
    adapters = "stacked"

    def __init__(
        self, *, strength: Annotated[float, Field(ge=0)] = 0.4, variant: Literal["paper", "released"] = "paper"
    ) -> None:
        self.strength, self.variant = strength, variant

    def loss_terms(self, ctx: Context, model: nn.Module, batch: TrainBatch, outputs: Any) -> dict[str, Tensor]:
        if self.strength == 0:
            return {}
        norms = []
        for _, layer in lora_layers(ctx.model):
            a, b = (factor.weight.float() for factor in factors(layer, TASK))
            if self.variant == "paper":
                norms.append(layer.scaling[TASK] * row_norm(a, b))
            elif a.shape[1] == b.shape[0]:
                norms.append((a @ b).abs().sum())
        return {"n_lora": self.strength * torch.stack(norms).mean() * batch.share("step")} if norms else {}


def row_norm(a: Tensor, b: Tensor) -> Tensor:
    """Mean over the rows of B A of their L1 norm: (rank, in), (out, rank) -> scalar; B A is never formed as a whole."""
    return mean_in_chunks(lambda rows: (rows @ a).abs().sum(dim=-1), (b,))
