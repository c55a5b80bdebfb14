"""iso: sum the task vectors and make all singular values equal (Iso-C).

Idea: a few directions dominate a sum of task vectors; a flat spectrum gives every task its share.
Formula: Σ τ_i = U diag(σ) Vᵀ; W̃ = W_0 + scale · mean(σ) · U Vᵀ.
Stored per task: its LoRA factors. Cost per step: 1×; per task one small SVD per matrix.
Reference: Marczak et al. 2025 (arXiv 2502.04959). Fidelity: the mean is over the positive singular values (the paper's
updates have full rank; the null directions of a LoRA sum are arbitrary); `scale` is searched in the paper.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from mllm_cl.methods._merging import Merging, Start


class Iso(Merging):
    """Iso-C.

    Args:
        scale: factor of the merged vector.
        start: `base` or `sequence`, from where a task is trained; see `mllm_cl/methods/_merging.py`.
    """

    name = "iso"
    summary = "sum the task vectors, then flatten the spectrum"
    merge = "iso"

    def __init__(
        self,
        *,
        scale: Annotated[float, Field(ge=0)] = 1.0,
        start: Start = "base",
    ) -> None:
        super().__init__(start=start)
        self.options = {"scale": scale}
