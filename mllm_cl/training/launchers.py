"""How this process was started, and what works under which launcher: the rules behind docs/compatibility.md."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mllm_cl.errors import ModelError, RecipeError
from mllm_cl.parse import parse_json

LAUNCHERS = ("single", "ddp", "zero1", "zero2", "zero3", "fsdp2")
QUANTIZATIONS = (None, "4bit", "8bit")

# Why a launcher is refused on a quantised base. A test holds the words of docs/compatibility.md against them.
QUANTIZED: dict[str, str] = {
    "zero1": "copies of quantised weights on several processes have not been tested",
    "zero2": "copies of quantised weights on several processes have not been tested",
    "zero3": "weights in 4 or 8 bits are packed and cannot be cut into shards",
    "fsdp2": "weights in 4 or 8 bits are packed and cannot be cut into shards",
}
SHARDED = ("zero1", "zero2", "zero3", "fsdp2")
"""Launchers that lay something in shards, and so need a second process."""
_FSDP_SWITCH = "ACCELERATE_USE_FSDP"
_DEEPSPEED_SWITCH = "ACCELERATE_USE_DEEPSPEED"


def launcher(training: Mapping[str, Any] | None = None) -> str:
    """Returns one of `LAUNCHERS`, from the environment that accelerate and torchrun set and the `training` section."""
    section = training or {}
    if section.get("deepspeed") or os.environ.get(_DEEPSPEED_SWITCH, "").lower() == "true":
        return f"zero{_zero_stage(section)}"
    if section.get("fsdp") or os.environ.get(_FSDP_SWITCH, "").lower() == "true":
        return "fsdp2"
    return "ddp" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else "single"


@contextlib.contextmanager
def hidden_from_accelerate() -> Iterator[None]:
    """Within the context accelerate does not see that FSDP or DeepSpeed was asked for: it would shard the adapters too, or keep
    one engine's settings for all tasks, and undo nothing; `models/sharding.py` and `zero.py` do what is needed here."""
    switches = (_FSDP_SWITCH, _DEEPSPEED_SWITCH)
    asked = {name: os.environ.pop(name) for name in switches if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(asked)


def deepspeed_config(training: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Returns the DeepSpeed configuration: a mapping or a file in the recipe, or the file that accelerate was given.

    Raises:
        RecipeError: the file is not there, or is no JSON.
    """
    deepspeed = training.get("deepspeed")
    if isinstance(deepspeed, Mapping):
        return deepspeed
    path = deepspeed if isinstance(deepspeed, str) else os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    if path in (None, "none"):
        return None
    try:
        return parse_json(Path(str(path)).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(f"training.deepspeed: {path} cannot be read ({error}).", expected="a JSON file") from error


def _zero_stage(training: Mapping[str, Any]) -> int:
    """The stage that a DeepSpeed configuration, or accelerate's environment, asks for; 0 counts as 1."""
    config = deepspeed_config(training)
    stage: Any = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", 2)
    if config is not None:
        stage = config.get("zero_optimization", {}).get("stage", 0)
    return max(1, int(stage)) if str(stage).isdigit() else 2


def refusal(started: str, quantization: str | None) -> str | None:
    """Returns why this combination is refused, `None` if it works; the same for every method."""
    return QUANTIZED.get(started) if quantization is not None else None


def check_launcher(started: str, quantization: str | None) -> None:
    """Refuses a launcher before any weight is loaded.

    Raises:
        RecipeError: it does not work here; the message says what does.
    """
    if started in SHARDED and int(os.environ.get("WORLD_SIZE", "1")) < 2:
        raise RecipeError(
            f"launcher: {started} was asked for, and there is one process.",
            expected="at least two: the shards lie on different processes",
            fix="start more (torchrun --nproc_per_node 2), or leave it away.",
        )
    why = refusal(started, quantization)
    if why is None:
        return
    raise RecipeError(
        f"launcher: {started} with model.quantization: {quantization} does not work ({why}).",
        expected="single or ddp when model.quantization is set",
        fix="start with ddp, or leave model.quantization away. See docs/compatibility.md.",
    )


def check_layers(config: Any, started: str) -> None:
    """Refuses a model, by its configuration, whose layers are not run equally on all processes.

    FSDP2 gathers each layer when it is run, DeepSpeed adds gradients up in the order of the layers.

    Raises:
        ModelError: it is one.
    """
    if started in SHARDED and getattr(config.get_text_config(), "cross_attention_layers", None):
        raise ModelError(
            f"{started}: this model skips its cross-attention layers for rows without images.",
            expected="a model whose layers are all run for every batch, on all processes",
            fix="start with ddp.",
        )
