"""model_mix: average the weights before and after each task.

Idea: the straight line between the model before a task and the model after it is a path of good compromises.
Formula: W̃_t = W̃_{t−1} + strength · (W_t − W̃_{t−1}); the next task starts from W̃_t. It is spectral consolidation with
the rate `uniform`: every singular direction is scaled alike.
Stored per task: nothing beyond the consolidated adapter. Cost per step: 1×; per task one product per matrix.
Reference: the baseline of LLaVA-c (arXiv 2506.08666); WiSE-FT, Wortsman et al. 2021 (arXiv 2109.01903).
Fidelity: on full updates, exactly; WiSE-FT mixes with the zero-shot model, here it is the stage before.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mllm_cl.methods.base import Context, Method
from mllm_cl.models.adapters import TASK, adapter_deltas, write_update
from mllm_cl.spectral import strength_at


class ModelMix(Method):
    """Uniform consolidation.

    Args:
        strength: share of each task's update that is kept (alpha).
        schedule: how the strength depends on the stage; `inverse` with strength 1 is the mean of all models.
    """

    name = "model_mix"
    summary = "average the weights before and after each task (uniform consolidation)"
    adapters = "stacked"
    roles = frozenset({"consolidation"})

    def __init__(
        self,
        *,
        strength: Annotated[float, Field(ge=0)] = 0.5,
        schedule: Literal["constant", "inverse", "inverse_sqrt"] = "constant",
    ) -> None:
        self.strength, self.schedule = strength, schedule

    def end_task(self, ctx: Context) -> None:
        strength = strength_at(self.strength, self.schedule, ctx.index)
        updates = adapter_deltas(ctx.model, TASK)
        write_update(ctx.model, TASK, {name: update * strength for name, update in updates.items()})
