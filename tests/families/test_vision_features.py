"""Image features that are kept change no answer, in families that give one tensor per image and in those that do not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from family_zoo import build_family
from peft import LoraConfig
from PIL import Image

from mllm_cl.data.rows import user_message
from mllm_cl.evaluation import engine
from mllm_cl.evaluation.engine import GenerationSettings, generate
from mllm_cl.evaluation.vision_features import VisionFeatures
from mllm_cl.models import adapters
from mllm_cl.models.parts import lora_targets

QUESTIONS = ("What is this?", "Is this red?", "Name it.")
PICTURES = {"red": (28, 28, (220, 20, 20)), "blue": (28, 28, (20, 20, 220)), "wide": (56, 28, (9, 99, 9))}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder, made = tmp_path_factory.mktemp("pictures"), []
    for name, (width, height, colour) in PICTURES.items():
        Image.new("RGB", (width, height), colour).save(folder / f"{name}.png")
        made += [
            {"id": f"{name}/{i}", "messages": [user_message(text, 1)], "images": [str(folder / f"{name}.png")]}
            for i, text in enumerate(QUESTIONS)
        ]
    return made


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[VisionFeatures]:
    """Every store that is made."""
    stores: list[VisionFeatures] = []

    class Noted(VisionFeatures):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            stores.append(self)

    monkeypatch.setattr(engine, "VisionFeatures", Noted)
    return stores


@pytest.mark.parametrize(
    ("family", "kept"),
    [
        ("LLaVA", True),
        ("LLaVA-NeXT", True),
        ("Qwen2-VL", True),
        ("InternVL", True),
        ("Qwen3-VL", False),
        ("Idefics3", False),
    ],
)
def test_answers_are_those_without(
    family: str, kept: bool, rows: list[Any], made: list[VisionFeatures], monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    model, processor = build_family(family, tmp_path)
    settings = GenerationSettings(4, 2)
    answers = generate(model, processor, rows, settings)
    assert made[-1].computed >= len(PICTURES) if kept else not made[-1].computed
    if family in ("LLaVA", "Qwen2-VL"):
        assert made[-1].computed == len(PICTURES)  # once per image, whatever the questions
    assert "get_image_features" not in vars(made[-1].owner)
    monkeypatch.setattr(engine, "image_groups", lambda rows: list(range(len(rows))))
    assert generate(model, processor, rows, settings) == answers
    assert len(made) == 1


def test_nothing_is_kept_where_an_adapter_lies_on_the_vision_side(
    rows: list[Any], made: list[VisionFeatures], tmp_path: Any
) -> None:
    model, processor = build_family("LLaVA", tmp_path)
    config = {
        part: LoraConfig(r=2, target_modules=lora_targets(model, **{part: True})) for part in ("bridge", "vision")
    }
    assert VisionFeatures(model).possible
    touched = adapters.add_adapter(model, "one", config["bridge"], 0)
    adapters.set_active(touched, [])  # an adapter that is off now may be routed to for the next row
    assert not VisionFeatures(touched).possible
    generate(touched, processor, rows, GenerationSettings(2, 4))
    assert made[-1].computed == 0


def test_the_bound_holds(rows: list[Any], tmp_path: Any) -> None:
    model, processor = build_family("LLaVA", tmp_path)
    pixels = torch.randn(5, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    size = processor.image_processor.crop_size if hasattr(processor.image_processor, "crop_size") else None
    if size is not None:
        pixels = torch.nn.functional.interpolate(pixels, (size["height"], size["width"]))
    plain = model.model.get_image_features(pixels).pooler_output
    store = VisionFeatures(model, most_bytes=3 * plain[0].nbytes)
    with torch.no_grad(), store.used():
        for _ in range(2):
            found = model.model.get_image_features(pixels).pooler_output
            for one, other in zip(found, plain, strict=True):
                torch.testing.assert_close(one, other)
    assert store.bytes <= store.most_bytes
