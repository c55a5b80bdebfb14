"""What saves memory changes nothing but memory: quantised bases, activation checkpointing, bfloat16."""

from __future__ import annotations

import copy
import importlib.util
import math

import pytest
import torch
from method_options import TINY
from peft import LoraConfig
from transformers import TrainerCallback

from mllm_cl.evaluation.engine import GenerationSettings, generate
from mllm_cl.methods import METHODS, build_method
from mllm_cl.methods.inquiry_regularization import InquiryRegularization
from mllm_cl.methods.spectral_consolidation import SpectralConsolidation
from mllm_cl.models import adapters
from mllm_cl.models.load import base_fingerprint, load_model
from mllm_cl.recipe import MethodSpec
from mllm_cl.training.learner import Learner

PER_COMMIT = ("finetune", "spectral_consolidation", "inquiry_regularization", "task_adapters", "osf")
QUANTISED = [
    *((method, "4bit") for method in METHODS),
    *(pytest.param(method, "8bit", marks=[] if method in PER_COMMIT else [pytest.mark.weekly]) for method in METHODS),
]


@pytest.fixture(scope="module")
def quantised(fixture_folder):
    """Loads the fixture model in 4 or 8 bits, once."""
    made = {}

    def get(kind):
        if kind not in made:
            made[kind] = load_model(str(fixture_folder), dtype="float32", quantization=kind)
        return made[kind]

    return get


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
@pytest.mark.parametrize(("method", "kind"), QUANTISED)
def test_every_method_learns_on_a_quantised_base(method, kind, quantised, small_stream, train_task):
    model, processor = copy.deepcopy(quantised(kind)[0]), quantised(kind)[1]
    before = base_fingerprint(model)
    specification = MethodSpec(name=method, options=TINY.get(method, {}))
    learner = Learner(model, processor, [build_method(specification)], LoraConfig(r=2, lora_alpha=4))
    stream = small_stream(2, rows=4)
    for _ in stream if kind == "4bit" else [stream[0], *[stream[1]] * (method == "joint")]:  # joint learns at the end
        train_task(learner, stream)
    assert base_fingerprint(learner.model) == before
    states = [adapters.adapter_state(learner.model, name) for name in adapters.adapter_names(learner.model)]
    assert all(bool(value.isfinite().all()) for state in states for value in state.values())
    own = [value for name, value in learner.methods[0].state_dict().tensors.items() if name.startswith("vectors/")]
    learnt = own or [
        value for state in states for name, value in state.items() if "lora_B" in name
    ]  # prompts, adapters
    assert any(bool(value.any()) for value in learnt)
    assert all(bool(value.isfinite().all()) for value in own)


class Gradients(TrainerCallback):
    """Keeps the gradient of every optimizer step."""

    def __init__(self) -> None:
        self.steps: list[torch.Tensor] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        self.steps.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).clone())


def llava_c():
    return [SpectralConsolidation(), InquiryRegularization(ratio=0.3)]


def test_activation_checkpointing_gives_the_same_gradients(make_learner, small_stream, train_task):
    results = []
    for section in ({}, {"activation_checkpointing": True}):
        learner, seen = make_learner(*llava_c()), Gradients()
        calls = count_layer_calls(learner)
        for _ in range(2):
            train_task(learner, small_stream(2, rows=16), seen, **section)
        results.append((seen.steps, calls[0]))
    (plain, few), (checkpointed, many) = results
    assert many > few  # layers are run again in the backward pass
    assert len(plain) == len(checkpointed) == 4
    for one, two in zip(plain, checkpointed):
        assert torch.allclose(one, two, rtol=1e-5, atol=1e-7)


def count_layer_calls(learner) -> list[int]:
    calls = [0]
    layer = learner.model.get_base_model().get_decoder().layers[0]
    layer.self_attn.register_forward_pre_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    return calls


def test_bfloat16_trains_and_answers(fixture_folder, small_stream, train_task):
    model, processor = load_model(str(fixture_folder), dtype="bfloat16")
    learner = Learner(model, processor, llava_c(), LoraConfig(r=4, lora_alpha=8))
    before, stream = base_fingerprint(learner.model), small_stream(2, rows=16)
    for _ in stream:
        trainer = train_task(learner, stream, bf16=True, num_train_epochs=3)
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert losses[-1] < losses[0]
        assert all(math.isfinite(loss) for loss in losses)
    assert base_fingerprint(learner.model) == before
    answers = generate(learner.model, processor, list(stream[0].test), GenerationSettings(2))
    assert len(answers) == len(stream[0].test)
