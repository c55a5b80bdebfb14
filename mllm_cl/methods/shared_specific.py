"""shared_specific: two LoRA branches, one that all tasks share and one of the task's own.

Idea: what tasks have in common is learnt once and kept nearly still; what is particular goes into a branch that nobody else
touches.
Formula: h = W x + ΔW_shared x + ΔW_t x. Both branches learn the first task; later the shared one moves `slowness` times
as far per step as the optimizer wants (0: frozen). After a task its adapter becomes ΔW_shared + ΔW_t, of rank 2 r.
Stored per task: one adapter of twice the rank and a prototype; once the shared branch. Cost per step: 1×, a second adapter in
the forward pass; per task and in inference as `task_adapters`.
Reference: the dual-branch block (DBME) of MMTL-UniAD (CVPR 2025), carried over from multi-task to continual learning.
Fidelity: the idea of two branches only; LoRA, the slow branch and its place in a stream are ours.
Folding the shared branch into each task's adapter keeps past tasks exactly as they were and loads in plain PEFT.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from mllm_cl.methods.base import AROUND_STEPS, Context, MethodState
from mllm_cl.methods.task_adapters import Reject, Router, Samples, TaskAdapters
from mllm_cl.models.adapters import (
    DEFAULT,
    adapter_deltas,
    adapter_parameters,
    set_active,
    task_adapter,
    write_deltas,
)

SHARED = "shared/"


class SharedSpecific(TaskAdapters):
    """Shared and task-specific branches.

    Args:
        slowness: share of its step that the shared branch takes from the second task on.
        router: `prototype`, `ridge`, `generative` or `oracle`.
        samples: training rows that make a prototype.
        reject: standard deviations below a task's own mean similarity at which a sample goes to the base.
    """

    name = "shared_specific"
    summary = "a slow shared LoRA branch beside one branch per task, routed per sample"
    supports = AROUND_STEPS

    def __init__(
        self,
        *,
        slowness: Annotated[float, Field(ge=0, le=1)] = 0.0,
        router: Router = "prototype",
        samples: Samples = 256,
        reject: Reject = 2.0,
    ) -> None:
        super().__init__(router=router, samples=samples, reject=reject)
        self.slowness = slowness
        self.shared: dict[str, Tensor] = {}
        self._live: dict[str, torch.nn.Parameter] = {}

    def begin_task(self, ctx: Context) -> None:
        self._live = adapter_parameters(ctx.model, DEFAULT)
        self._restore()
        set_active(ctx.model, [DEFAULT, task_adapter(ctx.task.name)])
        for parameter in self._live.values():
            parameter.requires_grad_(ctx.index == 1 or self.slowness > 0)
        self._remember()

    def after_step(self, ctx: Context) -> None:
        if ctx.index > 1 and self.slowness:
            with torch.no_grad():
                for name, parameter in self._live.items():
                    last = self.shared[name].to(parameter.device)
                    parameter.copy_(last + self.slowness * (parameter - last))
        self._remember()

    def end_task(self, ctx: Context) -> None:
        super().end_task(ctx)
        own, shared = task_adapter(ctx.task.name), adapter_deltas(ctx.model, DEFAULT)
        both = {module: update + shared[module] for module, update in adapter_deltas(ctx.model, own).items()}
        write_deltas(ctx.model, own, both, max(1, *(update.rank for update in both.values())))
        self._remember()
        self._live = {}

    def _remember(self) -> None:
        self.shared = {name: parameter.detach().clone() for name, parameter in self._live.items()}

    def _restore(self) -> None:
        with torch.no_grad():
            for name, tensor in self.shared.items():
                if name in self._live:
                    self._live[name].copy_(tensor)

    def state_dict(self) -> MethodState:
        state = super().state_dict()
        state.tensors |= {SHARED + name: tensor for name, tensor in self.shared.items()}
        return state

    def load_state_dict(self, state: MethodState) -> None:
        super().load_state_dict(state)
        self.shared = {k.removeprefix(SHARED): t for k, t in state.tensors.items() if k.startswith(SHARED)}
        self._restore()  # in the middle of a task the branch is part of the model already
