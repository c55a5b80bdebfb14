"""attention_only: train the attention matrices only.

Idea: new tasks need other routes between tokens more than other knowledge, which sits in the feed-forward layers.
Formula: ΔW = 0 outside the attention layers.
Stored per task: nothing. Cost per step: 1×, fewer trainable parameters. Combines with every adapter policy.
Reference: Zhu et al. 2025 (arXiv 2510.08564: attention projections, or gate and up only, forget least in MLLMs). Fidelity:
LoRA on these matrices, the paper updates the matrices themselves.
"""

from __future__ import annotations

from mllm_cl.methods._layers import is_attention, train_only
from mllm_cl.methods.base import Context, Method


class AttentionOnly(Method):
    """Train the LoRA of the attention layers only."""

    name = "attention_only"
    summary = "train the LoRA of the attention layers only"
    needs = frozenset({"adapter"})
    roles = frozenset({"choice of matrices"})

    def begin_task(self, ctx: Context) -> None:
        train_only(ctx.model, self.name, is_attention)
