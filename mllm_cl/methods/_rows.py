"""Rows of two kinds in one data set."""

from __future__ import annotations

import random
from collections.abc import Sequence

from mllm_cl.data.rows import Row, Rows


def mixed_in(rows: Sequence[Row], others: Sequence[Row], share: float, rng: random.Random) -> Rows:
    """Appends rows so that they make `share` of the result: whole passes over `others` before any row comes again.

    Rows are looked up when they are asked for, as what an earlier method has attached to them may depend on the epoch.
    """
    count, wanted = len(rows), round(len(rows) * share / (1 - share))
    order: list[int] = []
    while len(order) < wanted:
        order += rng.sample(range(len(others)), min(len(others), wanted - len(order)))
    return Rows(range(count + wanted), lambda index: rows[index] if index < count else others[order[index - count]])
