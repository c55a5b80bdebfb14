"""spectral_consolidation: SAC, the first half of LLaVA-c.

Idea: what a task has learnt is an update with few strong and many weak directions; keep its singular vectors and scale
the singular values before the update joins the consolidated adapter.
Formula: D = U diag(σ) Vᵀ (the fresh adapter's exact update), W_t = W_{t−1} + U diag(c(σ) σ) Vᵀ; c ≡ strength is
ModelMix.
Stored per task: nothing beyond the consolidated adapter. Cost per step: 1×; per task one small SVD per matrix.
Reference: LLaVA-c (arXiv 2506.08666). Fidelity: follows the published description as far as it is public (spectral
scaling of the per-task update); the rate function is our choice and may differ from the authors'.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mllm_cl.errors import MethodError, SpectralError
from mllm_cl.methods.base import Context, Method
from mllm_cl.models.adapters import DEFAULT, TASK, adapter_deltas, write_update
from mllm_cl.spectral import consolidate_many, strength_at
from mllm_cl.spectral.rates import find_rate


class SpectralConsolidation(Method):
    """Spectral-aware consolidation.

    Args:
        rate: how the rate depends on the singular value; see `mllm_cl.spectral.RATES`.
        strength: share of the update's norm that is kept (alpha).
        match: which norm of the update the strength refers to.
        schedule: how the strength depends on the stage.
        granularity: what "largest singular value", quantiles and means are taken over.
        cap: largest rate of any direction.
        rate_options: parameters of the rate (`gamma`, `tau`, ...).
    """

    name = "spectral_consolidation"
    summary = "SAC of LLaVA-c: scale the singular values of each task's update before consolidating it"
    adapters = "stacked"

    def __init__(
        self,
        *,
        rate: str = "power_up",
        strength: Annotated[float, Field(ge=0)] = 0.9,
        match: Literal["none", "fro", "nuclear", "spectral"] = "fro",
        schedule: Literal["constant", "inverse", "inverse_sqrt"] = "constant",
        granularity: Literal["matrix", "layer_type", "global"] = "matrix",
        cap: Annotated[float, Field(gt=0)] | None = None,
        rate_options: dict[str, float] | None = None,
    ) -> None:
        self.rate, self.strength, self.match, self.schedule = rate, strength, match, schedule
        self.granularity, self.cap, self.rate_options = granularity, cap, dict(rate_options or {})
        try:
            find_rate(rate, dict(self.rate_options))
        except SpectralError as error:
            raise MethodError(
                f"methods.spectral_consolidation: {error.given}", expected=error.expected, fix=error.fix
            ) from error

    def end_task(self, ctx: Context) -> None:
        consolidated = consolidate_many(
            adapter_deltas(ctx.model, TASK),
            self.rate,
            strength=strength_at(self.strength, self.schedule, ctx.index),
            match=self.match,
            cap=self.cap,
            previous=adapter_deltas(ctx.model, DEFAULT),
            granularity=self.granularity,
            **self.rate_options,
        )
        write_update(ctx.model, TASK, consolidated)
