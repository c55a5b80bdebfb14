"""What every builder of a public benchmark is made of: a description, and tasks that say where their rows lie.

A builder file is data: a `Family` with one `TaskFiles` per task, in the official order. What a benchmark's files cannot
say for themselves is checked row by row (`checks.py`), so that a wrong guess about a layout fails with the file and the
row and is never trained on. Numbers of rows are compared by `validate_stream`, as a warning: mirrors differ.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mllm_cl.data.readers import read_rows
from mllm_cl.data.rows import Row, Rows, assistant_message, user_message
from mllm_cl.errors import DataError

RowFunction = Callable[[Row, int], Row]
Scoring = Literal["official", "corrected"]


@dataclass(frozen=True)
class Files:
    """Where the rows of one split lie.

    Args:
        names (`str` or several): path below the root; of several (mirrors spell them differently) the first that exists.
        images (`str`, defaults to `""`): image folder below the root.
        format (`str`): row format; forced, so that another file in its place is an error.
        count (`int`, *optional*): published number of rows.
    """

    names: str | tuple[str, ...]
    images: str = ""
    format: str = "llava"
    count: int | None = None

    @property
    def candidates(self) -> tuple[str, ...]:
        return (self.names,) if isinstance(self.names, str) else tuple(dict.fromkeys(self.names))

    def locate(self, root: Path) -> Path | None:
        """Returns the first of the files that exists."""
        return next((root / name for name in self.candidates if (root / name).exists()), None)


@dataclass(frozen=True)
class TaskFiles:
    """One task of a family.

    Args:
        name (`str`): task name.
        train, test (`Files`): rows of each split.
        metric (`str`): scorer of the benchmark's own evaluation.
        corrected (`str`, *optional*): scorer to use instead when the official one is defective.
        functions (`Sequence`): `(row, position) -> row`, applied to test rows; they check a row or add scorer fields.
        train_functions (`Sequence`): the same for training rows.
        references (`Callable`, *optional*): root -> function, for what must be read from another file first.
        suffix (`str`, *optional*): instruction that the benchmark's driver appends to test questions; put on a line of
            its own unless it is there already.
    """

    name: str
    train: Files
    test: Files
    metric: str
    corrected: str | None = None
    functions: Sequence[RowFunction] = ()
    train_functions: Sequence[RowFunction] = ()
    references: Callable[[Path], RowFunction] | None = None
    suffix: str | None = None
    max_new_tokens: int | None = None
    description: str = ""


@dataclass(frozen=True)
class Family:
    """One benchmark: who made it, what may be done with it, how it lies on disk.

    Args:
        name (`str`): name in the catalogue.
        title, link, licence, citation (`str`): for the card.
        layout (`str`): the folder tree below the root.
        tasks (`Sequence[TaskFiles]`): in the official order.
        script (`str`): the script in `data_scripts/` that fetches it.
        gaps (`Sequence[str]`): what could not be found out, or is known to be wrong in the published material.
        files (`Sequence[Files]`): what is needed besides the tasks' own files.
    """

    name: str
    title: str
    link: str
    licence: str
    citation: str
    layout: str
    tasks: Sequence[TaskFiles] = ()
    script: str = ""
    gaps: Sequence[str] = field(default_factory=tuple)
    files: Sequence[Files] = ()

    @property
    def needed(self) -> list[Files]:
        """Everything that must lie below the root."""
        return [*self.files, *(split for task in self.tasks for split in (task.train, task.test))]

    def build(self, root: str | Path | None = None, *, scoring: Scoring = "official") -> list[dict[str, Any]]:
        """Returns the tasks in the official order.

        Args:
            root (`str` or `Path`, *optional*): the folder of `layout`; `default_root(name)` when not given.
            scoring (`str`, defaults to `"official"`): `"corrected"` replaces defective official scorers.

        Raises:
            DataError: files are missing (all of them are named) or cannot be read.
        """
        check_option("scoring", scoring, ("official", "corrected"))
        place = self.open(root)
        return [self._task(place, task, scoring) for task in self.tasks]

    def open(self, root: str | Path | None) -> Path:
        """Returns the root after checking that everything needed lies below it.

        Raises:
            DataError: names all missing files.
        """
        place = self.root(root)
        missing = self.missing(place)
        if missing:
            shown = missing[:8] + [f"... and {len(missing) - 8} more"] * (len(missing) > 8)
            raise DataError(
                f"{place}: {self.title} is not complete; missing: {', '.join(shown)}.",
                expected=f"the layout\n{self.layout.strip(chr(10))}",
                fix=f"`python {self.script}` says what to download from where"
                + (f"; the card of {self.name} lists the licence." if self.licence else "."),
            )
        return place

    def missing(self, root: Path) -> list[str]:
        """Returns the names of needed files that are not below the root."""
        return [" or ".join(files.candidates) for files in self.needed if files.locate(root) is None]

    def root(self, root: str | Path | None) -> Path:
        """Returns the folder of this family, given or by default.

        Raises:
            DataError: it does not exist.
        """
        place = default_root(self.name) if root is None else Path(root).expanduser()
        if not place.is_dir():
            raise DataError(
                f"{place}: the folder of {self.title} does not exist.",
                expected=f"the layout\n{self.layout.strip(chr(10))}",
                fix=f"download it (`python {self.script}` says how) or give `root`.",
            )
        return place

    def _task(self, root: Path, task: TaskFiles, scoring: Scoring) -> dict[str, Any]:
        functions = list(task.functions)
        if task.references is not None:
            functions.append(task.references(root))
        train = read_split(root, task.train, task.name, "train")
        test = read_split(root, task.test, task.name, "test", task.suffix)
        for function in task.train_functions:
            train = train.map(function)
        for function in functions:
            test = test.map(function)
        counts = {"train": task.train.count, "test": task.test.count}
        return {
            "name": task.name,
            "train": train,
            "test": test,
            "metric": task.corrected if scoring == "corrected" and task.corrected else task.metric,
            "max_new_tokens": task.max_new_tokens,
            "description": task.description,
            "sizes": {split: count for split, count in counts.items() if count is not None},
        }

    def card(self) -> str:
        """Returns what a person should know before using the data."""
        lines = [f"{self.title} ({self.link})", f"licence: {self.licence}", f"citation: {self.citation}"]
        for number, task in enumerate(self.tasks, start=1):
            counts = " / ".join(f"{files.count:,}" if files.count else "?" for files in (task.train, task.test))
            metric = task.metric + (f" (corrected: {task.corrected})" if task.corrected else "")
            lines.append(f"  {number}. {task.name}: {counts} train/test rows, {metric}")
        lines += ["layout:", self.layout.strip("\n")]
        lines += ["not known or defective:"] * bool(self.gaps) + [f"  * {gap}" for gap in self.gaps]
        return "\n".join([*lines, f"to fetch: python {self.script}"])


def read_split(root: Path, files: Files, task: str, split: str, suffix: str | None = None) -> Rows:
    """Returns the rows of one split; the file is known to exist."""
    path = files.locate(root)
    assert path is not None
    return read_rows(path, format=files.format, image_folder=root / files.images, split=split, suffix=suffix, task=task)


def default_root(name: str) -> Path:
    """Returns the folder where a family is looked for: `$MLLM_CL_DATA/NAME`, else `data/NAME`."""
    return Path(os.environ.get("MLLM_CL_DATA", "data")) / name


def check_option(name: str, value: Any, known: Sequence[Any]) -> None:
    """Raises `DataError` if an option of a builder has a value that is not known."""
    if value not in known:
        raise DataError(f"stream.options.{name}: {value!r} given.", expected="one of: " + ", ".join(map(str, known)))


def question_row(name: str, question: str, images: Sequence[Any], answer: str, split: str, **fields: Any) -> Row:
    """Returns the row of a question with one short answer; training rows end with it."""
    messages = [user_message(question, len(images))]
    if split == "train":
        messages.append(assistant_message(answer))
    return {"id": name, "messages": messages, "images": list(images), "answers": [answer], **fields}  # type: ignore[typeddict-item]


def merged(row: Row, fields: Mapping[str, Any]) -> Row:
    """Returns the row with further fields."""
    return {**row, **fields}  # type: ignore[typeddict-item]
