"""clora: keep the factors of the update out of fixed random subspaces.

Idea: if the update cannot use some directions at all, what the base does with them is left as it was.
Formula: L = CE + strength · mean over matrices of ½ (‖A V‖² + ‖Uᵀ B‖²), U and V fixed random matrices with `width`
orthonormal columns.
Stored per task: nothing, U and V come from `seed`. Cost per step: 1×, two products per layer.
Reference: Lu et al. 2024, Controlled LoRA (arXiv 2410.16801). Fidelity: as in the paper, except that matrices of the same size
share their U and V, and that `width` is at most half of the dimension (all of it would be plain weight decay).
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from mllm_cl.methods.base import WITHIN_STEPS, Context, Method, TrainBatch
from mllm_cl.models.adapters import TASK, factors, lora_layers


class CLora(Method):
    """Controlled LoRA.

    Args:
        strength: λ.
        width: k, directions that are closed on either side.
        seed: of the directions.
    """

    name = "clora"
    summary = "penalise what the factors do in fixed random subspaces"
    needs = frozenset({"adapter"})
    supports = WITHIN_STEPS
    adapters = "stacked"

    def __init__(
        self,
        *,
        strength: Annotated[float, Field(ge=0)] = 1.0,
        width: Annotated[int, Field(ge=1)] = 512,
        seed: Annotated[int, Field(ge=0)] = 0,
    ) -> None:
        self.strength, self.width, self.seed = strength, width, seed
        self._closed: dict[int, Tensor] = {}

    def loss_terms(self, ctx: Context, model: nn.Module, batch: TrainBatch, outputs: Any) -> dict[str, Tensor]:
        if self.strength == 0:
            return {}
        terms = []
        for _, layer in lora_layers(ctx.model):
            a, b = (factor.weight.float() for factor in factors(layer, TASK))
            inputs, outputs_ = self.closed(a.shape[1], a.device), self.closed(b.shape[0], b.device)
            terms.append(0.5 * ((a @ inputs).square().sum() + (outputs_.mT @ b).square().sum()))
        return {"clora": self.strength * torch.stack(terms).mean() * batch.share("step")}

    def closed(self, size: int, device: torch.device) -> Tensor:
        """The closed directions of a dimension: (size, k) with orthonormal columns."""
        if size not in self._closed or self._closed[size].device != device:
            generator = torch.Generator().manual_seed(self.seed * 100_003 + size)
            random = torch.randn(size, max(1, min(self.width, size // 2)), generator=generator)
            self._closed[size] = torch.linalg.qr(random).Q.to(device)
        return self._closed[size]
