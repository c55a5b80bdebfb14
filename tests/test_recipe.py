"""Reading a recipe: what is filled in, what is overridden, what is refused and in which words."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from mllm_cl.errors import RecipeError
from mllm_cl.recipe import MethodSpec, Recipe, load_recipe, recipe_schema

SMALLEST: dict[str, Any] = {"name": "x", "output_dir": "runs/x", "stream": {"name": "quickstart"}}


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def problem(content: dict[str, Any] | Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(content, overrides)
    return str(caught.value)


def test_defaults():
    recipe = load_recipe(SMALLEST)
    assert recipe.model.name_or_path == "tiny-llava"
    assert recipe.methods == []
    assert recipe.evaluation.stage_zero
    assert (recipe.seed, recipe.training) == (0, {})


def test_the_example_of_the_design(tmp_path):
    path = write(
        tmp_path,
        """
        name: plates-then-menus
        output_dir: runs/plates-then-menus
        seed: 0
        model:
          name_or_path: tiny-llava
          dtype: float32
          lora: {r: 8, lora_alpha: 16}
        stream:
          name: quickstart
        methods:
          - spectral_consolidation: {rate: power_up, strength: 0.5}
          - inquiry_regularization: {preset: uir_feat}
          - replay
          - ewc:
        training: {learning_rate: 2.0e-3, num_train_epochs: 1, per_device_train_batch_size: 16}
        evaluation: {batch_size: auto, max_new_tokens: 16, general: [quickstart-general]}
        """,
    )
    recipe = load_recipe(path)
    assert recipe.methods == [
        MethodSpec(name="spectral_consolidation", options={"rate": "power_up", "strength": 0.5}),
        MethodSpec(name="inquiry_regularization", options={"preset": "uir_feat"}),
        MethodSpec(name="replay"),
        MethodSpec(name="ewc"),
    ]
    assert recipe.training["learning_rate"] == 2e-3


@pytest.mark.parametrize("text", ["2e-3", "2.e-3", "2.0e-3", "2E-3", ".2e-2", "+2e-3", "0.002", "20e-4"])
def test_numbers_mean_numbers(text, tmp_path):
    """In a file and on the command line; YAML 1.1 reads most of these as text."""
    path = write(tmp_path, f"{yaml.safe_dump(SMALLEST)}training: {{learning_rate: {text}}}\n")
    assert math.isclose(load_recipe(path).training["learning_rate"], 2e-3)
    assert math.isclose(load_recipe(SMALLEST, [f"training.learning_rate={text}"]).training["learning_rate"], 2e-3)


@pytest.mark.parametrize("text", ["nan", "inf", "1e", "e5", "v1e-3", "2e-3b", "1_0e"])
def test_words_stay_words(text):
    assert load_recipe(SMALLEST, [f"name={text}"]).name == text


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seed=3", {"seed": 3}),
        ("model.lora.r=4", {"model": {"lora": {"r": 4}}}),
        ("model.adapters=null", {"model": {"adapters": None}}),
        ("evaluation.general=[a, b]", {"evaluation": {"general": ["a", "b"]}}),
        ("evaluation.stage_zero=false", {"evaluation": {"stage_zero": False}}),
        ("stream.limit={train: 5, test: 2}", {"stream": {"limit": {"train": 5, "test": 2}}}),
        ("stream.limit.train=5", {"stream": {"limit": {"train": 5}}}),
        ("output_dir=a=b", {"output_dir": "a=b"}),
        ("name='007'", {"name": "007"}),
        ("methods=[finetune]", {"methods": [{"name": "finetune", "options": {}}]}),
    ],
)
def test_overrides(override, expected):
    def within(small: Any, large: Any) -> bool:
        if isinstance(small, dict) and isinstance(large, dict):
            return all(key in large and within(value, large[key]) for key, value in small.items())
        return small == large

    assert within(expected, load_recipe(SMALLEST, [override]).model_dump())


def test_overrides_of_methods():
    content = SMALLEST | {
        "methods": ["replay", {"my.package:Method": None}, {"spectral_consolidation": {"rate": "all"}}]
    }
    overrides = [
        "methods.replay.size=50",
        "methods.my.package:Method.strength=2e-1",
        "methods.spectral_consolidation.rate_options.gamma=2",
        "methods.replay.share=0.5",
    ]
    assert load_recipe(content, overrides).methods == [
        MethodSpec(name="replay", options={"size": 50, "share": 0.5}),
        MethodSpec(name="my.package:Method", options={"strength": 0.2}),
        MethodSpec(name="spectral_consolidation", options={"rate": "all", "rate_options": {"gamma": 2}}),
    ]
    assert content["methods"][0] == "replay"  # the mapping that was given stays as it is


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["seed"], "'seed': not an override"),
        (["=3"], "not an override"),
        (["model..r=3"], "not an override"),
        (["name=[a"], "the value is not YAML"),
        (["seed.deep=3", "seed=3"], None),
        (["methods.replya.size=3"], "has no method 'replya'.\n  expected: did you mean 'replay'?"),
        (["methods.replay=3"], "methods is a list.\n  expected: methods=[...] or methods.NAME.option=value"),
        (["traning.x=1"], "traning: unknown key; did you mean 'training'?"),
        (["model.lroa={}"], "model.lroa: unknown key; did you mean 'lora'?"),
        (["evaluation.batch_size=many"], "evaluation.batch_size: should be 'auto', or should be a valid integer"),
        (["evaluation.batch_size=0"], "evaluation.batch_size: must be `auto` or at least 1 (given: 0)"),
        (["seed=-1"], "seed: should be greater than or equal to 0 (given: -1)"),
        ([f"seed={2**32}"], "seed: should be less than"),
        (["stream.path=s.yaml"], "stream: give exactly one of `name`"),
        (["stream.limit.trian=4"], "'train', 'validation' or 'test'"),
        (["model=3"], "model: should be a valid dictionary"),
        (["methods=finetune"], "methods: must be a list such as `- replay: {size: 100}`"),
        (["methods=[{a: 1}]"], "methods: the options of 'a' must be a mapping, not 1"),
        (["name=a/b"], "name: must be one line of text without slashes (given: 'a/b')"),
        (["name='a\n\nb'"], "name: must be one line of text without slashes"),
        (["name=' '"], "name: must be one line of text without slashes"),
    ],
)
def test_mistakes_are_explained(overrides, message):
    content = SMALLEST | {"methods": ["replay"]}
    if message is None:
        assert load_recipe(content, overrides).seed == 3
        return
    assert message in problem(content, *overrides)


def test_all_mistakes_are_named_at_once():
    text = problem({"nmae": "x", "stream": {"name": "a", "sed": 1}, "seed": "many"})
    assert "5 problem(s) in the recipe" in text
    for part in ("name: missing", "output_dir: missing", "nmae: unknown key", "stream.sed: unknown key", "seed: "):
        assert part in text


def test_files_that_are_no_recipe(tmp_path):
    assert "there is no such recipe file" in problem(tmp_path / "none.yaml")
    assert "not valid YAML" in problem(write(tmp_path, "name: [\n"))
    assert "holds list instead of a mapping" in problem(write(tmp_path, "- a\n"))
    assert "holds NoneType" in problem(write(tmp_path, ""))
    assert "cannot be read" in problem(tmp_path)
    (tmp_path / "latin.yaml").write_bytes("name: ä".encode("latin-1"))
    assert "UTF-8" in problem(tmp_path / "latin.yaml")
    assert "the key 'training' is given twice" in problem(
        write(tmp_path, "training: {a: 1}\nseed: 1\ntraining: {b: 2}\n")
    )


def test_a_mapping_from_python():
    recipe = load_recipe(SMALLEST | {"output_dir": Path("runs") / "y", "methods": ("finetune",)})
    assert recipe.output_dir == "runs/y"
    with pytest.raises(RecipeError):
        load_recipe(SMALLEST | {"training": {"a": {1}}})


def test_what_is_written_reads_back(tmp_path):
    recipe = load_recipe(
        SMALLEST
        | {"name": "ä", "methods": [{"replay": {"size": 3}}, "ewc"], "stream": {"name": "q", "limit": {"train": 2}}},
        ["training.learning_rate=2e-5", "evaluation.batch_size=3", "model.lora.target_modules=['a']"],
    )
    again = load_recipe(write(tmp_path, recipe.to_yaml()))
    assert again == recipe
    assert again.sha256 == recipe.sha256
    assert yaml.safe_load(recipe.to_yaml())["methods"] == [{"replay": {"size": 3}}, {"ewc": {}}]


def test_the_hash_is_of_what_was_asked_for(tmp_path):
    base = load_recipe(SMALLEST)
    for change in ({"name": "other"}, {"output_dir": "elsewhere"}):
        assert load_recipe(SMALLEST | change).sha256 == base.sha256
    for override in ("seed=1", "training.learning_rate=1e-3", "model.lora.r=3", "methods=[ewc]", "stream.seed=1"):
        assert load_recipe(SMALLEST, [override]).sha256 != base.sha256
    one, two = (load_recipe(SMALLEST | {"stream": {"path": str(tmp_path / name)}}).sha256 for name in "ab")
    assert one == two  # a stream is known by its rows, wherever it lies
    assert one != base.sha256


def test_a_stream_beside_the_recipe_is_found(tmp_path, monkeypatch):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/stream.yaml").write_text("")
    path = write(tmp_path / "recipes", yaml.safe_dump(SMALLEST | {"stream": {"path": "stream.yaml"}}))
    monkeypatch.chdir(tmp_path)
    assert load_recipe("recipes/recipe.yaml").stream.path == str(tmp_path / "recipes/stream.yaml")
    assert (
        load_recipe(path, ["stream.path=other.yaml"]).stream.path == "other.yaml"
    )  # what is typed is relative to here
    missing = write(tmp_path, yaml.safe_dump(SMALLEST | {"stream": {"path": "there.yaml"}}))
    assert load_recipe(missing).stream.path == "there.yaml"


def test_a_file_that_a_method_reads_is_found_beside_the_recipe(tmp_path):
    (tmp_path / "questions.txt").write_text("What is this?\n")
    path = write(
        tmp_path,
        "name: x\noutput_dir: r\nstream: {name: quickstart}\nmethods:\n"
        "  - inquiry_regularization: {pool: questions.txt, preset: uir_self}\n"
        "  - spectral_consolidation\n",
    )
    options = load_recipe(path).methods[0].options
    assert options == {"pool": str(tmp_path / "questions.txt"), "preset": "uir_self"}
    (tmp_path / "uir_self").mkdir()  # a folder is no file, and general is a word
    assert load_recipe(path).methods[0].options["preset"] == "uir_self"


def test_a_recipe_does_not_change():
    recipe = load_recipe(SMALLEST)
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 3  # type: ignore[misc]


def test_the_schema_completes_and_explains():
    schema = recipe_schema()
    assert set(schema["properties"]) == set(Recipe.model_fields)
    assert schema["additionalProperties"] is False
    sections = [schema, *schema["$defs"].values()]
    for section in sections:
        for name, field in section["properties"].items():
            described = "description" in field or "$ref" in field or section.get("title") == "MethodSpec"
            assert described, name
    json.dumps(schema)


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("training.hub_token=hf_{}", "training.hub_token"),
        ("model.name_or_path=https://user:hf_{}@huggingface.co/owner/model", "model.name_or_path"),
        ("methods=[{{replay: {{note: hf_{}}}}}]", "methods.0.replay.note"),
    ],
)
def test_a_token_in_a_recipe_is_refused_and_not_shown(override, key, monkeypatch):
    """A recipe is written to the folder of the run, into reports and cards."""
    secret = "abcdefghij" * 3
    with pytest.raises(RecipeError, match=f"{key}: holds what looks like an access token") as caught:
        load_recipe(SMALLEST, [override.format(secret)])
    assert secret not in str(caught.value)
    monkeypatch.setenv("HF_TOKEN", "a-token-of-another-kind")
    with pytest.raises(RecipeError, match="name: holds what looks like"):
        load_recipe(SMALLEST, ["name=a-token-of-another-kind"])
