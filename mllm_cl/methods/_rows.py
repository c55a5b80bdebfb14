"""Rows of two kinds in one data set, and rows drawn from the task."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from mllm_cl.data.rows import Row, Rows
from mllm_cl.methods.base import Context


def mixed_in(rows: Sequence[Row], others: Sequence[Row], share: float, rng: random.Random) -> Rows:
    """Appends rows so that they make `share` of the result: whole passes over `others` before any row comes again.

    Rows are looked up when they are asked for, as what an earlier method has attached to them may depend on the epoch.
    """
    count, wanted = len(rows), round(len(rows) * share / (1 - share))
    order: list[int] = []
    while len(order) < wanted:
        order += rng.sample(range(len(others)), min(len(others), wanted - len(order)))
    return Rows(range(count + wanted), lambda index: rows[index] if index < count else others[order[index - count]])


def drawn_rows(ctx: Context, samples: int) -> list[Row]:
    """Returns some of the task's training rows, drawn at random, in their order."""
    count = min(samples, len(ctx.task.train))
    chosen = torch.randperm(len(ctx.task.train), generator=ctx.rng)[:count].sort().values.tolist()
    return [ctx.task.train[index] for index in chosen]
