"""inquiry_regularization: UIR, the second half of LLaVA-c.

Idea: while learning a task, keep answering inquiries (user turns without answers) as a frozen reference would; no label
is read.
Formula: L = CE + weight · mean over inquiry rows of mean over positions of d(θ, reference), d = KL over the reference's
top-k tokens (`target: logits`) or ‖n(h) − n(h_ref)‖²/D, n(h) = h/rms(h) (`target: hidden`).
Inquiries: general ones are held to the untouched base, those of earlier tasks (question texts only, with images of the
current task) to the previous stage. `rollout` lets the reference write its own first tokens, so that the term sees the
answer's onset.
Stored per task: up to `memory` question texts. Cost per step: the inquiry rows are further rows of the batch; reference
targets are computed once per task. Reference: LLaVA-c (arXiv 2506.08666). Fidelity: label-free regularization on
inquiries as far as the description is public; source, target, distance and weight are our choice and may differ from
the authors'.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mllm_cl.data.collate import IGNORED
from mllm_cl.data.inquiry import BUILT_IN, ask, attach, question_of, questions_of, read_pool
from mllm_cl.data.rows import Row, assistant_message
from mllm_cl.errors import MethodError, suggest
from mllm_cl.methods._terms import normalised_distance, top_k_divergence, top_log_probabilities
from mllm_cl.methods.base import Context, Method, MethodState, ReferenceKind, TrainBatch

PRESETS: dict[str, dict[str, Any]] = {
    "uir_memory": {"target": "logits", "rollout": 8, "images": "both", "memory": 64},
    "uir_self": {"target": "logits", "rollout": 8, "images": "both", "memory": 0},
    "uir_kl": {"target": "logits", "rollout": 0, "images": "none", "memory": 0},
    "uir_feat": {"target": "hidden", "rollout": 0, "images": "none", "memory": 0},
    "uir_image": {"target": "hidden", "rollout": 0, "images": "both", "memory": 0},
}
_CHUNK = 32


class InquiryRegularization(Method):
    """Unsupervised inquiry regularization.

    Args:
        preset: named combination of the settings below; a setting given beside it wins.
        weight: λ.
        ratio: inquiry rows per task row.
        pool: `general` (built in), or a file of your own (see `mllm_cl.data.inquiry`).
        target: what is held: `logits` or `hidden` (last hidden state after the final norm).
        rollout: tokens that the reference writes greedily; 0 holds the inquiry alone.
        images: for general inquiries: `none` (text only), `pool` (their own), `task` (of the current task), `both`.
        memory: question texts kept of each task; they are held to the previous stage later. 0 keeps none.
        top_k: tokens of the reference's distribution that are kept per position.
    """

    name = "inquiry_regularization"
    summary = "UIR of LLaVA-c: hold the answers to unlabelled inquiries to a frozen reference"
    needs = frozenset({"previous", "generate"})

    def __init__(
        self,
        *,
        preset: str = "uir_memory",
        weight: Annotated[float, Field(ge=0)] = 2.0,
        ratio: Annotated[float, Field(gt=0)] = 1.0,
        pool: str = BUILT_IN,
        target: Literal["logits", "hidden"] | None = None,
        rollout: Annotated[int, Field(ge=0)] | None = None,
        images: Literal["none", "pool", "task", "both"] | None = None,
        memory: Annotated[int, Field(ge=0)] | None = None,
        top_k: Annotated[int, Field(ge=1)] = 32,
    ) -> None:
        if preset not in PRESETS:
            raise MethodError(
                f"inquiry_regularization.preset: {preset!r} does not exist.", expected=suggest(preset, PRESETS)
            )
        if pool != BUILT_IN and not Path(pool).exists():
            raise MethodError(
                f"inquiry_regularization.pool: there is no {pool!r}.",
                expected=f"{BUILT_IN!r} (built in), a .txt file with one inquiry per line, or a file of rows",
                fix="correct the path.",
            )
        given = {"target": target, "rollout": rollout, "images": images, "memory": memory}
        settings = PRESETS[preset] | {name: value for name, value in given.items() if value is not None}
        self.target, self.rollout = settings["target"], settings["rollout"]
        self.images, self.memory_size = settings["images"], settings["memory"]
        self.weight, self.ratio, self.pool, self.top_k = weight, ratio, pool, top_k
        self.memory: dict[str, list[str]] = {}

    def train_rows(self, ctx: Context, rows: Sequence[Row]) -> Sequence[Row]:
        if self.weight == 0 or not len(rows):
            return rows
        rng = random.Random(ctx.seed())
        total = max(1, round(self.ratio * len(rows)))
        remembered = total // 2 if self.memory else 0
        inquiries = self._with_targets(ctx, self._general(rows, total - remembered, rng), "base")
        if remembered:
            inquiries += self._with_targets(ctx, self._remembered(rows, remembered, rng), "previous")
        rng.shuffle(inquiries)
        ctx.cost["inquiry_rows"] += len(inquiries)
        return attach(rows, inquiries)

    def _general(self, rows: Sequence[Row], count: int, rng: random.Random) -> list[Row]:
        pool = read_pool(self.pool, count, rng.randrange(2**31))
        inquiries = []
        for index in range(count):
            inquiry = pool[index % len(pool)]
            pictures = list(inquiry["images"])
            if self.images == "task" or (self.images == "both" and (index % 2 or not pictures)):
                pictures = rows[rng.randrange(len(rows))]["images"]
            if self.images == "none":
                pictures = []
            inquiries.append(ask(question_of(inquiry), pictures, f"inquiry/{index}"))
        return inquiries

    def _remembered(self, rows: Sequence[Row], count: int, rng: random.Random) -> list[Row]:
        tasks = list(self.memory)
        inquiries = []
        for index in range(count):
            text = rng.choice(self.memory[tasks[index % len(tasks)]])
            inquiries.append(ask(text, rows[rng.randrange(len(rows))]["images"], f"remembered/{index}"))
        return inquiries

    def _with_targets(self, ctx: Context, inquiries: list[Row], reference: ReferenceKind) -> list[Row]:
        """Writes the reference's rollout and targets into the inquiries, once per task."""
        complete: list[Row] = []
        with ctx.reference(reference):
            answers = ctx.generate(inquiries, self.rollout) if self.rollout else [""] * len(inquiries)
            inquiries = [  # an empty answer still renders the assistant's marker, where an answer would start
                {**row, "messages": [*row["messages"], assistant_message(answer)]}  # type: ignore[typeddict-item]
                for row, answer in zip(inquiries, answers)
            ]
            for start in range(0, len(inquiries), _CHUNK):
                chunk = inquiries[start : start + _CHUNK]
                inputs = ctx.collate(chunk)
                states = self._states(ctx.model, inputs)  # (positions of all rows, features)
                lengths = self._positions(inputs).sum(dim=1).tolist()
                for row, own in zip(chunk, states.split(lengths)):
                    complete.append({**row, "targets": self._keep(own)})  # type: ignore[typeddict-item]
        return complete

    def _states(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """Logits or normalised hidden states at the positions that are held: (positions, features)."""
        forward = {name: value for name, value in inputs.items() if name not in ("labels", "targets")}
        positions = self._positions(inputs)
        if self.target == "hidden":
            return model(**forward, output_hidden_states=True).hidden_states[-1][positions]
        return model(**forward).logits[positions]

    def _positions(self, inputs: dict[str, Any]) -> Tensor:
        """Where the distance is taken: where the rollout is predicted, or at all tokens when there is none."""
        if not self.rollout:
            return inputs["attention_mask"].bool()
        predicting = torch.zeros_like(inputs["labels"], dtype=torch.bool)
        predicting[:, :-1] = inputs["labels"][:, 1:] != IGNORED
        return predicting

    def _keep(self, states: Tensor) -> dict[str, Tensor]:
        if self.target == "hidden":
            return {"hidden": states.cpu().clone()}
        values, ids = top_log_probabilities(states, self.top_k)
        return {"values": values.cpu().clone(), "ids": ids.cpu().clone()}

    def loss_terms(self, ctx: Context, model: nn.Module, batch: TrainBatch, outputs: Any) -> dict[str, Tensor]:
        inquiries = batch.companions.get("inquiry")
        if inquiries is None or self.weight == 0:
            return {}
        states, targets = self._states(model, inquiries), inquiries["targets"]
        if self.target == "hidden":
            distance = normalised_distance(states, torch.cat(targets["hidden"]))
        else:
            distance = top_k_divergence(states, torch.cat(targets["values"]), torch.cat(targets["ids"]))
        lengths = [len(values) for values in next(iter(targets.values()))]
        per_row = torch.stack([own.mean() for own in distance.split(lengths)])
        return {"uir": self.weight * per_row.mean() * batch.share("inquiry")}

    def end_task(self, ctx: Context) -> None:
        if self.memory_size:
            self.memory[ctx.task.name] = questions_of(ctx.task.train, self.memory_size, ctx.seed())

    def state_dict(self) -> MethodState:
        return MethodState(data={"memory": self.memory})

    def load_state_dict(self, state: MethodState) -> None:
        self.memory = {task: list(texts) for task, texts in state.data["memory"].items()}
