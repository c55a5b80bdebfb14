"""gate_up_only: train the matrices that open the feed-forward layers only.

Idea: gate and up decide what a feed-forward layer looks for; what it then writes (down) stays as it was.
Formula: ΔW = 0 outside gate_proj and up_proj.
Stored per task: nothing. Cost per step: 1×, fewer trainable parameters. Combines with every adapter policy.
Reference: Zhu et al. 2025 (arXiv 2510.08564: attention projections, or gate and up only, forget least in MLLMs). Fidelity:
LoRA on these matrices, the paper updates the matrices themselves.
"""

from __future__ import annotations

from mllm_cl.methods._layers import is_gate_or_up, train_only
from mllm_cl.methods.base import Context, Method


class GateUpOnly(Method):
    """Train the LoRA of gate_proj and up_proj only."""

    name = "gate_up_only"
    summary = "train the LoRA of gate_proj and up_proj only"
    needs = frozenset({"adapter"})
    roles = frozenset({"choice of matrices"})

    def begin_task(self, ctx: Context) -> None:
        train_only(ctx.model, self.name, is_gate_or_up)
