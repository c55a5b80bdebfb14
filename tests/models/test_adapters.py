"""Adapters: what is active, what is trainable, what is written and read, and that the base never changes."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel

from mllm_cl.data.collate import Collator
from mllm_cl.errors import ModelError
from mllm_cl.models import adapters
from mllm_cl.models.parts import lora_targets


@pytest.fixture
def base(fresh):
    return fresh()[0]


@pytest.fixture
def config(base):
    return LoraConfig(r=4, lora_alpha=8, target_modules=lora_targets(base))


@pytest.fixture
def model(base, config):
    return filled(adapters.add_adapter(base, "default", config, seed=1), "default", 1)


@pytest.fixture
def inputs(loaded, make_row):
    rows = [make_row(str(index), "What is this?", "red", (index * 90, 5, 5)) for index in range(3)]
    return {k: v for k, v in Collator(loaded[1])(rows).items() if k != "labels"}


def filled(model, name: str, seed: int):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapters.adapter_parameters(model, name).values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def logits(model, inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def state(model, name: str) -> dict[str, torch.Tensor]:
    return {key: tensor.clone() for key, tensor in adapters.adapter_state(model, name).items()}


def equal(one, two) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def trainable(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_initialisation_depends_on_the_seed_alone(fresh, config):
    torch.manual_seed(5)
    one = adapters.add_adapter(fresh()[0], "default", config, seed=3)
    torch.manual_seed(99)
    torch.rand(7)
    two = adapters.add_adapter(fresh()[0], "default", config, seed=3)
    other = adapters.add_adapter(fresh()[0], "default", config, seed=4)
    assert equal(state(one, "default"), state(two, "default"))
    assert not equal(state(one, "default"), state(other, "default"))


def test_adding_and_resetting_leave_the_global_generator_alone(base, config):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    model = adapters.add_adapter(base, "default", config, seed=3)
    adapters.add_adapter(model, "task", config, seed=4)
    adapters.reset_adapter(model, "task", seed=5)
    assert torch.equal(torch.rand(3), expected)


def test_a_fresh_adapter_changes_nothing_and_is_frozen(base, config, inputs):
    before = logits(base, inputs)
    model = adapters.add_adapter(base, "default", config, seed=3)
    assert next(adapters.lora_layers(model))[1].active_adapters == []
    assert trainable(model) == set()
    with adapters.active(model, ["default"]):
        assert torch.equal(logits(model, inputs), before)


def test_reset_is_a_fresh_start_from_the_seed_alone(model, inputs):
    adapters.reset_adapter(model, "default", seed=3)
    first = state(model, "default")
    with adapters.active(model, []):
        plain = logits(model, inputs)
    with adapters.active(model, ["default"]):
        assert torch.equal(logits(model, inputs), plain)
    torch.rand(5)
    adapters.reset_adapter(filled(model, "default", 2), "default", seed=3)
    assert equal(state(model, "default"), first)
    adapters.reset_adapter(model, "default", seed=4)
    assert not equal(state(model, "default"), first)


def test_adding_an_adapter_keeps_the_others_and_what_is_active(model, config):
    adapters.set_active(model, ["default"])
    before = state(model, "default")
    adapters.add_adapter(model, "task", config, seed=2)
    assert next(adapters.lora_layers(model))[1].active_adapters == ["default"]
    assert adapters.adapter_names(model) == ["default", "task"]
    adapters.remove_adapter(model, "task")
    assert adapters.adapter_names(model) == ["default"]
    assert next(adapters.lora_layers(model))[1].active_adapters == ["default"]
    assert equal(state(model, "default"), before)
    assert trainable(model) == set()


def test_active_adapters_add_up(model, config, inputs, base):
    adapters.add_adapter(model, "task", config, seed=2)
    filled(model, "task", 2)
    with adapters.active(model, []):
        plain = logits(model, inputs)
    dense = {
        name: adapters.adapter_deltas(model, "default")[name].dense() + delta.dense()
        for name, delta in adapters.adapter_deltas(model, "task").items()
    }
    with adapters.active(model, ["default", "task"]):
        both = logits(model, inputs)
    for name, layer in adapters.lora_layers(model):
        layer.get_base_layer().weight.data += dense[name]
    with adapters.active(model, []):
        assert torch.allclose(logits(model, inputs), both, atol=1e-5)
    assert not torch.allclose(plain, both, atol=1e-3)


def interrupted(model, grads: set[str]) -> None:
    assert trainable(model) == grads
    raise RuntimeError("boom")


def test_contexts_restore_everything_after_an_error(model, config, inputs):
    adapters.add_adapter(model, "task", config, seed=2)
    adapters.set_active(model, ["default", "task"])
    adapters.set_trainable(model, ["task"])
    before, grads = logits(model, inputs), trainable(model)
    scalings = [dict(layer.scaling) for _, layer in adapters.lora_layers(model)]
    for context in (
        adapters.active(model, []),
        adapters.active(model, ["default"]),
        adapters.weighted(model, {"default": 0.5, "task": 2.0}),
    ):
        with pytest.raises(RuntimeError, match="boom"), context:
            interrupted(model, grads)
        assert torch.equal(logits(model, inputs), before)
        assert trainable(model) == grads
        assert [dict(layer.scaling) for _, layer in adapters.lora_layers(model)] == scalings


def test_unknown_adapters_are_refused_and_not_answered_by_the_base(model):
    with pytest.raises(ModelError, match="'nobody' does not exist"), adapters.active(model, ["nobody"]):
        pass
    with pytest.raises(ModelError, match="nobody"), adapters.weighted(model, {"nobody": 1.0}):
        pass


def test_weights_scale_updates(model, inputs):
    with adapters.active(model, ["default"]):
        full = logits(model, inputs)
    with adapters.active(model, []):
        plain = logits(model, inputs)
    with adapters.weighted(model, {"default": 1.0}):
        assert torch.equal(logits(model, inputs), full)
    for nothing in ({}, {"default": 0.0}):
        with adapters.weighted(model, nothing):
            assert torch.equal(logits(model, inputs), plain)
    with adapters.weighted(model, {"default": 0.5}):
        halved = logits(model, inputs)
    with torch.no_grad():
        for name, parameter in adapters.adapter_parameters(model, "default").items():
            if name.endswith("lora_B"):
                parameter.mul_(0.5)
    with adapters.active(model, ["default"]):
        assert torch.allclose(logits(model, inputs), halved, atol=1e-6)


def test_trainable_is_exactly_the_adapter(model, config):
    adapters.add_adapter(model, "task", config, seed=2)
    chosen = adapters.set_trainable(model, ["task"])
    assert {id(p) for p in chosen} == {id(p) for p in adapters.adapter_parameters(model, "task").values()}
    assert len(trainable(model)) == len(chosen)
    assert all(".task." in name for name in trainable(model))
    assert adapters.set_trainable(model, []) == []
    assert trainable(model) == set()


def test_saved_folders_are_plain_peft(model, inputs, tmp_path, fresh):
    adapters.save_adapter(model, "default", tmp_path / "adapter")
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["inference_mode"] is True
    assert settings["peft_type"] == "LORA"
    with adapters.active(model, ["default"]):
        ours = logits(model, inputs)
    theirs = PeftModel.from_pretrained(fresh()[0], str(tmp_path / "adapter")).eval()
    assert torch.equal(logits(theirs, inputs), ours)


def test_folders_round_trip(model, tmp_path, fresh):
    before = state(model, "default")
    adapters.save_adapter(model, "default", tmp_path / "a")
    again = adapters.load_adapter(fresh()[0], tmp_path / "a", "default")
    assert equal(state(again, "default"), before)
    assert trainable(again) == set()
    reloaded = adapters.load_adapter(filled(model, "default", 9), tmp_path / "a", "default")  # over itself
    assert equal(state(reloaded, "default"), before)
    assert adapters.adapter_names(reloaded) == ["default"]
    adapters.load_adapter(model, tmp_path / "a", "second")
    assert equal(state(model, "second"), before)


def test_reading_reports_what_is_wrong(model, config, fresh, tmp_path, base):
    adapters.save_adapter(model, "default", tmp_path / "good")
    with pytest.raises(ModelError, match=r"adapter_config\.json is missing"):
        adapters.load_adapter(fresh()[0], tmp_path / "nothing", "default")

    shutil.copytree(tmp_path / "good", tmp_path / "torn")
    (tmp_path / "torn" / "adapter_model.safetensors").write_bytes(b"torn")
    with pytest.raises(ModelError, match="cannot be read"):
        adapters.load_adapter(fresh()[0], tmp_path / "torn", "default")

    def changed(name: str, **settings) -> str:
        shutil.copytree(tmp_path / "good", tmp_path / name)
        path = tmp_path / name / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))
        return name

    for name, message in (
        (changed("targets", target_modules="nothing.like.it"), "target modules are not in this base model"),
        (changed("rank", r=5), r"56|of another shape"),
        (changed("kind", peft_type="IA3"), "IA3"),
    ):
        with pytest.raises(ModelError, match=message):
            adapters.load_adapter(fresh()[0], tmp_path / name, "default")
        with pytest.raises(ModelError, match=message):
            adapters.load_adapter(model, tmp_path / name, "second")
        assert adapters.adapter_names(model) == ["default"]
        with adapters.active(model, ["default"]):  # still usable
            pass


def test_copies_are_frozen_and_independent(model, inputs):
    adapters.copy_adapter(model, "default", "previous")
    adapters.set_active(model, ["default"])
    kept = state(model, "previous")
    assert equal(kept, state(model, "default"))
    filled(model, "default", 7)
    assert equal(state(model, "previous"), kept)
    adapters.copy_adapter(model, "default", "previous")  # over the old copy
    assert equal(state(model, "previous"), state(model, "default"))


def test_writing_updates_is_exact(model, config):
    deltas = adapters.adapter_deltas(model, "default")
    doubled = {name: delta.with_sigma(delta.sigma * 2) for name, delta in deltas.items()}
    adapters.write_update(model, "default", doubled)
    for name, delta in adapters.adapter_deltas(model, "default").items():
        assert torch.allclose(delta.dense(), 2 * deltas[name].dense(), atol=1e-6)
    adapters.write_deltas(model, "wide", deltas, rank=9)
    assert model.peft_config["wide"].r == 9
    for name, delta in adapters.adapter_deltas(model, "wide").items():
        assert torch.allclose(delta.dense(), deltas[name].dense(), atol=1e-6)


def test_written_adapters_keep_the_choice_of_layers(base, config):
    config.target_modules, config.layers_to_transform, config.exclude_modules = ["q_proj", "v_proj"], [1], None
    model = adapters.add_adapter(base, "default", config, seed=1)
    assert len(list(adapters.lora_layers(model))) == 2
    adapters.write_deltas(model, "default", adapters.adapter_deltas(model, "default"), rank=6)
    assert len(list(adapters.lora_layers(model))) == 2


@pytest.mark.parametrize("trained", [True, False])
def test_written_adapters_are_as_trainable_as_before(model, trained):
    """A method that consolidates may come before one that takes gradients at the end of a task."""
    adapters.set_trainable(model, ["default"] if trained else [])
    adapters.write_deltas(model, "default", adapters.adapter_deltas(model, "default"), rank=6)
    assert {p.requires_grad for p in adapters.adapter_parameters(model, "default").values()} == {trained}


@pytest.mark.parametrize("task", ["plates", "v1.0", "keys", "lora_A", "default", "a-b_c.d"])
def test_every_task_name_makes_an_adapter(model, config, task):
    name = adapters.task_adapter(task)
    adapters.add_adapter(model, name, config, seed=1)
    with adapters.active(model, [name]):
        pass
    assert adapters.task_of_adapter(name) == task
    assert adapters.task_of_adapter("default") is None


def test_base_weights_are_never_written(fresh, config, inputs):
    base, _ = fresh()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = filled(adapters.add_adapter(base, "default", config, seed=1), "default", 1)
    adapters.add_adapter(model, "task", config, seed=2)
    with adapters.weighted(model, {"default": 0.3, "task": 1.0}):
        logits(model, inputs)
    adapters.write_deltas(model, "default", adapters.adapter_deltas(model, "default"), rank=8)
    adapters.remove_adapter(model, "task")
    after = {
        name.removeprefix("base_model.model.").replace(".base_layer.", "."): tensor
        for name, tensor in model.state_dict().items()
        if ".lora_" not in name
    }
    assert equal(before, after)
