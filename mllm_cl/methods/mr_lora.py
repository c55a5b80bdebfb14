"""mr_lora: one adapter per task, and the model itself, taught by a few rows per task, says which one to use (MR-LoRA).

Idea: which task a question belongs to is itself a question about its text and image, and the model can learn to answer
it.
Formula: ΔW(x) = ΔW_k(x): a router adapter is asked, about the row's images and question, which letter of a list of the
tasks fits; k is the task of the letter, and the untouched base answers where no letter of the list comes. After every
task the router adapter is trained anew from the base, with cross-entropy on the letter, on `shots` rows of each task so
far.
Stored per task: one adapter and `shots` (task, row id) pairs; the rows must stay in the stream; once: the router adapter.
Cost per step: 1×; per task: `epochs` passes over shots × tasks rows; inference: a second, short generation.
Reference: Zhao et al. 2025, MLLM-CL (arXiv 2506.05453; bjzhb666/MLLM-CL): 20 rows per task, 40 epochs, learning rate
5e-6, batch 4, rank 128. Fidelity: task adapters start from the base, as in the paper; the wording of the question is
ours; the released code reads the letters from files made before, here they are generated when they are needed. Every
process trains the same router.
"""

from __future__ import annotations

import string
from typing import Annotated

import torch
from peft import LoraConfig, PeftModel
from pydantic import Field
from torch import Tensor

from mllm_cl.data.inquiry import ask, question_of
from mllm_cl.data.memory import look_up
from mllm_cl.data.rows import Row
from mllm_cl.errors import MethodError
from mllm_cl.methods._held import answered
from mllm_cl.methods._rows import drawn_rows
from mllm_cl.methods.base import Context, Method, MethodState, RouteBatch
from mllm_cl.models.adapters import (
    active,
    adapter_names,
    adapter_state,
    add_adapter,
    load_adapter_state,
    remove_adapter,
    seeded,
    set_trainable,
    task_adapter,
)

ROUTER = "router"
LETTERS = string.ascii_uppercase


class MRLoRA(Method):
    """MR-LoRA.

    Args:
        shots: rows of each task that the router learns from.
        epochs: passes over them after each task.
        learning_rate: of the router adapter (AdamW, constant).
        batch: rows per step of the router.
    """

    name = "mr_lora"
    summary = "one adapter per task, chosen by the model itself after a few rows per task"
    needs = frozenset({"past_rows"})
    adapters = "per_task"
    roles = frozenset({"routing"})

    def __init__(
        self,
        *,
        shots: Annotated[int, Field(ge=1)] = 20,
        epochs: Annotated[int, Field(ge=1)] = 40,
        learning_rate: Annotated[float, Field(gt=0)] = 5e-6,
        batch: Annotated[int, Field(ge=1)] = 4,
    ) -> None:
        self.shots, self.epochs, self.learning_rate, self.batch = shots, epochs, learning_rate, batch
        self.tasks: list[str] = []
        self.options: list[str] = []  # what the list says about each task
        self.memory: list[tuple[str, str]] = []
        self.router: dict[str, Tensor] = {}
        self._placed = False  # the router adapter of the model is this one

    def begin_task(self, ctx: Context) -> None:
        if len(ctx.stream) > len(LETTERS):
            raise MethodError(
                f"methods.{self.name}: the stream has {len(ctx.stream)} tasks.",
                expected=f"at most {len(LETTERS)}, as many as the router's question has letters",
                fix="use task_adapters for longer streams.",
            )

    def end_task(self, ctx: Context) -> None:
        self.tasks.append(ctx.task.name)
        self.options.append(ctx.task.description or ctx.task.name)
        self.memory += [(ctx.task.name, row["id"]) for row in drawn_rows(ctx, self.shots)]
        if len(self.tasks) > 1:
            self._learn_to_route(ctx)

    def _learn_to_route(self, ctx: Context) -> None:
        rows = look_up(self.memory, {task.name: task.train for task in ctx.stream})
        lesson = [
            answered(routing_question(row, self.options), LETTERS[self.tasks.index(task)])
            for row, (task, _) in zip(rows, self.memory)
        ]
        seed = ctx.seed()
        self._place(ctx.model, seed)
        optimizer = torch.optim.AdamW(set_trainable(ctx.model, [ROUTER]), lr=self.learning_rate, weight_decay=0.0)
        was_training = ctx.model.training
        ctx.model.train()
        # dropout draws from the global generator, of which the processes may have used unlike parts by now
        with active(ctx.model, [ROUTER]), seeded(ctx.model, seed):
            for _ in range(self.epochs):
                order = torch.randperm(len(lesson), generator=ctx.rng).tolist()
                for start in range(0, len(order), self.batch):
                    inputs = ctx.collate([lesson[index] for index in order[start : start + self.batch]])
                    with ctx.accelerator.autocast():
                        loss = ctx.model(**inputs).loss
                    loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
        ctx.model.train(was_training)
        ctx.cost["router_rows"] += self.epochs * len(lesson)
        self.router, self._placed = adapter_state(ctx.model, ROUTER), True

    def _place(self, model: PeftModel, seed: int) -> None:
        """A router adapter as at the beginning, of the shape of the tasks' own."""
        if ROUTER in adapter_names(model):
            remove_adapter(model, ROUTER)
        config = model.peft_config[task_adapter(self.tasks[0])]
        assert isinstance(config, LoraConfig)
        add_adapter(model, ROUTER, config, seed)

    def route(self, ctx: Context, batch: RouteBatch) -> list[dict[str, float]] | None:
        if len(self.tasks) < 2:
            return [{task_adapter(task): 1.0 for task in self.tasks} for _ in batch.rows]
        if not self._placed:
            self._place(ctx.model, seed=0)
            load_adapter_state(ctx.model, ROUTER, self.router, "router")
            self._placed = True
        with active(ctx.model, [ROUTER]):
            said = ctx.generate([routing_question(row, self.options) for row in batch.rows], 2)
        chosen = [letter_number(text, len(self.tasks)) for text in said]
        return [{} if number is None else {task_adapter(self.tasks[number]): 1.0} for number in chosen]

    def state_dict(self) -> MethodState:
        data = {"tasks": self.tasks, "options": self.options, "memory": [list(entry) for entry in self.memory]}
        return MethodState(dict(self.router), data)

    def load_state_dict(self, state: MethodState) -> None:
        self.tasks, self.options = list(state.data["tasks"]), list(state.data["options"])
        self.memory = [(task, row_id) for task, row_id in state.data["memory"]]
        self.router, self._placed = dict(state.tensors), False


def routing_question(row: Row, options: list[str]) -> Row:
    """Returns the inquiry that asks which of the tasks a row's last question belongs to, about the row's images."""
    listed = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options))
    text = f"{question_of(row)}\n\nWhich kind of task is this?\n{listed}\nAnswer with the letter."
    return ask(text, row["images"], row["id"])


def letter_number(text: str, count: int) -> int | None:
    """Returns the number of the letter that an answer begins with; `None` if it is none of the first `count`."""
    number = LETTERS.find(text.strip()[:1].upper() or "?")
    return number if 0 <= number < count else None
