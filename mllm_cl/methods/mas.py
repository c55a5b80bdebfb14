"""mas: memory aware synapses, importance from how much the output moves, without answers.

Idea: a weight matters if the model's output depends on it, whatever the right answer is.
Formula: as `ewc` with Ω_i = mean over examples of |∂ Σ_positions ‖z‖² / V / ∂θ_i|, z the logits at the target positions.
Stored: Ω and θ*, float32, twice the adapter. Cost per step: 1×; per task one pass over `samples` rows at batch size 1.
Reference: Aljundi et al. 2018 (arXiv 1711.09601). Fidelity: ‖f(x)‖² of the logits, as in the paper; the positions are those
of the answer, whose tokens are read as input but not as labels.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from mllm_cl.methods._importance import QuadraticPenalty, mean_over_examples
from mllm_cl.methods._terms import target_logits
from mllm_cl.methods.base import Context
from mllm_cl.models.adapters import DEFAULT, adapter_parameters


class MAS(QuadraticPenalty):
    """Memory aware synapses.

    Args:
        strength: λ.
        samples: training rows on which Ω is estimated.
        decay: share of the importance of earlier tasks that is kept; 1 sums all.
    """

    name = "mas"
    summary = "quadratic penalty weighted by the sensitivity of the output, label-free"

    def __init__(
        self,
        *,
        strength: Annotated[float, Field(ge=0)] = 1.0,
        samples: Annotated[int, Field(ge=1)] = 128,
        decay: Annotated[float, Field(gt=0, le=1)] = 1.0,
    ) -> None:
        super().__init__(strength=strength, decay=decay)
        self.samples = samples

    def end_task(self, ctx: Context) -> None:
        parameters = adapter_parameters(ctx.model, DEFAULT)
        self.consolidate(ctx, mean_over_examples(ctx, parameters, self.samples, output_size, torch.abs))


def output_size(ctx: Context, batch: dict[str, Any]) -> Tensor:
    """Σ over the target positions of the mean squared logit."""
    labels = batch["labels"]
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    return target_logits(ctx.model(**inputs).logits.float(), labels).pow(2).mean(dim=-1).sum()
