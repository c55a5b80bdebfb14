"""reglora: protect the entries of the full update that mattered most to earlier tasks (RegLoRA, one half of SEFE).

Idea: essential knowledge sits in the largest entries of a task's update; later tasks may move everything else.
Formula: L = CE + strength · mean over matrices of mean_{(a,b) ∈ K} |(B_t A_t)_{ab}|, K the top `share` of |B_i A_i| of every
earlier task i.
Stored once, nothing per task: K as a bit mask, one bit per entry of every matrix. Cost per step: 1×, plus B A per layer, 64
rows at a time.
Reference: SEFE, Chen et al. 2025 (arXiv 2505.02486). Fidelity: as in the paper, except that an entry that several tasks protect
counts once (the released code concatenates the lists of positions). The other half of SEFE rewrites answers (data).
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from mllm_cl.methods._terms import mean_in_chunks
from mllm_cl.methods.base import WITHIN_STEPS, Context, Method, MethodState, TrainBatch
from mllm_cl.models.adapters import TASK, factors, lora_layers


class RegLora(Method):
    """RegLoRA.

    Args:
        strength: λ.
        share: of the entries of each matrix that a task protects.
    """

    name = "reglora"
    summary = "penalise changes of the entries that earlier tasks changed most"
    needs = frozenset({"adapter"})
    supports = WITHIN_STEPS
    adapters = "stacked"

    def __init__(
        self,
        *,
        strength: Annotated[float, Field(ge=0)] = 2500.0,
        share: Annotated[float, Field(gt=0, le=1)] = 0.02,
    ) -> None:
        self.strength, self.share = strength, share
        self.masks: dict[str, Tensor] = {}  # module -> bits (out, ⌈in / 8⌉) uint8

    def loss_terms(self, ctx: Context, model: nn.Module, batch: TrainBatch, outputs: Any) -> dict[str, Tensor]:
        if not self.masks or self.strength == 0:
            return {}
        terms = []
        for module, layer in lora_layers(ctx.model):
            a, b = (factor.weight.float() for factor in factors(layer, TASK))
            self.masks[module] = self.masks[module].to(a.device)
            terms.append(masked_mean(a, b, self.masks[module]))
        return {"reglora": self.strength * torch.stack(terms).mean() * batch.share("step")}

    def end_task(self, ctx: Context) -> None:
        for module, layer in lora_layers(ctx.model):
            a, b = (factor.weight.detach().float() for factor in factors(layer, TASK))
            own = pack(largest(b @ a, self.share))
            self.masks[module] = own | self.masks[module].to(own.device) if module in self.masks else own

    def state_dict(self) -> MethodState:
        return MethodState(tensors=dict(self.masks))

    def load_state_dict(self, state: MethodState) -> None:
        self.masks = dict(state.tensors)


def masked_mean(a: Tensor, b: Tensor, bits: Tensor) -> Tensor:
    """Mean of |B A| over the entries of a bit mask: (rank, in), (out, rank), (out, ⌈in / 8⌉) -> scalar."""
    columns = a.shape[1]
    total = mean_in_chunks(lambda rows, own: ((rows @ a).abs() * unpack(own, columns)).sum(dim=-1), (b, bits))
    count = sum(int(unpack(rows, columns).sum()) for rows in bits.split(64))
    return total * len(b) / max(count, 1)


def largest(matrix: Tensor, share: float) -> Tensor:
    """Mask of the entries of largest magnitude, at least one."""
    keep = max(1, round(share * matrix.numel()))
    mask = torch.zeros(matrix.numel(), dtype=torch.bool, device=matrix.device)
    mask[matrix.abs().flatten().topk(keep).indices] = True
    return mask.reshape(matrix.shape)


def pack(mask: Tensor) -> Tensor:
    """Eight columns to a byte: (out, in) bool -> (out, ⌈in / 8⌉) uint8."""
    padded = torch.nn.functional.pad(mask.to(torch.uint8), (0, -mask.shape[1] % 8))
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (padded.reshape(len(mask), -1, 8) * weights).sum(dim=-1).to(torch.uint8)


def unpack(bits: Tensor, columns: int) -> Tensor:
    """Inverse of `pack`."""
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits.unsqueeze(-1) >> places) & 1).bool().reshape(len(bits), -1)[:, :columns]
