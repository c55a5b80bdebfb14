"""corda: start A in the input directions that carry the least of what the base does with general inputs.

Idea: what a layer knows shows in its outputs on general inputs; learn in the directions that hardly matter to these.
Formula: U Σ Vᵀ = W_0 (C + δ I), C = mean x xᵀ over general rows, so that W_0 = U Σ V̂ᵀ with V̂ᵀ = Vᵀ (C + δ I)⁻¹; A = the rows of
V̂ᵀ with the `rank` smallest singular values, each made as long as 1, and B = 0. δ is 1 % of the mean diagonal of C.
Stored per task: nothing beyond the consolidated adapter. Cost per step: 1×; per task one forward pass over `samples` general
rows, one SVD (out × in) per matrix and one inverse (in × in) per distinct input.
Reference: CorDA, knowledge-preserved mode (Yang et al. 2024, NeurIPS, arXiv 2406.05223; PEFT's `corda` with method `kpm`).
Fidelity: there the adapter starts as √Σ on both sides of these components and the base gives them up; the base is never
written here, so B starts at 0 and only the directions of A are taken over.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize, pad

from mllm_cl.methods._general import BUILT_IN, check_source, read_source
from mllm_cl.methods._statistics import base_weight, fix_a, sketch_inputs
from mllm_cl.methods.base import Context, Method
from mllm_cl.models.adapters import TASK, factors, lora_layers

_DAMPING = 0.01


class CorDA(Method):
    """CorDA in knowledge-preserved mode.

    Args:
        samples: general rows whose inputs are looked at.
        source: `general` (built in), or a file of rows.
    """

    name = "corda"
    summary = "start A where the base's outputs on general inputs have the least energy"
    adapters = "stacked"
    roles = frozenset({"initialisation"})

    def __init__(self, *, samples: Annotated[int, Field(ge=1)] = 256, source: str = BUILT_IN) -> None:
        check_source(source, self.name)
        self.samples, self.source = samples, source

    def begin_task(self, ctx: Context) -> None:
        rows = read_source(self.source, self.name, self.samples)[: self.samples]
        with ctx.reference("base"):
            moments = sketch_inputs(ctx, self.samples, width=2**31, rows=rows)
        for module, layer in lora_layers(ctx.model):
            weight = factors(layer, TASK)[0].weight  # (rank, in)
            quiet = least_used(base_weight(layer), moments.of(module), len(weight))
            fix_a(layer, pad(quiet, (0, 0, 0, len(weight) - len(quiet))))
            weight.requires_grad_(True)


def least_used(weight: Tensor, moment: Tensor, count: int) -> Tensor:
    """The rows of V̂ᵀ with the smallest singular values, weakest first and of length 1.

    Args:
        weight: W (out, in).
        moment: C (in, in).
        count: how many at most; there are min(out, in).

    Returns:
        (min(count, out, in), in) float64

    Example:

    ```python
    >>> least_used(torch.diag(torch.tensor([2.0, 3.0])), torch.diag(torch.tensor([5.0, 1.0])), 1).tolist()
    [[0.0, 1.0]]

    ```
    """
    weight, moment = weight.double(), moment.double()
    level = moment.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    damped = moment + _DAMPING * level * torch.eye(len(moment), dtype=torch.float64, device=moment.device)
    right = torch.linalg.svd(weight @ damped, full_matrices=False).Vh.flip(0)[:count]
    found = normalize(torch.linalg.solve(damped, right.mT).mT, dim=1)  # V̂ᵀ = Vᵀ (C + δ I)⁻¹, and C is symmetric
    return found * found.gather(1, found.abs().argmax(dim=1, keepdim=True)).sign()  # the same bytes for the same input
