"""What a method trains beside the adapters: trained, averaged, counted, checkpointed; gone when the task ends."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mllm_cl.errors import ModelError, RecipeError
from mllm_cl.methods import Method
from mllm_cl.models import extra_parameters
from mllm_cl.recipe import BudgetSection
from mllm_cl.training.arguments import training_arguments
from mllm_cl.training.budget import check_trainable
from mllm_cl.training.trainer import ContinualTrainer


class Shift(Method):
    """Learns one vector that is pulled towards 3."""

    name = "shift"
    summary = "learns a vector"

    def __init__(self) -> None:
        self.vector = nn.Parameter(torch.zeros(2))
        self.steps: list[torch.Tensor] = []

    def begin_task(self, ctx) -> None:
        self.vector = nn.Parameter(torch.zeros(2))

    def parameters(self, ctx):
        return {"a.vector": self.vector}

    def loss_terms(self, ctx, model, batch, outputs):
        return {"shift": (self.vector - 3.0).square().mean() * batch.share("step")}

    def after_step(self, ctx) -> None:
        self.steps.append(self.vector.detach().clone())


def test_a_method_trains_parameters_of_its_own(make_learner, small_stream, train_task):
    method, stream = Shift(), small_stream(1, rows=16)
    learner = make_learner(method)
    plain = make_learner()
    trainer = train_task(learner, stream, num_train_epochs=2)
    assert len(method.steps) == 4
    assert method.steps[-1].min() > 0.03  # Adam at 1e-2
    assert method.vector.detach().equal(method.steps[-1])
    assert not extra_parameters.attached(learner.model)
    assert not any("method_parameters" in name for name, _ in learner.model.named_parameters())
    assert learner.model.state_dict().keys() == plain.model.state_dict().keys()
    assert trainer.state.log_history


def test_they_are_counted(begin_with, small_stream):
    with_it, without = begin_with(Shift(), small_stream), begin_with(None, small_stream)
    assert with_it.parameters() == without.parameters() + 2
    assert set(extra_parameters.attached(with_it.model)) == {"shift/a+vector"}
    budget = BudgetSection(kind="trainable_parameters", value=1000)
    check_trainable(budget, 980, 8, extra=20)  # 120 per rank and 20: 8 fits, 9 does not
    with pytest.raises(RecipeError, match=r"model\.lora\.r=8.*980 parameters"):
        check_trainable(budget, 500, 4, extra=20)
    with pytest.raises(RecipeError, match="with rank 1 this recipe already trains 1010"):
        check_trainable(budget, 1010, 1, extra=900)
    check_trainable(budget, 20, 8, extra=20)  # no adapter is trained: the rank cannot help


@pytest.fixture
def begin_with(make_learner):
    from accelerate import Accelerator

    def start(method, small_stream):
        learner = make_learner(*([method] if method else []))
        stream = small_stream(1, rows=4)
        learner.begin_task(stream[0], stream, Accelerator(cpu=True))
        return learner

    return start


def test_a_checkpoint_holds_them(make_learner, small_stream, tmp_path):
    stream, results = small_stream(1, rows=16), []
    settings = {
        "learning_rate": 1e-2, "per_device_train_batch_size": 8, "save_strategy": "steps", "save_steps": 2,
        "save_total_limit": 5, "use_cpu": True, "num_train_epochs": 2, "logging_steps": 1,
    }  # fmt: skip
    for folder, resume in (("one", None), ("two", str(tmp_path / "one" / "checkpoint-2"))):
        learner, method = make_learner(shift := Shift()), shift
        args = training_arguments(settings, tmp_path / folder, seed=1)
        trainer = ContinualTrainer(args=args, task=stream[0], stream=stream, learner=learner)
        trainer.train(resume_from_checkpoint=resume)
        results.append(method.steps)
    assert len(results[0]) == 4
    assert len(results[1]) == 2
    assert torch.equal(results[0][-1], results[1][-1])


def test_parameters_of_another_method_are_not_loaded(begin_with, small_stream):
    model = begin_with(Shift(), small_stream).model
    with pytest.raises(ModelError, match=r"shift/a\+vector is not what was saved"):
        extra_parameters.load(model, {"shift/a+vector": torch.zeros(3)})
    with pytest.raises(ModelError, match="other is not what was saved"):
        extra_parameters.load(model, {"shift/a+vector": torch.zeros(2), "other": torch.zeros(1)})
    extra_parameters.load(model, {"shift/a+vector": torch.ones(2)})
    assert extra_parameters.attached(model)["shift/a+vector"].tolist() == [1.0, 1.0]
