"""Checkpoints inside a task: what is written, what comes back, and that training continues exactly where it stopped."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from transformers import TrainerCallback, TrainingArguments

from mllm_cl.errors import RunError
from mllm_cl.files import folder_sha256
from mllm_cl.methods.inquiry_regularization import InquiryRegularization
from mllm_cl.methods.lwf import LwF
from mllm_cl.methods.replay import Replay
from mllm_cl.models import adapters
from mllm_cl.training.checkpoint import (
    SEAL,
    last_checkpoint,
    load_tree,
    pack,
    random_states,
    restore_random_states,
    save_tree,
    unpack,
)
from mllm_cl.training.learner import Learner
from mllm_cl.training.trainer import ContinualTrainer

SETTINGS: dict[str, dict[str, Any]] = {
    "second epoch": {"num_train_epochs": 3, "stop": 5},
    "end of an epoch": {"num_train_epochs": 2, "stop": 3, "save_strategy": "epoch"},
    "accumulation": {
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
        "num_train_epochs": 2,
        "stop": 4,
    },
    "last step": {"stop": 3},
    "checkpoint before the stop": {"num_train_epochs": 2, "save_steps": 2, "stop": 5},
    "max_steps": {"max_steps": 5, "stop": 4},
    "linear": {"lr_scheduler_type": "linear", "warmup_steps": 2, "stop": 2},
    "constant": {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 2, "stop": 2},
    "restarts": {"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": {"num_cycles": 2}, "stop": 2},
    "polynomial": {"lr_scheduler_type": "polynomial", "stop": 2},
    "inverse_sqrt": {"lr_scheduler_type": "inverse_sqrt", "warmup_steps": 1, "stop": 2},
    "minimum": {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-4}, "stop": 2},
    "sgd": {"optim": "sgd", "optim_args": "momentum=0.9", "stop": 2},
    "adafactor": {"optim": "adafactor", "stop": 2},
    "unfused": {"optim": "adamw_torch", "weight_decay": 0.1, "stop": 2},
    "workers": {"dataloader_num_workers": 1, "stop": 2},
}


class _Stop(Exception):
    pass


class _StopAt(TrainerCallback):
    """Interrupts training before the step after `stop`."""

    def __init__(self, stop: int) -> None:
        self.stop = stop

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.stop:
            raise _Stop

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.stop:
            raise _Stop


class _Pickles(TrainerCallback):
    """Looks for files that only pickle can read, after each step and each save."""

    found: list[Path]

    def __init__(self, folder: Path) -> None:
        self.folder, self.found, self.most = folder, [], 0

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.found += [path for path in self.folder.rglob("*") if path.suffix in (".pt", ".pth", ".bin", ".pkl")]
        self.most = max(self.most, len(list(self.folder.glob("checkpoint-*"))))

    on_step_end = on_save


@pytest.fixture
def trainer_for(new_model, stream) -> Callable[..., ContinualTrainer]:
    """Returns trainers of the first task over a fresh learner, with dropout so that the random states matter."""

    def make(
        folder: Path, stop: int | None = None, methods: tuple = (), rows: int = 12, **settings: Any
    ) -> ContinualTrainer:
        model, processor = new_model()
        torch.manual_seed(random.randrange(2**31))  # nothing may depend on what came before
        lora = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.2)
        learner = Learner(model, processor, list(methods), lora, seed=5)
        args = TrainingArguments(
            str(folder),
            **{
                "use_cpu": True,
                "seed": 3,
                "learning_rate": 5e-3,
                "per_device_train_batch_size": 4,
                "save_steps": 1,
                "save_total_limit": 1,
                "disable_tqdm": True,
                "logging_steps": 1,
                "report_to": "none",
                **settings,
            },
        )
        callbacks: list[TrainerCallback] = [] if stop is None else [_StopAt(stop)]
        task = stream[0]
        return ContinualTrainer(
            args=args, task=task, train_dataset=task.train[:rows], stream=stream, learner=learner, callbacks=callbacks
        )

    return make


def weights(trainer: ContinualTrainer) -> dict[str, torch.Tensor]:
    return adapters.adapter_state(trainer.learner.model, "default")


@pytest.mark.parametrize("name", SETTINGS)
def test_training_continues_exactly(name, trainer_for, tmp_path):
    settings = dict(SETTINGS[name])
    stop = settings.pop("stop")
    straight = trainer_for(tmp_path / "straight", **settings)
    straight.train()
    with pytest.raises(_Stop):
        trainer_for(tmp_path / "run", stop=stop, **settings).train()
    checkpoint = last_checkpoint(tmp_path / "run")
    assert checkpoint is not None
    resumed = trainer_for(tmp_path / "run", **settings)
    resumed.train(resume_from_checkpoint=checkpoint)
    expected, found = weights(straight), weights(resumed)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert resumed.state.num_input_tokens_seen == straight.state.num_input_tokens_seen
    losses = [
        [entry["loss"] for entry in trainer.state.log_history if "loss" in entry] for trainer in (straight, resumed)
    ]
    assert losses[0] == losses[1]


def test_methods_continue_exactly(trainer_for, tmp_path, stream_file):
    """Costs and the generator of the context are part of a checkpoint."""

    def methods() -> tuple:
        pool = str(stream_file.parent / "pool.txt")
        return (InquiryRegularization(pool=pool, rollout=1, ratio=0.5), LwF(), Replay(size=4))

    straight = trainer_for(tmp_path / "straight", methods=methods())
    straight.train()
    with pytest.raises(_Stop):
        trainer_for(tmp_path / "run", stop=2, methods=methods()).train()
    resumed = trainer_for(tmp_path / "run", methods=methods())
    resumed.train(resume_from_checkpoint=True)
    assert all(torch.equal(weights(resumed)[key], tensor) for key, tensor in weights(straight).items())
    assert resumed.ctx.cost == straight.ctx.cost
    assert torch.equal(resumed.ctx.rng.get_state(), straight.ctx.rng.get_state())
    for one, two in zip(straight.learner.methods, resumed.learner.methods):
        assert one.state_dict().data == two.state_dict().data


def test_no_pickle_and_no_heap_of_checkpoints(trainer_for, tmp_path):
    trainer = trainer_for(tmp_path, num_train_epochs=2, save_total_limit=2)
    watch = _Pickles(tmp_path)
    trainer.add_callback(watch)
    trainer.train()
    assert watch.found == []
    assert watch.most == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-5", "checkpoint-6"]
    names = {path.name for path in (tmp_path / "checkpoint-6").iterdir()}
    parts = {
        f"{part}.{kind}"
        for part in ("optimizer", "scheduler", "context", "parameters", "random-0")
        for kind in ("json", "safetensors")
    }
    assert names == parts | {"adapter", "trainer_state.json", SEAL}


def test_the_checkpoint_of_another_task_is_refused(trainer_for, tmp_path, stream):
    trainer = trainer_for(tmp_path, save_steps=3)
    trainer.train()
    args = trainer.args
    second = ContinualTrainer(args=args, task=stream[1], learner=trainer.learner, stream=stream)
    with pytest.raises(RunError, match="is a checkpoint of task-1, not of task-2"):
        second.train(resume_from_checkpoint=True)


def test_the_checkpoint_of_fewer_processes_is_refused(trainer_for, tmp_path):
    with pytest.raises(_Stop):
        trainer_for(tmp_path, stop=2).train()
    folder = tmp_path / "checkpoint-2"
    (folder / "random-0.json").unlink()
    (folder / SEAL).write_text(folder_sha256(folder, besides=SEAL))
    with pytest.raises(RunError, match="written by fewer processes"):
        trainer_for(tmp_path).train(resume_from_checkpoint=True)


def test_a_checkpoint_that_has_changed_is_refused(trainer_for, tmp_path):
    """Whatever file it is: a wrong state of the optimizer would not be seen in any score."""
    with pytest.raises(_Stop):
        trainer_for(tmp_path, stop=2).train()
    folder = tmp_path / "checkpoint-2"
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = path.read_bytes()
        for damaged in (content[:-1], content[:-1] + bytes([content[-1] ^ 1])):
            path.write_bytes(damaged)
            with pytest.raises(RunError, match="checkpoint-2: is not what was saved there"):
                trainer_for(tmp_path).train(resume_from_checkpoint=True)
        path.write_bytes(content)
    (folder / SEAL).unlink()
    with pytest.raises(RunError, match="is not what was saved there"):
        trainer_for(tmp_path).train(resume_from_checkpoint=True)


def test_unfinished_checkpoints_do_not_count(tmp_path):
    for name in ("checkpoint-2", "checkpoint-10", "checkpoint-11.partial", "other"):
        (tmp_path / name).mkdir()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    assert last_checkpoint(tmp_path / "nothing") is None


def test_a_grad_scaler_is_part_of_a_checkpoint(trainer_for, tmp_path):
    """Only fp16 on a GPU has one; its state is numbers."""
    trainer = trainer_for(tmp_path, save_strategy="no")
    trainer.train()
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    torch.ones(2).pow(2)  # a scaler only has a state once it has scaled
    trainer.accelerator.scaler.scale(torch.ones(1))
    trainer._save_checkpoint(trainer.model, None)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    trainer._load_optimizer_and_scheduler(last_checkpoint(tmp_path))
    assert trainer.accelerator.scaler.state_dict()["scale"] == 64.0


def test_trees_come_back(tmp_path):
    tree = {
        0: {"step": torch.tensor(3.0), "empty": torch.zeros(0, 2), "half": torch.ones(2, dtype=torch.bfloat16)},
        "text": "ä",
        "numbers": [1, 2.5, float("inf"), None, True, np.float64(0.1), np.int64(4)],
        "pair": (1, (2, [])),
        "nothing": {},
    }
    save_tree(tmp_path, "tree", tree)
    found = load_tree(tmp_path, "tree")
    assert torch.equal(found[0]["half"], tree[0]["half"])
    assert found[0]["half"].dtype == torch.bfloat16
    assert found[0]["step"].shape == ()
    assert found[0]["empty"].shape == (0, 2)
    assert found["numbers"] == [1, 2.5, float("inf"), None, True, 0.1, 4]
    assert found["pair"] == (1, (2, []))
    assert (found["text"], found["nothing"]) == ("ä", {})
    assert list(found) == list(tree)


def test_what_cannot_be_kept_is_refused():
    with pytest.raises(TypeError, match="root/key/0: a checkpoint cannot hold object"):
        pack({"key": [object()]}, {})


def test_shared_tensors_are_kept_apart():
    tensors: dict[str, torch.Tensor] = {}
    base = torch.arange(4.0)
    content = pack([base, base[1:3], base.t()], tensors)
    assert len({tensor.data_ptr() for tensor in tensors.values()}) == 3
    assert torch.equal(unpack(content, tensors)[1], torch.tensor([1.0, 2.0]))


def test_random_states_come_back(tmp_path):
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    np.random.normal()  # leaves a second normal number behind
    save_tree(tmp_path, "random", random_states())

    def draw() -> list[float]:
        return [random.random(), random.gauss(0, 1), np.random.normal(), np.random.rand(), torch.rand(()).item()]

    expected = draw()
    draw()
    restore_random_states(load_tree(tmp_path, "random"))
    assert draw() == expected
