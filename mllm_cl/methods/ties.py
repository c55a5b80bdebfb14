"""ties: merge task vectors after trimming them and settling their signs.

Idea: small entries and opposite signs are what makes a plain sum of task vectors bad.
Formula: keep the `density` largest |entries| of each τ_i; sign γ = sgn Σ τ_i; W̃ = W_0 + scale · mean of the entries with
sign γ.
Stored per task: its LoRA factors. Cost per step: 1×; per task one dense matrix per task and weight
matrix, one after another, and an SVD that cuts the result to `model.max_rank` (its error is in the ledger).
Reference: Yadav et al. 2023 (arXiv 2306.01708). Fidelity: trimmed per matrix (as in PEFT), in the paper over all weights
together. PEFT's `ties` merges A and B separately, which is another matrix.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from mllm_cl.methods._merging import Merging, Start


class Ties(Merging):
    """TIES merging.

    Args:
        density: share of the entries of each task vector that is kept.
        scale: factor of the merged vector.
        start: `base` or `sequence`, from where a task is trained; see `mllm_cl/methods/_merging.py`.
    """

    name = "ties"
    summary = "trim, elect signs, average the task vectors that agree"
    merge = "ties"

    def __init__(
        self,
        *,
        density: Annotated[float, Field(gt=0, le=1)] = 0.2,
        scale: Annotated[float, Field(ge=0)] = 1.0,
        start: Start = "base",
    ) -> None:
        super().__init__(start=start)
        self.options = {"density": density, "scale": scale}
