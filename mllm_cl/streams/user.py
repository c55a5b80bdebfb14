"""The stream file of a user, `stream.yaml`: which files are the tasks, in which order.

```yaml
name: my-stream
tasks:
  - name: plates
    train: plates/train.json
    test: plates/test.json
    validation: plates/validation.json    # optional
    image_folder: plates/images           # optional; the folder of each file by default
    metric: exact_match                   # optional; any scorer
    instruction_suffix: "Answer with one word."   # optional
    format: llava                         # optional; found out by default
    max_new_tokens: 16                    # optional
    columns: {image_path: image}          # optional; columns of the files under the names that the format reads
    description: "Reading number plates"  # optional
  - name: vqa                             # one data set that becomes one task per value of a column:
    train: vqa/train.jsonl
    test: vqa/test.jsonl
    split_by: category                    # tasks vqa-count, vqa-colour, ...
    values: [count, colour]               # optional: which, in this order; by default all as they first appear
```

Paths are relative to the file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from mllm_cl.data.formats import FORMATS
from mllm_cl.data.readers import hub_id_of, read_rows, read_rows_by
from mllm_cl.data.rows import Rows
from mllm_cl.errors import DataError, StreamError, suggest
from mllm_cl.parse import YamlMistake, parse_yaml
from mllm_cl.streams.fingerprint import fingerprint as fingerprint_of
from mllm_cl.streams.stream import Stream, Task

_FOREIGN = re.compile(r"[^A-Za-z0-9._-]+")
TASK_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
SPLITS = ("train", "validation", "test")
Split = Literal["train", "validation", "test"]


class TaskFile(BaseModel):
    """One task of a stream file."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: str = Field(description="Unique name; becomes a folder name.")
    train: str = Field(min_length=1, description="Training rows: file, folder or Hub id.")
    test: str = Field(min_length=1, description="Test rows: file, folder or Hub id.")
    validation: str | None = Field(None, min_length=1, description="Rows to choose settings on.")
    image_folder: str | None = Field(None, description="What relative image paths are relative to.")
    metric: str = Field("exact_match", min_length=1, description="Name of a scorer.")
    instruction_suffix: str | None = Field(None, description="Appended to the last user turn on a line of its own.")
    format: str = Field("auto", description="Row format; found out from the first rows by default.")
    columns: dict[str, str] = Field(default_factory=dict, description="Column of the files: key that the format reads.")
    max_new_tokens: int | None = Field(None, ge=1, description="Longest answer to generate.")
    description: str = Field("", description="One line for listings.")
    split_by: str | None = Field(None, min_length=1, description="Column whose values become tasks of their own.")
    values: list[str] | None = Field(None, min_length=1, description="Values of `split_by` to keep, in this order.")

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if not TASK_NAME.fullmatch(name):
            raise ValueError(f"{name!r} cannot be a task name|letters, digits, `.`, `_`, `-`; no dot in front")
        return name

    @field_validator("format")
    @classmethod
    def _check_format(cls, name: str) -> str:
        if name != "auto" and name not in FORMATS:
            raise ValueError(f"unknown format {name!r}|{suggest(name, ['auto', *FORMATS])}")
        return name


class StreamFile(BaseModel):
    """What a stream file says, checked but with no data read yet."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: str = Field(min_length=1, description="Name for reports.")
    tasks: list[TaskFile] = Field(min_length=1, description="Tasks in the order of learning.")


def read_stream(path: str | Path, *, fingerprint: bool = True) -> Stream:
    """Returns the stream of a stream file; rows are indexed, not converted, and no image is opened.

    Args:
        path (`str` or `Path`): the YAML file, or a folder that holds `stream.yaml`.
        fingerprint (`bool`, defaults to `True`): compute `Stream.fingerprint`, which reads every row once.

    Raises:
        StreamError: the file, or one of its data files, cannot be used; names the file and the key.

    Example:

    ```python
    >>> from mllm_cl.streams import read_stream
    >>> stream = read_stream("my-stream/stream.yaml")  # doctest: +SKIP
    >>> [task.name for task in stream]  # doctest: +SKIP
    ['plates', 'menus']

    ```
    """
    file, content = read_stream_file(path)
    tasks = []
    for index, task in enumerate(content.tasks):
        folder = image_folder_of(file, content, index)
        rows = {split: open_split(file, content, index, split, folder) for split in SPLITS}
        for name in rows["train"]:
            if name not in rows["test"]:
                raise StreamError(
                    f"{file}, tasks[{index}].test: no rows of {name!r}.",
                    fix="add test rows of this value, or name the `values` to keep.",
                )
            tasks.append(
                Task(
                    name=name,
                    train=rows["train"][name],
                    test=rows["test"][name],
                    validation=rows["validation"].get(name, ()),
                    metric=task.metric,
                    max_new_tokens=task.max_new_tokens,
                    description=task.description,
                )
            )
    return Stream(content.name, tuple(tasks), fingerprint_of(tasks) if fingerprint else "")


def read_stream_file(path: str | Path) -> tuple[Path, StreamFile]:
    """Returns the path of the stream file and what it says.

    Raises:
        StreamError: it is missing, not UTF-8, not YAML, or its keys are not those of a stream file.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        file = file / "stream.yaml"
    if not file.is_file():
        names = sorted(item.name for item in file.parent.glob("*.y*ml")) if file.parent.is_dir() else []
        hint = f"there is: {', '.join(names)}." if names else "write one; see `mllm_cl.streams.user`."
        raise StreamError(f"{file}: the stream file does not exist.", expected="a stream.yaml", fix=hint)
    content = _parse_yaml(file)
    if not isinstance(content, dict):
        raise StreamError(
            f"{file}: the file is {'empty' if content is None else 'no mapping'}.",
            expected="the keys `name` and `tasks`",
        )
    try:
        stream = StreamFile.model_validate(content)
    except ValidationError as error:
        raise _explain(file, error) from error
    seen: dict[str, int] = {}
    for index, task in enumerate(stream.tasks):
        first = seen.setdefault(task.name.casefold(), index)
        if first != index:
            raise StreamError(
                f"{file}, tasks[{index}].name: {task.name!r} is also the name of tasks[{first}].",
                expected="names that differ in more than upper and lower case (they become folders)",
                fix="give every task its own name.",
            )
    return file, stream


def image_folder_of(file: Path, stream: StreamFile, index: int) -> Path | None:
    """Returns the image folder of one task, or `None` if it names none.

    Raises:
        StreamError: the folder does not exist.
    """
    name = stream.tasks[index].image_folder
    if name is None:
        return None
    folder = file.parent / Path(name).expanduser()
    if not folder.is_dir():
        raise StreamError(
            f"{file}, tasks[{index}].image_folder: the folder {str(folder)!r} does not exist.",
            expected="a folder, relative to the stream file",
            fix="correct the path, or remove the key when image paths are relative to the data file.",
        )
    return folder


def open_split(file: Path, stream: StreamFile, index: int, split: Split, image_folder: Path | None) -> dict[str, Rows]:
    """Returns the rows of one split by task name: one task, or one per value of its `split_by` column.

    Empty if there is no such split.

    Raises:
        StreamError: the data file cannot be read or has no such column; names the stream file and the key.
    """
    task = stream.tasks[index]
    value = {"train": task.train, "validation": task.validation, "test": task.test}[split]
    if value is None:
        return {}
    options: dict[str, Any] = {
        "format": task.format,
        "image_folder": image_folder,
        "suffix": task.instruction_suffix,
        "columns": task.columns,
    }
    try:
        path = _locate(file, value)
        if task.split_by is None:
            return {task.name: read_rows(path, split=split, task=task.name, **options)}
        parts = read_rows_by(path, _Column(task.split_by, split), split=split, task=task.name, **options)
    except DataError as error:
        raise StreamError(
            f"{file}, tasks[{index}].{split}: {error.given}", expected=error.expected, fix=error.fix
        ) from error
    found = {name.removesuffix(f"/{split}"): rows for name, rows in parts.items()}
    wanted = task.values or list(found)
    missing = [value for value in wanted if value not in found]
    if missing or not found:
        raise StreamError(
            f"{file}, tasks[{index}].split_by: {value} has no rows with {task.split_by} = {', '.join(missing) or '...'}.",
            expected=f"one of: {', '.join(found)}" if found else f"rows with a text or number in `{task.split_by}`",
        )
    named = {f"{task.name}-{_FOREIGN.sub('-', value)}": found[value] for value in wanted}
    if len(named) < len(wanted):
        raise StreamError(
            f"{file}, tasks[{index}].split_by: two values of {task.split_by} give the same task name.",
            expected="values that differ in letters, digits, `.`, `_` or `-`",
        )
    return named


@dataclass(frozen=True)
class _Column:
    """`VALUE/SPLIT` of a raw row, `None` if it has no such column."""

    name: str
    split: str

    def __call__(self, raw: Any) -> str | None:
        value = raw.get(self.name) if isinstance(raw, Mapping) else None
        if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
            return None
        return f"{value}/{self.split}"


def _locate(file: Path, value: str) -> str:
    """Returns a path relative to the stream file, or a Hub id as it is when nothing local is meant."""
    name = value.rsplit("@", 1)[0] if "@" in value.rsplit("/", 1)[-1] else value
    local = file.parent / Path(value).expanduser()
    if local.exists() or (file.parent / name).exists() or (file.parent / name).parent.is_dir():
        return str(local)
    return value if hub_id_of(name) else str(local)


def _parse_yaml(file: Path) -> Any:
    try:
        return parse_yaml(file.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise StreamError(f"{file}: not UTF-8 ({error.reason}).", fix="save the file as UTF-8.") from error
    except OSError as error:
        raise StreamError(f"{file}: cannot be read ({error.strerror}).") from error
    except YamlMistake as error:
        raise StreamError(
            f"{file}{error.place}: not valid YAML ({error.problem}).", fix="check indentation, quotes and colons there."
        ) from error


def _explain(file: Path, error: ValidationError) -> StreamError:
    """Turns the first mistake pydantic found into a message with the key path."""
    details = error.errors(include_url=False)
    # A misspelt key also makes the right one missing: name the misspelling.
    first = next((item for item in details if item["type"] == "extra_forbidden"), details[0])
    location, kind = first["loc"], first["type"]
    key = str(location[-1]) if len(location) else ""
    place = f"{file}, {_key_path(location)}"
    given = first["input"]
    if kind == "extra_forbidden":
        model = TaskFile if len(location) > 1 else StreamFile
        return StreamError(f"{place}: unknown key.", expected=suggest(key, model.model_fields))
    if kind == "missing":
        fix = f"add `{key}:`."
        if key == "test":
            fix = (
                "add `test:`; without a test split nothing can be measured, so hold some rows out of the training file."
            )
        return StreamError(f"{place}: the key is missing.", fix=fix)
    if kind == "value_error":
        message, _, expected = first["msg"].removeprefix("Value error, ").partition("|")
        return StreamError(f"{place}: {message}.", expected=expected, fix="choose another.")
    if kind == "too_short" and location == ("tasks",):
        return StreamError(f"{place}: the stream has no tasks.", expected="at least one task", fix="add a task.")
    fix = "put the value in quotes." if kind == "string_type" and isinstance(given, (int, float, bool)) else None
    return StreamError(f"{place}: {given!r} given.", expected=first["msg"], fix=fix)


def _key_path(location: tuple[int | str, ...]) -> str:
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    return path
