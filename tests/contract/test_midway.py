"""A task that is killed in the middle and resumed ends bit for bit where an uninterrupted one does.

Methods that keep something while a task trains (a path, a slow copy, a branch, drawn rows) are the ones that can fail;
what all methods share is tested with whole runs in `tests/training`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mllm_cl.methods import build_method
from mllm_cl.models import adapters
from mllm_cl.recipe import MethodSpec
from mllm_cl.training.arguments import training_arguments
from mllm_cl.training.trainer import ContinualTrainer

CASES: dict[str, dict[str, Any]] = {
    "si": {},
    "ema": {"decay": 0.5},
    "slao": {},
    "agem": {"size": 4, "batch": 2},
    "gem": {"size": 4, "batch": 2},
    "derpp": {"size": 4, "ratio": 0.5},
    "replay": {"size": 4, "policy": "surprise"},
    "magmax": {},
    "inflora": {"samples": 4, "energy": 0.5},
    "mica": {},
    "shared_specific": {"samples": 4, "slowness": 0.5},
    "moelora": {"experts": 2},
    "mr_lora": {"shots": 4, "epochs": 2, "learning_rate": 0.01},
    "sd_lora": {},
    "smolora": {"blocks": 2},
    "clmoe": {"experts": 4, "important": 1, "samples": 4},
    "branchlora": {"experts": 4, "samples": 4},
    "osf": {},
    "progressive_prompts": {},
    "l2p": {"pool": 4, "top": 2},
    "modal_prompt": {},
}


def learn(learner: Any, stream: Any, folder: Path, resume: Path | None = None, **section: Any) -> None:
    settings = {
        "learning_rate": 1e-2, "per_device_train_batch_size": 8, "save_strategy": "steps", "save_steps": 2,
        "save_total_limit": 5, "use_cpu": True, "num_train_epochs": 2, "logging_steps": 1,
    }  # fmt: skip
    stage = learner.stage + 1
    args = training_arguments(settings | section, folder, seed=stage)
    trainer = ContinualTrainer(args=args, task=stream[stage - 1], stream=stream, learner=learner)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))


@pytest.mark.parametrize("name", CASES)
def test_a_task_continues_from_a_checkpoint_bit_for_bit(name, make_learner, small_stream, tmp_path):
    def make() -> Any:
        return make_learner(build_method(MethodSpec(name=name, options=CASES[name])))

    stream, straight = small_stream(2, rows=16), make()
    learn(straight, stream, tmp_path / "1", save_strategy="no")
    straight.save_adapters(tmp_path / "adapter")
    straight.save_states(tmp_path / "method")
    learn(straight, stream, tmp_path / "2")

    resumed = make()
    resumed.load_stage(tmp_path / "adapter", tmp_path / "method", 1)
    checkpoint = tmp_path / "2" / "checkpoint-2"
    assert checkpoint.is_dir()
    learn(resumed, stream, tmp_path / "3", resume=checkpoint)
    for adapter in adapters.adapter_names(straight.model):
        if adapter in (adapters.DEFAULT, *(adapters.task_adapter(task.name) for task in stream)):
            found, expected = (adapters.adapter_state(learner.model, adapter) for learner in (resumed, straight))
            if straight.policy != "per_task" or adapter != adapters.DEFAULT:
                assert all(torch.equal(found[key], expected[key]) for key in expected), adapter
    state, expected = (learner.methods[0].state_dict() for learner in (resumed, straight))
    assert state.data == expected.data
    assert state.tensors.keys() == expected.tensors.keys()
    assert all(torch.equal(state.tensors[key], expected.tensors[key]) for key in expected.tensors)
