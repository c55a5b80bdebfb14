"""mica: write only into the output directions that the base uses least.

Idea: the minor left singular vectors of a weight are where its output hardly ever goes; there is room.
Formula: ΔW = B A with B = the `rank` left singular vectors of the smallest singular values of W_0, frozen; A starts at 0
and is trained.
Stored per task: nothing beyond the consolidated adapter. Cost per step: 1×, half the trainable parameters; per task one
eigendecomposition (out × out) per matrix. Reference: MiCA (arXiv 2604.01694; PEFT's `mica`). Fidelity: as there; every task
writes into the same directions. The base weights must be in floating point and stay untouched.
"""

from __future__ import annotations

import torch

from mllm_cl.methods._statistics import base_weight
from mllm_cl.methods.base import Context, Method
from mllm_cl.models.adapters import TASK, factors, lora_layers
from mllm_cl.spectral.subspace import minor_directions


class MiCA(Method):
    """Minor component adaptation."""

    name = "mica"
    summary = "fix B to the base's minor output directions, train A"
    adapters = "stacked"
    roles = frozenset({"initialisation"})

    def begin_task(self, ctx: Context) -> None:
        for _, layer in lora_layers(ctx.model):
            a, b = (factor.weight for factor in factors(layer, TASK))
            columns = minor_directions(base_weight(layer), b.shape[1])
            with torch.no_grad():
                a.zero_()
                b.zero_()[:, : columns.shape[1]] = columns  # fewer where the rank exceeds the layer
            b.requires_grad_(False)
