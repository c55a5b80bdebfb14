"""token_weights: weigh the tokens of the answers by what the model thinks of them (EAFT, DFT, TALR).

Idea: tokens that contradict the model with confidence are the ones whose gradients destroy what it knew.
Formula: L = mean over target tokens of −w_k log p(y_k), w without gradient:
- eaft: w = (H_20 / 3)^alpha, H_20 the entropy of the renormalised 20 most likely tokens (ln 20 ≈ 3)
- dft: w = p(y_k)
- talr: w = max(exp(−ℓ_k / τ), floor), ℓ_k = −log p(y_k), τ the mean ℓ of the row's own tokens
The term that is logged is the difference to the plain cross-entropy.
Stored per task: nothing. Cost per step: 1×.
Reference: EAFT, Diao et al. 2026 (arXiv 2601.02151; PRIS-CV/EAFT); DFT, Wu et al. 2025 (arXiv 2508.05629); TALR, Lin et al.
2025 (arXiv 2509.20758).
Fidelity: TALR takes its temperature from the batch; per row it does not depend on accumulation or processes.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from mllm_cl.data.collate import IGNORED
from mllm_cl.methods._terms import target_logits
from mllm_cl.methods.base import EVERY_LAUNCHER, Context, Method, TrainBatch

_TOP = 20


class TokenWeights(Method):
    """Token-weighted fine-tuning.

    Args:
        rule: `eaft`, `dft` or `talr`.
        alpha: exponent of EAFT.
        floor: smallest weight of TALR.
    """

    name = "token_weights"
    summary = "weigh answer tokens by entropy or probability (EAFT, DFT, TALR)"
    supports = EVERY_LAUNCHER

    def __init__(
        self,
        *,
        rule: Literal["eaft", "dft", "talr"] = "eaft",
        alpha: Annotated[float, Field(ge=0)] = 1.0,
        floor: Annotated[float, Field(ge=0, le=1)] = 0.1,
    ) -> None:
        self.rule, self.alpha, self.floor = rule, alpha, floor

    def loss_terms(self, ctx: Context, model: nn.Module, batch: TrainBatch, outputs: Any) -> dict[str, Tensor]:
        labels = batch.inputs["labels"]
        known = labels[:, 1:] != IGNORED
        logits = target_logits(outputs.logits, labels).float()  # (N, V)
        if not len(logits):  # a micro-batch of ignored rows only
            return {self.name: outputs.logits.sum() * 0.0}
        losses = -log_softmax(logits, dim=-1).gather(-1, labels[:, 1:][known].unsqueeze(-1)).squeeze(-1)  # (N,)
        rows = known.nonzero()[:, 0]  # the row of each target token
        weights = self.weights(logits.detach(), losses.detach(), rows)
        return {self.name: ((weights - 1) * losses).mean() * batch.share("tokens")}

    def weights(self, logits: Tensor, losses: Tensor, rows: Tensor) -> Tensor:
        """Weight of every target token: (N, V), (N,), (N,) -> (N,)."""
        if self.rule == "eaft":
            return (top_entropy(logits) / 3).pow(self.alpha)
        if self.rule == "dft":
            return (-losses).exp()
        count = torch.bincount(rows).clamp_min(1)
        mean = torch.bincount(rows, weights=losses).to(losses) / count  # (rows,)
        return (-losses / mean[rows].clamp_min(1e-6)).exp().clamp_min(self.floor)


def top_entropy(logits: Tensor) -> Tensor:
    """Entropy in nats of the 20 most likely tokens, renormalised: (N, V) -> (N,)."""
    values = log_softmax(logits.topk(min(_TOP, logits.shape[-1]), dim=-1).values, dim=-1)
    return -(values.exp() * values).sum(dim=-1)
