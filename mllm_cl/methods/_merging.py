"""What the merges have in common: train a task vector, keep it, merge all of them into the consolidated adapter.

A task vector is the full update τ_t = θ_t − θ_0 of one task, kept as its LoRA factors. `start` says from where a task is
trained, two settings that papers mix up:

- `base`: every task alone from the untouched base, so τ_t is its fresh adapter (what the merging literature does)
- `sequence`: on from the weights of the previous task, unmerged, so τ_t is the sum of all fresh adapters so far (MagMax)

The merge itself is `mllm_cl.spectral.merge_many`; entrywise merges have full rank and are cut to `model.max_rank`, whose
relative error is written into the ledger (`merge_truncation_error`).
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from mllm_cl.methods.base import Context, Method, MethodState
from mllm_cl.models.adapters import (
    DEFAULT,
    TASK,
    adapter_names,
    clear_adapter,
    lora_factors,
    remove_adapter,
    set_active,
    write_deltas,
)
from mllm_cl.spectral import LowRankDelta, merge_many

Start = Literal["base", "sequence"]
SEQUENCE = "sequence"


class Merging(Method):
    """Base of the methods that merge task vectors; a subclass names the merge and takes its options."""

    adapters = "stacked"
    roles = frozenset({"consolidation"})
    merge: ClassVar[str]

    def __init__(self, *, start: Start = "base") -> None:
        self.start = start
        self.options: dict[str, float | int | str] = {}
        self.fresh: list[dict[str, Tensor]] = []  # per task: `module/A` (rank, in) and `module/B` (out, rank)

    def begin_task(self, ctx: Context) -> None:
        names = [TASK]
        if self.start == "sequence" and self.fresh:
            so_far = self._vectors()[-1]
            write_deltas(ctx.model, SEQUENCE, so_far, max(1, *(update.rank for update in so_far.values())))
            names = [SEQUENCE, TASK]
        set_active(ctx.model, names)

    def end_task(self, ctx: Context) -> None:
        if SEQUENCE in adapter_names(ctx.model):
            remove_adapter(ctx.model, SEQUENCE)
        self.fresh.append(lora_factors(ctx.model, TASK))
        merged, error = merge_many(self._vectors(), self.merge, rank=ctx.max_rank, **self.options)
        ctx.cost["merge_truncation_error"] = error  # type: ignore[assignment]
        write_deltas(ctx.model, DEFAULT, merged, max(1, *(update.rank for update in merged.values())))
        clear_adapter(ctx.model, TASK)

    def _vectors(self) -> list[dict[str, LowRankDelta]]:
        """The task vectors, in the order of the tasks."""
        vectors: list[dict[str, LowRankDelta]] = []
        for factors in self.fresh:
            own = updates_of(factors)
            if self.start == "sequence" and vectors:
                own = {module: vectors[-1][module] + update for module, update in own.items()}
            vectors.append(own)
        return vectors

    def state_dict(self) -> MethodState:
        tensors = {f"{task}/{name}": tensor for task, own in enumerate(self.fresh) for name, tensor in own.items()}
        return MethodState(tensors=tensors, data={"tasks": len(self.fresh)})

    def load_state_dict(self, state: MethodState) -> None:
        self.fresh = [
            {name.partition("/")[2]: t for name, t in state.tensors.items() if name.partition("/")[0] == str(task)}
            for task in range(state.data["tasks"])
        ]


def updates_of(factors: dict[str, Tensor]) -> dict[str, LowRankDelta]:
    """Returns the updates of what `lora_factors` returned."""
    modules = [name.removesuffix("/A") for name in factors if name.endswith("/A")]
    with torch.no_grad():
        return {name: LowRankDelta.from_lora(factors[f"{name}/A"], factors[f"{name}/B"]) for name in modules}
