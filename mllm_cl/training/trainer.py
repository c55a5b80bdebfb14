"""ContinualTrainer: `transformers.Trainer` plus the hooks of the methods. A new one per task.

    loss = cross-entropy + Σ terms

The cross-entropy is the model's own, normalised by the target tokens of the whole accumulated batch of all processes. Each term
comes scaled with `batch.share(...)`, so neither gradient accumulation nor the number of processes changes the gradient.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, ProcessorMixin, TrainerCallback, TrainerState, TrainingArguments, set_seed
from transformers.trainer_utils import TrainOutput

from mllm_cl.data.collate import COMPANIONS, IGNORED, Collator
from mllm_cl.data.rows import Row, Rows
from mllm_cl.errors import DataError, ModelError, RunError
from mllm_cl.files import remove
from mllm_cl.methods import Context, Method, TrainBatch
from mllm_cl.methods.base import overrides
from mllm_cl.methods.inquiry_regularization import InquiryRegularization
from mllm_cl.methods.spectral_consolidation import SpectralConsolidation
from mllm_cl.models import adapters, extra_parameters
from mllm_cl.streams import Stream, Task
from mllm_cl.training.arguments import adapt_arguments
from mllm_cl.training.batch_size import fit_batch_size
from mllm_cl.training.capabilities import check_plain
from mllm_cl.training.checkpoint import CheckpointedTrainer, load_tree, save_tree
from mllm_cl.training.learner import Learner
from mllm_cl.training.part_rates import split_groups
from mllm_cl.training.states import load_states, save_states
from mllm_cl.training.zero import engine_of_task

COMPANION_KINDS = ("inquiry", "memory")
CACHE = "cache"  # beside the checkpoints, and like them only while a task is learnt


class ContinualTrainer(CheckpointedTrainer):
    """Trains one task with the learner's methods.

    Args:
        model: the base model (LoRA is added), or a `PeftModel`; the same object for every task of a user's own loop.
        args (`TrainingArguments`): as for `Trainer`; unused columns are always kept.
        train_dataset (`Sequence[Row]`): the task's rows; `task.train` when not given.
        processing_class (`ProcessorMixin`): the processor.
        task (`Task`, *optional*): named `task-1`, `task-2`, ... when not given.
        stream (`Stream`, *optional*): all tasks; those seen so far when not given.
        learner (`Learner`, *optional*): the model's own when it has one.
        methods (`Sequence[Method]`, *optional*): used when a learner is created.
        peft_config (`LoraConfig`, *optional*): used when a learner is created for a base model.

    Further keyword arguments go to `Trainer`.

    Raises:
        ModelError: `model` or `processing_class` is missing.
        DataError: there are no rows to train on.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel | None = None,
        args: TrainingArguments | None = None,
        train_dataset: Sequence[Row] | None = None,
        processing_class: ProcessorMixin | None = None,
        *,
        task: Task | None = None,
        stream: Stream | None = None,
        learner: Learner | None = None,
        methods: Sequence[Method] | None = None,
        peft_config: LoraConfig | None = None,
        **kwargs: Any,
    ) -> None:
        given = train_dataset if train_dataset is not None else () if task is None else task.train
        if not len(given):
            raise DataError("train_dataset: has no rows to train on.", expected="the rows of a task")
        args = args or TrainingArguments("trainer_output")
        adapt_arguments(args)
        find_size, args.auto_find_batch_size = args.auto_find_batch_size, False  # see `batch_size.py`
        learner = learner or self._learner_of(model, processing_class, methods, peft_config, args.seed)
        task = task or Task(name=f"task-{learner.stage + 1}", train=given, test=())
        self.learner = learner
        self._term_sums: dict[str, Tensor] = {}
        self._term_count = 0
        self._totals: dict[str, Any] = {}
        self._missing: set[str] = set()  # kinds of companions that only other processes have in this step, under ZeRO-3
        super().__init__(
            model=learner.model,
            args=args,
            train_dataset=Rows([]),  # type: ignore[arg-type]
            processing_class=learner.processor,
            data_collator=Collator(learner.processor),
            **kwargs,
        )
        stream = stream or learner.remember(task)
        whole = args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps
        passes = args.max_steps * whole / len(given) if args.max_steps > 0 else args.num_train_epochs
        self._cache = Path(str(args.output_dir)) / CACHE
        self.ctx: Context = learner.begin_task(task, stream, self.accelerator, self._cache, max(1, math.ceil(passes)))
        rows = learner.train_rows(self.ctx, given)
        self.rows = len(rows)
        self.train_dataset = whole_batches(rows, whole)  # type: ignore[assignment]
        self._term_methods = [method for method in learner.methods if overrides(method, "loss_terms")]
        self._trained = [parameter for parameter in learner.model.parameters() if parameter.requires_grad]
        self.add_callback(_CountEpochs(self.ctx))
        self.add_callback(_Steps(learner, self.ctx))
        if find_size and self.rows:
            fit_batch_size(self)

    def _learner_of(
        self,
        model: PreTrainedModel | PeftModel | None,
        processor: ProcessorMixin | None,
        methods: Sequence[Method] | None,
        peft_config: LoraConfig | None,
        seed: int,
    ) -> Learner:
        """The learner that the model got from the trainer of an earlier task, or a new one."""
        if model is None or processor is None:
            missing = "model" if model is None else "processing_class"
            raise ModelError(
                f"{type(self).__name__}: `{missing}` is missing.",
                expected="`model` (the same object for every task) and `processing_class` (its processor)",
            )
        if peft_config is not None:
            check_plain(vars(peft_config), "peft_config")
        known = Learner.of(model)
        return known or Learner(
            model, processor, self.default_methods() if methods is None else methods, peft_config, seed=seed
        )

    def default_methods(self) -> Sequence[Method]:
        """Methods of a learner that the trainer has to create itself."""
        return ()

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Trains, then lets the methods finish the task (consolidation, memories, prototypes)."""
        if self.learner.stage != self.ctx.index - 1:
            raise RunError(
                f"{self.ctx.task.name}: the model has gone on since this trainer was made.",
                expected="one trainer per task, trained once",
                fix="make a new trainer.",
            )
        with _given_back(self.learner.model), self.learner.sharded(), engine_of_task(self):
            output = super().train(*args, **kwargs) if self.rows else TrainOutput(0, 0.0, {})
        self.model_wrapped = self.model
        set_seed(self.args.seed)  # the end of a task does not depend on where training was resumed
        self.learner.end_task(self.ctx)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            remove(self._cache)
        return output

    def rehearse(self, rows: Sequence[Row] | None = None) -> None:
        """Runs the passes of one micro-batch as a step would and takes back what it changed.

        Args:
            rows: of the micro-batch; some of the task when not given.
        """
        states = copy.deepcopy([method.state_dict() for method in self.learner.methods])
        drawn, count = self.ctx.rng.get_state(), self.args.per_device_train_batch_size
        chosen: Any = rows or [self.train_dataset[index * self.rows // count] for index in range(count)]  # type: ignore[index]
        try:
            with torch.random.fork_rng():  # dropout
                self.model.train()  # type: ignore[union-attr]
                batch = self.data_collator(chosen)
                (batch,), items = self.get_batch_samples(iter([batch]), 1, self.args.device)
                self.compute_loss(self.model, self._prepare_inputs(batch), num_items_in_batch=items).backward()  # type: ignore[arg-type]
                for method in self.learner.methods:
                    method.before_step(self.ctx)
        finally:
            self.model.zero_grad()  # type: ignore[union-attr]
            for method, state in zip(self.learner.methods, states):
                method.load_state_dict(state)
            self.ctx.rng.set_state(drawn)
            self._term_sums, self._term_count = {}, 0

    # the loss --------------------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        inputs = dict(inputs)
        companions = inputs.pop(COMPANIONS, {})
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training and self._term_methods:
            shares = self._shares(inputs, companions, num_items_in_batch)
            batch = TrainBatch(inputs=inputs, companions=companions, shares=shares)
            for method in self._term_methods:
                for name, term in method.loss_terms(self.ctx, model, batch, outputs).items():
                    loss = loss + term.to(loss.device)
                    self._term_sums[name] = self._term_sums.get(name, 0.0) + term.detach()
        for _ in self._missing:  # what other processes have passed through the model, so that all gather as many layers
            passed = {name: value for name, value in inputs.items() if name != "labels"}
            loss = loss + 0.0 * model(**passed).logits.sum()
        if model.training and self.accelerator.num_processes > 1 and not self.learner.adapters_in_shards:
            # DDP waits for every trained parameter, also for those that this process's rows do not reach (no image, no inquiry)
            loss = loss + 0.0 * torch.stack([parameter.sum() for parameter in self._trained]).sum()
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        own = inputs.get(COMPANIONS, {})
        uneven: set[str] = set()
        if self.learner.layers_in_shards and self._term_methods:
            # where only some processes have a kind, they would run the layers, and gather their weights, more often
            kinds = torch.tensor([float(kind in own) for kind in COMPANION_KINDS], device=self.args.device)
            having: Any = self.accelerator.reduce(kinds, reduction="sum")
            full = (0, self.accelerator.num_processes)
            uneven = {kind for kind, count in zip(COMPANION_KINDS, having.tolist()) if count not in full}
        self._missing = uneven - set(own) if self.learner.adapters_in_shards else set()
        with self.learner.whole() if uneven else contextlib.nullcontext():
            return super().training_step(model, inputs, *args, **kwargs)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        made = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if made and self.learner.part_rates:
            split_groups(optimizer, model or self.learner.model, self.learner.part_names, self.learner.part_rates)
        return optimizer

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | int | None]:
        samples, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._term_count += 1
        self._totals = {"step": len(samples)}
        if self._term_methods:
            taught = torch.stack([_taught(batch) for batch in samples]).sum().to(device)
            self._totals["rows"] = self.accelerator.reduce(taught, reduction="sum").clamp_min(1)  # type: ignore[union-attr]
            for kind in COMPANION_KINDS:
                own = [batch[COMPANIONS][kind] for batch in samples if kind in batch.get(COMPANIONS, {})]
                total = torch.tensor(sum(len(batch["input_ids"]) for batch in own), device=device)
                self._totals[kind] = self.accelerator.reduce(total, reduction="sum").clamp_min(1)  # type: ignore[union-attr]
        return samples, items

    def _shares(self, inputs: dict[str, Any], companions: dict[str, Any], items: Any) -> dict[str, Any]:
        """This micro-batch's part of each quantity, times the processes (DDP averages their gradients)."""
        processes, steps = self.accelerator.num_processes, self._totals["step"]
        if items is None:  # the model averages over the micro-batch, and `training_step` divides by their number
            shares: dict[str, Any] = {"step": 1.0, "tokens": 1.0}
        else:
            shares, steps = {"step": 1 / steps}, 1
            shares["tokens"] = (inputs["labels"][:, 1:] != IGNORED).sum() / items * processes
        shares["rows"] = _taught(inputs) / self._totals["rows"] * processes * steps
        for kind, batch in companions.items():
            shares[kind] = len(batch["input_ids"]) / self._totals[kind] * processes * steps
        return shares

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self._term_methods and "loss" in logs:
            own = {name: float(total) / max(self._term_count, 1) for name, total in self._term_sums.items()}
            everyone = gather_object([own])
            for name in sorted({name for terms in everyone for name in terms}):
                logs[f"cl/{name}"] = round(sum(terms.get(name, 0.0) for terms in everyone) / len(everyone), 6)
            self._term_sums, self._term_count = {}, 0
        super().log(logs, start_time)

    # checkpoints: the trained adapter, the methods, and what the context has used up --------------------------------------

    def write_model(self, folder: Path) -> None:
        name = self.learner.trained_name(self.ctx.task)
        adapters.save_adapter(self.learner.model, name, folder / "adapter")
        save_states(folder / "method", self.learner.methods)
        save_tree(folder, "parameters", extra_parameters.attached(self.learner.model))
        used = {"task": self.ctx.task.name, "rng": self.ctx.rng.get_state(), "cost": dict(self.ctx.cost)}
        save_tree(folder, "context", used)

    def read_model(self, folder: Path) -> None:
        name, used = self.learner.trained_name(self.ctx.task), load_tree(folder, "context")
        if used["task"] != self.ctx.task.name:
            raise RunError(
                f"{folder}: is a checkpoint of {used['task']}, not of {self.ctx.task.name}.",
                fix="give every task an output_dir of its own.",
            )
        adapters.load_adapter_state(self.learner.model, name, adapters.read_state(folder / "adapter"), str(folder))
        load_states(folder / "method", self.learner.methods)
        extra_parameters.load(self.learner.model, load_tree(folder, "parameters"))
        self.ctx.rng.set_state(used["rng"])
        self.ctx.cost.clear()
        self.ctx.cost.update(used["cost"])


class LlavaCTrainer(ContinualTrainer):
    """LLaVA-c preset: spectral-aware consolidation and unsupervised inquiry regularization.

    Regularizes while it trains and consolidates at the end of each `train()`:

        for task in stream:
            LlavaCTrainer(model=model, args=args, train_dataset=task.train, processing_class=processor).train()
    """

    def default_methods(self) -> Sequence[Method]:
        return (SpectralConsolidation(strength=1.0), InquiryRegularization())


class _CountEpochs(TrainerCallback):
    """Tells the context which pass over the rows begins, also when training is resumed within it."""

    def __init__(self, ctx: Context) -> None:
        self.ctx = ctx

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, *others: Any, **kwargs: Any) -> None:
        self.ctx.epochs.current = int((state.epoch or 0.0) + 1e-6)


class _Steps(TrainerCallback):
    """Calls the hooks of the methods around the optimizer step."""

    def __init__(self, learner: Learner, ctx: Context) -> None:
        self.before = [method for method in learner.methods if overrides(method, "before_step")]
        self.after = [method for method in learner.methods if overrides(method, "after_step")]
        self.learner, self.ctx = learner, ctx

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        if self.before:
            with self.learner.whole():
                for method in self.before:
                    method.before_step(self.ctx)

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        for method in self.after:
            method.after_step(self.ctx)


@contextlib.contextmanager
def _given_back(model: PeftModel) -> Iterator[None]:
    """Undoes what accelerate does to the model inside: an autocast around `forward`, which would stay for the evaluation (but not
    in a run that is continued there), and a mark that keeps the accelerator of the next task from doing it again."""
    names = ("forward", "_original_forward", "_is_accelerate_prepared")
    before = {name: vars(model)[name] for name in names if name in vars(model)}
    try:
        yield
    finally:
        for name in names:
            vars(model).pop(name, None)
        vars(model).update(before)


def _taught(batch: dict[str, Any]) -> Tensor:
    """Number of the batch's rows that have labels; those that fill it up have none."""
    return (batch["labels"] != IGNORED).any(dim=1).sum()


def whole_batches(rows: Sequence[Row], batch: int) -> Rows:
    """Fills the last batch up with rows whose labels are ignored.

    Every row counts once per epoch whatever the number of processes; without this a sampler over several processes repeats
    rows, and one process and two would see different gradients in the last step of an epoch.
    """
    count = len(rows)

    def pick(index: int) -> Row:
        if index < count:
            return rows[index]
        row = {key: value for key, value in rows[index % count].items() if key != COMPANIONS}
        return {**row, "ignored": True}  # type: ignore[typeddict-item,return-value]

    return Rows(range(-(-count // batch) * batch), pick)
