"""QLoRA on a CPU: only the language part is quantised, nothing is repacked, and whole weights can be read."""

from __future__ import annotations

import copy
import importlib.util
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel

from mllm_cl.data.collate import Collator
from mllm_cl.errors import ModelError
from mllm_cl.evaluation.engine import GenerationSettings, generate
from mllm_cl.methods.inquiry_regularization import InquiryRegularization
from mllm_cl.methods.spectral_consolidation import SpectralConsolidation
from mllm_cl.models import adapters, parts, quantize
from mllm_cl.models.gather import full_tensor, full_weight
from mllm_cl.models.load import base_fingerprint, load_model
from mllm_cl.training.learner import Learner

pytestmark = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")


@pytest.fixture(scope="module", params=["4bit", "8bit"])
def quantised(request, fixture_folder):
    return load_model(str(fixture_folder), dtype="float32", quantization=request.param)


def test_the_language_part_alone_is_quantised(quantised, loaded):
    model, _ = quantised
    assert quantize.quantised_names(model) == parts.linear_names(loaded[0], parts.decoder_name(loaded[0]))
    for name, module in loaded[0].named_modules():
        if isinstance(module, torch.nn.Linear) and name not in quantize.quantised_names(model):
            assert torch.equal(module.weight, model.get_submodule(name).weight), name


def test_whole_weights_are_close_to_the_original(quantised, loaded):
    bits = 4 if getattr(quantised[0], "is_loaded_in_4bit", False) else 8
    for name in quantize.quantised_names(quantised[0]):
        original, read = loaded[0].get_submodule(name).weight, full_weight(quantised[0].get_submodule(name))
        assert read.shape == original.shape
        error = float((read - original).norm() / original.norm())
        misread = bits == 4 and quantize.is_misread(quantised[0].get_submodule(name))
        assert 0 < error < (0.5 if misread else {4: 0.12, 8: 0.02}[bits])
    norm = next(module for module in quantised[0].modules() if "RMSNorm" in type(module).__name__)
    assert torch.equal(full_tensor(norm.weight), norm.weight)


def test_whole_weights_are_what_the_layers_multiply_with(quantised):
    if not getattr(quantised[0], "is_loaded_in_4bit", False):
        pytest.skip("layers in 8 bits round their inputs as well")
    for name in quantize.quantised_names(quantised[0]):
        module: Any = quantised[0].get_submodule(name)
        with torch.no_grad():
            applied = module(torch.eye(module.in_features)).T
        torch.testing.assert_close(full_weight(module), applied, atol=1e-5, rtol=1e-4)


def test_layers_that_the_processor_misreads_are_warned_about(quantised, caplog, monkeypatch):
    monkeypatch.setattr(quantize, "is_misread", lambda module: module.in_features == 32)
    with caplog.at_level("WARNING", logger=quantize.logger.name):
        quantize.finish_loading(quantised[0])
    assert "answers worse here" in caplog.text


def test_two_tasks_with_llava_c(quantised, small_stream, train_task, tmp_path):
    model, processor = copy.deepcopy(quantised[0]), quantised[1]
    before = base_fingerprint(model)
    methods = [SpectralConsolidation(), InquiryRegularization(ratio=0.3)]
    learner = Learner(model, processor, methods, LoraConfig(r=4, lora_alpha=8))
    stream = small_stream(2, rows=16)
    generate(learner.model, processor, list(stream[0].test), GenerationSettings(2))  # evaluation comes before training
    for _ in stream:
        trainer = train_task(learner, stream, num_train_epochs=2)
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert losses[-1] < losses[0]
    assert base_fingerprint(learner.model) == before
    learner.save_adapters(tmp_path)
    plain = PeftModel.from_pretrained(copy.deepcopy(quantised[0]), str(tmp_path)).eval()
    inputs = Collator(processor)(list(stream[0].test))
    with torch.no_grad():
        assert torch.equal(plain(**inputs).logits, learner.model.eval()(**inputs).logits)
    assert any(
        value.any() for name, value in adapters.adapter_state(learner.model, "default").items() if "lora_B" in name
    )


def test_weights_are_never_repacked(fixture_folder, monkeypatch, make_row):
    """As on a processor with AVX512-BF16, where bitsandbytes would repack at the first evaluation."""
    functional = pytest.importorskip("bitsandbytes.functional")
    modules = pytest.importorskip("bitsandbytes.nn.modules")
    monkeypatch.setattr(modules, "has_avx512bf16", lambda: True)
    monkeypatch.setattr(functional, "has_avx512bf16", lambda: True)
    model, processor = load_model(str(fixture_folder), dtype="float32", quantization="4bit")
    with torch.no_grad():
        model(**Collator(processor)([make_row("a", "?", "x")]))
    for name in quantize.quantised_names(model):
        assert not getattr(model.get_submodule(name).weight.quant_state, "packing_format_for_cpu", False)


def test_a_repacked_weight_is_read_as_such():
    functional = pytest.importorskip("bitsandbytes.functional")
    nn = pytest.importorskip("bitsandbytes.nn")
    torch.manual_seed(0)
    layer = nn.Linear4bit(128, 64, bias=False, quant_type="nf4", compress_statistics=False)
    layer.weight.data.normal_()
    layer.to("cpu")
    functional_weight, state = functional.quantize_4bit(torch.randn(64, 128), blocksize=64, quant_type="nf4")
    layer.weight = nn.Params4bit(functional_weight, requires_grad=False, quant_state=state, bnb_quantized=True)
    expected = quantize.dequantised(layer)
    layer.weight.data, layer.weight.quant_state = functional._convert_weight_packed_for_cpu(layer.weight.data, state)
    assert layer.weight.quant_state.packing_format_for_cpu
    wrong = functional.dequantize_4bit(layer.weight.data.reshape(-1, 1), layer.weight.quant_state).float()
    if wrong.shape == expected.shape:
        assert float((wrong - expected).norm() / expected.norm()) > 0.1  # what everybody else reads
    assert torch.allclose(quantize.dequantised(layer), expected, rtol=1e-2, atol=1e-6)  # scales became bfloat16


def test_a_missing_bitsandbytes_is_said_before_loading(monkeypatch, fixture_folder):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None)
    with pytest.raises(ModelError, match="needs bitsandbytes, which is not installed"):
        load_model(str(fixture_folder / "not there"), quantization="4bit")
