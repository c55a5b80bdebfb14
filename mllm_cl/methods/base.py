"""The contract of a method: ten optional hooks and the small frozen context they are given.

A method is a class in one file. Hooks return values and never mutate the trainer. A method declares what it `needs`
from the runner, which launchers it `supports` and how it wants the `adapters`, so that an impossible recipe is refused
before any weight is loaded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor, nn
from transformers import ProcessorMixin

from mllm_cl.data.rows import Row
from mllm_cl.streams import Stream, Task

HOOKS = (
    "begin_task", "parameters", "train_rows", "loss_terms", "before_step", "after_step", "end_task", "route",
    "state_dict", "load_state_dict",
)  # fmt: skip

EVERY_LAUNCHER = frozenset({"single", "ddp", "zero1", "zero2", "zero3", "fsdp2"})
WITHIN_STEPS = EVERY_LAUNCHER - {"zero3"}
"""For parameters of a method's own, and terms that read those of the adapters: ZeRO-3 has them in shards."""
AROUND_STEPS = WITHIN_STEPS - {"zero1", "zero2"}
"""For `before_step` and `after_step`: DeepSpeed steps within the backward pass, from weights of its own."""

AdapterPolicy = Literal["one", "stacked", "per_task"]
ReferenceKind = Literal["base", "previous"]
ShareOf = Literal["step", "rows", "tokens", "inquiry", "memory"]


@dataclass
class Epochs:
    """How often the rows of the task are gone through, and which pass this is (from 0)."""

    total: int = 1
    current: int = 0


@dataclass(frozen=True)
class Context:
    """What a method may see and use while one task is learnt.

    Args:
        task: the task that is learnt now.
        index: its stage, 1 for the first task.
        stream: the tasks; a method uses those up to `index` unless it declares that it needs all.
        model: the PEFT model, not wrapped by a launcher.
        processor: the model's processor.
        accelerator: for gathering over processes.
        rng: a CPU generator seeded from the recipe's seed and the stage.
        max_rank: largest rank of the consolidated adapter.
        cache: folder for what is computed once per task; gone when the stage is complete, then `None`.
        reference: `with ctx.reference("base" | "previous"):` runs the model as it was before the first task or before
            this task, without gradients and without dropout.
        reference_key: identifies the weights of a reference, for cache keys.
        generate: rows, longest answer -> greedy answers of the model as it is (or of the reference around the call).
        embed: rows -> (rows, features) float32 embedding by the untouched base.
        calibration: number of rows, rows per batch -> collated training batches of this task, drawn with the stage's
            seed.
        collate: rows -> model inputs with labels, on the model's device.
        epochs: the passes over the rows; `current` moves while the task trains.
        cost: what the method spends beyond a plain step (`inquiry_rows`, `memory_rows`); goes into the ledger. The
            passes that it runs and their FLOPs are counted by the runner.
    """

    task: Task
    index: int
    stream: Stream
    model: PeftModel
    processor: ProcessorMixin
    accelerator: Accelerator
    rng: torch.Generator
    max_rank: int
    cache: Path | None
    reference: Callable[[ReferenceKind], AbstractContextManager[None]]
    reference_key: Callable[[ReferenceKind], str]
    generate: Callable[[Sequence[Row], int], list[str]]
    embed: Callable[[Sequence[Row]], Tensor]
    calibration: Callable[[int, int], Iterable[dict[str, Any]]]
    collate: Callable[[Sequence[Row]], dict[str, Any]]
    epochs: Epochs = field(default_factory=Epochs)
    cost: Counter[str] = field(default_factory=Counter)

    def seed(self) -> int:
        """Draws a seed from `rng`, for generators of other libraries."""
        return int(torch.randint(2**31 - 1, (), generator=self.rng))


@dataclass(frozen=True)
class TrainBatch:
    """One micro-batch as `loss_terms` sees it.

    Args:
        inputs: what the model's forward was given, with `labels`; (batch, length) for ids and labels.
        companions: rows that `train_rows` attached, by kind, each collated like `inputs` (plus `targets`).
        shares: for each quantity this micro-batch's count divided by the count in the whole accumulated batch of all
            processes, times the number of processes (which average their gradients).
    """

    inputs: dict[str, Any]
    companions: dict[str, dict[str, Any]] = field(default_factory=dict)
    shares: Mapping[str, float | Tensor] = field(default_factory=dict)

    def share(self, of: ShareOf) -> float | Tensor:
        """Weight that makes a term independent of gradient accumulation and of the number of processes.

        A mean over this micro-batch's target tokens is multiplied by `share("tokens")`, a mean over its
        rows that have labels by `share("rows")`, over its inquiry rows by `share("inquiry")`, over its memory rows by
        `share("memory")`, a penalty on the parameters by `share("step")`.
        """
        return self.shares[of]


@dataclass(frozen=True)
class RouteBatch:
    """One evaluation batch as `route` sees it: the rows (with their `task`, `None` for general benchmarks)."""

    rows: Sequence[Row]
    tasks: Sequence[str | None]


@dataclass
class MethodState:
    """What a method carries from task to task: tensors, and JSON for the rest."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)


class Method:
    """Base of all methods. Every hook is optional; `docs/methods.md` says when each is called.

    Class constants:
        name: the word in a recipe.
        summary: one line for the catalogue.
        needs: facilities: `past_rows` (train rows of earlier tasks), `all_rows` (of later ones too), `previous`
            (the model of the last stage as reference), `generate`, `task_id` (the task of a test row), `continued`
            (every task goes on from the adapter as the last one left it), `adapter` (the LoRA adapter is what is trained).
        supports: launchers it is correct under. Every one when it does nothing within a step; a method that does declares
            what a test has shown (`WITHIN_STEPS`, `AROUND_STEPS`).
        adapters: the adapter policy it requires; `None` when any will do.
        roles: what only one method of a recipe can do: `consolidation` (writes the deployed adapter after a task),
            `initialisation` (chooses or freezes a factor of the fresh adapter), `choice of matrices`, `routing`,
            `training` (trains parameters of its own instead of the adapter).
        measures: `seen` (all tasks so far) or `current` (only the task just learnt).
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    needs: frozenset[str] = frozenset()
    supports: ClassVar[frozenset[str]] = frozenset({"single", "ddp"})
    adapters: AdapterPolicy | None = None
    roles: ClassVar[frozenset[str]] = frozenset()
    measures: ClassVar[Literal["seen", "current"]] = "seen"
    version: ClassVar[int] = 1

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "supports" in vars(cls):
            return
        hooks = ("parameters", "loss_terms", "before_step", "after_step")
        if all(getattr(cls, hook) is getattr(Method, hook) for hook in hooks):
            cls.supports = EVERY_LAUNCHER
        elif cls.supports == EVERY_LAUNCHER:  # inherited from a method that does nothing within a step
            cls.supports = Method.supports

    def begin_task(self, ctx: Context) -> None:
        """Called before the optimizer exists; may add, freeze, initialise or switch adapters."""

    def parameters(self, ctx: Context) -> Mapping[str, nn.Parameter]:
        """Returns what is trained in this task beside the adapters (gates, prompts); called once, after `begin_task`.

        They are given to the optimizer and to the launcher, counted in the budget and written into checkpoints, under
        names that must not depend on the process. What they have learnt is the method's to keep, in its state.
        """
        return {}

    def train_rows(self, ctx: Context, rows: Sequence[Row]) -> Sequence[Row]:
        """Returns the rows to train on; an empty sequence skips training at this stage."""
        return rows

    def companions_per_row(self, earlier: int) -> float:
        """Returns how many rows `train_rows` attaches to each row after so many tasks; memory is estimated with it."""
        return 0.0

    def loss_terms(self, ctx: Context, model: nn.Module, batch: TrainBatch, outputs: Any) -> dict[str, Tensor]:
        """Returns named terms that are added to the cross-entropy, already weighted and scaled with `batch.share`.

        Under ZeRO-3 all processes run the layers equally often: what depends on companions passes each kind of them through the
        model once (processes without that kind pass other rows), and all else is passed by all.

        Args:
            model: the model as the launcher wrapped it; for a further forward pass with gradients.
            outputs: the model's outputs for `batch.inputs`, with `logits` (batch, length, vocabulary).
        """
        return {}

    def before_step(self, ctx: Context) -> None:
        """Called before each optimizer step, when the gradients are accumulated, averaged and clipped; may change them."""

    def after_step(self, ctx: Context) -> None:
        """Called after each optimizer step; the gradients are still there."""

    def end_task(self, ctx: Context) -> None:
        """Called after training, before the stage is saved."""

    def route(self, ctx: Context, batch: RouteBatch) -> list[dict[str, float]] | None:
        """Returns for each row the adapters to use and their weights ({} is the untouched base), or `None`."""
        return None

    def state_dict(self) -> MethodState:
        """Returns what must survive until the next task."""
        return MethodState()

    def load_state_dict(self, state: MethodState) -> None:
        """Restores what `state_dict` returned."""


def overrides(method: Method, hook: str) -> bool:
    """True if the method implements a hook itself."""
    return getattr(type(method), hook) is not getattr(Method, hook)
