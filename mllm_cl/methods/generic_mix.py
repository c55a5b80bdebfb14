"""generic_mix: mix general instruction rows into every task.

Idea: rehearse what the base could do, from a fixed general instruction set, instead of (or beside) the earlier tasks.
Formula: L = E_{D_t} ℓ + share/(1 − share) · E_G ℓ, realised by the mixture of rows; other rows of G for every task.
Stored per task: nothing. Cost per step: 1×, but 1/(1 − share) as many steps.
Reference: TRACE mixes LIMA in (Wang et al. 2023, arXiv 2310.06762). Fidelity: another set, with
images. The built-in set is the training part of the general
mixture that tiny-llava was pre-trained on; no row of the benchmark `quickstart-general` is in it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from mllm_cl.data.rows import Row
from mllm_cl.methods._general import BUILT_IN, check_source, read_source
from mllm_cl.methods._rows import mixed_in
from mllm_cl.methods.base import Context, Method


class GenericMix(Method):
    """Replay of general instructions.

    Args:
        share: share of general rows among the rows of each task.
        source: `general` (built in), or a file of rows with answers in any format that a stream takes.
    """

    name = "generic_mix"
    summary = "mix general instruction rows into every task"

    def __init__(self, *, share: Annotated[float, Field(gt=0, lt=1)] = 0.1, source: str = BUILT_IN) -> None:
        check_source(source, self.name)
        self.share, self.source = share, source

    def train_rows(self, ctx: Context, rows: Sequence[Row]) -> Sequence[Row]:
        rng = random.Random(ctx.seed())
        wanted = round(len(rows) * self.share / (1 - self.share))
        if not wanted:
            return rows
        others = read_source(self.source, self.name, wanted, rng.randrange(2**31) if self.source == BUILT_IN else 0)
        return mixed_in(rows, others, self.share, rng)
