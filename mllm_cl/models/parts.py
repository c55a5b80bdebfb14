"""Finds the parts of an image-text model without knowing it by name: decoder, vision tower, bridge.

The decoder and the vision tower come from the accessors of transformers; their dotted names from identity over
`named_modules()`. The bridge is what lies beside them in the same parent and has parameters.
"""

from __future__ import annotations

import re

from torch import nn
from transformers import PreTrainedModel

from mllm_cl.errors import ModelError


def module_name(model: nn.Module, module: nn.Module) -> str:
    """Returns the dotted name of `module` inside `model`.

    Raises:
        ModelError: it is not inside.
    """
    for name, candidate in model.named_modules():
        if candidate is module:
            return name
    raise ModelError(f"{type(model).__name__}: {type(module).__name__} is not one of its modules.")


def decoder_name(model: PreTrainedModel) -> str:
    """Returns the dotted name of the language decoder."""
    return module_name(model, model.get_decoder())


def vision_name(model: PreTrainedModel) -> str | None:
    """Returns the dotted name of the vision tower, `None` for a text-only model."""
    encoder = model.get_encoder(modality="image")
    if encoder is None or encoder is model or encoder is model.get_decoder():
        return None
    return module_name(model, encoder)


def bridge_names(model: PreTrainedModel) -> list[str]:
    """Returns the dotted names of the modules between vision tower and decoder (projector, connector)."""
    decoder, vision = decoder_name(model), vision_name(model)
    if vision is None:
        return []
    parent = decoder.rpartition(".")[0]
    prefix = f"{parent}." if parent else ""
    children = model.get_submodule(parent).named_children()
    names = [f"{prefix}{name}" for name, child in children if next(child.parameters(), None) is not None]
    return [name for name in names if name not in (decoder, vision) and not vision.startswith(f"{name}.")]


def linear_names(model: nn.Module, prefix: str) -> list[str]:
    """Returns the dotted names of all linear layers under `prefix`."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and (name == prefix or name.startswith(f"{prefix}."))
    ]


def lora_targets(model: PreTrainedModel, *, bridge: bool = False, vision: bool = False) -> str:
    """Returns the regular expression (full match, as PEFT wants it) of the linear layers that get LoRA.

    The language part is always in it; `bridge` and `vision` add the other two.

    Raises:
        ModelError: a part that was asked for does not exist.
    """
    names = linear_names(model, decoder_name(model))
    if bridge:
        parts = bridge_names(model)
        if not parts:
            raise ModelError(f"{type(model).__name__}: no bridge was found.", fix="set `model.train_bridge: false`.")
        names += [name for part in parts for name in linear_names(model, part)]
    if vision:
        tower = vision_name(model)
        if tower is None:
            raise ModelError(
                f"{type(model).__name__}: no vision tower was found.", fix="set `model.train_vision: false`."
            )
        names += linear_names(model, tower)
    if not names:
        raise ModelError(f"{type(model).__name__}: its language part has no linear layer to put LoRA on.")
    patterns = sorted({re.sub(r"\\\.\d+(?=\\\.|$)", r"\\.\\d+", re.escape(name)) for name in names})
    pattern = "|".join(patterns)
    if {name for name, _ in model.named_modules() if re.fullmatch(pattern, name)} == set(names):
        return pattern
    return "|".join(sorted(map(re.escape, names)))  # layers of different kinds have the same name: one by one
