"""task_arithmetic: sum the task vectors.

Idea: what a task changes in the weights is a vector; vectors of different tasks can be added.
Formula: W̃_t = W_0 + scale · Σ_{i≤t} τ_i.
Stored per task: its LoRA factors. Cost per step: 1×; per task the SVD of the stacked factors.
Reference: Ilharco et al. 2022 (arXiv 2212.04089). Fidelity: the sum is exact and in full weights; `scale` is searched on
validation data in the paper, 0.3 to 0.4 is usual.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from mllm_cl.methods._merging import Merging, Start


class TaskArithmetic(Merging):
    """Task arithmetic.

    Args:
        scale: factor λ of the sum.
        start: `base` or `sequence`, from where a task is trained; see `mllm_cl/methods/_merging.py`.
    """

    name = "task_arithmetic"
    summary = "sum the task vectors of tasks trained apart, times a scale"
    merge = "task_arithmetic"

    def __init__(
        self,
        *,
        scale: Annotated[float, Field(ge=0)] = 0.4,
        start: Start = "base",
    ) -> None:
        super().__init__(start=start)
        self.options = {"scale": scale}
