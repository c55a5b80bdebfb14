"""Experts whose gates depend on the task of a row, which is guessed where it is not known, and how much a task uses them.

Notation as in `_experts.py`: N rows, L tokens, E experts, T tasks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mllm_cl.errors import MethodError
from mllm_cl.methods._experts import Experts, language_only
from mllm_cl.methods._routing import similarities
from mllm_cl.methods._rows import drawn_rows
from mllm_cl.methods.base import Context, MethodState, RouteBatch


class TaskExperts(Experts):
    """Experts whose gates depend on the task too. While a task is learnt it is that task; later every row is taken for the
    task with the nearest prototype, and without `route` for the last one.

    Args:
        samples: training rows that make a prototype, and that the use of the experts is measured on.
    """

    def __init__(self, experts: int, samples: int) -> None:
        super().__init__(experts)
        self.samples = samples
        self.tasks: list[str] = []
        self.prototypes = torch.zeros(0, 0)  # (T, features)
        self._chosen: Tensor | None = None  # (N,) number of the task of every row
        self._noted: dict[str, list[Tensor]] | None = None

    def begin_task(self, ctx: Context) -> None:
        language_only(ctx, self.name)
        self._chosen = None
        super().begin_task(ctx)

    def end_task(self, ctx: Context) -> None:
        super().end_task(ctx)
        own = ctx.embed(drawn_rows(ctx, self.samples)).mean(dim=0, keepdim=True).cpu()
        self.prototypes = torch.cat([self.prototypes, own]) if self.tasks else own
        self.tasks.append(ctx.task.name)

    def route(self, ctx: Context, batch: RouteBatch) -> list[dict[str, float]] | None:
        """Says which task every row is taken for; holds for the forward passes of these rows."""
        self._attach(ctx.model)
        near = similarities(ctx.embed(batch.rows).cpu(), self.prototypes).argmax(dim=1) if self.tasks else None
        self._chosen = None if near is None else near.to(ctx.model.device)
        return None

    def of_rows(self, per_task: Sequence[Tensor], inputs: Tensor) -> Tensor:
        """Each row's own of the tasks' values, with an axis for tokens: T × (...) -> (N or 1, 1, ...)."""
        if self._chosen is None:
            return per_task[-1][None, None]
        chosen = self._chosen.repeat_interleave(inputs.shape[0] // len(self._chosen))  # beams of a row lie together
        if inputs.dim() != 3 or len(chosen) != len(inputs):
            raise MethodError(
                f"methods.{self.name}: a layer was given {tuple(inputs.shape)} for {len(self._chosen)} routed rows.",
                expected="(rows, tokens, features), the rows that `route` has seen last",
                fix="route the rows before they are answered.",
            )
        return torch.stack(list(per_task))[chosen].unsqueeze(1)

    def note(self, module: str, gates: Tensor) -> None:
        """Remembers the gates (..., E) of one row's tokens while the use of the experts is measured."""
        if self._noted is not None:
            self._noted.setdefault(module, []).append(gates.detach().flatten(0, -2))

    @torch.no_grad()
    def measure(self, ctx: Context, top: int = 2) -> dict[str, tuple[Tensor, Tensor]]:
        """Returns, per layer, the mean gates over the tokens of some of the task's rows and how often an expert was among the
        `top` with the largest: module -> (E,), (E,)."""
        self._noted, was_training = {}, ctx.model.training
        ctx.model.eval()
        for batch in ctx.calibration(self.samples, 1):  # one row at a time: no padding
            ctx.model(**{name: value for name, value in batch.items() if name != "labels"})
        ctx.model.train(was_training)
        noted, self._noted = self._noted, None
        found = {}
        for module, parts in noted.items():
            gates = torch.cat(parts)
            counts = gates.topk(min(top, self.experts), dim=-1).indices.flatten().bincount(minlength=self.experts)
            found[module] = (gates.mean(dim=0), counts)
        return found

    def state_dict(self) -> MethodState:
        state = super().state_dict()
        state.tensors["prototypes"] = self.prototypes
        state.data["tasks"] = list(self.tasks)
        return state

    def load_state_dict(self, state: MethodState) -> None:
        super().load_state_dict(state)
        self.prototypes, self.tasks, self._chosen = state.tensors["prototypes"], list(state.data["tasks"]), None
