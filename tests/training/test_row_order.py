"""Which rows the trainer's loader gives to which process: every row once per epoch, also when a run goes on in the middle.

The trainer leaves this to transformers and accelerate (a seeded sampler, cut over the processes; a resumed run skips
positions, not rows) and fills the last batch up with ignored rows. What they promise is held here.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from torch import nn
from transformers import Trainer, TrainingArguments

from mllm_cl.data.rows import Rows
from mllm_cl.training.trainer import ContinualTrainer, whole_batches

COUNT, BATCH = 53, 4


class Counting(nn.Module):
    """A model that only has a parameter: its loss needs no input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, number: torch.Tensor, **ignored: Any) -> dict[str, torch.Tensor]:
        return {"loss": (self.weight * number.float()).mean()}


def logged(log: list[int], rows: int = COUNT, whole: int = BATCH) -> Rows:
    """Rows that write down who is read, filled up as the trainer fills them up."""

    def read(number: int) -> Any:
        log.append(number)
        return {"id": str(number), "number": number}

    return whole_batches(Rows(range(rows), read), whole)


def collate(rows: list[Any]) -> dict[str, Any]:
    return {"number": torch.tensor([-1 if row.get("ignored") else row["number"] for row in rows])}


def trainer_of(folder: Path, rows: Rows, **arguments: Any) -> Trainer:
    defaults: dict[str, Any] = {"per_device_train_batch_size": BATCH, "report_to": [], "save_strategy": "no", "seed": 3}
    given = TrainingArguments(
        str(folder), use_cpu=True, disable_tqdm=True, remove_unused_columns=False, **defaults | arguments
    )
    return Trainer(model=Counting(), args=given, train_dataset=rows, data_collator=collate)  # type: ignore[arg-type]


def loaders(folder: Path, rows: Rows, processes: int) -> list[Any]:
    """The loader of each process, made from the trainer's as accelerate makes it there."""
    trainer = trainer_of(folder, rows)
    accelerator = trainer.accelerator
    accelerator.prepare = lambda loader: loader  # type: ignore[method-assign,assignment]
    return [
        prepare_data_loader(
            trainer.get_train_dataloader(),
            num_processes=processes,
            process_index=rank,
            split_batches=accelerator.split_batches,
            even_batches=accelerator.even_batches,
            use_seedable_sampler=accelerator.use_seedable_sampler,
            data_seed=accelerator.dataloader_config.data_seed,
        )
        for rank in range(processes)
    ]


def numbers(loader: Any) -> list[int]:
    return [number for batch in loader for number in batch["number"].tolist() if number >= 0]


def test_the_trainer_leaves_the_order_to_transformers() -> None:
    for name in ("get_train_dataloader", "_get_train_sampler", "_get_dataloader"):
        assert getattr(ContinualTrainer, name) is getattr(Trainer, name)  # else this file would test another order


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_every_row_once_over_the_processes_and_another_order_in_the_next_epoch(processes: int, tmp_path: Path) -> None:
    parts = loaders(tmp_path, logged([], whole=BATCH * processes), processes)
    epochs = []
    for epoch in range(2):
        for loader in parts:
            loader.set_epoch(epoch)
        found = [numbers(loader) for loader in parts]
        assert Counter(number for part in found for number in part) == dict.fromkeys(range(COUNT), 1)
        assert max(map(len, found)) - min(map(len, found)) <= BATCH
        epochs.append(found)
    assert epochs[0] != epochs[1]
    assert epochs[0][0] != sorted(epochs[0][0])


@pytest.mark.parametrize("processes", [1, 2])
def test_skipped_batches_are_not_read_and_the_rest_is_the_same(processes: int, tmp_path: Path) -> None:
    log: list[int] = []
    whole = [numbers(loader) for loader in loaders(tmp_path, logged(log, whole=BATCH * processes), processes)]
    log.clear()
    parts = loaders(tmp_path, logged(log, whole=BATCH * processes), processes)
    rest = [numbers(skip_first_batches(loader, 3)) for loader in parts]
    for before, after in zip(whole, rest):
        assert after == before[-len(after) :]
        assert 0 < len(before) - len(after) <= 3 * BATCH
    assert set(log) <= {number for part in rest for number in part} | set(range(BATCH * processes))  # the filling


def test_a_run_that_goes_on_in_an_epoch_trains_on_the_rows_that_are_left(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"num_train_epochs": 2, "learning_rate": 1e-6, "logging_strategy": "no"}
    log: list[int] = []
    trainer_of(tmp_path / "whole", logged(log), **arguments).train()
    steps = -(-COUNT // BATCH)
    assert len(log) == 2 * steps * BATCH
    first: list[int] = []
    stopped = trainer_of(tmp_path / "cut", logged(first), **arguments, save_strategy="steps", save_steps=5)

    class Stop(Exception):
        pass

    def stop(*given: Any, **more: Any) -> None:
        if stopped.state.global_step == 5:
            save(*given, **more)
            raise Stop
        save(*given, **more)

    save = stopped._save_checkpoint
    stopped._save_checkpoint = stop  # type: ignore[method-assign]
    with pytest.raises(Stop):
        stopped.train()
    rest: list[int] = []
    trainer_of(tmp_path / "cut", logged(rest), **arguments).train(
        resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-5")
    )
    assert rest == log[5 * BATCH :]
    assert first[: 5 * BATCH] == log[: 5 * BATCH]
