"""opcm: merge tasks one after another, each without what it has in the leading directions of the merge so far.

Idea: a new task may write where the merged model does not live yet.
Formula: C = Uᵀ τ_t V in the singular basis of the merge; zero its leading block (singular values up to `share` of their
sum) and its diagonal; add; rescale to the mean norm of the task vectors.
Stored per task: its LoRA factors. Cost per step: 1×; per task one small SVD per matrix and task.
Reference: Tang et al. 2025 (arXiv 2501.09522). Fidelity: as in the paper (norm over all parameters); the diagonal is zeroed
over the directions that the merge has, as the bases of its null spaces are arbitrary. Recomputed from the stored vectors.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from mllm_cl.methods._merging import Merging, Start


class Opcm(Merging):
    """OPCM.

    Args:
        share: of the singular values' sum that makes the leading block (alpha).
        scale: factor of the merged vector.
        start: `base` or `sequence`, from where a task is trained; see `mllm_cl/methods/_merging.py`.
    """

    name = "opcm"
    summary = "add each task outside the leading directions of the merge so far"
    merge = "opcm"

    def __init__(
        self,
        *,
        share: Annotated[float, Field(gt=0, le=1)] = 0.5,
        scale: Annotated[float, Field(ge=0)] = 1.0,
        start: Start = "base",
    ) -> None:
        super().__init__(start=start)
        self.options = {"share": share, "scale": scale}
