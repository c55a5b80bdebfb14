"""Every recipe that ships resolves against the installed libraries; nothing is downloaded."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mllm_cl.data.builders import STREAMS
from mllm_cl.recipe import load_recipe
from mllm_cl.training.arguments import check_training
from mllm_cl.training.capabilities import build_methods, check_lora

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted(path for path in (ROOT / "recipes").glob("*/*.yaml") if path.parent.name != "accelerate")
LARGE = [path for path in RECIPES if path.parent.name != "quickstart"]


def name(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_recipes_resolve(path):
    recipe = load_recipe(path)
    check_training(recipe.training)
    check_lora(recipe.model.lora)
    assert build_methods(recipe)
    assert recipe.stream.name in STREAMS


@pytest.mark.parametrize("path", LARGE, ids=name)
def test_recipes_for_real_models_say_where_their_values_come_from(path):
    text = path.read_text()
    marks = set(re.findall(r"^#\s+\[(\w+)\]", text, re.MULTILINE))
    used = re.findall(r"\S.*#\s*\[(\w+)\]", text)
    assert set(used) <= marks
    keys = ("learning_rate", "lora", "per_device_train_batch_size", "spectral_consolidation", "inquiry_regularization")
    for key in keys:
        at = text.index(f"{key}:")
        assert re.search(rf"\[({'|'.join(marks)})\]", text[at : text.index("\n", at)]), key


def test_there_are_recipes_for_both_settings_of_the_paper():
    assert {name(path) for path in LARGE} >= {
        "llava15_7b/pretraining",
        "llava15_7b/finetuning",
        "qwen3vl_4b/finetuning",
    }
