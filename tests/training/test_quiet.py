"""What a run prints: nothing. The command line shows progress; warnings of libraries about themselves help nobody."""

from __future__ import annotations

import warnings

import pytest
import torch
from transformers import PrinterCallback, TrainingArguments

from mllm_cl.errors import RecipeError
from mllm_cl.training.arguments import (
    DEFAULTS,
    OWNED,
    RENAMED,
    adapt_arguments,
    check_training,
    runs_on_cpu,
    training_arguments,
)
from mllm_cl.training.loop import run_stream
from mllm_cl.training.trainer import ContinualTrainer


def test_a_run_says_nothing(recipe_for, capfd):
    overrides = ("stream.limit.train=4", "stream.limit.test=2", "evaluation.max_new_tokens=2")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run_stream(recipe_for("llava_c", *overrides))
    printed = capfd.readouterr()
    assert printed.out == ""
    assert printed.err == ""
    ours = [str(warning.message) for warning in caught if "torch/" not in warning.filename]
    assert [text for text in ours if "gradient_checkpointing" in text or "pin_memory" in text or "PEFT" in text] == []


def test_a_loop_of_ones_own_prints_as_usual(new_model, stream, tmp_path):
    model, processor = new_model()
    args = TrainingArguments(str(tmp_path), use_cpu=True, disable_tqdm=True, save_strategy="no")
    rows = stream[0].train[:4]
    trainer = ContinualTrainer(model=model, args=args, train_dataset=rows, processing_class=processor)
    assert any(isinstance(callback, PrinterCallback) for callback in trainer.callback_handler.callbacks)


def test_defaults_and_what_a_recipe_says(tmp_path):
    args = training_arguments({"learning_rate": 1e-3, "save_steps": 7}, tmp_path, 3)
    assert (args.learning_rate, args.save_steps, args.seed, args.data_seed) == (1e-3, 7, 3, 3)
    assert (args.lr_scheduler_type, args.warmup_steps) == (DEFAULTS["lr_scheduler_type"], 0.03)
    assert args.report_to in ([], ["none"], "none")
    assert not args.remove_unused_columns


@pytest.mark.parametrize("key", sorted(RENAMED))
def test_arguments_of_version_4_name_their_successor(key):
    with pytest.raises(RecipeError, match=f"training.{key}: an argument of transformers 4") as caught:
        check_training({key: 1})
    assert RENAMED[key].split(":")[0] in str(caught.value)


@pytest.mark.parametrize("key", sorted(OWNED))
def test_what_the_run_decides_is_refused(key):
    with pytest.raises(RecipeError, match=f"training.{key}: decided by the run itself"):
        check_training({key: 1})


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"learning_rat": 1}, "did you mean 'learning_rate'"),
        ({"learning_rate": "fast"}, "a number above 0"),
        ({"num_train_epochs": 0}, "a number above 0"),
        ({"per_device_train_batch_size": True}, "a number above 0"),
        ({"gradient_accumulation_steps": -1}, "a number above 0"),
        ({"save_strategy": "best"}, "steps, epoch or no"),
        ({"optim": "magic"}, "transformers refuses these arguments"),
        ({"lr_scheduler_type": "wave"}, "transformers refuses these arguments"),
    ],
)
def test_mistakes(section, message):
    with pytest.raises(RecipeError, match=message):
        check_training(section)


def test_every_name_in_the_tables_is_right():
    known = set(TrainingArguments.__dataclass_fields__)
    assert set(DEFAULTS) <= known
    assert set(OWNED) <= known


def test_bf16_trains_on_a_processor_too(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert runs_on_cpu({})
    assert training_arguments({"bf16": True}, tmp_path, 0).use_cpu
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert not runs_on_cpu({})
    assert runs_on_cpu({"use_cpu": True})


def test_what_the_trainer_needs_is_set(tmp_path, caplog):
    args = TrainingArguments(str(tmp_path), use_cpu=True)
    args._n_gpu = 2
    adapt_arguments(args)
    assert (args.remove_unused_columns, args.label_names) == (False, ["labels"])
    assert (args.ddp_find_unused_parameters, args.ddp_broadcast_buffers) == (False, False)
    assert not args.dataloader_pin_memory
    assert args.n_gpu == 1
    assert "start with torchrun" in caplog.text
    chosen = TrainingArguments(str(tmp_path), use_cpu=True, ddp_find_unused_parameters=True)
    adapt_arguments(chosen)
    assert chosen.ddp_find_unused_parameters
