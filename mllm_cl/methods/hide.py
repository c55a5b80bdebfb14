"""hide: fuse what tasks share, mix what tells them apart (HiDe-LLaVA).

Idea: adapters of different tasks resemble each other in all blocks but the last; add them up there, and let the sample
choose in the last block only.
Formula: ΔW = Σ_t ΔW_t in all blocks but the last; ΔW(x) = Σ_t w_t(x) ΔW_t in the last, w = softmax(s_t / temperature), s_t
the mean of the cosines of the whole inquiry and of its question alone with the task's prototypes.
Stored per task: one adapter and one prototype. Cost per step: 1×; per task: two embedding passes over `samples` rows;
inference: two over the rows, and rows with different gates are generated one by one.
Reference: Guo et al. 2025, HiDe-LLaVA (ACL 2025). Fidelity: updates are summed exactly; with `variant: released` the factors
are, s (Σ B)(Σ A), which adds cross terms between tasks, as the released code does. Embeddings come from the untouched base
instead of CLIP; gates are per sample, prototypes float32. What is not in a decoder block (vision, bridge) is fused.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from mllm_cl.data.inquiry import ask, question_of
from mllm_cl.methods._layers import decoder_blocks
from mllm_cl.methods._routing import gates
from mllm_cl.methods.base import Context, MethodState, RouteBatch
from mllm_cl.methods.task_adapters import Samples, TaskAdapters
from mllm_cl.models.adapters import (
    adapter_deltas,
    adapter_names,
    lora_factors,
    remove_adapter,
    task_adapter,
    write_deltas,
)
from mllm_cl.spectral import LowRankDelta

FUSED, TOP = "fused", "top-"


class HiDe(TaskAdapters):
    """HiDe-LLaVA.

    Args:
        samples: training rows that make a prototype.
        temperature: of the softmax over tasks.
        variant: what is summed, the updates (`paper`) or their factors (`released`).
    """

    name = "hide"
    summary = "one adapter per task, summed in all blocks but the last, mixed per sample there"

    def __init__(
        self,
        *,
        samples: Samples = 256,
        temperature: Annotated[float, Field(gt=0)] = 0.1,
        variant: Literal["paper", "released"] = "paper",
    ) -> None:
        super().__init__(samples=samples, reject=None)
        self.temperature, self.variant = temperature, variant
        self._built: tuple[str, ...] = ()

    def embed(self, ctx: Context, rows: list) -> Tensor:
        """Two halves of unit length, so that their cosine is the mean of the two."""
        questions = [ask(question_of(row), [], row["id"]) for row in rows]
        return torch.cat([normalize(ctx.embed(part), dim=-1) for part in (rows, questions)], dim=-1).cpu()

    def prototype(self, embeddings: Tensor) -> Tensor:
        """Each half of unit length too: the rows of a task have one question and many images, so that their means are not
        equally long, and the longer one would count for more."""
        halves = embeddings.mean(dim=0).unflatten(0, (2, -1))
        return normalize(halves, dim=-1).flatten() / 2**0.5

    def begin_task(self, ctx: Context) -> None:
        self._remove(ctx)

    def load_state_dict(self, state: MethodState) -> None:
        super().load_state_dict(state)
        self._built = ()  # of the adapters that were there before

    def route(self, ctx: Context, batch: RouteBatch) -> list[dict[str, float]] | None:
        if not self.tasks:
            return [{} for _ in batch.rows]
        if self._built != tuple(self.tasks) or FUSED not in adapter_names(ctx.model):
            self._build(ctx)
        weights = gates(self.compare(ctx, batch)[1], self.temperature).tolist()
        return [{FUSED: 1.0} | {TOP + str(i): weight for i, weight in enumerate(own)} for own in weights]

    def _build(self, ctx: Context) -> None:
        """The fused adapter, and each task's part of the last block as an adapter of its own; in memory only."""
        self._remove(ctx)
        blocks = decoder_blocks(ctx.model)
        last = {module for module, block in blocks.items() if block == max(blocks.values())}
        exact: dict[str, LowRankDelta] = {}
        for number, task in enumerate(self.tasks):
            own = adapter_deltas(ctx.model, task_adapter(task))
            top = {m: u if m in last else LowRankDelta.zeros(*u.shape) for m, u in own.items()}
            exact = {module: update + exact[module] if exact else update for module, update in own.items()}
            write_deltas(ctx.model, TOP + str(number), top, max(1, *(update.rank for update in top.values())))
        summed = exact if self.variant == "paper" else self._summed_factors(ctx)
        fused = {m: LowRankDelta.zeros(*u.shape) if m in last else u for m, u in summed.items()}
        write_deltas(ctx.model, FUSED, fused, max(1, *(update.rank for update in fused.values())))
        self._built = tuple(self.tasks)

    def _summed_factors(self, ctx: Context) -> dict[str, LowRankDelta]:
        """s (Σ B)(Σ A) per module."""
        tasks = [lora_factors(ctx.model, task_adapter(task)) for task in self.tasks]
        total = {name: sum(own[name] for own in tasks[1:]) + tasks[0][name] for name in tasks[0]}
        modules = [name.removesuffix("/A") for name in total if name.endswith("/A")]
        return {module: LowRankDelta.from_lora(total[f"{module}/A"], total[f"{module}/B"], 1.0) for module in modules}

    def _remove(self, ctx: Context) -> None:
        for name in adapter_names(ctx.model):
            if name == FUSED or name.startswith(TOP):
                remove_adapter(ctx.model, name)
        self._built = ()
