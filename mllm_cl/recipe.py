"""The recipe: everything a run depends on, in one YAML file.

Unknown keys are errors with a spelling suggestion; `load_recipe` applies `section.key=value` overrides and returns a frozen
`Recipe`. `Recipe.sha256` identifies what was asked for (where files lie is not part of it).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from mllm_cl.errors import RecipeError, suggest
from mllm_cl.model_section import AUTO, ModelSection, Section
from mllm_cl.parse import YamlMistake, parse_json, parse_yaml


class StreamSection(Section):
    """What is learnt, in which order."""

    name: str | None = Field(default=None, description="a built-in stream: see `mllm-cl data list`")
    path: str | None = Field(default=None, description="a stream.yaml of your own")
    root: str | None = Field(
        default=None,
        description="folder of a public benchmark's data; `$MLLM_CL_DATA/NAME` or `data/NAME` when not given",
    )
    options: dict[str, Any] = Field(default_factory=dict, description="options of the builder; see `mllm-cl data show`")
    tasks: list[str] | None = Field(default=None, description="only these tasks; all when not given")
    order: list[str] | Literal["random", "similar", "dissimilar"] | None = Field(
        default=None, description="task names; `random` (uses `seed`); `similar`, `dissimilar`: by their questions"
    )
    limit: int | dict[Literal["train", "validation", "test"], int] | None = Field(
        default=None, description="rows per task and split, drawn with `seed`"
    )
    validation_share: float | None = Field(
        default=None, gt=0, lt=1, description="share of train rows held out when none is given"
    )
    seed: int = Field(default=0, description="seed of order, limit, validation share and everything below")
    exclude: str | None = Field(
        default=None, description="list of rows to leave out, written by `mllm-cl data validate --drop-bad`"
    )
    merge: dict[str, list[str] | dict[str, float]] = Field(
        default_factory=dict, description="new name: tasks, or task: share of its rows, that are learnt as one"
    )
    repeat: int | dict[str, int] = Field(
        default=1, description="appearances of every task, or per task; its training rows are divided among them"
    )
    blur: float | None = Field(
        default=None, gt=0, lt=1, description="share of each task's train rows that is learnt with its neighbours"
    )
    task_free: bool = Field(
        default=False, description="cut the train rows into segments that do not end where tasks end"
    )
    transforms: list[dict[str, Any]] = Field(
        default_factory=list, description="`answer_styles`, `rewrite_instructions`, `boxes`, in this order"
    )

    @model_validator(mode="after")
    def _one_source(self) -> StreamSection:
        if (self.name is None) == (self.path is None):
            raise ValueError("give exactly one of `name` (a built-in stream) and `path` (a stream.yaml)")
        return self


class EvaluationSection(Section):
    """How the stages are measured."""

    batch_size: Literal["auto"] | int = Field(
        default="auto", description="rows per generation batch; `auto` halves on out-of-memory"
    )
    max_new_tokens: int = Field(default=16, ge=1, description="longest answer, unless the task says otherwise")
    general: list[str] = Field(default_factory=list, description="general benchmarks measured at every stage")
    tasks: Literal["seen", "all"] = Field(
        default="seen", description="tasks measured at each stage; `all` also fills the upper triangle"
    )
    split: Literal["test", "validation"] = Field(
        default="test", description="choose settings on validation, report on test"
    )
    stage_zero: bool = Field(default=True, description="measure the untouched model first")
    drift: int = Field(
        default=32, ge=0, description="open inquiries for feature shift and format collapse at every stage; 0: none"
    )
    num_workers: int | Literal["auto"] = Field(default="auto", description="processes that decode images")

    @field_validator("batch_size")
    @classmethod
    def _positive(cls, value: Any) -> Any:
        if value != "auto" and value < 1:
            raise ValueError("must be `auto` or at least 1")
        return value


class BudgetSection(Section):
    """What a method may cost; every run of a comparison gets the same."""

    kind: Literal["trainable_parameters", "stored_bytes", "flops"] = Field(
        description="`trainable_parameters` of the first task (the largest rank that fits is required, or found with "
        "`model.lora.r: auto`), `stored_bytes` of a stage (adapters and method states), or training `flops` per task (each "
        "stage takes as many optimizer steps as fit; epochs then only say for how many passes methods prepare)"
    )
    value: int = Field(ge=1, description="how much of it")


TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")  # what an access token of the Hub looks like


class MethodSpec(Section):
    """One entry of `methods`: the method's name and its options."""

    name: str
    options: dict[str, Any] = Field(default_factory=dict)


class HubSection(Section):
    """Whether and where the stages are published. A token never stands here: `hf auth login`, or `HF_TOKEN`."""

    push: bool = Field(default=False, description="push every stage to the Hub once it is measured")
    repo_id: str | None = Field(
        default=None, pattern=r"^[\w.-]+/[\w.-]+$", description="repository on the Hub, `owner/name`"
    )
    private: bool = Field(default=False, description="make the repository private")
    base_model: str | None = Field(
        default=None, description="Hub id of the base model, where `model.name_or_path` is a folder of this machine"
    )
    license: str | None = Field(
        default=None, description="licence of the adapter, as the Hub names it: apache-2.0, mit"
    )
    datasets: dict[str, str] = Field(
        default_factory=dict,
        description="task or general benchmark: its data set on the Hub, `owner/name` or `owner/name:task_id`",
    )

    @model_validator(mode="after")
    def _somewhere(self) -> HubSection:
        if self.push and self.repo_id is None:
            raise ValueError("`push: true` needs `repo_id: owner/name`")
        return self


class Recipe(Section):
    """A whole recipe; the defaults train the built-in model."""

    name: str = Field(description="name of the run, shown in reports")
    output_dir: str = Field(description="folder of the run")
    seed: int = Field(default=0, ge=0, lt=2**32, description="seed of everything that is random")
    model: ModelSection = Field(default_factory=ModelSection)
    stream: StreamSection
    methods: list[MethodSpec] = Field(default_factory=list, description="methods in this order; `finetune` when empty")
    training: dict[str, Any] = Field(default_factory=dict, description="passed to transformers.TrainingArguments")
    budget: BudgetSection | None = Field(
        default=None, description="`{kind, value}`: the same cost for every method, or refusal"
    )
    evaluation: EvaluationSection = Field(default_factory=EvaluationSection)
    hub: HubSection = Field(default_factory=HubSection)

    @model_validator(mode="after")
    def _budget_decides(self) -> Recipe:
        kind = self.budget.kind if self.budget else None
        if self.model.lora.get("r") == AUTO and kind != "trainable_parameters":
            raise ValueError(
                "`model.lora.r: auto` is the largest rank within `budget: {kind: trainable_parameters, value: ...}`; "
                "add that budget, or give the rank"
            )
        if kind == "flops" and self.training.get("max_steps", -1) > 0:
            raise ValueError("`budget.kind: flops` decides the steps of every stage; remove `training.max_steps`")
        return self

    @field_validator("name")
    @classmethod
    def _one_line(cls, name: str) -> str:
        if not name.strip() or any(character in "/\\" or not character.isprintable() for character in name):
            raise ValueError("must be one line of text without slashes")
        return name

    @field_validator("methods", mode="before")
    @classmethod
    def _method_entries(cls, entries: Any) -> Any:
        if entries is None:
            return []
        if not isinstance(entries, list):
            raise ValueError("must be a list such as `- replay: {size: 100}`")
        return [_method_entry(entry) for entry in entries]

    @property
    def sha256(self) -> str:
        """Hash of what was asked for; where things lie and what they are called is left out (a stream is known by its rows)."""
        left_out: Any = {"output_dir": True, "name": True, "hub": True, "stream": {"path", "root"}}
        content = self.model_dump(mode="json", exclude=left_out)
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def to_yaml(self) -> str:
        """Returns the resolved recipe, every default written out."""
        content = self.model_dump(mode="json")
        content["methods"] = [{spec.name: dict(spec.options)} for spec in self.methods]
        return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def _method_entry(entry: Any) -> Any:
    if isinstance(entry, MethodSpec):
        return entry
    if isinstance(entry, str):
        return {"name": entry}
    if isinstance(entry, dict) and len(entry) == 1:
        name, options = next(iter(entry.items()))
        if options is None or isinstance(options, dict):
            return {"name": str(name), "options": options or {}}
        raise ValueError(f"the options of {name!r} must be a mapping, not {options!r}")
    if isinstance(entry, dict) and set(entry) == {"name", "options"}:
        return entry
    raise ValueError(f"must be a name or `name: {{options}}`, not {entry!r}")


def load_recipe(source: str | Path | dict[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe.

    Args:
        source: a YAML file, or the mapping that one would hold.
        overrides: `section.key=value` strings; values are YAML, so `4`, `true`, `[a, b]` and `null` mean what they say.

    Raises:
        RecipeError: the file is missing, is not YAML, or a key or value is not what was expected.
    """
    if isinstance(source, dict):
        place, content = "recipe", _plain(source)
    else:
        place, content = str(source), _read_yaml(Path(source))
        _anchor_paths(content, Path(source).parent)
    for override in overrides:
        _apply_override(content, override)
    _check_secrets(place, content)
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise RecipeError(_explain(place, error)) from error


def _check_secrets(place: str, content: Any, key: str = "") -> None:
    """Refuses a recipe with a token in it: recipes are written to run folders, reports and cards."""
    children = content.items() if isinstance(content, dict) else enumerate(content if isinstance(content, list) else ())
    for name, child in children:
        _check_secrets(place, child, f"{key}.{name}".removeprefix("."))
    own = os.environ.get("HF_TOKEN") or ""
    if isinstance(content, str) and (TOKEN.search(content) or (len(own) > 7 and own in content)):
        given = f"{place}: {key}: holds what looks like an access token of the Hub."
        raise RecipeError(given, expected="a token in HF_TOKEN or behind `hf auth login` only", fix="remove it.")


def _plain(source: dict[str, Any]) -> dict[str, Any]:
    """A copy that holds what YAML could hold; paths become text."""
    try:
        return parse_json(json.dumps(source, default=os.fspath))
    except (TypeError, ValueError, RecursionError) as error:
        raise RecipeError(f"recipe: {error}.", expected="text, numbers, booleans, lists and mappings") from error


def _anchor_paths(content: dict[str, Any], folder: Path) -> None:
    """Files named in a recipe file are relative to it when they are found there, else to the working directory.

    That is the stream's `path`, and any option of a method that is the name of a file.
    """
    methods = content.get("methods")
    entries = [entry for entry in methods if isinstance(entry, dict)] if isinstance(methods, list) else []
    options = [own for entry in entries for own in entry.values() if isinstance(own, dict)]
    stream = content.get("stream")
    places = [(stream, "path")] if isinstance(stream, dict) else []
    for section, key in [*places, *((own, key) for own in options for key in own)]:
        value = section.get(key)
        if not isinstance(value, str) or not value or Path(value).is_absolute():
            continue
        beside = folder / value
        if beside.is_file() or (section is stream and beside.exists()):
            section[key] = os.path.abspath(beside)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RecipeError(f"{path}: there is no such recipe file.", fix="check the path.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read as a recipe ({error}).", expected="a UTF-8 YAML file") from error
    except YamlMistake as error:
        raise RecipeError(f"{path}: not valid YAML ({error}).", fix="correct the syntax at that line.") from error
    if not isinstance(content, dict):
        raise RecipeError(
            f"{path}: holds {type(content).__name__} instead of a mapping.",
            expected="keys such as name, output_dir, model, stream, methods, training, evaluation",
        )
    return content


def _apply_override(content: dict[str, Any], override: str) -> None:
    key, separator, raw = override.partition("=")
    if not separator or not all(key.split(".")):
        raise RecipeError(f"{override!r}: not an override.", expected="section.key=value, for example seed=1")
    try:
        value = parse_yaml(raw)
    except YamlMistake as error:
        raise RecipeError(f"{override!r}: the value is not YAML ({error}).", fix="quote it.") from error
    node: Any = content
    if key.startswith("methods."):
        node, key = _method_options(content.get("methods") or [], key.removeprefix("methods."), override)
    *parents, last = key.split(".")
    for position, parent in enumerate(parents):
        if node.get(parent) is None:
            node[parent] = {}
        node = node[parent]
        if not isinstance(node, dict):
            raise RecipeError(
                f"{override!r}: {'.'.join(parents[: position + 1])} is a value, not a section.",
                fix="shorten the key.",
            )
    node[last] = value


def _method_options(methods: list[Any], key: str, override: str) -> tuple[dict[str, Any], str]:
    """Returns the options of the method that `NAME.option` means, and the option; a `module:Class` has dots of its own."""
    names = [entry if isinstance(entry, str) else str(next(iter(entry), "?")) for entry in methods]
    for position, name in enumerate(names):
        if key.startswith(f"{name}."):
            entry = methods[position]
            options = entry[name] if isinstance(entry, dict) else None
            methods[position] = {name: options or {}}
            return methods[position][name], key.removeprefix(f"{name}.")
    given, dot, _ = key.partition(".")
    if not dot:
        raise RecipeError(f"{override!r}: methods is a list.", expected="methods=[...] or methods.NAME.option=value")
    raise RecipeError(
        f"{override!r}: the recipe has no method {given!r}.",
        expected=suggest(given, names) if names else "methods=[...], since the recipe lists none",
    )


def _explain(place: str, error: ValidationError) -> str:
    """One line per setting; a setting of several possible kinds has an error for each of them."""
    problems: dict[str, list[str]] = {}
    given: dict[str, str] = {}
    for item in error.errors():
        location, known = _setting(item["loc"])
        where = ".".join(location) or "recipe"
        if item["type"] == "extra_forbidden":
            message = f"unknown key; {suggest(str(item['loc'][-1]), known)}"
        elif item["type"] == "missing":
            message = "missing; add it"
        else:
            message = item["msg"].removeprefix("Value error, ").replace("Input should", "should").replace("String", "")
            if not isinstance(item["input"], (dict, list)):
                given[where] = f" (given: {item['input']!r})"
        problems.setdefault(where, []).append(message.strip())
    lines = [f"  {where}: {', or '.join(messages)}{given.get(where, '')}" for where, messages in problems.items()]
    return "\n".join([f"{place}: {len(problems)} problem(s) in the recipe.", *lines])


def _setting(location: tuple[int | str, ...]) -> tuple[list[str], list[str]]:
    """The setting that a place in pydantic's tree means (without the kinds it tried), and the keys known beside it."""
    model: type[BaseModel] | None = Recipe
    parts: list[str] = []
    known: list[str] = []
    for part in map(str, location):
        parts.append(part)
        if model is None:
            break
        known = list(model.model_fields)
        field = model.model_fields.get(part)
        annotation = field.annotation if field is not None else None
        model = annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None
        if model is None:
            break
    return parts, known


def recipe_schema() -> dict[str, Any]:
    """Returns the JSON schema of a recipe, for editors; a method is a name, or its name with options."""
    schema = Recipe.model_json_schema()
    entry = {"anyOf": [{"type": "string"}, {"type": "object", "minProperties": 1, "maxProperties": 1}]}
    schema["properties"]["methods"] |= {"items": entry}
    return schema
