"""Gradients on stored rows, for methods that compare them with the gradient of the task."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mllm_cl.data.collate import IGNORED
from mllm_cl.data.rows import Row
from mllm_cl.methods.base import Context


def trained_with_gradients(ctx: Context) -> list[nn.Parameter]:
    """Returns the parameters that the next optimizer step will move, in the order of the model."""
    return [p for p in ctx.model.parameters() if p.requires_grad and p.grad is not None]


def memory_gradient(ctx: Context, rows: Sequence[Row], parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Gradient of the mean token loss of the rows, without dropout: one float32 tensor per parameter.

    The processes share the rows; each gets the gradient over all of them.
    """
    processes, own = ctx.accelerator.num_processes, ctx.accelerator.process_index
    was_training = ctx.model.training
    ctx.model.eval()
    total = {str(place): torch.zeros_like(p, dtype=torch.float32) for place, p in enumerate(parameters)}
    tokens = torch.zeros((), device=ctx.model.device)
    for index in range(own, len(rows), processes):
        batch = ctx.collate([rows[index]])
        tokens += (batch["labels"][:, 1:] != IGNORED).sum()
        loss = ctx.model(**batch, num_items_in_batch=1).loss
        for place, gradient in enumerate(torch.autograd.grad(loss, list(parameters), allow_unused=True)):
            if gradient is not None:
                total[str(place)] += gradient.float()
    ctx.model.train(was_training)
    ctx.cost["memory_rows"] += len(rows)
    whole: dict[str, Tensor] = ctx.accelerator.reduce(total | {"tokens": tokens}, reduction="sum")  # type: ignore[assignment]
    return [whole[str(place)] / whole["tokens"].clamp_min(1) for place in range(len(parameters))]


def product(one: Sequence[Tensor], two: Sequence[Tensor]) -> float:
    """Inner product of two gradients, summed in float64."""
    return sum(float((a.double() * b.double()).sum()) for a, b in zip(one, two))
