"""branchlora: experts that share one A, of which the most used are frozen after every task, with a router per task.

Idea: the A of different experts come to resemble each other and their B do not, so one A is a trunk for all and every B a
branch; what a task has come to rely on is frozen, and its router stays as it was.
Formula: y = W x + s Σ_e softmax_top-k(R_t x)_e B_e A x for every token, t the task of the row; after a task the `freeze`
most used branches of every layer that are still tuned are frozen (one always stays tuned). In use, t is the task whose
prototype is nearest to the row. The trunk goes on learning, so past tasks are protected, not isolated.
Stored once: one adapter of rank r (r / E for the trunk, repeated for every branch so that it is a plain LoRA); per task: a
router per layer (E × in, float32) and a prototype. Cost per step: 1×; per task: forward passes over `samples` rows;
inference: one embedding pass.
Reference: Zhang et al. 2025, BranchLoRA (ACL, arXiv 2506.02041); written from its description, no code was found. Fidelity:
the paper learns image and text keys per task with a cosine loss to select the router, here a prototype in the embedding of
the untouched base does; how many branches are frozen is our choice. The paper: 8 branches, top-2, feed-forward layers, rank
128.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from mllm_cl.methods._experts import first_router
from mllm_cl.methods._routing import top_gates
from mllm_cl.methods._task_experts import TaskExperts
from mllm_cl.methods.base import AROUND_STEPS, Context, MethodState
from mllm_cl.models.adapters import DEFAULT, factors, lora_layers


class BranchLoRA(TaskExperts):
    """BranchLoRA.

    Args:
        experts: branches per layer; must divide `model.lora.r`.
        top: branches that a token uses.
        freeze: branches per layer that are frozen after every task.
        samples: training rows that make a prototype, and that the use of the branches is counted on.
    """

    name = "branchlora"
    summary = "branches over one shared A, the most used frozen after each task, a router per task"
    supports = AROUND_STEPS

    def __init__(
        self,
        *,
        experts: Annotated[int, Field(ge=1)] = 4,
        top: Annotated[int, Field(ge=1)] = 2,
        freeze: Annotated[int, Field(ge=0)] = 1,
        samples: Annotated[int, Field(ge=1)] = 64,
    ) -> None:
        super().__init__(experts, samples)
        self.top, self.freeze = top, freeze
        self.frozen: dict[str, Tensor] = {}  # module -> (E,) bool
        self._kept: dict[str, Tensor] = {}  # module -> B as the task found it

    def prepare(self, ctx: Context) -> None:
        for module, layer in lora_layers(ctx.model):
            last = self.gates.get(f"{ctx.index - 1}/{module}")
            start = first_router(self.experts, layer.in_features, ctx.rng) if last is None else last.clone()
            self.gates[f"{ctx.index}/{module}"] = start
            self.frozen.setdefault(module, torch.zeros(self.experts, dtype=torch.bool))
            self._kept[module] = factors(layer, DEFAULT)[1].weight.detach().clone()
        self._repeat_trunk(ctx)

    def trains(self, name: str, index: int) -> bool:
        return name.startswith(f"{index}/")

    def gate(self, own: Mapping[str, Tensor], module: str, inputs: Tensor, states: Tensor, scaled: Tensor) -> Tensor:
        count = len(self.tasks) + (f"{len(self.tasks) + 1}/{module}" in own)
        routers = self.of_rows([own[f"{task}/{module}"] for task in range(1, count + 1)], inputs)  # (N or 1, 1, E, in)
        gates = top_gates(inputs @ routers.squeeze(1).mT, self.top)  # (N, L, E)
        self.note(module, gates)
        trunk = states[..., : states.shape[-1] // self.experts]
        return (gates.unsqueeze(-1) * trunk.unsqueeze(-2)).flatten(-2)  # (N, L, E, R / E) -> (N, L, R)

    def after_step(self, ctx: Context) -> None:
        with torch.no_grad():
            for module, layer in lora_layers(ctx.model):
                if self.frozen[module].any():
                    weight = factors(layer, DEFAULT)[1].weight  # (out, R)
                    frozen = self._columns(module, weight)
                    weight[:, frozen] = self._kept[module][:, frozen]

    def end_task(self, ctx: Context) -> None:
        for module, (_, counts) in self.measure(ctx, self.top).items():
            tuned = counts.cpu().masked_fill(self.frozen[module], -1)
            room = max(0, int((~self.frozen[module]).sum()) - 1)
            self.frozen[module][tuned.topk(min(self.freeze, room)).indices] = True
        self._repeat_trunk(ctx)
        self._kept = {}
        super().end_task(ctx)

    def _columns(self, module: str, weight: Tensor) -> Tensor:
        """Which columns of B belong to frozen branches."""
        return self.frozen[module].repeat_interleave(weight.shape[1] // self.experts).to(weight.device)

    def _repeat_trunk(self, ctx: Context) -> None:
        """The adapter as stored holds the trunk once per branch."""
        with torch.no_grad():
            for _, layer in lora_layers(ctx.model):
                weight = factors(layer, DEFAULT)[0].weight  # (R, in)
                weight.copy_(weight[: len(weight) // self.experts].repeat(self.experts, 1))

    def state_dict(self) -> MethodState:
        state = super().state_dict()
        state.tensors |= {f"frozen/{module}": tensor for module, tensor in self.frozen.items()}
        return state

    def load_state_dict(self, state: MethodState) -> None:
        super().load_state_dict(state)
        kept = {name.removeprefix("frozen/"): t for name, t in state.tensors.items() if name.startswith("frozen/")}
        self.frozen = kept
