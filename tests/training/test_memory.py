"""The memory estimate: what can be counted is exact, what is simulated behaves as the real thing does."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForImageTextToText, Llama4Config, Qwen3VLMoeConfig

from mllm_cl.errors import ModelError
from mllm_cl.methods import build_method
from mllm_cl.models import adapters
from mllm_cl.models.load import empty_model, load_model
from mllm_cl.models.parts import lora_targets
from mllm_cl.recipe import MethodSpec, load_recipe
from mllm_cl.training.learner import Learner
from mllm_cl.training.memory import _make_fake, _Peak, _training_peak, estimate_memory, longest, readable

LORA = {"r": 4, "lora_alpha": 8}


@pytest.fixture
def estimate(fixture_folder, small_stream):
    """Returns a function that estimates a recipe on the fixture model."""

    def make(*methods: str, model=None, on_cpu=False, earlier=0, **training):
        recipe = load_recipe(
            {
                "name": "x",
                "output_dir": "x",
                "model": {"name_or_path": str(fixture_folder), "lora": LORA, **(model or {})},
                "stream": {"name": "quickstart"},
                "methods": list(methods),
                "training": {"per_device_train_batch_size": 8} | training,
            }
        )
        built = [build_method(MethodSpec(name=name)) for name in methods]
        task = small_stream(1)[0]
        return estimate_memory(recipe, built, task.train, task.test, earlier=earlier, on_cpu=on_cpu)

    return make


def test_what_can_be_counted_is_exact(estimate, fixture_folder, fresh):
    found = estimate("finetune")
    model, processor = fresh()
    assert found.weights == sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    learner = Learner(model, processor, [], LoraConfig(**LORA))
    own = sum(p.numel() * 4 for p in adapters.adapter_parameters(learner.model, "default").values())
    assert (found.adapters, found.gradients, found.optimizer) == (own, own, 2 * own)
    assert found.rows == 8
    assert found.length >= 16  # image tokens count
    assert found.total >= found.weights + found.adapters + found.gradients + found.optimizer + found.activations


def test_options_change_what_they_should(estimate):
    plain = estimate("finetune")
    larger = estimate("finetune", per_device_train_batch_size=16)
    assert 1.7 < larger.activations / plain.activations < 2.2
    assert estimate("finetune", activation_checkpointing=True).activations < plain.activations
    assert estimate("finetune", optim="sgd").optimizer == 0
    half = estimate("finetune", model={"dtype": "bfloat16"})
    assert 0.5 <= half.weights / plain.weights < 0.52  # buffers of positions stay what they are
    four = estimate("finetune", model={"quantization": "4bit"})
    assert four.weights < plain.weights
    assert plain.allocator == 0
    on_cpu = estimate("finetune", on_cpu=True)
    assert on_cpu.allocator == on_cpu.activations == plain.activations
    assert on_cpu.total == plain.total + plain.activations  # the step is larger than the evaluation here
    assert estimate("lwf").methods == plain.adapters  # a copy of the previous stage
    assert estimate("spectral_consolidation").adapters == 5 * plain.adapters  # consolidated at 4 x r, and the fresh one


def test_rows_beside_the_tasks_are_in_a_step(estimate):
    """Activations grow with the rows of a step: by half at the first task, by a half more for each earlier task."""
    plain = estimate("finetune").activations
    at = [estimate("inquiry_regularization", earlier=earlier).activations for earlier in (0, 1, 5)]
    assert at == pytest.approx([1.5 * plain, 2 * plain, 4 * plain], rel=0.1)
    assert estimate("derpp").activations == plain  # nothing to replay yet
    assert estimate("derpp", earlier=5).activations == pytest.approx(1.5 * plain, rel=0.1)


def test_nothing_is_loaded(fixture_folder):
    section = load_recipe(
        {
            "name": "x",
            "output_dir": "x",
            "model": {"name_or_path": str(fixture_folder)},
            "stream": {"name": "quickstart"},
        }
    ).model
    empty, (model, _) = empty_model(section), load_model(str(fixture_folder))
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert {n: p.shape for n, p in empty.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}


def test_the_peak_is_what_lives_at_once():
    with _Peak() as peak:
        one = torch.zeros(1000)  # 4000
        two = one + 1  # 8000
        del one
        three = two * 2  # 4000 freed, 4000 new
        view = three.view(10, 100)  # nothing
        view.add_(1)
        del two
        torch.zeros(500)  # 4000 + 2000
    assert peak.largest == 8000
    assert peak.alive == 4000
    assert three.numel() == 1000


TEXT = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 300, "pad_token_id": 0,
}  # fmt: skip
EXPERTS = {
    "their own rule for groups": Qwen3VLMoeConfig(
        text_config={
            **TEXT, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4},
        },
        vision_config={"depth": 1, "hidden_size": 16, "num_heads": 2, "out_hidden_size": 16},
    ),
    "a decoder with its head": Llama4Config(
        text_config={**TEXT, "intermediate_size_mlp": 32, "num_local_experts": 2},
        vision_config={"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vision_output_dim": 16},
    ),
}  # fmt: skip


@pytest.mark.parametrize("config", EXPERTS.values(), ids=EXPERTS)
def test_models_of_experts_are_simulated(config):
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
        adapted = get_peft_model(model, LoraConfig(r=2, target_modules=lora_targets(model)))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        _make_fake(adapted, mode)
        one, four = (_training_peak(adapted, rows, 16, {}) for rows in (1, 4))
    assert 2 < four / one < 5


def test_towers_that_are_trained_are_in_the_step(estimate, monkeypatch):
    plain, trained = estimate("finetune"), estimate("finetune", model={"train_vision": True, "train_bridge": True})
    assert trained.activations > plain.activations
    assert not trained.towers_left_out

    def depends_on_values(_, batch):
        if batch:
            raise RuntimeError("nonzero")
        return []

    monkeypatch.setattr("mllm_cl.training.memory._image_features", depends_on_values)
    assert estimate("finetune", model={"train_vision": True}).towers_left_out


def test_a_model_that_cannot_be_simulated_is_named(estimate, monkeypatch):
    def fails(*_):
        raise RuntimeError("aten.nonzero.default\nmore")

    monkeypatch.setattr("mllm_cl.training.memory._training_peak", fails)
    with pytest.raises(ModelError, match=r"cannot be estimated.*\(RuntimeError: aten.nonzero.default\)"):
        estimate("finetune")


def test_the_longest_rows_are_taken(loaded, make_row):
    rows = [make_row(str(i), "What? " * i, "x", None if i % 2 else (1, 2, 3)) for i in range(6)]
    assert [row["id"] for row in longest(loaded[1], rows, 2)] == ["4", "2"]
    rows[3] = {**rows[3], "companions": {"inquiry": [rows[4], rows[2]]}}  # passed in the same step
    assert [row["id"] for row in longest(loaded[1], rows, 2)] == ["3", "4"]


def test_bytes_are_readable():
    assert [readable(count) for count in (2**20, 300 * 2**20, 3 * 2**30)] == ["1.0 MiB", "300 MiB", "3.00 GiB"]
