"""single: every task alone from the untouched base, the ceiling of plasticity.

Idea: how well could this model learn each task if it had nothing to remember?
Formula: θ_t = SFT(θ_0, D_t); only the diagonal of the matrix is measured (S_t in transfer and intransigence).
Stored per task: nothing. Cost per step: 1×.
Reference: an anchor, without a publication of its own. Fidelity: every task gets its own fresh adapter, drawn with the stage's
seed.
"""

from __future__ import annotations

from mllm_cl.methods.base import Context, Method
from mllm_cl.models.adapters import DEFAULT, reset_adapter


class Single(Method):
    """Isolated training."""

    name = "single"
    summary = "each task alone from the base: the plasticity ceiling"
    adapters = "one"
    measures = "current"

    def begin_task(self, ctx: Context) -> None:
        reset_adapter(ctx.model, DEFAULT, ctx.seed())
