"""Time per row of `ContinualTrainer` against the plain `transformers.Trainer`, in pairs within one process.

    python benchmarks/step_overhead.py --output step_overhead.json
    python benchmarks/step_overhead.py --model 300m --rows 32 --batch 16 --rounds 2   # random weights; an hour on one core

All train the same LoRA on the same model, on the same rows, with as many per step:

- `plain`: `transformers.Trainer` on a mixture of a task's rows and as many inquiries with the reference's answers
  (`ratio: 1`; by default a second task asks as many).
- `no methods`: `ContinualTrainer` without methods, the same.
- `SAC + UIR`: the task's rows, with the inquiries beside them and targets from the cache; the consolidation at the end
  of the task counts, and is also timed by itself (`ending_seconds`: it is paid once per task, however many rows that has;
  `ratio_of_steps` leaves it out), as is computing the targets (`preparing_seconds`).
- `teacher in the step`: the same rows, but each step runs the reference's forward pass: what the cache saves. (The
  reference's answers are still written once per task.)

Seconds are CPU time of the one thread, which other processes disturb less than the time on the wall; on a GPU the latter.
The order changes from round to round; a ratio is the median over rounds of (variant / plain of the same round).
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from evaluation import SHAPES, random_model
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from mllm_cl.data.builders.quickstart import build_task
from mllm_cl.data.collate import Collator
from mllm_cl.data.rows import Row
from mllm_cl.methods.base import Method
from mllm_cl.methods.inquiry_regularization import InquiryRegularization
from mllm_cl.methods.spectral_consolidation import SpectralConsolidation
from mllm_cl.models.load import load_model
from mllm_cl.models.parts import lora_targets
from mllm_cl.streams import Stream, Task
from mllm_cl.training.learner import Learner
from mllm_cl.training.trainer import ContinualTrainer


class TeacherInTheStep(InquiryRegularization):
    """UIR that asks the reference at every step instead of once per task."""

    name = "teacher_in_the_step"

    def loss_terms(self, ctx: Any, model: Any, batch: Any, outputs: Any) -> dict[str, torch.Tensor]:
        inquiries = batch.companions.get("inquiry")
        if inquiries is not None:
            mask = self.probe.mask(inquiries)
            with ctx.reference("base"):
                kept = self.probe.keep(self.probe.states(ctx.model, inquiries, mask))
            sizes = mask.sum(dim=1).tolist()
            inquiries["targets"] = {name: list(values.split(sizes)) for name, values in kept.items()}
        return super().loss_terms(ctx, model, batch, outputs)


def task_of(rows: int) -> Task:
    """Real rows of the quickstart stream, as many as asked for."""
    found = build_task("digit-parity")["train"]
    if len(found) < rows:
        raise SystemExit(
            f"--rows {2 * rows}: the task has {len(found)} rows, and half of the rows are its own: at most {2 * len(found)}."
        )
    return Task("rows", found[:rows], test=())


def loaded(name: str) -> tuple[Any, Any]:
    """The tiny LLaVA, or random weights in one of the larger shapes (16 tokens per image)."""
    return load_model(name) if name == "tiny-llava" else random_model(name, torch.float32, image_size=56)


def arguments(folder: Path, batch: int) -> TrainingArguments:
    """The same for all variants."""
    return TrainingArguments(
        str(folder),
        learning_rate=1e-3,
        num_train_epochs=1,
        per_device_train_batch_size=batch,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=not torch.cuda.is_available(),
    )


clock = time.perf_counter if torch.cuda.is_available() else time.process_time

Times = tuple[float, float, float]
"""Seconds of training with its end, of preparing, and of the end alone."""


class StepsDone(TrainerCallback):
    """Knows when the last step was done."""

    def __init__(self) -> None:
        self.at = 0.0

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.at = clock()


def mixture_of(name: str, rows: int, batch: int, folder: Path) -> list[Row]:
    """The rows of a task, and the inquiries that `SAC + UIR` trains with them, answered by the reference."""
    model, processor = loaded(name)
    learner, task = Learner(model, processor, [InquiryRegularization(ratio=1.0)], seed=0), task_of(rows)
    trainer = ContinualTrainer(args=arguments(folder, batch), task=task, stream=Stream("one", (task,)), learner=learner)
    found: list[Row] = []
    for row in map(trainer.train_dataset.__getitem__, range(rows)):  # type: ignore[union-attr]
        inquiries = row.get("companions", {}).get("inquiry", [])
        found += [{key: own[key] for key in ("id", "messages", "images")} for own in (row, *inquiries)]  # type: ignore[misc]
    return found


def plain(rows: list[Row], name: str, batch: int, folder: Path) -> Times:
    """Seconds to train these rows with `transformers.Trainer`."""
    model, processor = loaded(name)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=lora_targets(model))
    trainer = Trainer(
        model=get_peft_model(model, lora),  # type: ignore[arg-type]
        args=arguments(folder, batch),
        train_dataset=rows,  # type: ignore[arg-type]
        data_collator=Collator(processor),
    )
    start = clock()
    trainer.train()
    return clock() - start, 0.0, 0.0


def continual(task: Task, methods: Callable[[], list[Method]], name: str, batch: int, folder: Path) -> Times:
    """Seconds to train a task with `ContinualTrainer`."""
    model, processor = loaded(name)
    learner = Learner(model, processor, methods(), seed=0)
    start = clock()
    trainer = ContinualTrainer(args=arguments(folder, batch), task=task, stream=Stream("one", (task,)), learner=learner)
    done = StepsDone()
    trainer.add_callback(done)
    prepared = clock()
    trainer.train()
    finished = clock()
    return finished - prepared, prepared - start, finished - done.at


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["tiny-llava", *SHAPES], default="tiny-llava")
    parser.add_argument("--rows", type=int, default=512, help="rows per measurement, inquiries included")
    parser.add_argument("--batch", type=int, default=32, help="rows per step, inquiries included")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)

    size: dict[str, Any] = {"name": given.model, "batch": given.batch}
    half = size | {"task": task_of(given.rows // 2), "batch": given.batch // 2}
    with tempfile.TemporaryDirectory() as folder:
        mixture = mixture_of(given.model, given.rows // 2, given.batch // 2, Path(folder))
    variants: dict[str, Callable[[Path], Times]] = {
        "plain": lambda folder: plain(mixture, **size, folder=folder),
        "no methods": lambda folder: continual(Task("rows", mixture, test=()), list, **size, folder=folder),
        "SAC + UIR": lambda folder: continual(
            methods=lambda: [SpectralConsolidation(strength=1.0), InquiryRegularization(ratio=1.0)],
            **half,
            folder=folder,
        ),
        "teacher in the step": lambda folder: continual(
            methods=lambda: [SpectralConsolidation(strength=1.0), TeacherInTheStep(ratio=1.0)], **half, folder=folder
        ),
    }
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    preparing: dict[str, list[float]] = {name: [] for name in variants}
    ending: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    for turn in range(given.rounds + 1):  # the first round warms up
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            with tempfile.TemporaryDirectory() as folder:
                trained, prepared, ended = variants[name](Path(folder))
            if turn:
                seconds[name].append(trained)
                preparing[name].append(prepared)
                ending[name].append(ended)
    result = {
        name: {
            "seconds": [round(value, 3) for value in own],
            "ratio": round(statistics.median(a / b for a, b in zip(own, seconds["plain"])), 3),
            "ratio_of_steps": round(
                statistics.median((a - c) / b for a, b, c in zip(own, seconds["plain"], ending[name])), 3
            ),
            "ending_seconds": round(statistics.median(ending[name]), 3),
            "preparing_seconds": round(statistics.median(preparing[name]), 3),
        }
        for name, own in seconds.items()
    }
    report = {
        "model": given.model,
        "rows": given.rows,
        "batch": given.batch,
        "threads": 1,
        "torch": torch.__version__,
        "variants": result,
    }
    print(json.dumps(report, indent=2))
    if given.output:
        given.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
