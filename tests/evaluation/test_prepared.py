"""Several checkpoints of one model on the same rows: inputs are made once, features come from one pass of the tower."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig
from PIL import Image

from mllm_cl.data import collate
from mllm_cl.evaluation.engine import GenerationSettings, generate, generate_batches, planned
from mllm_cl.evaluation.prepared import Prepared
from mllm_cl.models import adapters
from mllm_cl.models.parts import lora_targets

SETTINGS = GenerationSettings(5, 2)


@pytest.fixture(scope="module")
def rows(make_row, tmp_path_factory):
    folder, made = tmp_path_factory.mktemp("pictures"), []
    for number in range(6):
        path = folder / f"{number // 2}.png"  # two questions on one picture
        Image.new("RGB", (32, 32), (number // 2 * 90, 9, 200 - number // 2 * 80)).save(path)
        made.append({**make_row(f"r{number}", "What is this?" + "?" * number, "x"), "images": [str(path)]})
    return made


@pytest.fixture
def several(fresh):
    """A model with two adapters that answer differently."""
    model, processor = fresh()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.7)
    config = LoraConfig(r=2, target_modules=lora_targets(model))
    for name in ("one", "two"):
        model = adapters.add_adapter(model, name, config, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model, processor


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """References that were decoded."""
    seen: list[Any] = []
    whole = collate.load_image

    def load(reference: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(reference)
        return whole(reference, *args, **kwargs)

    monkeypatch.setattr(collate, "load_image", load)
    return seen


def answers(model, processor, rows, prepared: Prepared) -> list[str]:
    found = {}
    for batch, texts in generate_batches(model, processor, rows, prepared.batches, SETTINGS, prepared=prepared):
        found |= dict(zip(batch, texts))
    return [found[index] for index in range(len(rows))]


def test_every_adapter_answers_as_it_does_alone(several, rows, decoded):
    model, processor = several
    expected = []
    for names in (["one"], ["two"], []):
        adapters.set_active(model, names)
        expected.append(generate(model, processor, rows, SETTINGS))
    assert len({tuple(own) for own in expected}) == 3
    decoded.clear()
    prepared = Prepared(model, planned(processor, rows, SETTINGS))
    for names, own in zip((["one"], ["two"], []), expected):
        adapters.set_active(model, names)
        assert answers(model, processor, rows, prepared) == own
    assert len(decoded) == len(rows)  # not once per checkpoint
    assert prepared.features.possible
    assert prepared.features.computed == 3  # pictures, whatever the number of questions and checkpoints


def test_what_does_not_fit_is_prepared_again(several, rows, decoded):
    model, processor = several
    batches = planned(processor, rows, SETTINGS)
    size = sum(
        v.nbytes for v in collate.Collator(processor, for_generation=True)([rows[i] for i in batches[0]]).values()
    )
    decoded.clear()
    prepared = Prepared(model, batches, most_bytes=size)
    first = answers(model, processor, rows, prepared)
    assert prepared.bytes <= size
    assert answers(model, processor, rows, prepared) == first
    assert len(decoded) == len(rows) + len(rows) - len(batches[0])


def test_features_are_not_shared_when_an_adapter_lies_on_the_tower(fresh, rows):
    model, processor = fresh()
    tower = [name for name, _ in model.named_modules() if "vision" in name and name.endswith("q_proj")]
    model = adapters.add_adapter(model, "one", LoraConfig(r=2, target_modules=tower), seed=0)
    prepared = Prepared(model, planned(processor, rows, SETTINGS))
    assert not prepared.features.possible
    assert answers(model, processor, rows, prepared) == generate(model, processor, rows, SETTINGS)
    assert prepared.features.computed == 0
