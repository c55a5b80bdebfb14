"""The memory estimate: what can be counted is exact, what is simulated behaves as the real thing does."""

from __future__ import annotations

import pytest
import torch

from mllm_cl.methods import build_method
from mllm_cl.models import adapters
from mllm_cl.models.load import empty_model, load_model
from mllm_cl.recipe import MethodSpec, load_recipe
from mllm_cl.training.learner import Learner
from mllm_cl.training.memory import _Peak, estimate_memory, longest, readable

LORA = {"r": 4, "lora_alpha": 8}


@pytest.fixture
def estimate(fixture_folder, small_stream):
    """Returns a function that estimates a recipe on the fixture model."""

    def make(*methods: str, model=None, on_cpu=False, **training):
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
        return estimate_memory(recipe, built, task.train, task.test, on_cpu=on_cpu)

    return make


def test_what_can_be_counted_is_exact(estimate, fixture_folder, fresh):
    found = estimate("finetune")
    model, processor = fresh()
    assert found.weights == sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    from peft import LoraConfig

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
    assert estimate("inquiry_regularization").activations > plain.activations


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


def test_the_longest_rows_are_taken(loaded, make_row):
    rows = [make_row(str(i), "What? " * i, "x", None if i % 2 else (1, 2, 3)) for i in range(6)]
    assert [row["id"] for row in longest(loaded[1], rows, 2)] == ["4", "2"]


def test_bytes_are_readable():
    assert [readable(count) for count in (2**20, 300 * 2**20, 3 * 2**30)] == ["1.0 MiB", "300 MiB", "3.00 GiB"]
