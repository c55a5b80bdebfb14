"""star: truncate each task vector's spectrum, rescale what is left, average.

Idea: the weak directions of a task vector are noise that only interferes.
Formula: keep the leading directions with `share` of the nuclear norm, times ‖σ‖₁ / ‖σ_kept‖₁; W̃ = W_0 + scale · mean.
Stored per task: its LoRA factors. Cost per step: 1×; per task one small SVD per matrix and task.
Reference: Lee et al. 2025 (arXiv 2502.10339). Fidelity: as in the paper.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from mllm_cl.methods._merging import Merging, Start


class Star(Merging):
    """STAR.

    Args:
        share: of the nuclear norm that is kept (eta).
        scale: factor of the mean.
        start: `base` or `sequence`, from where a task is trained; see `mllm_cl/methods/_merging.py`.
    """

    name = "star"
    summary = "cut and rescale the spectrum of each task vector, then average"
    merge = "star"

    def __init__(
        self,
        *,
        share: Annotated[float, Field(gt=0, le=1)] = 0.4,
        scale: Annotated[float, Field(ge=0)] = 1.0,
        start: Start = "base",
    ) -> None:
        super().__init__(start=start)
        self.options = {"share": share, "scale": scale}
