"""Finding decoder, vision tower and bridge, and the linear layers that get LoRA."""

from __future__ import annotations

import re

import pytest
import torch
import transformers as t
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from mllm_cl.errors import ModelError
from mllm_cl.models import parts
from mllm_cl.models.load import load_model
from mllm_cl.models.quantize import quantization_config

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


SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def empty(config) -> PreTrainedModel:
    with torch.device("meta"):
        return t.AutoModelForImageTextToText.from_config(config)


def test_a_router_of_experts_is_no_linear_layer():
    """It inherits from one, but returns scores and logits: an adapter around it would break the forward pass."""
    text = {**SMALL, "num_key_value_heads": 1, "head_dim": 8, "intermediate_size_mlp": 32, "num_local_experts": 2}
    model = empty(t.Llama4Config(text_config=text, vision_config={**SMALL, "vision_output_dim": 16}))
    routers = [name for name, module in model.named_modules() if name.endswith(".router")]
    assert routers
    assert isinstance(model.get_submodule(routers[0]), nn.Linear)
    assert not hit(model, parts.lora_targets(model)) & set(routers)
    assert not set(quantization_config(model, "4bit", torch.float32).llm_int8_skip_modules or ()).isdisjoint(routers)


def test_the_vision_tower_inside_a_decoder_is_not_language():
    vision = {**SMALL, "embed_dim": 16, "image_size": 14, "patch_size": 7}
    model = empty(t.IdeficsConfig(**SMALL, vision_config=vision, use_resampler=False, cross_layer_interval=1))
    tower = parts.vision_name(model) or ""
    assert tower.startswith(f"{parts.decoder_name(model)}.")
    language = hit(model, parts.lora_targets(model))
    assert language
    assert language.isdisjoint(parts.linear_names(model, tower))
    assert hit(model, parts.lora_targets(model, vision=True)) == language | set(parts.linear_names(model, tower))
    with pytest.raises(ModelError, match="no bridge was found"):  # the head lies beside the decoder, but is no bridge
        parts.lora_targets(model, bridge=True)


def test_the_bridge_lies_beside_a_decoder_that_is_deeper_than_the_tower():
    text = {"model_type": "opt", **SMALL, "ffn_dim": 32, "word_embed_proj_dim": 16}
    config = t.InstructBlipConfig(text_config=text, vision_config=SMALL, qformer_config=SMALL)
    model = empty(config)
    assert "." in parts.decoder_name(model)
    assert parts.bridge_names(model) == ["qformer", "language_projection"]


def test_other_towers_are_no_bridge():
    text = {**SMALL, "num_key_value_heads": 1}
    tower = {**SMALL, "image_size": 14, "patch_size": 7}
    config = t.VideoLlavaConfig(text_config=t.LlamaConfig(**text), vision_config=t.CLIPVisionConfig(**tower))
    assert parts.bridge_names(empty(config)) == ["model.multi_modal_projector"]
