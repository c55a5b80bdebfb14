"""lora_null: start A in the directions that general inputs do not use.

Idea: an update that is blind to what general inputs look like cannot change how they are answered.
Formula: A = the `rank` eigenvectors of the smallest eigenvalues of C = mean x xᵀ over general rows (as rows), B = 0; with
`freeze` only B is trained, so that the update stays in their span.
Stored per task: nothing beyond the consolidated adapter. Cost per step: 1×; per task one forward pass over `samples` general
rows and one eigendecomposition (in × in) per distinct input.
Reference: LoRA-Null, Tang et al. 2025 (arXiv 2503.02659). Fidelity: there the base gives up the part that the adapter starts
with; the base is never written here, so B starts at 0. `freeze` is its variant 2.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field

from mllm_cl.methods._general import BUILT_IN, check_source, read_source
from mllm_cl.methods._statistics import fix_a, sketch_inputs
from mllm_cl.methods.base import Context, Method
from mllm_cl.models.adapters import TASK, factors, lora_layers
from mllm_cl.spectral.subspace import minor_directions


class LoraNull(Method):
    """LoRA-Null.

    Args:
        freeze: train B only.
        samples: general rows whose inputs are looked at.
        source: `general` (built in), or a file of rows.
    """

    name = "lora_null"
    summary = "start A where general inputs have no energy"
    adapters = "stacked"
    roles = frozenset({"initialisation"})

    def __init__(
        self, *, freeze: bool = False, samples: Annotated[int, Field(ge=1)] = 256, source: str = BUILT_IN
    ) -> None:
        check_source(source, self.name)
        self.freeze, self.samples, self.source = freeze, samples, source

    def begin_task(self, ctx: Context) -> None:
        rows = read_source(self.source, self.name, self.samples)[: self.samples]
        moments = sketch_inputs(ctx, self.samples, width=2**31, rows=rows)
        for module, layer in lora_layers(ctx.model):
            weight = factors(layer, TASK)[0].weight  # (rank, in)
            quiet = minor_directions(moments.of(module), min(weight.shape)).mT
            fix_a(layer, torch.nn.functional.pad(quiet, (0, 0, 0, len(weight) - len(quiet))))
            weight.requires_grad_(not self.freeze)
