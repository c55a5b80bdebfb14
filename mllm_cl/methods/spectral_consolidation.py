"""spectral_consolidation: SAC, the first half of LLaVA-c.

Idea: what a task has learnt is an update with few strong and many weak directions; keep its singular vectors and scale
the singular values before the update joins the consolidated adapter. By default all alike, to 0.9 of what they were: with
inquiries in the loop that was measured to be better than rates that favour strong or weak ones (docs/llava_c.md).
Formula: D = U diag(σ) Vᵀ (the task's exact update), W_t = W_{t−1} + U diag(c(σ) σ) Vᵀ; c ≡ strength is ModelMix.
D is a fresh adapter's update, or what a continued adapter has changed; the latter is cut back to its rank, and the
relative error of that is logged. Bridge and vision tower, where they are trained, have a rate of their own.
Stored per task: nothing beyond the consolidated adapter. Cost per step: 1×; per task one small SVD per matrix.
Reference: LLaVA-c (arXiv 2506.08666). Fidelity: follows the published description as far as it is public (spectral
scaling of the per-task update); the rate function is our choice, selected by measurement (docs/llava_c.md), and may
differ from the authors'.
"""

from __future__ import annotations

import logging
from typing import Annotated, Any, Literal, cast

from pydantic import Field
from transformers import PreTrainedModel

from mllm_cl.errors import MethodError, SpectralError
from mllm_cl.methods.base import Context, Method
from mllm_cl.models.adapters import DEFAULT, PREVIOUS, TASK, adapter_deltas, write_update
from mllm_cl.models.parts import part_names
from mllm_cl.spectral import LowRankDelta, consolidate_many, strength_at
from mllm_cl.spectral.rates import find_rate

logger = logging.getLogger(__name__)


class SpectralConsolidation(Method):
    """Spectral-aware consolidation.

    Args:
        rate: how the rate depends on the singular value; see `mllm_cl.spectral.RATES`.
        strength: share of the update's norm that is kept (alpha). Beside `inquiry_regularization`, which keeps what was
            learnt by itself, 1.0 is best (docs/llava_c.md); alone less.
        match: which norm of the update the strength refers to.
        schedule: how the strength depends on the stage.
        granularity: what "largest singular value", quantiles and means are taken over.
        cap: largest rate of any direction.
        rate_options: parameters of the rate (`gamma`, `tau`, ...).
        other_rate: rate of the matrices outside the language part; `uniform` mixes them with what they were.
        adapter: a `fresh` adapter per task, or one `continued` adapter over all tasks.
    """

    name = "spectral_consolidation"
    summary = "SAC of LLaVA-c: scale the singular values of each task's update before consolidating it"
    roles = frozenset({"consolidation"})

    def __init__(
        self,
        *,
        rate: str = "uniform",
        strength: Annotated[float, Field(ge=0)] = 0.9,
        match: Literal["none", "fro", "nuclear", "spectral"] = "fro",
        schedule: Literal["constant", "inverse", "inverse_sqrt"] = "constant",
        granularity: Literal["matrix", "layer_type", "global"] = "matrix",
        cap: Annotated[float, Field(gt=0)] | None = None,
        rate_options: dict[str, float] | None = None,
        other_rate: str = "uniform",
        adapter: Literal["fresh", "continued"] = "fresh",
    ) -> None:
        self.rate, self.strength, self.match, self.schedule = rate, strength, match, schedule
        self.granularity, self.cap = granularity, cap
        self.rate_options: dict[str, Any] = dict(rate_options or {})
        self.other_rate = other_rate
        self.adapters = "stacked" if adapter == "fresh" else "one"
        self.needs = frozenset() if adapter == "fresh" else frozenset({"previous"})
        try:
            find_rate(rate, dict(self.rate_options))
            find_rate(other_rate, {})
        except SpectralError as error:
            raise MethodError(
                f"methods.spectral_consolidation: {error.given}", expected=error.expected, fix=error.fix
            ) from error

    def end_task(self, ctx: Context) -> None:
        if self.adapters == "stacked":
            updates, before = adapter_deltas(ctx.model, TASK), adapter_deltas(ctx.model, DEFAULT)
            write_update(ctx.model, TASK, self._consolidated(ctx, updates, before))
            return
        now, before = adapter_deltas(ctx.model, DEFAULT), adapter_deltas(ctx.model, PREVIOUS)
        changes = {name: now[name] + before[name] * -1.0 for name in now}
        kept = self._consolidated(ctx, changes, before)
        cut = {name: (before[name] + update).truncate(rank=now[name].rank) for name, update in kept.items()}
        logger.info("continued adapter cut back: largest relative error %.3g", max(error for _, error in cut.values()))
        write_update(ctx.model, DEFAULT, {name: update for name, (update, _) in cut.items()})

    def _consolidated(
        self, ctx: Context, updates: dict[str, LowRankDelta], before: dict[str, LowRankDelta]
    ) -> dict[str, LowRankDelta]:
        """The part of the updates that is taken over, language part and the rest each by its rate."""
        base = cast(PreTrainedModel, ctx.model.get_base_model())
        others = tuple(f"{name}." for names in part_names(base).values() for name in names)
        language = {name: update for name, update in updates.items() if not name.startswith(others)}
        rest = {name: update for name, update in updates.items() if name not in language}
        strength = strength_at(self.strength, self.schedule, ctx.index)
        settings: dict[str, Any] = {
            "strength": strength,
            "match": self.match,
            "cap": self.cap,
            "granularity": self.granularity,
        }
        kept = consolidate_many(language, self.rate, previous=before, **settings, **self.rate_options)
        if rest:
            kept |= consolidate_many(rest, self.other_rate, previous=before, **settings)
        return kept
