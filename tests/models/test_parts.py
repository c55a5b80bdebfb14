"""Finding decoder, vision tower and bridge, and the linear layers that get LoRA."""

from __future__ import annotations

import re

import pytest
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from mllm_cl.errors import ModelError
from mllm_cl.models import parts
from mllm_cl.models.load import load_model

KINDS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.fixture(scope="module")
def model(loaded):
    return loaded[0]


def hit(model, pattern: str) -> set[str]:
    return {name for name, _ in model.named_modules() if re.fullmatch(pattern, name)}


def test_parts_are_found_by_identity(model):
    assert model.get_submodule(parts.decoder_name(model)) is model.get_decoder()
    vision = parts.vision_name(model)
    assert vision is not None
    assert type(model.get_submodule(vision)).__name__ == "CLIPVisionModel"
    assert [type(model.get_submodule(name)).__name__ for name in parts.bridge_names(model)] == [
        "LlavaMultiModalProjector"
    ]


def test_a_foreign_module_is_refused(model):
    with pytest.raises(ModelError, match="is not one of its modules"):
        parts.module_name(model, nn.Linear(2, 2))


def test_targets_are_exactly_the_linears_of_the_decoder(model):
    names = hit(model, parts.lora_targets(model))
    decoder = parts.decoder_name(model)
    assert len(names) == 2 * len(KINDS)
    assert all(name.startswith(f"{decoder}.layers.") and name.rpartition(".")[2] in KINDS for name in names)
    assert "lm_head" not in names


def test_the_shipped_model_has_28_targets():
    tiny, _ = load_model("tiny-llava")
    assert len(hit(tiny, parts.lora_targets(tiny))) == 28
    adapted = get_peft_model(tiny, LoraConfig(target_modules=parts.lora_targets(tiny)))
    assert sum(isinstance(module, LoraLayer) for module in adapted.modules()) == 28


def test_bridge_and_vision_are_added_on_request(model):
    language = hit(model, parts.lora_targets(model))
    bridge = hit(model, parts.lora_targets(model, bridge=True)) - language
    vision = hit(model, parts.lora_targets(model, vision=True)) - language
    assert bridge == set(parts.linear_names(model, parts.bridge_names(model)[0]))
    assert len(bridge) == 2
    assert vision == set(parts.linear_names(model, parts.vision_name(model) or ""))
    assert vision
    assert hit(model, parts.lora_targets(model, bridge=True, vision=True)) == language | bridge | vision


class _Mixed(nn.Module):
    """A decoder whose layers are of different kinds under the same name."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.ModuleList(
            [nn.ModuleDict({"mix": nn.Linear(2, 2)}), nn.ModuleDict({"mix": nn.Conv1d(2, 2, 1)})]
        )

    def get_decoder(self) -> nn.Module:
        return self.decoder

    def get_encoder(self, modality: str) -> nn.Module:
        return self


def test_layers_of_another_kind_are_not_hit():
    mixed = _Mixed()
    assert hit(mixed, parts.lora_targets(mixed)) == {"decoder.0.mix"}  # type: ignore[arg-type]


def test_missing_parts_are_named():
    mixed = _Mixed()
    with pytest.raises(ModelError, match="no bridge was found"):
        parts.lora_targets(mixed, bridge=True)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="no vision tower was found"):
        parts.lora_targets(mixed, vision=True)  # type: ignore[arg-type]
