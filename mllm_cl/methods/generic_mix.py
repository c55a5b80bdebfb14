"""generic_mix: mix general instruction rows into every task.

Idea: rehearse what the base could do, from a fixed general instruction set, instead of (or beside) the earlier tasks.
Formula: L = E_{D_t} ℓ + share/(1 − share) · E_G ℓ, realised by the mixture of rows; other rows of G for every task.
Stored per task: nothing. Cost per step: 1×, but 1/(1 − share) as many steps.
Reference: TRACE mixes LIMA in (Wang et al. 2023, arXiv 2310.06762). The built-in set is the training part of the general
mixture that tiny-llava was pre-trained on; no row of the benchmark `quickstart-general` is in it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field

from mllm_cl.data.builders.general import general_rows
from mllm_cl.data.readers import read_rows
from mllm_cl.data.rows import Row
from mllm_cl.errors import MethodError
from mllm_cl.methods._rows import mixed_in
from mllm_cl.methods.base import Context, Method

BUILT_IN = "general"


class GenericMix(Method):
    """Replay of general instructions.

    Args:
        share: share of general rows among the rows of each task.
        source: `general` (built in), or a file of rows with answers in any format that a stream takes.
    """

    name = "generic_mix"
    summary = "mix general instruction rows into every task"

    def __init__(self, *, share: Annotated[float, Field(gt=0, lt=1)] = 0.1, source: str = BUILT_IN) -> None:
        if source != BUILT_IN and not Path(source).exists():
            raise MethodError(
                f"generic_mix.source: there is no {source!r}.",
                expected=f"{BUILT_IN!r} (built in), or a file of rows",
                fix="correct the path.",
            )
        self.share, self.source = share, source

    def train_rows(self, ctx: Context, rows: Sequence[Row]) -> Sequence[Row]:
        rng = random.Random(ctx.seed())
        wanted = round(len(rows) * self.share / (1 - self.share))
        if not wanted:
            return rows
        if self.source == BUILT_IN:
            others: Sequence[Row] = general_rows("train", size=wanted, seed=rng.randrange(2**31))
        else:
            path = Path(self.source)
            others = read_rows(path, image_folder=path.parent, task=self.name, split="train")
        return mixed_in(rows, others, self.share, rng)
