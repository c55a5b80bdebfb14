"""The recipe: everything a run depends on, in one YAML file.

Unknown keys are errors with a spelling suggestion; `load_recipe` applies `section.key=value` overrides and returns a frozen
`Recipe`. `Recipe.sha256` identifies what was asked for (where the results are written is not part of it).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from mllm_cl.errors import RecipeError, suggest


class Section(BaseModel):
    """A part of the recipe; frozen, unknown keys forbidden."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), populate_by_name=True)


class ModelSection(Section):
    """Which model learns, and where its adapters go."""

    name_or_path: str = Field("tiny-llava", description="`tiny-llava` (built in), a Hub id or a local folder")
    revision: str | None = Field(None, description="branch, tag or commit of a Hub id")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="dtype of the base weights")
    trust_remote_code: bool = Field(False, description="run code that comes with the checkpoint")
    lora: dict[str, Any] = Field(
        default_factory=lambda: {"r": 8, "lora_alpha": 16}, description="passed to peft.LoraConfig"
    )
    adapters: Literal["one", "stacked"] | None = Field(
        None,
        description="one continued adapter, or a fresh one per task added to the consolidated adapter; "
        "what the methods need when not given",
    )
    max_rank: int | None = Field(
        None, ge=1, description="rank of the consolidated adapter after recompression; 4 x r when not given"
    )
    train_bridge: bool = Field(False, description="put LoRA on the vision-language bridge too")
    train_vision: bool = Field(False, description="put LoRA on the vision tower too")


class StreamSection(Section):
    """What is learnt, in which order."""

    name: str | None = Field(None, description="a built-in stream: see `mllm-cl data list`")
    path: str | None = Field(None, description="a stream.yaml of your own")
    order: list[str] | Literal["random"] | None = Field(None, description="task names, or `random` (uses `seed`)")
    limit: int | dict[Literal["train", "validation", "test"], int] | None = Field(
        None, description="rows per task and split, drawn with `seed`"
    )
    validation_share: float | None = Field(
        None, gt=0, lt=1, description="share of train rows held out when none is given"
    )
    seed: int = Field(0, description="seed of order, limit and validation share")

    @model_validator(mode="after")
    def _one_source(self) -> StreamSection:
        if (self.name is None) == (self.path is None):
            raise ValueError("give exactly one of `name` (a built-in stream) and `path` (a stream.yaml)")
        return self


class EvaluationSection(Section):
    """How the stages are measured."""

    batch_size: Literal["auto"] | int = Field(
        "auto", description="rows per generation batch; `auto` halves on out-of-memory"
    )
    max_new_tokens: int = Field(16, ge=1, description="longest answer, unless the task says otherwise")
    general: list[str] = Field(default_factory=list, description="general benchmarks measured at every stage")
    tasks: Literal["seen", "all"] = Field(
        "seen", description="tasks measured at each stage; `all` also fills the upper triangle"
    )
    split: Literal["test", "validation"] = Field("test", description="choose settings on validation, report on test")
    stage_zero: bool = Field(True, description="measure the untouched model first")
    num_workers: int | Literal["auto"] = Field("auto", description="processes that decode images")

    @field_validator("batch_size")
    @classmethod
    def _positive(cls, value: Any) -> Any:
        if value != "auto" and value < 1:
            raise ValueError("must be `auto` or at least 1")
        return value


class MethodSpec(Section):
    """One entry of `methods`: the method's name and its options."""

    name: str
    options: dict[str, Any] = Field(default_factory=dict)


class Recipe(Section):
    """A whole recipe; the defaults train the built-in model."""

    name: str = Field(description="name of the run, shown in reports", pattern=r"^[^/\\\x00]+$")
    output_dir: str = Field(description="folder of the run")
    seed: int = Field(0, ge=0, lt=2**32, description="seed of everything that is random")
    model: ModelSection = Field(default_factory=ModelSection)
    stream: StreamSection
    methods: list[MethodSpec] = Field(default_factory=list, description="methods in this order; `finetune` when empty")
    training: dict[str, Any] = Field(default_factory=dict, description="passed to transformers.TrainingArguments")
    evaluation: EvaluationSection = Field(default_factory=EvaluationSection)

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
        """Hash of what was asked for; `output_dir` and `name` are not part of it."""
        content = self.model_dump(mode="json", exclude={"output_dir", "name"})
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
        place, content = "recipe", json.loads(json.dumps(source))
    else:
        place, content = str(source), _read_yaml(Path(source))
    for override in overrides:
        _apply_override(content, override)
    if isinstance(source, (str, Path)):
        _anchor_paths(content, Path(source).parent)
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise RecipeError(*_explain(place, error)) from error


def _anchor_paths(content: dict[str, Any], folder: Path) -> None:
    """A stream path in a recipe file is relative to that file when it is found there, else to the working directory."""
    stream = content.get("stream")
    if isinstance(stream, dict) and isinstance(stream.get("path"), str):
        beside = folder / stream["path"]
        if not Path(stream["path"]).is_absolute() and beside.exists():
            stream["path"] = str(beside)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RecipeError(f"{path}: there is no such recipe file.", fix="check the path.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read as a recipe ({error}).", expected="a UTF-8 YAML file") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not valid YAML ({error}).", fix="correct the syntax at that line.") from error
    if not isinstance(content, dict):
        raise RecipeError(
            f"{path}: holds {type(content).__name__} instead of a mapping.",
            expected="keys such as name, output_dir, model, stream, methods, training, evaluation",
        )
    return content


def _apply_override(content: dict[str, Any], override: str) -> None:
    key, separator, raw = override.partition("=")
    if not separator or not key:
        raise RecipeError(f"{override!r}: not an override.", expected="section.key=value, for example seed=1")
    try:
        value = yaml.safe_load(raw)
    except yaml.YAMLError as error:
        raise RecipeError(f"{override!r}: the value is not YAML ({error}).", fix="quote it.") from error
    if isinstance(value, str):
        value = _as_number(value)
    *parents, last = key.split(".")
    node: Any = content
    for position, parent in enumerate(parents):
        if isinstance(node, list):
            node = _method_options(node, parent, override)
            continue
        if node.get(parent) is None:
            node[parent] = {}
        node = node[parent]
        if not isinstance(node, (dict, list)):
            raise RecipeError(
                f"{override!r}: {'.'.join(parents[: position + 1])} is a value, not a section.",
                fix="shorten the key.",
            )
    if isinstance(node, list):
        raise RecipeError(f"{override!r}: {key} is a list.", expected="methods=[...] or methods.NAME.option=value")
    node[last] = value


def _as_number(text: str) -> str | float:
    """YAML 1.1 reads `2e-3` as text; people mean a number."""
    try:
        return float(text)
    except ValueError:
        return text


def _method_options(methods: list[Any], name: str, override: str) -> dict[str, Any]:
    for position, entry in enumerate(methods):
        if entry == name:
            methods[position] = entry = {name: {}}
        if isinstance(entry, dict) and name in entry:
            if entry[name] is None:
                entry[name] = {}
            return entry[name]
    names = [entry if isinstance(entry, str) else next(iter(entry), "?") for entry in methods]
    raise RecipeError(f"{override!r}: the recipe has no method {name!r}.", expected=suggest(name, map(str, names)))


def _explain(place: str, error: ValidationError) -> tuple[str]:
    lines = [f"{place}: {error.error_count()} problem(s) in the recipe."]
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"]) or "recipe"
        if item["type"] == "extra_forbidden":
            known = _known_keys(item["loc"][:-1])
            lines.append(f"  {where}: unknown key; {suggest(str(item['loc'][-1]), known)}")
        elif item["type"] == "missing":
            lines.append(f"  {where}: missing; add it")
        else:
            message = item["msg"].removeprefix("Value error, ")
            if item["type"] == "string_pattern_mismatch":  # only `name` has a pattern
                message = "must be without slashes and not empty"
            given = "" if isinstance(item["input"], (dict, list)) else f" (given: {item['input']!r})"
            lines.append(f"  {where}: {message}{given}")
    return ("\n".join(lines),)


def _known_keys(location: tuple[Any, ...]) -> list[str]:
    model: type[BaseModel] = Recipe
    for part in location:
        field = model.model_fields.get(str(part))
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            break
        model = field.annotation
    return list(model.model_fields)


def recipe_schema() -> dict[str, Any]:
    """Returns the JSON schema of a recipe, for editors; a method is a name, or its name with options."""
    schema = Recipe.model_json_schema()
    entry = {"anyOf": [{"type": "string"}, {"type": "object", "minProperties": 1, "maxProperties": 1}]}
    schema["properties"]["methods"] |= {"items": entry}
    return schema
