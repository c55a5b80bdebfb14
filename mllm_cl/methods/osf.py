"""osf: full-weight fine-tuning in the singular directions that the weights use least (orthogonal subspace fine-tuning).

Idea: the large singular directions of a weight hold what has been learnt; there is room in the small ones, and all of it may
be used.
Formula: W = U Σ Vᵀ the weight before the task, its k largest directions U_h, V_h frozen; of the others U_l, s_l, V_l are
trained and start where they are, so that ΔW = U_l diag(s_l) V_l − the same at the start. Gradients of U_l and V_l are
projected off U_h and V_h, and so are U_l and V_l after every step: U_hᵀ ΔW = 0 and ΔW V_hᵀ = 0 hold for any optimizer.
k = protected · min(out, in) for the first task, growing evenly towards all of them (`schedule: growing`), or the same for
every task (`constant`).
Stored per task: nothing beyond the consolidated adapter, which needs `model.max_rank` of min(out, in) to be exact; a lower
one cuts it back, and what that costs is in the ledger. Cost per step: (1 − protected) of all weights trained, three times
the products of every linear layer; per task one SVD per matrix, and the factors twice in memory.
Reference: Nayak et al. 2025 (Sculpting Subspaces, arXiv 2504.07097); PEFT's `osf`. Fidelity: as PEFT computes it, but beside
LoRA, as PEFT's layer takes the place of the linear layer and what it learns must be merged into the base, which is never
written here; ΔW becomes an adapter. PEFT projects gradients alone: Adam rescales and remembers, and moves into the protected
directions all the same, hence the projection after the step. The paper's choice of k per layer, from the similarity of its
input and output, is not there. Weight decay (0 by default) would shrink what the base knows in U_l, s_l, V_l.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from peft.tuners.lora import LoraLayer
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.hooks import RemovableHandle

from mllm_cl.errors import MethodError
from mllm_cl.methods._statistics import base_weight
from mllm_cl.methods.base import AROUND_STEPS, Context, Method
from mllm_cl.models.adapters import DEFAULT, TASK, adapter_deltas, lora_layers, set_trainable, write_deltas
from mllm_cl.spectral import LowRankDelta
from mllm_cl.spectral.subspace import project_out


@dataclass
class Split:
    """A weight in two parts of its singular directions.

    Args:
        u_high, v_high: (out, k) and (in, k), orthonormal, protected.
        u, s, v: (out, m), (m,) and (m, in), trained.
        u_start, v_start: what u · s and v were before the task, (out, m) and (m, in).
    """

    u_high: Tensor
    v_high: Tensor
    u: nn.Parameter
    s: nn.Parameter
    v: nn.Parameter
    u_start: Tensor
    v_start: Tensor

    @classmethod
    def of(cls, weight: Tensor, protected: int) -> Split:
        """Splits a weight (out, in) behind its `protected` largest singular values; gradients come projected."""
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        # laid out as a checkpoint brings them back: norms are summed in the order of the memory
        low = (u[:, protected:], s[protected:], v[protected:])
        own_u, own_s, own_v = (nn.Parameter(part.clone(memory_format=torch.contiguous_format)) for part in low)
        u_high, v_high = u[:, :protected].clone(), v[:protected].mT.clone()
        own_u.register_hook(lambda gradient: project_out(gradient, u_high))
        own_v.register_hook(lambda gradient: project_out(gradient.mT, v_high).mT)
        return cls(u_high, v_high, own_u, own_s, own_v, low[0] * low[1], low[2].clone())

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (2 m, in) and B (out, 2 m) with ΔW = B A."""
        return torch.cat([self.v, self.v_start]), torch.cat([self.u * self.s, -self.u_start], dim=1)

    @torch.no_grad()
    def project(self) -> None:
        """Takes out of u and v what lies in the protected directions."""
        self.u.copy_(project_out(self.u, self.u_high))
        self.v.copy_(project_out(self.v.mT, self.v_high).mT)


class Osf(Method):
    """Orthogonal subspace fine-tuning.

    Args:
        protected: share of the singular directions of every weight that the first task leaves alone.
        schedule: whether that share grows with the tasks or stays.
    """

    name = "osf"
    summary = "train all of the weights' small singular directions, leave the large ones alone"
    supports = AROUND_STEPS
    adapters = "stacked"
    roles = frozenset({"initialisation", "consolidation", "training"})

    def __init__(
        self,
        *,
        protected: Annotated[float, Field(ge=0, lt=1)] = 0.5,
        schedule: Literal["growing", "constant"] = "growing",
    ) -> None:
        self.protected, self.schedule = protected, schedule
        self.splits: dict[str, Split] = {}
        self._handles: list[RemovableHandle] = []

    def share(self, index: int, tasks: int) -> float:
        """Share of the directions that is protected while task number `index` of so many is learnt."""
        grown = (index - 1) / tasks if self.schedule == "growing" else 0.0
        return self.protected + (1 - self.protected) * grown

    def begin_task(self, ctx: Context) -> None:
        share = self.share(ctx.index, len(ctx.stream))
        past = adapter_deltas(ctx.model, DEFAULT)
        self._release()
        for module, layer in lora_layers(ctx.model):
            if not isinstance(layer.get_base_layer(), nn.Linear):
                raise MethodError(
                    f"methods.osf: {module} is not a linear layer.",
                    fix="give linear layers only in model.lora.target_modules.",
                )
            weight = base_weight(layer)
            weight = weight + past[module].dense().to(weight.device)
            count = min(round(share * min(weight.shape)), min(weight.shape) - 1)  # one direction stays
            split = self.splits[module] = Split.of(weight, count)
            self._handles.append(layer.register_forward_hook(_adding(split)))  # type: ignore[attr-defined]

    def parameters(self, ctx: Context) -> Mapping[str, nn.Parameter]:
        set_trainable(ctx.model, [])
        trained = {}
        for module, split in self.splits.items():
            trained |= {f"{module}/u": split.u, f"{module}/s": split.s, f"{module}/v": split.v}
        return trained

    def after_step(self, ctx: Context) -> None:
        for split in self.splits.values():
            split.project()

    def end_task(self, ctx: Context) -> None:
        updates = {}
        for module, split in self.splits.items():
            lora_a, lora_b = split.factors()
            updates[module] = LowRankDelta.from_lora(lora_a.detach(), lora_b.detach())
        self._release()
        write_deltas(ctx.model, TASK, updates, max(1, *(update.rank for update in updates.values())))

    def _release(self) -> None:
        """Takes the trained factors out of the layers."""
        for handle in self._handles:
            handle.remove()
        self._handles, self.splits = [], {}


def _adding(split: Split) -> Callable[[LoraLayer, tuple[Tensor, ...], Tensor], Tensor | None]:
    """What a layer's output is given while the task is learnt: ΔW x."""

    def hook(layer: LoraLayer, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if layer.disable_adapters or TASK not in layer.active_adapters:
            return None
        lora_a, lora_b = split.factors()
        return output + linear(linear(args[0].to(lora_a.dtype), lora_a), lora_b).to(output.dtype)

    return hook
