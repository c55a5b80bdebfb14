"""ContinualTrainer: `transformers.Trainer` plus the hooks of the methods. A new one per task.

    loss = cross-entropy + Σ terms

The cross-entropy is the model's own, normalised by the target tokens of the whole accumulated batch of all processes. Each term
comes scaled with `batch.share(...)`, so neither gradient accumulation nor the number of processes changes the gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, ProcessorMixin, Trainer, TrainerCallback, TrainingArguments

from mllm_cl.data.collate import COMPANIONS, IGNORED, Collator
from mllm_cl.data.rows import Row, Rows
from mllm_cl.methods import Context, Method, TrainBatch
from mllm_cl.methods.base import overrides
from mllm_cl.methods.inquiry_regularization import InquiryRegularization
from mllm_cl.methods.spectral_consolidation import SpectralConsolidation
from mllm_cl.models import adapters
from mllm_cl.streams import Stream, Task
from mllm_cl.training.checkpoint import CheckpointMixin
from mllm_cl.training.learner import Learner
from mllm_cl.training.states import load_states, save_states


class ContinualTrainer(CheckpointMixin, Trainer):
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
        args = args or TrainingArguments("trainer_output")
        if learner is None:
            if model is None or processing_class is None:
                raise ValueError("ContinualTrainer needs `model` and `processing_class`, or a `learner`")
            learner = Learner.of(model)
        if learner is None:
            given = self.default_methods() if methods is None else methods
            learner = Learner(model, processing_class, given, peft_config, seed=args.seed)  # type: ignore[arg-type]
        if task is None:
            task = Task(name=f"task-{learner.stage + 1}", train=train_dataset or (), test=())
        args.remove_unused_columns = False
        args.label_names = ["labels"]
        self.learner = learner
        self._term_sums: dict[str, Tensor] = {}
        self._term_count = 0
        self._totals: dict[str, Any] = {}
        super().__init__(
            model=learner.model,
            args=args,
            train_dataset=Rows([]),  # type: ignore[arg-type]
            processing_class=learner.processor,
            data_collator=Collator(learner.processor),
            **kwargs,
        )
        history = learner.model.get_base_model().__dict__.setdefault("_mllm_cl_tasks", [])
        history[learner.stage :] = [task]
        self.ctx: Context = learner.begin_task(task, stream or Stream("own loop", tuple(history)), self.accelerator)
        rows = learner.train_rows(self.ctx, task.train if train_dataset is None else train_dataset)
        self.rows = len(rows)
        whole = args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps
        self.train_dataset = whole_batches(rows, whole)  # type: ignore[assignment]
        self._term_methods = [method for method in learner.methods if overrides(method, "loss_terms")]
        stepping = [method for method in learner.methods if overrides(method, "after_step")]
        if stepping:
            self.add_callback(_AfterStep(stepping, self.ctx))

    def default_methods(self) -> Sequence[Method]:
        """Methods of a learner that the trainer has to create itself."""
        return ()

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trains, then lets the methods finish the task (consolidation, memories, prototypes)."""
        output = super().train(*args, **kwargs)
        self.learner.end_task(self.ctx)
        return output

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
        return (loss, outputs) if return_outputs else loss

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | int | None]:
        samples, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._term_count += 1
        self._totals = {"step": len(samples)}
        if self._term_methods:
            count = sum(len(batch[COMPANIONS]["inquiry"]["input_ids"]) for batch in samples if COMPANIONS in batch)
            total = torch.tensor(count, device=device)
            self._totals["inquiry"] = self.accelerator.reduce(total, reduction="sum").clamp_min(1)  # type: ignore[union-attr]
        return samples, items

    def _shares(self, inputs: dict[str, Any], companions: dict[str, Any], items: Any) -> dict[str, Any]:
        """This micro-batch's part of each quantity, times the processes (DDP averages their gradients)."""
        if items is None:  # the model averages over the micro-batch, and `training_step` divides by their number
            return {"step": 1.0, "tokens": 1.0, "inquiry": 1.0}
        processes = self.accelerator.num_processes
        shares: dict[str, Any] = {"step": 1 / self._totals["step"]}
        shares["tokens"] = (inputs["labels"][:, 1:] != IGNORED).sum() / items * processes
        if "inquiry" in companions:
            shares["inquiry"] = len(companions["inquiry"]["input_ids"]) / self._totals["inquiry"] * processes
        return shares

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self._term_sums and "loss" in logs:
            steps = max(self._term_count, 1)
            logs |= {f"cl/{name}": round(float(total) / steps, 6) for name, total in self._term_sums.items()}
            self._term_sums, self._term_count = {}, 0
        super().log(logs, start_time)

    # checkpoints: the trained adapter and the methods ------------------------------------------------------------------

    def write_model(self, folder: Path) -> None:
        for name in self._trained_names():
            adapters.save_adapter(self.learner.model, name, folder / name)
        save_states(folder / "method", self.learner.methods)

    def read_model(self, folder: Path) -> None:
        for name in self._trained_names():
            state = adapters.read_state(folder / name)
            adapters.load_adapter_state(self.learner.model, name, state, str(folder))
        load_states(folder / "method", self.learner.methods)

    def _trained_names(self) -> list[str]:
        return [self.learner.trained_adapter.get(self.learner.policy, self.ctx.task.name)]


class LlavaCTrainer(ContinualTrainer):
    """LLaVA-c preset: spectral-aware consolidation and unsupervised inquiry regularization.

    Regularizes while it trains and consolidates at the end of each `train()`:

        for task in stream:
            LlavaCTrainer(model=model, args=args, train_dataset=task.train, processing_class=processor).train()
    """

    def default_methods(self) -> Sequence[Method]:
        return (SpectralConsolidation(), InquiryRegularization())


class _AfterStep(TrainerCallback):
    """Calls `after_step` of the methods once the parameters have moved."""

    def __init__(self, methods: Sequence[Method], ctx: Context) -> None:
        self.methods, self.ctx = methods, ctx

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        for method in self.methods:
            method.after_step(self.ctx)


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
