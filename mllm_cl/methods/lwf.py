"""lwf: learning without forgetting, distillation from the previous stage on the current inputs.

Idea: while learning task t, keep answering its inputs as the model of stage t−1 would.
Formula: L = CE + strength · T² · mean over target positions of KL(p_{t−1}^{1/T} ‖ p_t^{1/T}).
With `top_k`, p_{t−1} is kept for its k most likely tokens only and all others are one further outcome (a lower bound of
the divergence). Either way the divergence is taken a few positions at a time and no further (N, V) tensor is kept.
Stored per task: nothing (the previous stage is the frozen consolidated adapter, or one frozen copy of the adapter).
Cost per step: one further forward pass without gradients, about 1.5× (of a full fine-tuning 1.33×); nothing at the first task.
Reference: Li and Hoiem 2016 (arXiv 1606.09282). Fidelity: the token distributions at the target positions take the place of
the old tasks' heads, and there is no warm-up of a new head. TRACE's released LwF passes teacher and student the wrong way
round and caches teacher logits by step number although rows are shuffled; here both come from the same batch.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field
from torch import Tensor, nn

from mllm_cl.methods._terms import distillation, target_logits, top_k_distillation, top_log_probabilities
from mllm_cl.methods.base import EVERY_LAUNCHER, Context, Method, TrainBatch


class LwF(Method):
    """Learning without forgetting.

    Args:
        strength: weight of the distillation.
        temperature: T; larger looks further down the reference's ranking.
        top_k: tokens of the reference that are kept per position; all when not given.
    """

    name = "lwf"
    summary = "distil the previous stage on the current inputs"
    needs = frozenset({"previous"})
    supports = EVERY_LAUNCHER

    def __init__(
        self,
        *,
        strength: Annotated[float, Field(ge=0)] = 1.0,
        temperature: Annotated[float, Field(gt=0)] = 2.0,
        top_k: Annotated[int, Field(ge=1)] | None = None,
    ) -> None:
        self.strength, self.temperature, self.top_k = strength, temperature, top_k

    def loss_terms(self, ctx: Context, model: nn.Module, batch: TrainBatch, outputs: Any) -> dict[str, Tensor]:
        if ctx.index == 1 or self.strength == 0:
            return {}
        labels = batch.inputs["labels"]
        inputs = {name: value for name, value in batch.inputs.items() if name != "labels"}
        with ctx.reference("previous"):
            reference = target_logits(ctx.model(**inputs).logits, labels)
        current = target_logits(outputs.logits, labels)
        if not len(current):  # a micro-batch of ignored rows only
            return {"lwf": outputs.logits.sum() * 0.0}
        if self.top_k is None:
            term = distillation(current, reference, self.temperature)
        else:
            kept = top_log_probabilities(reference / self.temperature, self.top_k)
            term = top_k_distillation(current, *kept, self.temperature)
        return {"lwf": self.strength * term * batch.share("tokens")}
