"""agem: never step in a direction that makes the memory worse (averaged gradient episodic memory).

Idea: if the gradient of the task points against that of stored rows, take away the part that does.
Formula: g ← g − (g·m / m·m) m if g·m < 0, g the gradient of the whole batch of all processes, m that of `batch` memory
rows, drawn anew at every step.
Stored per task: (task, row id) pairs; the rows must stay in the stream. Cost per step: 1× and one forward and backward
pass over `batch` rows. Reference: Chaudhry et al. 2019 (arXiv 1812.00420). Fidelity: as in the paper; acts after gradient
clipping, on accumulated and averaged gradients, with all trained parameters in one vector.
"""

from __future__ import annotations

import random
from typing import Annotated

from pydantic import Field

from mllm_cl.data.memory import balanced, look_up
from mllm_cl.methods._gradients import memory_gradient, product, trained_with_gradients
from mllm_cl.methods.base import AROUND_STEPS, Context, Method, MethodState


class AGem(Method):
    """A-GEM.

    Args:
        size: rows kept in total, the same number of every task.
        batch: memory rows per step.
    """

    name = "agem"
    summary = "project the gradient so that it does not raise the loss on stored rows"
    needs = frozenset({"past_rows"})
    supports = AROUND_STEPS

    def __init__(self, *, size: Annotated[int, Field(ge=1)] = 200, batch: Annotated[int, Field(ge=1)] = 16) -> None:
        self.size, self.batch = size, batch
        self.memory: list[tuple[str, str]] = []

    def before_step(self, ctx: Context) -> None:
        if not self.memory:
            return
        parameters = trained_with_gradients(ctx)
        drawn = random.Random(ctx.seed()).sample(self.memory, min(self.batch, len(self.memory)))
        rows = look_up(drawn, {task.name: task.train for task in ctx.stream})
        reference = memory_gradient(ctx, rows, parameters)
        gradients = [p.grad for p in parameters if p.grad is not None]
        along = product(gradients, reference)
        if along < 0:
            factor = along / product(reference, reference)
            for gradient, own in zip(gradients, reference):
                gradient.sub_((factor * own).to(gradient.dtype))
            ctx.cost["projected_steps"] += 1

    def end_task(self, ctx: Context) -> None:
        new = [(ctx.task.name, row["id"]) for row in ctx.task.train]
        self.memory = balanced(self.memory, new, self.size, random.Random(ctx.seed()))

    def state_dict(self) -> MethodState:
        return MethodState(data={"memory": [list(entry) for entry in self.memory]})

    def load_state_dict(self, state: MethodState) -> None:
        self.memory = [(task, row_id) for task, row_id in state.data["memory"]]
