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

import torch
from pydantic import Field
from torch import Tensor

from mllm_cl.data.memory import balanced, look_up
from mllm_cl.methods.base import Context, Method, MethodState


class AGem(Method):
    """A-GEM.

    Args:
        size: rows kept in total, the same number of every task.
        batch: memory rows per step.
    """

    name = "agem"
    summary = "project the gradient so that it does not raise the loss on stored rows"
    needs = frozenset({"past_rows"})

    def __init__(self, *, size: Annotated[int, Field(ge=1)] = 200, batch: Annotated[int, Field(ge=1)] = 16) -> None:
        self.size, self.batch = size, batch
        self.memory: list[tuple[str, str]] = []

    def before_step(self, ctx: Context) -> None:
        if not self.memory:
            return
        parameters = [p for p in ctx.model.parameters() if p.requires_grad and p.grad is not None]
        reference = self._reference(ctx, parameters)
        gradients = [p.grad for p in parameters if p.grad is not None]
        product = sum((g.float() * m).sum() for g, m in zip(gradients, reference))
        if product < 0:
            factor = product / sum((m * m).sum() for m in reference)
            for gradient, own in zip(gradients, reference):
                gradient.sub_((factor * own).to(gradient.dtype))
            ctx.cost["projected_steps"] += 1

    def _reference(self, ctx: Context, parameters: list[torch.nn.Parameter]) -> list[Tensor]:
        """m: gradient of the mean token loss of the drawn rows, which the processes share."""
        rng = random.Random(ctx.seed())
        drawn = rng.sample(self.memory, min(self.batch, len(self.memory)))
        rows = look_up(drawn, {task.name: task.train for task in ctx.stream})
        processes, own = ctx.accelerator.num_processes, ctx.accelerator.process_index
        inputs = [ctx.collate([rows[index]]) for index in range(own, len(rows), processes)]
        was_training = ctx.model.training
        ctx.model.eval()
        total = {str(place): torch.zeros_like(p, dtype=torch.float32) for place, p in enumerate(parameters)}
        for batch in inputs:
            loss = ctx.model(**batch, num_items_in_batch=1).loss
            for place, gradient in enumerate(torch.autograd.grad(loss, parameters, allow_unused=True)):
                if gradient is not None:
                    total[str(place)] += gradient.float()
        ctx.model.train(was_training)
        ctx.cost["memory_rows"] += len(rows)
        whole = ctx.accelerator.reduce(total, reduction="sum")
        return [whole[str(place)] for place in range(len(parameters))]  # type: ignore[index]

    def end_task(self, ctx: Context) -> None:
        new = [(ctx.task.name, row["id"]) for row in ctx.task.train]
        self.memory = balanced(self.memory, new, self.size, random.Random(ctx.seed()))

    def state_dict(self) -> MethodState:
        return MethodState(data={"memory": [list(entry) for entry in self.memory]})

    def load_state_dict(self, state: MethodState) -> None:
        self.memory = [(task, row_id) for task, row_id in state.data["memory"]]
