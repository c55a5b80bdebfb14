"""ewc: elastic weight consolidation, a quadratic penalty that holds important weights of the adapter.

Idea: after each task measure how much the likelihood depends on each weight; later, pay for moving those that matter.
Formula: L = CE + strength · ½ Σ_i Ω_i (θ_i − θ*_i)², Ω_i = mean over examples of (∂ log p(y|x)/∂θ_i)², one example at a
time; online form Ω ← decay · Ω + Ω_t with one anchor θ* (Schwarz et al. 2018). Ω_t is normalised to mean 1 after each
task, so that `strength` keeps its meaning over models.
Stored: Ω and θ*, float32, twice the adapter. Cost per step: 1×; per task one pass over `samples` rows at batch size 1.
Reference: Kirkpatrick et al. 2017 (arXiv 1612.00796). TRACE, LIBERO and Continual-NExT square the gradient of a batch
mean, which shrinks Ω by the batch size; Prism reads gradients that DeepSpeed has freed, so its penalty is zero.
Fidelity: empirical Fisher (answers from the data); the online form, whose sum over tasks (decay 1) has the same gradient
as one penalty per task as long as the anchors are close, and one anchor to store.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from mllm_cl.methods._importance import QuadraticPenalty, fisher_information
from mllm_cl.methods.base import Context
from mllm_cl.models.adapters import DEFAULT, adapter_parameters


class EWC(QuadraticPenalty):
    """Elastic weight consolidation on the continued adapter.

    Args:
        strength: λ.
        samples: training rows on which Ω is estimated.
        decay: γ; 1 sums the importance of all tasks.
    """

    name = "ewc"
    summary = "quadratic penalty weighted by the per-example Fisher information"

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
        self.consolidate(ctx, fisher_information(ctx, adapter_parameters(ctx.model, DEFAULT), self.samples))
