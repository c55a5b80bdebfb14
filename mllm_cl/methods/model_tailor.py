"""model_tailor: keep few entries of what a task changed, and let them make up for the others.

Idea: a tenth of the changed weights carries the task; the rest goes back to what it was, which protects older abilities.
Formula: keep the `keep` entries with the largest mix · z(|D|) + (1 − mix) · z(W² / U_jj²), H⁻¹ = UᵀU, H = mean x xᵀ;
hand the effect of each dropped entry on the layer's output to the later columns (OBS).
Stored per task: nothing beyond the consolidated adapter. Cost per step: 1×; per task one forward pass over `samples` rows
and per matrix one Cholesky (in × in, all layers at once in memory) and one sweep.
Reference: Zhu et al. 2024 (arXiv 2402.12048). Fidelity: as in the paper; applied to each task's update relative to the
stage before. The released code adds the compensation instead of subtracting it (the output error then grows) and
treats decoder layers 20 to 31 only. The sparse update is cut to `model.max_rank` (`merge_truncation_error` in the ledger).
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field

from mllm_cl.methods._statistics import base_weight, sketch_inputs
from mllm_cl.methods.base import Context, Method
from mllm_cl.models.adapters import DEFAULT, TASK, adapter_deltas, lora_layers, write_deltas
from mllm_cl.spectral.compensate import tailored
from mllm_cl.spectral.merges import limited


class ModelTailor(Method):
    """Model Tailor.

    Args:
        keep: share of the entries of a task's update that stays.
        mix: weight of the size of the change in the score; the rest is the sensitivity of the output.
        samples: training rows whose layer inputs make H.
        damping: of H, times the mean of its diagonal.
    """

    name = "model_tailor"
    summary = "keep a tenth of each task's changes and compensate for the rest"
    adapters = "stacked"
    roles = frozenset({"consolidation"})

    def __init__(
        self,
        *,
        keep: Annotated[float, Field(gt=0, le=1)] = 0.1,
        mix: Annotated[float, Field(ge=0, le=1)] = 0.5,
        samples: Annotated[int, Field(ge=1)] = 128,
        damping: Annotated[float, Field(gt=0)] = 0.01,
    ) -> None:
        self.keep, self.mix, self.samples, self.damping = keep, mix, samples, damping

    def end_task(self, ctx: Context) -> None:
        moments = sketch_inputs(ctx, self.samples, width=2**31)
        past, fresh = adapter_deltas(ctx.model, DEFAULT), adapter_deltas(ctx.model, TASK)
        kept, worst = {}, 0.0
        for module, layer in lora_layers(ctx.model):
            before = base_weight(layer) + past[module].dense().float()
            sparse = tailored(
                before, fresh[module].dense().float(), moments.of(module),
                keep=self.keep, mix=self.mix, damping=self.damping,
            )  # fmt: skip
            kept[module], error = limited(sparse, ctx.max_rank, torch.float32)
            worst = max(worst, error)
        ctx.cost["merge_truncation_error"] = worst  # type: ignore[assignment]
        write_deltas(ctx.model, TASK, kept, max(1, *(update.rank for update in kept.values())))
