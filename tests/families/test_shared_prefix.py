"""Rows that share the keys and values of their image are answered as rows that do not, family by family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from family_zoo import build_family
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import DynamicCache

from mllm_cl.data.collate import Collator
from mllm_cl.data.rows import user_message
from mllm_cl.evaluation import engine, shared_prefix
from mllm_cl.evaluation.engine import GenerationSettings, generate
from mllm_cl.evaluation.shared_prefix import SharedPrefix, split_batch
from mllm_cl.models.parts import lora_targets

QUESTIONS = ("What is this?", "Is this red or is it blue, say?", "Name it.")
SIZES = {"wide": (56, 28), "small": (28, 28), "tall": (28, 56)}
SHARING = (
    *("LLaVA", "LLaVA-NeXT", "LLaVA-OneVision", "Qwen2-VL", "Qwen2.5-VL", "Qwen3-VL", "InternVL", "Idefics3"),
    *("SmolVLM", "Mistral 3", "Pixtral", "Aya Vision"),
)
SETTINGS = GenerationSettings(5, 16)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder, noise, made = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0), []
    for name, (width, height) in SIZES.items():
        Image.fromarray(noise.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / f"{name}.png")
        made += [
            {"id": f"{name}/{i}", "messages": [user_message(text, 1)], "images": [str(folder / f"{name}.png")]}
            for i, text in enumerate(QUESTIONS)
        ]
    return made[:-2]  # the last image has one question only


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[SharedPrefix]:
    """Every one that is made; the small rows here are always worth it."""
    instances: list[SharedPrefix] = []

    class Noted(SharedPrefix):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            instances.append(self)

    monkeypatch.setattr(engine, "SharedPrefix", Noted)
    monkeypatch.setattr(shared_prefix, "_WORTH", 2.0)
    return instances


def alone(model: Any, processor: Any, rows: list[Any]) -> list[str]:
    return [generate(model, processor, [row], SETTINGS)[0] for row in rows]


@pytest.mark.parametrize("family", [*SHARING, "Gemma 3", "Mllama", "PaliGemma"])
def test_answers_are_those_of_single_rows(
    family: str, rows: list[Any], made: list[SharedPrefix], tmp_path: Path
) -> None:
    model, processor = build_family(family, tmp_path)
    answers = generate(model, processor, rows, SETTINGS)
    assert made[-1].rows == (len(rows) if family in SHARING else 0)
    assert answers == alone(model, processor, rows)


def test_each_image_is_passed_once(
    rows: list[Any], made: list[SharedPrefix], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = build_family("LLaVA", tmp_path)
    monkeypatch.setattr(SharedPrefix, "_agrees", lambda self, *args, **options: True)
    passed: list[tuple[int, ...]] = []
    decoder: Any = model.get_decoder()
    whole = decoder.forward

    def noted(*args: Any, **given: Any) -> Any:
        passed.append(tuple(given["inputs_embeds"].shape[:2]))
        return whole(*args, **given)

    monkeypatch.setattr(decoder, "forward", noted)
    generate(model, processor, rows, GenerationSettings(1, 16))
    assert [count for count, _ in passed] == [len(SIZES), len(rows)]
    longest = Collator(processor, for_generation=True)(rows)["input_ids"].shape[1]
    assert sum(count * length for count, length in passed) < len(rows) * longest


def test_a_stray_cache_is_noticed(
    rows: list[Any], made: list[SharedPrefix], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = build_family("LLaVA", tmp_path)
    expected = alone(model, processor, rows)
    select = DynamicCache.batch_select_indices
    monkeypatch.setattr(DynamicCache, "batch_select_indices", lambda self, places: select(self, places.flip(0)))
    assert generate(model, processor, rows, SETTINGS) == expected
    assert made[-1].rows == 0
    assert not shared_prefix._agreed[model]


def test_adapters_share_and_what_reads_whole_rows_does_not(
    rows: list[Any], made: list[SharedPrefix], tmp_path: Path
) -> None:
    base, processor = build_family("LLaVA", tmp_path)
    torch.manual_seed(0)
    model: Any = get_peft_model(base, LoraConfig(r=4, target_modules=lora_targets(base), init_lora_weights=False))
    answers = generate(model, processor, rows, SETTINGS)
    assert made[-1].rows == len(rows)
    assert answers == alone(model, processor, rows)
    handle = model.get_decoder().register_forward_pre_hook(lambda module, args: None)
    assert generate(model, processor, rows, SETTINGS) == answers
    assert made[-1].rows == 0
    handle.remove()
    sampled = GenerationSettings(5, 16, options=(("do_sample", True),))
    generate(model, processor, rows, sampled)
    assert made[-1].rows == 0


def test_rows_without_image_and_questions_before_it_are_passed_whole(
    rows: list[Any], made: list[SharedPrefix], tmp_path: Path
) -> None:
    model, processor = build_family("LLaVA", tmp_path)
    text = {"id": "text", "messages": [user_message("Who are you?", 0)], "images": []}
    mixed = [*rows[:2], text]
    assert generate(model, processor, mixed, SETTINGS) == alone(model, processor, mixed)
    assert made[0].rows == 0
    late = [{**row, "messages": [{"role": "user", "content": row["messages"][0]["content"][::-1]}]} for row in rows[:2]]
    assert generate(model, processor, late, SETTINGS) == alone(model, processor, late)
    assert all(one.rows == 0 for one in made)


def test_split_by_hand() -> None:
    image = 9
    ids = torch.tensor([[0, 1, 9, 5, 6], [1, 9, 5, 7, 8], [0, 0, 1, 9, 4]])
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    split = split_batch(inputs, [0, 0, 2], [image], 0)
    assert split is not None
    assert split.heads == [0, 2]
    assert split.owner.tolist() == [0, 0, 1]
    assert split.first["input_ids"].tolist() == [[1, 9, 5], [0, 1, 9]]
    assert split.first["attention_mask"].tolist() == [[1, 1, 1], [0, 1, 1]]
    assert split.whole["input_ids"].tolist() == [[1, 9, 5, 0, 6], [1, 9, 5, 7, 8], [0, 1, 9, 0, 4]]
    assert split.whole["attention_mask"].tolist() == [[1, 1, 1, 0, 1], [1, 1, 1, 1, 1], [0, 1, 1, 0, 1]]
    assert split.passed == 2 * 3 + 3 * 2
    assert split_batch(inputs, [0, 1, 2], [image], 0) is None
    assert split_batch(inputs, [0, 0, 2], [7], 0) is None  # a row without images
