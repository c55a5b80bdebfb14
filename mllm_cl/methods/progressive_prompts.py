"""progressive_prompts: a soft prompt for every task in front of those of the tasks before.

Idea: what is not touched is not forgotten; a new prompt can build upon all that earlier ones say.
Formula: input [P_t; P_{t−1}; …; P_1; x], P_k (length, hidden); only P_t is trained, by cross-entropy alone.
Stored per task: length × hidden float32. Cost per step: 1× and t × length tokens more in every sequence, inference the same.
Reference: Razdaibiedina et al. 2023 (ICLR, arXiv 2301.12314; arazd/ProgressivePrompts). Fidelity: there a row is answered
with the prompts up to its own task, which must be known; here all that have been learnt are there, as in TRACE's
comparison, so later prompts do change the answers to earlier tasks. Prompts start from word embeddings drawn at random, as
there; no reparametrisation by a residual MLP. The prompt stands behind the begin token. It learns at far higher rates than
an adapter: 0.3 in the paper.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from mllm_cl.methods._prompts import Prompts, Query, Vectors, word_vectors
from mllm_cl.methods.base import Context


class ProgressivePrompts(Prompts):
    """Progressive Prompts.

    Args:
        length: tokens of every task's prompt.
    """

    name = "progressive_prompts"
    summary = "a soft prompt per task, put in front of those of earlier tasks"

    def __init__(self, *, length: Annotated[int, Field(ge=1)] = 10) -> None:
        super().__init__()
        self.length = length

    def prepare(self, ctx: Context) -> None:
        self.learnt[str(ctx.index)] = word_vectors(ctx, self.length)

    def trains(self, name: str, index: int) -> bool:
        return name == str(index)

    def pick(self, own: Vectors, ask: Callable[[], Query], learning: int | None) -> Tensor | None:
        return torch.cat([own[name] for name in sorted(own, key=int, reverse=True)]).unsqueeze(0)
