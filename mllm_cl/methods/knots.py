"""knots: align the task vectors by one SVD of all of them, then merge in that basis.

Idea: LoRA updates of different tasks do not share their axes; entrywise merging needs common ones.
Formula: [τ_1 … τ_T] = U diag(σ) [V_1 … V_T]ᵀ; W̃ = W_0 + scale · U diag(σ) merge(V_1, …, V_T)ᵀ, merge = TIES or mean.
Stored per task: its LoRA factors. Cost per step: 1×; per task one SVD of the factors side by side.
Reference: Stoica et al. 2024 (arXiv 2410.19735). Fidelity: as in the paper, TIES per matrix.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mllm_cl.methods._merging import Merging, Start


class Knots(Merging):
    """KnOTS.

    Args:
        then: merge of the aligned vectors.
        density: share of the entries that TIES keeps.
        scale: factor of the merged vector.
        start: `base` or `sequence`, from where a task is trained; see `mllm_cl/methods/_merging.py`.
    """

    name = "knots"
    summary = "align the task vectors by a joint SVD, then TIES"
    merge = "knots"

    def __init__(
        self,
        *,
        then: Literal["ties", "mean"] = "ties",
        density: Annotated[float, Field(gt=0, le=1)] = 0.2,
        scale: Annotated[float, Field(ge=0)] = 0.6,
        start: Start = "base",
    ) -> None:
        super().__init__(start=start)
        self.options = {"then": then, "density": density, "scale": scale}
