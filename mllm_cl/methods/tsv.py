"""tsv: merge the singular vectors of all tasks after making them orthogonal to each other (TSV-M).

Idea: tasks interfere where their singular vectors overlap; the nearest orthonormal vectors do not.
Formula: [U_1 … U_T] and [V_1 … V_T] of the leading min(out, in)/T triplets ← their polar factors;
W̃ = W_0 + scale · U diag(σ) Vᵀ.
Stored per task: its LoRA factors. Cost per step: 1×; per task two small SVDs per matrix.
Reference: Gargiulo et al. 2024 (arXiv 2412.00081). Fidelity: as in the paper; matrices only, nothing else is trained.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from mllm_cl.methods._merging import Merging, Start


class TaskSingularVectors(Merging):
    """TSV-M.

    Args:
        scale: factor of the merged vector.
        start: `base` or `sequence`, from where a task is trained; see `mllm_cl/methods/_merging.py`.
    """

    name = "tsv"
    summary = "orthogonalise the singular vectors of all tasks, then add"
    merge = "tsv"

    def __init__(
        self,
        *,
        scale: Annotated[float, Field(ge=0)] = 1.0,
        start: Start = "base",
    ) -> None:
        super().__init__(start=start)
        self.options = {"scale": scale}
