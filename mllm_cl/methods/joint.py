"""joint: train on all tasks at once, the usual upper bound of the final average.

Idea: no sequence at all; the mixture of all tasks' training rows is learnt in one stage, the last.
Formula: θ_T = SFT(θ_0, D_1 ∪ … ∪ D_T).
Stored per task: nothing. Cost: the same number of steps as the whole sequence; the stages before the last are not
trained, so their cells are not measured.
Reference: an anchor, without a publication of its own. Fidelity: epochs are passes over the union of the tasks, so that every row
is seen as often as in the sequence.
"""

from __future__ import annotations

from collections.abc import Sequence

from mllm_cl.data.rows import Row, Rows
from mllm_cl.methods.base import Context, Method


class Joint(Method):
    """Multitask training at the last stage."""

    name = "joint"
    summary = "all tasks at once at the last stage: the upper bound"
    needs = frozenset({"all_rows"})
    adapters = "one"

    def train_rows(self, ctx: Context, rows: Sequence[Row]) -> Sequence[Row]:
        if ctx.index < len(ctx.stream):
            return Rows([])
        return Rows([row for task in ctx.stream for row in task.train])
