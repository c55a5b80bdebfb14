"""magmax: keep, entry by entry, the task vector with the largest magnitude.

Idea: after sequential training, large changes are the ones that matter, whichever task made them.
Formula: W̃_t = W_0 + scale · τ_{k}, entrywise with k = argmax_i |τ_i|; τ_i = θ_i − θ_0 along one sequence of trainings.
Stored per task: its LoRA factors. Cost per step: 1×; per task one dense matrix per task and weight
matrix, one after another, and an SVD that cuts the result to `model.max_rank` (its error is in the ledger).
Reference: Marczak et al. 2024 (arXiv 2407.06322). Fidelity: the paper keeps one running dense maximum, the same result; kept
as factors it is smaller as long as the tasks' ranks add up to less than the matrix.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from mllm_cl.methods._merging import Merging, Start


class MagMax(Merging):
    """MagMax.

    Args:
        scale: factor of the merged vector.
        start: `base` or `sequence`, from where a task is trained; see `mllm_cl/methods/_merging.py`.
    """

    name = "magmax"
    summary = "train in sequence, keep the largest change of every weight"
    merge = "magmax"

    def __init__(
        self,
        *,
        scale: Annotated[float, Field(ge=0)] = 0.5,
        start: Start = "sequence",
    ) -> None:
        super().__init__(start=start)
        self.options = {"scale": scale}
