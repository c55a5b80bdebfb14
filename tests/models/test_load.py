"""Loading a model, what is refused, and what identifies base weights."""

from __future__ import annotations

import shutil

import pytest
import torch
from peft import LoraConfig
from transformers import Florence2Config

from mllm_cl.data.collate import Collator
from mllm_cl.errors import ModelError
from mllm_cl.models import adapters, load
from mllm_cl.models.parts import lora_targets


def test_a_folder_is_loaded_ready_to_answer(loaded, fixture_folder):
    model, processor = loaded
    assert not model.training
    assert model.name_or_path == str(fixture_folder)
    assert model.dtype == torch.float32
    assert processor.chat_template


def test_the_built_in_model_needs_no_path():
    assert (load.resolve_model("tiny-llava").replace("\\", "/")).endswith("models/tiny_llava")
    assert load.resolve_model("some/hub-id") == "some/hub-id"


def test_what_cannot_be_loaded_is_explained(tmp_path, fixture_folder):
    with pytest.raises(ModelError, match=r"cannot be loaded") as caught:
        load.load_model(str(tmp_path / "nothing"))
    assert "check `model.name_or_path`" in str(caught.value)
    shutil.copytree(fixture_folder, tmp_path / "torn")
    (tmp_path / "torn" / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load.load_model(str(tmp_path / "torn"))


def test_templates_without_generation_markers_are_fine(tmp_path, fixture_folder, make_row):
    shutil.copytree(fixture_folder, tmp_path / "model")
    template = tmp_path / "model" / "chat_template.jinja"
    text = template.read_text()
    template.write_text(text.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", ""))
    assert template.read_text() != text
    unmarked, marked = (load.load_model(str(folder))[1] for folder in (tmp_path / "model", fixture_folder))
    rows = [make_row("a", "What is this?", "a photo of a cat")]
    assert torch.equal(Collator(unmarked)(rows)["labels"], Collator(marked)(rows)["labels"])


def test_a_model_without_a_chat_template_is_refused(tmp_path, fixture_folder):
    shutil.copytree(fixture_folder, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match="no chat template"):
        load.load_model(str(tmp_path / "model"))
    _, processor = load.load_model(str(tmp_path / "model"), prompt_profile="llava_v1")
    assert processor.chat_template


def test_a_model_with_an_encoder_for_the_question_is_refused(tmp_path):
    """It would train without complaint: the answer would stand in the question, and the labels on both sides."""
    folder, bart = tmp_path / "model", {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1}
    Florence2Config(text_config={"model_type": "bart", **bart}).save_pretrained(folder)
    with pytest.raises(ModelError, match="florence2 has an encoder for the question") as caught:
        load.load_model(str(folder))
    assert "one sequence" in str(caught.value)


def test_the_fingerprint_is_that_of_the_base(fresh):
    model, _ = fresh()
    before = load.base_fingerprint(model)
    adapted = adapters.add_adapter(model, "default", LoraConfig(r=2, target_modules=lora_targets(model)), seed=1)
    assert load.base_fingerprint(model) == before
    assert load.base_fingerprint(adapted) == before
    with torch.no_grad():
        for parameter in adapters.adapter_parameters(adapted, "default").values():
            parameter.add_(1.0)
    assert load.base_fingerprint(adapted) == before


def test_the_fingerprint_survives_another_dtype(loaded, fixture_folder):
    before = load.base_fingerprint(loaded[0])
    reloaded, _ = load.load_model(str(fixture_folder), dtype="bfloat16")
    assert reloaded.dtype == torch.bfloat16
    assert load.base_fingerprint(reloaded) == before


@pytest.mark.parametrize("whole", [2**20, 16])
def test_any_changed_weight_changes_the_fingerprint(fresh, monkeypatch, whole):
    monkeypatch.setattr(load, "_HASHED_WHOLE", whole)
    model, _ = fresh()
    before, weight = load.base_fingerprint(model), model.get_decoder().layers[1].mlp.up_proj.weight
    for position in (0, 777, weight.numel() - 1):
        flat = weight.data.flatten()
        old = flat[position].clone()
        weight.data.view(-1)[position] += 1.0
        assert load.base_fingerprint(model) != before
        weight.data.view(-1)[position] = old
        assert load.base_fingerprint(model) == before
    weight.data = weight.data.flip(0)  # the same values in other places
    assert load.base_fingerprint(model) != before
