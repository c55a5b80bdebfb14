"""replay: rehearse a few stored rows of earlier tasks while learning the current one.

Idea: mix the current task with a small memory of past rows (experience replay).
Formula: L = E_{D_t} ℓ + share/(1 − share) · E_M ℓ, realised by the mixture of rows.
Stored per task: (task, row id) pairs, no pixels and no texts; the rows must stay in the stream.
Cost per step: 1×, but 1/(1 − share) as many steps.
Reference: reservoir, Vitter 1985; balanced memories, Chaudhry et al. 2019 (arXiv 1902.10486).
Peers fill the memory with the first batches (Prism) or one rank's rows; here every row of a task has the same chance.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from mllm_cl.data.memory import balanced, look_up, reservoir
from mllm_cl.data.rows import Row, Rows
from mllm_cl.methods.base import Context, Method, MethodState


class Replay(Method):
    """Experience replay.

    Args:
        size: rows kept in total.
        share: share of replayed rows among the rows of each later task.
        policy: `reservoir` (every row seen so far has the same chance) or `balanced` (every task the same number).
    """

    name = "replay"
    summary = "rehearse stored rows of earlier tasks (reservoir or balanced)"
    needs = frozenset({"past_rows"})

    def __init__(
        self,
        *,
        size: Annotated[int, Field(ge=1)] = 200,
        share: Annotated[float, Field(gt=0, lt=1)] = 0.25,
        policy: Literal["reservoir", "balanced"] = "reservoir",
    ) -> None:
        self.size, self.share, self.policy = size, share, policy
        self.memory: list[tuple[str, str]] = []
        self.seen = 0

    def train_rows(self, ctx: Context, rows: Sequence[Row]) -> Sequence[Row]:
        if not self.memory:
            return rows
        stored = look_up(self.memory, {task.name: task.train for task in ctx.stream})
        wanted = round(len(rows) * self.share / (1 - self.share))
        rng = random.Random(ctx.seed())
        order: list[int] = []
        while len(order) < wanted:  # whole passes over the memory before any row comes again
            order += rng.sample(range(len(stored)), min(len(stored), wanted - len(order)))
        return Rows([*rows, *stored.select(order)])

    def end_task(self, ctx: Context) -> None:
        rng = random.Random(ctx.seed())
        new = [(ctx.task.name, row["id"]) for row in ctx.task.train]
        if self.policy == "reservoir":
            self.memory = reservoir(self.memory, self.seen, new, self.size, rng)
        else:
            self.memory = balanced(self.memory, new, self.size, rng)
        self.seen += len(new)

    def state_dict(self) -> MethodState:
        return MethodState(data={"memory": [list(entry) for entry in self.memory], "seen": self.seen})

    def load_state_dict(self, state: MethodState) -> None:
        self.memory = [(task, row_id) for task, row_id in state.data["memory"]]
        self.seen = state.data["seen"]
