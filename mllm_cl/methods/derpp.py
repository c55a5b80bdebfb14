"""derpp: dark experience replay, stored rows with the logits that the model had when it knew their task (DER++).

Idea: stored answers say what was right, stored logits say what the model thought.
Formula: L = CE + alpha · mean over memory rows of mean over positions of ‖z_k − z*_k‖² / k + beta · mean over memory rows
of their mean token loss; z*_k the k largest logits of the stored row at its target positions.
Stored per task: (task, row id) pairs, and per target position k logits (float16) and token ids (int32).
Cost per step: the memory rows are further rows of the batch, `ratio` per task row; per task one forward pass over the
stored rows. Reference: Buzzega et al. 2020 (arXiv 2004.07211). Fidelity: logits are taken at the end of the task, not
along the way, and the k largest of them (the vocabulary of an MLLM does not fit); reservoir memory as in the paper.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from mllm_cl.data.inquiry import attach
from mllm_cl.data.memory import look_up, reservoir
from mllm_cl.data.rows import Row, Rows
from mllm_cl.methods._terms import row_likelihoods, target_logits
from mllm_cl.methods.base import EVERY_LAUNCHER, Context, Method, MethodState, TrainBatch

_AT_ONCE = 16
Entry = tuple[str, str]


class DerPlusPlus(Method):
    """DER++.

    Args:
        alpha: weight of the stored logits.
        beta: weight of the stored answers.
        size: rows kept in total (reservoir).
        ratio: memory rows per task row.
        top_k: logits kept per position.
    """

    name = "derpp"
    summary = "replay stored rows with their answers and top-k logits"
    needs = frozenset({"past_rows"})
    supports = EVERY_LAUNCHER

    def __init__(
        self,
        *,
        alpha: Annotated[float, Field(ge=0)] = 0.5,
        beta: Annotated[float, Field(ge=0)] = 0.5,
        size: Annotated[int, Field(ge=1)] = 200,
        ratio: Annotated[float, Field(gt=0, le=1)] = 0.5,
        top_k: Annotated[int, Field(ge=1)] = 100,
    ) -> None:
        self.alpha, self.beta, self.size, self.ratio, self.top_k = alpha, beta, size, ratio, top_k
        self.memory: list[Entry] = []
        self.targets: list[dict[str, Tensor]] = []  # per entry: `logits` (positions, k) and `ids` (positions, k)
        self.seen = 0

    def train_rows(self, ctx: Context, rows: Sequence[Row]) -> Sequence[Row]:
        if not self.memory or self.alpha == self.beta == 0:
            return rows
        stored = look_up(self.memory, {task.name: task.train for task in ctx.stream})
        rng, wanted = random.Random(ctx.seed()), max(1, round(self.ratio * len(rows)))
        order: list[int] = []
        while len(order) < wanted * ctx.epochs.total:
            order += rng.sample(range(len(stored)), len(stored))
        chosen = Rows(order[: wanted * ctx.epochs.total], lambda place: self._with_targets(stored, place))
        ctx.cost["memory_rows"] += wanted
        return attach(rows, chosen, "memory", lambda: ctx.epochs.current, ctx.epochs.total)

    def companions_per_row(self, earlier: int) -> float:
        return self.ratio * (earlier > 0)

    def _with_targets(self, stored: Rows, place: int) -> Row:
        row = {key: value for key, value in stored[place].items() if key != "companions"}
        return {**row, "targets": self.targets[place]}  # type: ignore[typeddict-item]

    def loss_terms(self, ctx: Context, model: nn.Module, batch: TrainBatch, outputs: Any) -> dict[str, Tensor]:
        memory = batch.companions.get("memory")
        if memory is None:
            return {}
        inputs = {name: value for name, value in memory.items() if name not in ("labels", "targets")}
        logits = model(**inputs).logits
        per_row = []
        for row, (values, ids) in enumerate(zip(memory["targets"]["logits"], memory["targets"]["ids"])):
            current = target_logits(logits[row : row + 1], memory["labels"][row : row + 1]).float()
            per_row.append(logit_distance(current, values.to(current), ids.to(current.device)))
        answers = -row_likelihoods(logits, memory["labels"]).mean()
        share = batch.share("memory")
        return {
            "derpp_logits": self.alpha * torch.stack(per_row).mean() * share,
            "derpp_answers": self.beta * answers * share,
        }

    def end_task(self, ctx: Context) -> None:
        rng, train = random.Random(ctx.seed()), ctx.task.train
        new = [(ctx.task.name, row["id"]) for row in train]
        known = dict(zip(self.memory, self.targets))
        self.memory = reservoir(self.memory, self.seen, new, self.size, rng)
        self.seen += len(new)
        fresh = [entry for entry in self.memory if entry not in known]
        rows = look_up(fresh, {ctx.task.name: train})
        known |= dict(zip(fresh, self._logits(ctx, rows)))
        self.targets = [known[entry] for entry in self.memory]

    @torch.no_grad()
    def _logits(self, ctx: Context, rows: Sequence[Row]) -> list[dict[str, Tensor]]:
        was_training = ctx.model.training
        ctx.model.eval()
        found = []
        for start in range(0, len(rows), _AT_ONCE):
            inputs = ctx.collate([rows[index] for index in range(start, min(start + _AT_ONCE, len(rows)))])
            labels = inputs.pop("labels")
            logits = ctx.model(**inputs).logits
            for row in range(len(labels)):
                own = target_logits(logits[row : row + 1], labels[row : row + 1]).float()
                values, ids = own.topk(min(self.top_k, own.shape[-1]), dim=-1)
                found.append({"logits": values.half().cpu(), "ids": ids.int().cpu()})
        ctx.model.train(was_training)
        return found

    def state_dict(self) -> MethodState:
        tensors = {f"{place}/{kind}": own[kind] for place, own in enumerate(self.targets) for kind in own}
        return MethodState(tensors, {"memory": [list(entry) for entry in self.memory], "seen": self.seen})

    def load_state_dict(self, state: MethodState) -> None:
        self.memory = [(task, row_id) for task, row_id in state.data["memory"]]
        self.seen = state.data["seen"]
        self.targets = [
            {kind: state.tensors[f"{place}/{kind}"] for kind in ("logits", "ids")} for place in range(len(self.memory))
        ]


def logit_distance(logits: Tensor, stored: Tensor, ids: Tensor) -> Tensor:
    """Mean over positions and kept tokens of (z − z*)²: (N, V), (N, k), (N, k) -> scalar; 0 without positions."""
    if not len(stored):
        return logits.sum() * 0.0
    return (logits.gather(-1, ids.long()) - stored).pow(2).mean()
