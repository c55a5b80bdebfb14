"""dare: drop most entries of each task vector at random and rescale the rest, then merge.

Idea: the entries of a task vector are redundant; sparse vectors interfere less.
Formula: τ_i ← m ⊙ τ_i / (1 − drop), m ~ Bernoulli(1 − drop); then W̃ = W_0 + scale · Σ τ_i, their mean, or TIES.
Stored per task: its LoRA factors. Cost per step: 1×; per task one dense matrix per task and weight
matrix, one after another, and an SVD that cuts the result to `model.max_rank` (its error is in the ledger).
Reference: Yu et al. 2023 (arXiv 2311.03099). Fidelity: as in the paper on full updates; a random sparse matrix is far from
low rank, so with `drop` 0.9 the cut to `model.max_rank` loses a lot: read `merge_truncation_error`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mllm_cl.methods._merging import Merging, Start


class Dare(Merging):
    """DARE merging.

    Args:
        drop: probability with which an entry is dropped.
        then: what is done with the sparse vectors.
        density: share that TIES keeps.
        scale: factor of the merged vector.
        seed: of what is dropped; the same entries after every task.
        start: `base` or `sequence`, from where a task is trained; see `mllm_cl/methods/_merging.py`.
    """

    name = "dare"
    summary = "drop and rescale entries of the task vectors, then merge"
    merge = "dare"

    def __init__(
        self,
        *,
        drop: Annotated[float, Field(ge=0, lt=1)] = 0.9,
        then: Literal["sum", "mean", "ties"] = "sum",
        density: Annotated[float, Field(gt=0, le=1)] = 1.0,
        scale: Annotated[float, Field(ge=0)] = 0.4,
        seed: Annotated[int, Field(ge=0)] = 0,
        start: Start = "base",
    ) -> None:
        super().__init__(start=start)
        self.options = {"drop": drop, "then": then, "density": density, "scale": scale, "seed": seed}
