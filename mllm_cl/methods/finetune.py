"""finetune: plain sequential fine-tuning, the lower bound of every comparison.

Idea: train on one task after another, do nothing about forgetting.
Formula: θ_t = SFT(θ_{t−1}, D_t).
Stored per task: nothing but the adapter. Cost per step: 1×.
Reference: an anchor of all works, TRACE (Wang et al. 2023, arXiv 2310.06762) among them. Fidelity: optimizer and schedule
start anew with every task.
Two variants that papers mix up: `model.adapters: one` continues one adapter (default), `stacked` starts a fresh one for
every task and adds it to the consolidated adapter.
"""

from __future__ import annotations

from mllm_cl.methods.base import Method


class Finetune(Method):
    """Sequential fine-tuning."""

    name = "finetune"
    summary = "sequential LoRA fine-tuning: the lower bound"
