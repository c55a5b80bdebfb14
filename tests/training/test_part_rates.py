"""Language, bridge and vision may learn at different speeds."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from transformers import TrainerCallback

from mllm_cl.errors import RecipeError
from mllm_cl.models import adapters
from mllm_cl.recipe import load_recipe
from mllm_cl.training.learner import Learner
from mllm_cl.training.part_rates import part_of

RATES = {"bridge": 3e-3, "vision": 0.5}


class Groups(TrainerCallback):
    """Keeps what the optimizer looks like at every step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs) -> None:
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.steps.append({names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]})


def make(fresh, **settings) -> Learner:
    model, processor = fresh()
    return Learner(model, processor, [], LoraConfig(r=2, lora_alpha=4), bridge=True, vision=True, **settings)


def test_every_part_has_its_own_rate(fresh, small_stream, train_task):
    learner, seen = make(fresh, part_rates=RATES), Groups()
    train_task(
        learner, small_stream(1, rows=16), seen, learning_rate=1e-2, lr_scheduler_type="linear", num_train_epochs=2
    )
    assert len(seen.steps) == 4
    trainable = [name for name in dict(learner.model.named_parameters()) if ".lora_" in name and ".default." in name]
    for step, rates in enumerate(seen.steps):
        assert sorted(rates) == sorted(trainable)  # every parameter in exactly one group, none lost
        share = 1 - step / 4
        for name, rate in rates.items():
            part = part_of(name, learner.part_names)
            assert rate == pytest.approx({"language": 1e-2, **RATES}[part] * share)
    assert {part_of(name, learner.part_names) for name in trainable} == {"language", "bridge", "vision"}


def test_without_rates_nothing_changes(fresh, small_stream, train_task):
    states = []
    for rates in (None, {"bridge": 1e-2, "vision": 1e-2}):
        learner = make(fresh, part_rates=rates)
        train_task(learner, small_stream(1, rows=16), learning_rate=1e-2)
        states.append(adapters.adapter_state(learner.model, adapters.DEFAULT))
    for name, value in states[0].items():
        assert torch.allclose(value, states[1][name], atol=1e-7)


def test_a_bridge_inside_the_vision_tower_is_the_bridge():
    prefixes = {"bridge": ["model.visual.merger"], "vision": ["model.visual"]}
    assert part_of("base_model.model.model.visual.merger.mlp.0.lora_A.default.weight", prefixes) == "bridge"
    assert part_of("model.visual.blocks.0.attn.qkv.lora_A.default.weight", prefixes) == "vision"
    assert part_of("model.visual_like.blocks.0.weight", prefixes) == "language"


def test_a_rate_of_a_part_that_is_not_trained_is_refused():
    recipe = {"name": "x", "output_dir": "x", "stream": {"name": "quickstart"}}
    with pytest.raises(RecipeError, match=r"vision_learning_rate.* has no effect without `train_vision: true`"):
        load_recipe(recipe | {"model": {"vision_learning_rate": 1e-5}})
    section = load_recipe(recipe | {"model": {"train_vision": True, "vision_learning_rate": 1e-5}}).model
    assert section.part_rates == {"vision": 1e-5}
