"""`for task in stream: LlavaCTrainer(...).train()`: the trainer in a loop that somebody else wrote."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from mllm_cl.data.collate import Collator
from mllm_cl.errors import DataError, MllmClError, ModelError, RecipeError, RunError
from mllm_cl.methods.inquiry_regularization import InquiryRegularization
from mllm_cl.methods.spectral_consolidation import SpectralConsolidation
from mllm_cl.models import adapters
from mllm_cl.models.parts import lora_targets
from mllm_cl.training.learner import Learner
from mllm_cl.training.trainer import ContinualTrainer, LlavaCTrainer, whole_batches

Arguments = Callable[..., TrainingArguments]


class SmallLlavaC(LlavaCTrainer):
    """The preset with a pool that needs no photographs."""

    pool = ""

    def default_methods(self) -> Any:
        uir = InquiryRegularization(pool=self.pool, rollout=1, inquiry_memory=2, ratio=0.5)
        return (SpectralConsolidation(), uir)


@pytest.fixture
def arguments(tmp_path: Path) -> Arguments:
    def make(**settings: Any) -> TrainingArguments:
        base = {"use_cpu": True, "learning_rate": 5e-3, "per_device_train_batch_size": 4, "save_strategy": "no"}
        return TrainingArguments(
            str(tmp_path / "out"), **(base | {"disable_tqdm": True, "logging_steps": 1} | settings)
        )

    return make


@pytest.fixture
def small_llava_c(stream_file: Path, monkeypatch: pytest.MonkeyPatch) -> type[SmallLlavaC]:
    monkeypatch.setattr(SmallLlavaC, "pool", str(stream_file.parent / "pool.txt"))
    return SmallLlavaC


def test_the_preset_is_llava_c():
    names = [method.name for method in LlavaCTrainer.default_methods(object.__new__(LlavaCTrainer))]
    assert names == ["spectral_consolidation", "inquiry_regularization"]


@pytest.mark.parametrize("given", ["base", "peft_config", "PeftModel"])
def test_a_loop_of_ones_own(given, new_model, stream, arguments, small_llava_c):
    model, processor = new_model()
    settings: dict[str, Any] = {}
    if given == "peft_config":
        settings["peft_config"] = LoraConfig(r=2, lora_alpha=4)
    elif given == "PeftModel":
        model = get_peft_model(model, LoraConfig(r=3, lora_alpha=6, target_modules=lora_targets(model)))
    args = arguments()
    for task in stream:
        trainer = small_llava_c(
            model=model, args=args, train_dataset=task.train[:8], processing_class=processor, **settings
        )
        assert trainer.ctx.task.name == f"task-{trainer.ctx.index}"
        trainer.train()
    learner = Learner.of(model)
    assert learner is not None
    assert learner.stage == 2
    rank = {"base": 8, "peft_config": 2, "PeftModel": 3}[given]
    assert learner.model.peft_config["default"].r == 2 * rank  # both updates, exactly
    assert adapters.adapter_names(learner.model) == ["default"]
    assert [task.name for task in trainer.ctx.stream] == ["task-1", "task-2"]
    uir = learner.methods[1]
    assert isinstance(uir, InquiryRegularization)
    assert set(uir.memory) == {"task-1", "task-2"}


def test_what_an_adapter_already_knows_is_kept(new_model, stream, arguments):
    """A PeftModel that comes with a trained adapter: its update is consolidated, not cut off."""
    model, processor = new_model()
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=lora_targets(model)))
    for _, layer in adapters.lora_layers(model):
        torch.nn.init.normal_(layer.lora_B["default"].weight)
    before = {name: update.dense() for name, update in adapters.adapter_deltas(model, "default").items()}
    learner = Learner(model, processor, [], policy="stacked")
    trainer = ContinualTrainer(args=arguments(learning_rate=1e-9), train_dataset=stream[0].train[:4], learner=learner)
    trainer.train()
    assert learner.truncation_error == 0
    for name, update in adapters.adapter_deltas(model, "default").items():
        torch.testing.assert_close(update.dense(), before[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_train_epochs": 1},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
        {"num_train_epochs": 2, "lr_scheduler_type": "cosine", "warmup_steps": 1},
    ],
    ids=["plain", "accumulation", "epochs"],
)
def test_without_methods_it_is_the_plain_trainer(settings, new_model, stream, arguments):
    """Bit for bit, when the rows divide the batch."""
    rows, results = stream[0].train[:12], []
    for kind in (Trainer, ContinualTrainer):
        model, processor = new_model()
        args = arguments(seed=11, **settings)
        learner = Learner(model, processor, [], LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1), seed=11)
        if kind is ContinualTrainer:
            trainer: Trainer = ContinualTrainer(args=args, train_dataset=rows, learner=learner)
        else:
            args.remove_unused_columns, args.label_names = False, ["labels"]
            adapters.set_trainable(learner.model, ["default"])
            trainer = Trainer(model=learner.model, args=args, train_dataset=rows, data_collator=Collator(processor))
        trainer.train()
        losses = [(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry]
        results.append((losses, adapters.adapter_state(learner.model, "default")))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(results[1][1][name], tensor) for name, tensor in results[0][1].items())


def test_rows_that_do_not_divide_the_batch_count_once(new_model, stream, arguments):
    """One step over 4 + 1 rows is the same as one over these 5 rows, whatever the batch."""
    found = []
    for settings in (
        {"per_device_train_batch_size": 5},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    ):
        model, processor = new_model()
        learner = Learner(model, processor, [], seed=0)
        args = arguments(optim="sgd", learning_rate=0.5, max_grad_norm=0.0, **settings)
        ContinualTrainer(args=args, train_dataset=stream[0].train[:5], learner=learner).train()
        found.append(adapters.adapter_state(learner.model, "default"))
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, atol=1e-6, rtol=1e-4)


def test_whole_batches():
    rows = [{"id": str(index), "messages": [], "images": [], "companions": {"inquiry": [1]}} for index in range(5)]
    padded = whole_batches(rows, 4)  # type: ignore[arg-type]
    assert [row["id"] for row in padded] == ["0", "1", "2", "3", "4", "0", "1", "2"]
    assert [row.get("ignored", False) for row in padded] == [False] * 5 + [True] * 3
    assert ["companions" in row for row in padded] == [True] * 5 + [False] * 3
    assert [row["id"] for row in whole_batches(rows[:1], 4)] == ["0"] * 4  # type: ignore[arg-type]
    assert len(whole_batches(rows, 5)) == 5  # type: ignore[arg-type]


def test_what_is_missing_is_named(new_model, stream, arguments):
    model, processor = new_model()
    rows = stream[0].train[:4]
    with pytest.raises(ModelError, match="ContinualTrainer: `model` is missing"):
        ContinualTrainer(args=arguments(), train_dataset=rows, processing_class=processor)
    with pytest.raises(ModelError, match="LlavaCTrainer: `processing_class` is missing"):
        LlavaCTrainer(model=model, args=arguments(), train_dataset=rows)
    with pytest.raises(DataError, match="train_dataset: has no rows to train on"):
        ContinualTrainer(model=model, args=arguments(), processing_class=processor)
    best = arguments(load_best_model_at_end=True, eval_strategy="steps", save_strategy="steps")
    with pytest.raises(RecipeError, match="load_best_model_at_end"):
        ContinualTrainer(model=model, args=best, train_dataset=rows, processing_class=processor)
    pissa = LoraConfig(init_lora_weights="pissa")
    with pytest.raises(RecipeError, match=r"peft_config\.init_lora_weights: 'pissa' changes the base weights"):
        ContinualTrainer(
            model=model, args=arguments(), train_dataset=rows, processing_class=processor, peft_config=pissa
        )
    plain = get_peft_model(model, LoraConfig(target_modules=lora_targets(model)), adapter_name="other")
    with pytest.raises(MllmClError, match="no LoRA adapter called 'default'"):
        ContinualTrainer(model=plain, args=arguments(), train_dataset=rows, processing_class=processor)


def test_a_trainer_is_used_once(new_model, stream, arguments):
    model, processor = new_model()
    first = ContinualTrainer(
        model=model, args=arguments(), train_dataset=stream[0].train[:4], processing_class=processor
    )
    first.train()
    with pytest.raises(RunError, match="the model has gone on since this trainer was made"):
        first.train()


def test_evaluation_sees_no_terms_and_no_gradient(new_model, stream, arguments, stream_file):
    """`eval_dataset` works as in any Trainer: the loss is the cross-entropy alone."""
    model, processor = new_model()
    method = InquiryRegularization(pool=str(stream_file.parent / "pool.txt"), rollout=0, weight=100.0)
    trainer = ContinualTrainer(
        model=model,
        args=arguments(eval_strategy="steps", eval_steps=1),
        train_dataset=stream[0].train[:4],
        eval_dataset=stream[0].test,
        processing_class=processor,
        methods=[method],
    )
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 20
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all("cl/uir" in entry for entry in logged)
    assert not any("cl/uir" in entry for entry in trainer.state.log_history if "eval_loss" in entry)


def test_bfloat16_leaves_the_model_as_it_was(new_model, stream, arguments):
    model, processor = new_model()
    for task in stream:
        args = arguments(bf16=True)
        ContinualTrainer(model=model, args=args, train_dataset=task.train[:4], processing_class=processor).train()
        learner = Learner.of(model)
        assert learner is not None
        assert not {"forward", "_original_forward", "_is_accelerate_prepared"} & vars(learner.model).keys()


class _SeenTypes(TrainerCallback):
    def __init__(self) -> None:
        self.autocast: list[bool] = []

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.autocast.append("_original_forward" in vars(kwargs["model"]))


def test_every_task_trains_in_bfloat16(new_model, stream, arguments):
    model, processor = new_model()
    for task in stream:
        seen = _SeenTypes()
        args = arguments(bf16=True, gradient_accumulation_steps=2, per_device_train_batch_size=2)
        ContinualTrainer(
            model=model, args=args, train_dataset=task.train[:4], processing_class=processor, callbacks=[seen]
        ).train()
        assert seen.autocast == [True] * 3  # epochs


def test_nothing_piles_up(new_model, stream, arguments, small_llava_c):
    """Eight tasks: no trainer, optimizer or adapter of an earlier task stays; the number of live tensors does not grow."""
    model, processor = new_model()
    tensors, trainers = [], []
    for index in range(8):
        trainer = small_llava_c(
            model=model, args=arguments(), train_dataset=stream[index % 2].train[:4], processing_class=processor
        )
        trainer.train()
        trainers.append(weakref.ref(trainer))
        del trainer
        gc.collect()
        learner = Learner.of(model)
        assert learner is not None
        assert adapters.adapter_names(learner.model) == ["default"]
        tensors.append(sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects()))
    assert [reference() for reference in trainers] == [None] * 8
    assert tensors[2:] == [tensors[2]] * 6


def test_a_learner_goes_with_its_model(new_model, stream, arguments):
    model, processor = new_model()
    ContinualTrainer(
        model=model, args=arguments(), train_dataset=stream[0].train[:4], processing_class=processor
    ).train()
    learner = weakref.ref(Learner.of(model))  # type: ignore[arg-type]
    assert learner() is not None
    assert isinstance(learner().model, PeftModel)  # type: ignore[union-attr]
    del model
    gc.collect()
    assert learner() is None
