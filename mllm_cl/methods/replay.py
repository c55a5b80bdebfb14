"""replay: rehearse a few stored rows of earlier tasks while learning the current one.

Idea: mix the current task with a small memory of past rows (experience replay).
Formula: L = E_{D_t} ℓ + share/(1 − share) · E_M ℓ, realised by the mixture of rows. What is kept (`policy`):
- reservoir: every row seen so far has the same chance min(1, size / n)
- balanced: every task the same number, drawn at random; class_balanced: and within a task the answers in turn
- herding: rows whose mean embedding (untouched base) stays nearest to the task's
- surprise: rows with the largest mean negative log-likelihood of their answer before the task is learnt
Stored per task: (task, row id) pairs, no pixels and no texts; the rows must stay in the stream.
Cost per step: 1×, but 1/(1 − share) as many steps; herding and surprise one forward pass over `candidates` rows per task.
Reference: Vitter 1985; Chaudhry et al. 2019 (arXiv 1902.10486); herding, Rebuffi et al. 2017 (arXiv 1611.07725);
surprise, SuRe (arXiv 2511.22367). Fidelity: replayed rows are shuffled into the task's, `share` of them in the mean and not in
every batch; SuRe's slow weights are `ema`. Peers fill the memory with the first batches (Prism) or one rank's rows.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field

from mllm_cl.data.memory import balanced, class_order, first_of_each, herding_order, look_up, reservoir
from mllm_cl.data.rows import Row, reference_answers
from mllm_cl.methods._rows import mixed_in
from mllm_cl.methods._terms import row_likelihoods
from mllm_cl.methods.base import Context, Method, MethodState

_AT_ONCE = 16  # rows per forward pass


class Replay(Method):
    """Experience replay.

    Args:
        size: rows kept in total.
        share: share of replayed rows among the rows of each later task.
        policy: `reservoir`, `balanced`, `class_balanced`, `herding` or `surprise`.
        candidates: rows per task that herding and surprise choose from.
    """

    name = "replay"
    summary = "rehearse stored rows of earlier tasks (reservoir, balanced, by class, herding, surprise)"
    needs = frozenset({"past_rows"})

    def __init__(
        self,
        *,
        size: Annotated[int, Field(ge=1)] = 200,
        share: Annotated[float, Field(gt=0, lt=1)] = 0.25,
        policy: Literal["reservoir", "balanced", "class_balanced", "herding", "surprise"] = "reservoir",
        candidates: Annotated[int, Field(ge=1)] = 1024,
    ) -> None:
        self.size, self.share, self.policy, self.candidates = size, share, policy, candidates
        self.memory: list[tuple[str, str]] = []
        self.seen = 0
        self.surprising: list[int] = []  # of the current task, most surprising first; made again when resumed

    def begin_task(self, ctx: Context) -> None:
        if self.policy == "surprise":
            drawn = self._candidates(ctx)
            likelihoods = answer_likelihoods(ctx, [ctx.task.train[index] for index in drawn])
            self.surprising = [drawn[place] for place in likelihoods.argsort(stable=True).tolist()]

    def train_rows(self, ctx: Context, rows: Sequence[Row]) -> Sequence[Row]:
        if not self.memory:
            return rows
        stored = look_up(self.memory, {task.name: task.train for task in ctx.stream})
        return mixed_in(rows, stored, self.share, random.Random(ctx.seed()))

    def end_task(self, ctx: Context) -> None:
        rng, train = random.Random(ctx.seed()), ctx.task.train
        if self.policy == "reservoir":
            self.memory = reservoir(self.memory, self.seen, self._entries(ctx, range(len(train))), self.size, rng)
        elif self.policy == "balanced":
            self.memory = balanced(self.memory, self._entries(ctx, range(len(train))), self.size, rng)
        else:
            self.memory = first_of_each(self.memory, self._entries(ctx, self._order(ctx, rng)), self.size)
        self.seen += len(train)

    def _order(self, ctx: Context, rng: random.Random) -> Sequence[int]:
        """Rows of the task in the order in which they deserve a place."""
        if self.policy == "class_balanced":
            return class_order([" ".join(reference_answers(row)) for row in ctx.task.train], rng)
        if self.policy == "surprise":
            return self.surprising
        drawn = self._candidates(ctx)
        embeddings = ctx.embed([ctx.task.train[index] for index in drawn])
        return [drawn[place] for place in herding_order(embeddings, self.size)]

    def _candidates(self, ctx: Context) -> list[int]:
        order = torch.randperm(len(ctx.task.train), generator=ctx.rng)
        return order[: self.candidates].sort().values.tolist()

    def _entries(self, ctx: Context, indices: Sequence[int]) -> list[tuple[str, str]]:
        return [(ctx.task.name, ctx.task.train[index]["id"]) for index in indices]

    def state_dict(self) -> MethodState:
        return MethodState(data={"memory": [list(entry) for entry in self.memory], "seen": self.seen})

    def load_state_dict(self, state: MethodState) -> None:
        self.memory = [(task, row_id) for task, row_id in state.data["memory"]]
        self.seen = state.data["seen"]


@torch.no_grad()
def answer_likelihoods(ctx: Context, rows: Sequence[Row]) -> torch.Tensor:
    """Mean log-likelihood of each row's answer under the model as it is, without dropout: (rows,) float32."""
    was_training = ctx.model.training
    ctx.model.eval()
    parts = []
    for start in range(0, len(rows), _AT_ONCE):
        inputs = ctx.collate(rows[start : start + _AT_ONCE])
        labels = inputs.pop("labels")
        parts.append(row_likelihoods(ctx.model(**inputs).logits, labels).cpu())
    ctx.model.train(was_training)
    return torch.cat(parts)
