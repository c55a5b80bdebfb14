"""bottom_frozen: train the upper blocks of the decoder only.

Idea: much of what looks like forgetting is a change of the lowest layers, which all tasks share.
Formula: ΔW = 0 in the lowest ⌈share · blocks⌉ blocks of the decoder (at least one stays trainable), in vision tower and
bridge.
Stored per task: nothing. Cost per step: 1×, fewer trainable parameters. Combines with every adapter policy.
Reference: Zheng et al. 2025, spurious forgetting (arXiv 2501.13453), who freeze the bottom layers.
Fidelity: from the first task on, on LoRA, and a share of the blocks instead of a number; embeddings are never trained here.
"""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import Field

from mllm_cl.methods._layers import decoder_blocks, train_only
from mllm_cl.methods.base import Context, Method


class BottomFrozen(Method):
    """Frozen lower blocks.

    Args:
        share: of the decoder's blocks that is frozen, from the bottom.
    """

    name = "bottom_frozen"
    summary = "train the LoRA of the decoder's upper blocks only"
    needs = frozenset({"adapter"})

    def __init__(self, *, share: Annotated[float, Field(ge=0, lt=1)] = 0.5) -> None:
        self.share = share

    def begin_task(self, ctx: Context) -> None:
        blocks = decoder_blocks(ctx.model)
        count = max(blocks.values(), default=-1) + 1
        first = min(math.ceil(self.share * count), count - 1)
        train_only(ctx.model, self.name, lambda module: blocks.get(module, -1) >= first)
