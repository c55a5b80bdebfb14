"""clmoe: a mixture of LoRA experts with two routers and two momenta (CL-MoE).

Idea: the token says which experts fit it, the task says which have served it; after a task, experts that earlier tasks rely
on keep most of what they were, and the experts that only the new task relies on keep most of what they have become.
Formula: y = W x + s Σ_e (β g_e(x) + (1 − β) G_e(t)) B_e A_e x with g(x) = softmax(R x) for every token and G(t) the mean of
g over rows of task t, per layer: before training for the task that is learnt, after it for good. In use, t is the task whose
prototype is nearest to the row. After a task θ_e ← λ_e θ_e(before) + (1 − λ_e) θ_e for both factors, λ_e = 1 − γ if expert e
is among the `important` of the new task and of no earlier one, else γ; important are those most often among a token's top
two.
Stored once: one adapter of rank r and a router per layer; per task: G (E numbers per layer) and a prototype. Cost per step:
1×; per task: two forward passes and an embedding pass over `samples` rows; inference: one embedding pass.
Reference: Huai et al. 2025, CL-MoE (CVPR, arXiv 2503.00413; ECNU-ICALK/CL-MoE). Fidelity: the released merge script tests
for names that PEFT's tensors do not have, so that it merges nothing, gives the two coefficients the other way round, and
lacks the task router at test time; this is the paper's description, with γ for experts that neither side relies on (ours).
The paper finds the task by cluster centres of text and image features, here by a prototype in the embedding of the untouched
base.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from mllm_cl.methods._experts import spread
from mllm_cl.methods._routing import token_gates
from mllm_cl.methods._task_experts import TaskExperts
from mllm_cl.methods.base import Context, MethodState
from mllm_cl.models.adapters import DEFAULT, adapter_parameters

Share = Annotated[float, Field(ge=0, le=1)]
TASK_GATES, IMPORTANT = "task_gates/", "important/"


class CLMoE(TaskExperts):
    """CL-MoE.

    Args:
        experts: experts per layer; must divide `model.lora.r`.
        balance: β, the share of the token's own gates.
        momentum: γ, the share of the old weights in experts that earlier tasks rely on.
        important: experts per layer that a task relies on.
        samples: training rows that make a prototype, and that gates and their use are measured on.
    """

    name = "clmoe"
    summary = "LoRA experts with a token and a task router, merged with the last stage by two momenta"
    needs = frozenset()
    roles = frozenset({"routing", "consolidation"})

    def __init__(
        self,
        *,
        experts: Annotated[int, Field(ge=1)] = 4,
        balance: Share = 0.5,
        momentum: Share = 0.7,
        important: Annotated[int, Field(ge=1)] = 2,
        samples: Annotated[int, Field(ge=1)] = 64,
    ) -> None:
        super().__init__(experts, samples)
        self.balance, self.momentum, self.important = balance, momentum, important
        self.task_gates: dict[str, Tensor] = {}  # module -> G (T, E)
        self.relied_on: dict[str, Tensor] = {}  # module -> (E,) bool, by any task so far
        self._now: dict[str, Tensor] = {}  # module -> G of the task that is learnt
        self._before: dict[str, Tensor] = {}

    def begin_task(self, ctx: Context) -> None:
        super().begin_task(ctx)
        self._before = {name: own.detach().clone() for name, own in adapter_parameters(ctx.model, DEFAULT).items()}
        self._now = {}
        self._now = {module: mean for module, (mean, _) in self.measure(ctx).items()}

    def gate(self, own: Mapping[str, Tensor], module: str, inputs: Tensor, states: Tensor, scaled: Tensor) -> Tensor:
        gates = token_gates(inputs, own[module])  # (N, L, E)
        self.note(module, gates)
        per_task = [*self.task_gates.get(module, ()), *([self._now[module]] if module in self._now else [])]
        if per_task:
            of_task = self.of_rows([task.to(gates.device) for task in per_task], inputs)  # (N or 1, 1, E)
            gates = self.balance * gates + (1 - self.balance) * of_task
        return states * spread(gates, states.shape[-1])

    def end_task(self, ctx: Context) -> None:
        parameters = adapter_parameters(ctx.model, DEFAULT)
        for module, (mean, counts) in self.measure(ctx).items():
            new = torch.zeros(self.experts, dtype=torch.bool)
            new[counts.cpu().topk(min(self.important, self.experts)).indices] = True
            old = self.relied_on.get(module, torch.zeros_like(new))
            if ctx.index > 1:
                share = old_shares(new, old, self.momentum)
                keys = [f"{module}.lora_{kind}" for kind in "AB"]
                merge_experts([parameters[key] for key in keys], [self._before[key] for key in keys], share)
            self.relied_on[module] = old | new
            past = self.task_gates.get(module, torch.zeros(0, self.experts))
            self.task_gates[module] = torch.cat([past, mean.cpu().unsqueeze(0)])
        self._now, self._before = {}, {}
        super().end_task(ctx)

    def state_dict(self) -> MethodState:
        state = super().state_dict()
        state.tensors |= {TASK_GATES + module: tensor for module, tensor in self.task_gates.items()}
        state.tensors |= {IMPORTANT + module: tensor for module, tensor in self.relied_on.items()}
        return state

    def load_state_dict(self, state: MethodState) -> None:
        super().load_state_dict(state)
        tensors = state.tensors
        self.task_gates = {k.removeprefix(TASK_GATES): t for k, t in tensors.items() if k.startswith(TASK_GATES)}
        self.relied_on = {k.removeprefix(IMPORTANT): t for k, t in tensors.items() if k.startswith(IMPORTANT)}


def old_shares(new: Tensor, old: Tensor, momentum: float) -> Tensor:
    """λ of every expert: how much of its old weights it keeps; (E,) bool, (E,) bool -> (E,)."""
    return torch.where(new & ~old, 1 - momentum, momentum)


@torch.no_grad()
def merge_experts(factors: Sequence[Tensor], before: Sequence[Tensor], share: Tensor) -> None:
    """θ_e <- λ_e θ_e(before) + (1 − λ_e) θ_e in place, for A (R, in) and B (out, R), with λ (E,)."""
    lora_a, lora_b = factors
    kept = spread(share, len(lora_a)).to(lora_a)  # (R,)
    lora_a.copy_(kept[:, None] * before[0] + (1 - kept[:, None]) * lora_a)
    lora_b.copy_(kept * before[1] + (1 - kept) * lora_b)
