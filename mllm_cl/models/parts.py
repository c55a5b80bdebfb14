"""Finds the parts of an image-text model without knowing it by name: decoder, vision tower, bridge.

The decoder and the vision tower come from the accessors of transformers; their dotted names from identity over
`named_modules()`. The bridge is what lies beside them in the innermost module that holds both and has parameters, towers
of other inputs left out; where there is nothing, it is the part of the vision tower whose output is as wide as the decoder.
The language part is what of the decoder is in neither: some decoders hold the vision tower.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn
from torch.func import functional_call
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
    if f"{vision}.".startswith(f"{decoder}."):
        return _inner_bridge(model, vision)
    parent = _common_parent(decoder, vision)
    prefix = f"{parent}." if parent else ""
    beside = [
        f"{prefix}{name}"
        for name, child in model.get_submodule(parent).named_children()
        if next(child.parameters(), None) is not None
        and not any(f"{part}.".startswith(f"{prefix}{name}.") for part in (decoder, vision))
        and not _is_elsewhere(model, child)
    ]
    return beside or _inner_bridge(model, vision)


def _common_parent(one: str, other: str) -> str:
    """The dotted name of the innermost module that holds both, itself neither of them."""
    shared = []
    for first, second in zip(one.split(".")[:-1], other.split(".")[:-1]):
        if first != second:
            break
        shared.append(first)
    return ".".join(shared)


def _is_elsewhere(model: PreTrainedModel, module: nn.Module) -> bool:
    """True for the head, and for towers that read sound, or pixels by themselves (a second eye, a tokenizer of images)."""
    if module is model.get_output_embeddings() or module is model.get_encoder(modality="audio"):
        return True
    return isinstance(module, PreTrainedModel) and module.main_input_name != PreTrainedModel.main_input_name


def _inner_bridge(model: PreTrainedModel, vision: str) -> list[str]:
    """The bridge of a model that keeps it inside the vision tower: what ends with the decoder's width there, the stack of
    layers (its largest part) left out."""
    width = model.config.get_text_config().hidden_size
    children = dict(model.get_submodule(vision).named_children())
    sizes = {name: sum(parameter.numel() for parameter in child.parameters()) for name, child in children.items()}
    stack = max(sizes, key=sizes.__getitem__)
    found = []
    for name, child in children.items():
        linears = [module for module in child.modules() if isinstance(module, nn.Linear)]
        if name != stack and linears and linears[-1].out_features == width:
            found.append(f"{vision}.{name}")
    return found


def part_names(model: PreTrainedModel) -> dict[str, list[str]]:
    """Returns the dotted names of bridge and vision tower, in the order in which they are to be matched: a bridge may lie
    inside the vision tower. What is in neither is the language part."""
    vision = vision_name(model)
    return {"bridge": bridge_names(model), "vision": [] if vision is None else [vision]}


def linear_names(model: nn.Module, prefix: str) -> list[str]:
    """Returns the dotted names of all linear layers under `prefix`."""
    return [
        name
        for name, module in model.named_modules()
        if _is_linear(module) and (name == prefix or name.startswith(f"{prefix}."))
    ]


def _is_linear(module: nn.Module) -> bool:
    """True for what computes as a linear layer; a router of experts may inherit from one and return a choice instead."""
    if not isinstance(module, nn.Linear):
        return False
    if type(module).forward is nn.Linear.forward or not type(module).__module__.startswith("transformers."):
        return True
    empty = {name: torch.empty_like(value, device="meta") for name, value in module.named_parameters()}
    with torch.no_grad():
        answer = functional_call(module, empty, (empty["weight"].new_empty(1, module.in_features),))
    return isinstance(answer, Tensor)


def language_linears(model: PreTrainedModel) -> list[str]:
    """Returns the dotted names of the linear layers of the language part: of the decoder, without what it holds of the
    vision tower and the bridge."""
    others = tuple(f"{name}." for names in part_names(model).values() for name in names)
    return [name for name in linear_names(model, decoder_name(model)) if not f"{name}.".startswith(others)]


def lora_targets(model: PreTrainedModel, *, bridge: bool = False, vision: bool = False) -> str:
    """Returns the regular expression (full match, as PEFT wants it) of the linear layers that get LoRA.

    The language part is always in it; `bridge` and `vision` add the other two.

    Raises:
        ModelError: a part that was asked for does not exist.
    """
    names = language_linears(model)
    if bridge:
        parts = bridge_names(model)
        if not parts:
            raise ModelError(f"{type(model).__name__}: no bridge was found.", fix="set `model.train_bridge: false`.")
        found = [name for part in parts for name in linear_names(model, part)]
        if not found:
            raise ModelError(
                f"{type(model).__name__}: its bridge ({', '.join(parts)}) has no linear layer to put LoRA on.",
                fix="set `model.train_bridge: false`.",
            )
        names += found
    if vision:
        tower = vision_name(model)
        if tower is None:
            raise ModelError(
                f"{type(model).__name__}: no vision tower was found.", fix="set `model.train_vision: false`."
            )
        inner = [f"{part}." for part in bridge_names(model)]
        names += [name for name in linear_names(model, tower) if not name.startswith(tuple(inner)) or name in names]
    if not names:
        raise ModelError(f"{type(model).__name__}: its language part has no linear layer to put LoRA on.")
    patterns = sorted({re.sub(r"\\\.\d+(?=\\\.|$)", r"\\.\\d+", re.escape(name)) for name in names})
    pattern = "|".join(patterns)
    if {name for name, _ in model.named_modules() if re.fullmatch(pattern, name)} == set(names):
        return pattern
    return "|".join(sorted(map(re.escape, names)))  # layers of different kinds have the same name: one by one
