"""What does not work is refused before any weight is loaded, with what to do instead."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import ClassVar

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from mllm_cl.errors import MethodError, ModelError, RecipeError
from mllm_cl.methods import METHODS, method_class
from mllm_cl.recipe import load_recipe
from mllm_cl.training import capabilities, zero
from mllm_cl.training.arguments import training_arguments
from mllm_cl.training.capabilities import build_methods
from mllm_cl.training.launchers import (
    LAUNCHERS,
    QUANTIZATIONS,
    SHARDED,
    check_layers,
    hidden_from_accelerate,
    launcher,
    refusal,
)

RECIPES = Path(__file__).resolve().parents[2] / "recipes" / "accelerate"
FILES = {"single": "single", "ddp": "ddp", "zero1": "zero1", "zero2": "zero2", "zero3": "zero3", "fsdp2": "fsdp2"}


def recipe(method: str = "finetune", **settings):
    content = {
        "name": "x",
        "output_dir": "x",
        "model": {"name_or_path": "there/is-no-such-model", **settings.pop("model", {})},
        "stream": {"name": "quickstart"},
        "methods": [method],
        **settings,
    }
    return load_recipe(content)


def start(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Sets the environment that the launcher sets."""
    environment = {
        "single": {},
        "ddp": {"WORLD_SIZE": "2"},
        "fsdp2": {"WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
    }.get(name) or {"WORLD_SIZE": "2", "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": name[-1]}
    for key, value in {} if name == "single" else environment.items():
        monkeypatch.setenv(key, value)


@pytest.mark.parametrize("name", LAUNCHERS)
def test_launchers_are_recognised(monkeypatch, name):
    start(monkeypatch, name)
    assert launcher() == name


@pytest.mark.parametrize("name", LAUNCHERS)
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_every_cell_is_allowed_or_refused_for_every_method(monkeypatch, name, quantization):
    """Nothing is loaded: the model does not exist."""
    start(monkeypatch, name)
    monkeypatch.setattr(capabilities, "check_bitsandbytes", lambda kind: None)
    monkeypatch.setattr(capabilities, "check_training", lambda section: None)  # would look for the other process
    monkeypatch.setattr(zero, "find_spec", lambda name: object())
    for method in METHODS:
        asked = recipe(method, model={"quantization": quantization})
        why = refusal(name, quantization)
        if why is None and name in method_class(method).supports:
            build_methods(asked)
            continue
        if why is None:
            with pytest.raises(MethodError, match=f"{method} does not work under {name}"):
                build_methods(asked)
            continue
        with pytest.raises(RecipeError) as caught:
            build_methods(asked)
        assert why in str(caught.value)
        assert name in str(caught.value)
        assert "docs/compatibility.md" in str(caught.value)


def test_deepspeed_and_fsdp_in_the_recipe_are_seen(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    for given, expected in (
        ({"deepspeed": str(path)}, "zero3"),
        ({"deepspeed": {"zero_optimization": {"stage": 2}}}, "zero2"),
        ({"deepspeed": {}} | {"fsdp": True}, "fsdp2"),
        ({"deepspeed": {"train_batch_size": 4}}, "zero1"),
    ):
        assert launcher(given) == expected
    with pytest.raises(RecipeError, match="cannot be read"):
        launcher({"deepspeed": str(tmp_path / "none.json")})


@pytest.mark.parametrize(("name", "switch"), [("fsdp2", "ACCELERATE_USE_FSDP"), ("zero2", "ACCELERATE_USE_DEEPSPEED")])
def test_shards_need_a_second_process(monkeypatch, name, switch):
    monkeypatch.setenv(switch, "true")
    with pytest.raises(RecipeError, match=f"{name} was asked for, and there is one process"):
        build_methods(recipe())


def test_what_is_sharded_is_not_for_the_recipe_to_say(monkeypatch):
    start(monkeypatch, "fsdp2")
    with pytest.raises(RecipeError, match=r"training\.fsdp_config"):
        build_methods(recipe(training={"fsdp": True, "fsdp_config": {"fsdp_version": 2}}))


@pytest.mark.parametrize(("name", "switch"), [("fsdp2", "ACCELERATE_USE_FSDP"), ("zero2", "ACCELERATE_USE_DEEPSPEED")])
def test_accelerate_does_not_shard_a_second_time(monkeypatch, name, switch):
    start(monkeypatch, name)
    with hidden_from_accelerate():
        assert switch not in os.environ
    assert launcher() == name


def test_the_trainer_does_not_hear_of_shards():
    assert not training_arguments({"fsdp": True}, RECIPES, 0).fsdp
    assert not training_arguments({"deepspeed": {"zero_optimization": {"stage": 2}}}, RECIPES, 0).deepspeed


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3"])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"training": {"save_steps": 10}}, "writes no checkpoints within a task"),
        ({"training": {"save_strategy": "epoch"}}, "writes no checkpoints within a task"),
        ({"training": {"fp16": True}}, r"training\.fp16: does not work under"),
        ({"model": {"train_vision": True}}, r"model\.train_vision: does not work under"),
        ({"model": {"train_bridge": True}}, r"model\.train_bridge: does not work under"),
        ({"training": {"auto_find_batch_size": True}}, "auto_find_batch_size does not work with"),
    ],
)
def test_what_does_not_go_with_an_engine_is_refused(monkeypatch, name, settings, message):
    start(monkeypatch, name)
    monkeypatch.setattr(zero, "find_spec", lambda name: object())
    with pytest.raises(RecipeError, match=message) as caught:
        build_methods(recipe(**settings))
    assert name in str(caught.value)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"optimizer": {"type": "AdamW"}}, "optimizer"),
        ({"gradient_clipping": 0.5}, "gradient_clipping"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, "offload_optimizer"),
    ],
)
def test_what_deepspeeds_configuration_may_not_say(monkeypatch, config, named):
    monkeypatch.setenv("WORLD_SIZE", "2")
    given = {"zero_optimization": {"stage": 2}} | config
    with pytest.raises(RecipeError, match=f"{named}: not supported"):
        build_methods(recipe(training={"deepspeed": given}))


def test_offloading_by_accelerate_is_refused(monkeypatch):
    start(monkeypatch, "zero2")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "cpu")
    with pytest.raises(RecipeError, match="OFFLOAD_OPTIMIZER_DEVICE=cpu: not supported"):
        build_methods(recipe())


def test_the_engine_gets_the_stage_and_the_sizes(monkeypatch):
    config = {"train_batch_size": "auto", "zero_optimization": {"stage": 1, "reduce_bucket_size": 1000}}
    assert zero.zero_section({"deepspeed": config}, "zero1") == {"stage": 1, "reduce_bucket_size": 1000}
    start(monkeypatch, "zero2")
    assert zero.zero_section({}, "zero2") == {"stage": 2}
    config["zero_optimization"] = {"stage": 3, "stage3_param_persistence_threshold": 10}
    section = zero.zero_section({"deepspeed": config}, "zero3")
    assert section.items() > config["zero_optimization"].items()
    assert section["stage3_prefetch_bucket_size"] == 0  # processes need not run the same modules
    with pytest.raises(RecipeError, match=r"allgather_bucket_size: not supported"):
        zero.zero_section({"deepspeed": {"zero_optimization": {"stage": 3, "allgather_bucket_size": 10}}}, "zero3")


def test_missing_deepspeed_is_refused_before_loading(monkeypatch):
    start(monkeypatch, "zero2")
    monkeypatch.setattr(zero, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match="DeepSpeed is not installed"):
        build_methods(recipe())


def test_layers_that_rows_without_images_skip_are_refused():
    class Config:
        cross_attention_layers: ClassVar[list[int]] = [1]

        def get_text_config(self):
            return self

    check_layers(Config(), "ddp")
    for name in SHARDED:
        with pytest.raises(ModelError, match=f"{name}: this model skips"):
            check_layers(Config(), name)


def test_missing_bitsandbytes_is_refused_before_loading(monkeypatch):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else real(name, *a)
    )
    with pytest.raises(ModelError, match="needs bitsandbytes"):
        build_methods(recipe(model={"quantization": "8bit"}))


@pytest.mark.parametrize("name", FILES)
def test_accelerate_reads_the_shipped_configurations(name, monkeypatch):
    """The file is one that `accelerate launch` understands, and what it starts is recognised."""
    content = yaml.safe_load((RECIPES / f"{FILES[name]}.yaml").read_text(encoding="utf-8"))
    arguments = launch_command_parser().parse_args(
        ["--config_file", str(RECIPES / f"{name}.yaml"), "recipes/train.py", "r"]
    )
    from accelerate.commands.config import load_config_from_file

    config = load_config_from_file(str(RECIPES / f"{name}.yaml"))
    assert config.num_processes == content["num_processes"] == (1 if name == "single" else 2)
    for key, value in vars(config).items():
        if hasattr(arguments, key) and not isinstance(value, dict):
            setattr(arguments, key, value)
    if name.startswith("zero"):
        for key, value in config.deepspeed_config.items():
            setattr(arguments, key, value)
        arguments.deepspeed_fields_from_accelerate_config = ",".join(config.deepspeed_config)
        environment = prepare_deepspeed_cmd_env(arguments)[1]
    elif name == "fsdp2":
        arguments.use_fsdp, arguments.dynamo_backend = True, "no"
        for key, value in config.fsdp_config.items():
            setattr(arguments, key, value)
        environment = prepare_multi_gpu_env(arguments)
    else:
        return
    for key in [key for key in environment if key.startswith(("ACCELERATE_", "FSDP_"))]:
        monkeypatch.setenv(key, environment[key])
    assert launcher() == name


@pytest.mark.parametrize("name", ["zero1", "fsdp2"])
def test_a_budget_of_flops_is_for_whole_weights(monkeypatch, name):
    asked = recipe(budget={"kind": "flops", "value": 10**9})
    build_methods(asked)
    start(monkeypatch, name)
    with pytest.raises(RecipeError, match=f"flops does not work with {name}"):
        build_methods(asked)
