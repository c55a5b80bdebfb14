"""`auto_find_batch_size`: memory that runs out costs passes, not the result."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig

from mllm_cl.errors import RecipeError, RunError
from mllm_cl.methods import build_method
from mllm_cl.models import adapters
from mllm_cl.recipe import MethodSpec, load_recipe
from mllm_cl.training.capabilities import build_methods
from mllm_cl.training.learner import Learner

METHODS = ("spectral_consolidation", "inquiry_regularization")


@pytest.fixture
def trained(fresh, small_stream, train_task):
    """Returns a function that trains two tasks on a device that holds so many rows, and gives adapter and last trainer."""

    def make(room: int | None = None, **section):
        torch.manual_seed(0)
        model, processor = fresh()
        learner = Learner(model, processor, [build_method(MethodSpec(name=name)) for name in METHODS], LoraConfig(r=4))
        decoder = learner.model.get_base_model().get_decoder()

        def run_out(_, args, kwargs):
            rows = len(kwargs["inputs_embeds"])
            if room is not None and torch.is_grad_enabled() and rows > room:
                raise RuntimeError("CUDA out of memory. Tried to allocate more than there is.")

        decoder.register_forward_pre_hook(run_out, with_kwargs=True)
        stream = small_stream(2)
        for _ in stream:
            trainer = train_task(learner, stream, **section)
        return adapters.adapter_parameters(learner.model, learner.trained_name(stream[1])), trainer

    return make


def test_it_ends_where_the_smaller_batch_would_have(trained):
    found, trainer = trained(room=2, auto_find_batch_size=True)
    args = trainer.args
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (2, 4)
    wanted, other = trained(per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert trainer.state.global_step == other.state.global_step > 0
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


def test_what_fits_is_left_alone(trained):
    found, trainer = trained(auto_find_batch_size=True)
    assert (trainer.args.per_device_train_batch_size, trainer.args.gradient_accumulation_steps) == (8, 1)
    wanted, _ = trained()
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("size", [2, 6])
def test_nothing_is_trained_when_nothing_fits(trained, size):
    with pytest.raises(RunError, match="does not fit into memory") as caught:
        trained(room=0, auto_find_batch_size=True, per_device_train_batch_size=size)
    assert "per_device_train_batch_size" in str(caught.value)


def test_other_errors_are_not_taken_for_it(trained, monkeypatch):
    from mllm_cl.training.trainer import ContinualTrainer

    def broken(self, rows=None):
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(ContinualTrainer, "rehearse", broken)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        trained(auto_find_batch_size=True)


@pytest.mark.parametrize(
    ("method", "training", "named"), [("finetune", {"fsdp": True}, "fsdp2"), ("agem", {}, "ddp and agem")]
)
def test_what_waits_for_the_others_cannot_fail_alone(monkeypatch, method, training, named):
    monkeypatch.setenv("WORLD_SIZE", "2")
    content = {"name": "x", "output_dir": "x", "stream": {"name": "quickstart"}, "methods": [method]}
    recipe = load_recipe(content | {"training": {"auto_find_batch_size": True, **training}})
    with pytest.raises(RecipeError, match=f"auto_find_batch_size does not work with {named}"):
        build_methods(recipe)
