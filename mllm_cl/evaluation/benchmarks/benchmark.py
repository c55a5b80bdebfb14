"""What a general benchmark is: where its rows lie, how one becomes a question, which scorer it has.

Rows are looked for in `$MLLM_CL_DATA/NAME` (or `data/NAME`): parquet, JSON lines, a folder of `save_to_disk`, with the
columns of the Hub data set. Without such a folder the Hub id is used. A benchmark with two tables has a folder with a
subfolder for each. Nothing is converted before it is asked for, and no image is decoded.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllm_cl.data.raw import only_columns, raw_rows
from mllm_cl.data.rows import Row, Rows, assistant_message, user_message
from mllm_cl.errors import DataError, suggest
from mllm_cl.evaluation.benchmarks.prompts import PROMPTS

Raw = Mapping[str, Any]


@dataclass(frozen=True)
class Question:
    """What is made of one raw row.

    Args:
        text: the question without image marks, in the words of the prompt profile.
        answers: what is accepted.
        images: references.
        fields: what the scorer needs besides, such as `choices`.
    """

    text: str
    answers: Sequence[str]
    images: Sequence[Any]
    fields: Mapping[str, Any]


@dataclass(frozen=True)
class Benchmark:
    """One general benchmark; calling it returns its rows.

    Args:
        name: in the catalogue; also the name of its local folder.
        hub_id: `owner/name:config@split`.
        columns: those that are read; their absence is an error that names them.
        convert: `(raw row, prompt profile) -> questions`; usually one.
        keep: which raw rows belong to it.
        parts: how many questions a raw row is, where `convert` returns several.
        scan: the columns that `keep` and `parts` read of every row.
        tables: further tables by name -> Hub id; `prepare` gets them.
        prepare: `tables -> function on raw rows`, for what must be looked up in another table.
    """

    name: str
    hub_id: str
    columns: Sequence[str]
    convert: Callable[[Raw, str], Sequence[Question]]
    keep: Callable[[Raw], bool] | None = None
    parts: Callable[[Raw], int] | None = None
    scan: Sequence[str] = ()
    tables: Mapping[str, str] | None = None
    prepare: Callable[[Mapping[str, Sequence[Raw]]], Callable[[Raw], Raw]] | None = None

    def __call__(self, split: str = "test", *, prompts: str = "llava_v1", root: str | Path | None = None) -> Rows:
        """Returns the rows.

        Args:
            split: only `test`, the split that papers report; it must not be used to choose settings.
            prompts: a key of `mllm_cl.evaluation.benchmarks.prompts.PROMPTS`.
            root: folder to look in instead of `$MLLM_CL_DATA/NAME`.

        Raises:
            DataError: no such split or prompt profile, nothing readable, or columns are missing.
        """
        if split != "test":
            raise DataError(
                f"{self.name}: has no {split} rows.", expected="test", fix="choose settings on the tasks' own rows."
            )
        if prompts not in PROMPTS:
            raise DataError(
                f"{self.name}: no prompt profile is called {prompts!r}.", expected=suggest(prompts, PROMPTS)
            )
        main = self._open(self.hub_id, None, root)
        self._check(main)
        change: Callable[[Raw], Raw] = lambda raw: raw  # noqa: E731
        if self.prepare is not None:
            change = self.prepare(
                {name: self._open(hub_id, name, root) for name, hub_id in (self.tables or {}).items()}
            )
        return Rows(_Questions(self, main, change, prompts))

    def place(self, hub_id: str, table: str | None, root: str | Path | None) -> str:
        """Returns the local folder if it is there, else the Hub id."""
        folder = Path(root) if root is not None else Path(os.environ.get("MLLM_CL_DATA", "data")) / self.name
        if root is None and not folder.exists():
            return hub_id
        own = folder / (table or "main")
        return str(own if own.exists() else folder)

    def _open(self, hub_id: str, table: str | None, root: str | Path | None) -> Sequence[Raw]:
        place = self.place(hub_id, table, root)
        split = hub_id.rpartition("@")[2]
        return raw_rows(place, split=split)

    def _check(self, rows: Sequence[Raw]) -> None:
        missing = [name for name in self.columns if name not in rows[0]]
        if missing:
            raise DataError(
                f"{self.name}: the rows have no {', '.join(missing)}.",
                expected=f"the columns of {self.hub_id}: {', '.join(self.columns)}",
                fix=f"put the data set into $MLLM_CL_DATA/{self.name} as it is on the Hub.",
            )


class _Questions(Sequence[Row]):
    """The converted view of a table. Rows that become several questions are counted once, at the start."""

    def __init__(self, benchmark: Benchmark, table: Sequence[Raw], change: Callable[[Raw], Raw], prompts: str) -> None:
        self.benchmark, self.table, self.change, self.prompts = benchmark, table, change, prompts
        self.places = _places(benchmark, table)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index):  # type: ignore[override]
        number, part = self.places[index]
        raw = self.change(self.table[number])
        question = self.benchmark.convert(raw, self.prompts)[part]
        messages = [user_message(question.text, len(question.images))]
        if question.answers:
            messages.append(assistant_message(question.answers[0]))
        return {
            "id": f"{self.benchmark.name}/{number}" + (f"/{part}" if part else ""),
            "messages": messages,
            "images": list(question.images),
            "answers": list(question.answers),
            **question.fields,
        }


def _places(benchmark: Benchmark, table: Sequence[Raw]) -> list[tuple[int, int]]:
    """Returns (number of the raw row, number of its question) of every question."""
    if benchmark.keep is None and benchmark.parts is None:
        return [(index, 0) for index in range(len(table))]
    seen = only_columns(table, benchmark.scan)
    found = []
    for index in range(len(table)):
        raw = seen[index]
        if benchmark.keep is None or benchmark.keep(raw):
            found += [(index, part) for part in range(1 if benchmark.parts is None else benchmark.parts(raw))]
    return found


def as_list(value: Any) -> list[Any]:
    """Returns a column of one value, several or none as a list."""
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]
