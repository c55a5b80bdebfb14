"""The row: one question (or conversation) with its images, the unit that every other room passes around.

A row is a plain `dict` in the conversational format of TRL and datasets:

```
{
    "id": "plates/train/17",                                         # unique within a task
    "messages": [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What does the plate say?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "AB 123"}]},   # absent or ignored in test rows
    ],
    "images": [reference, ...],      # one per {"type": "image"} block, in order; see `mllm_cl.data.images`
    "answers": ["AB 123", "AB123"],  # accepted answers of a test row
}
```

Further keys are kept (scorers read them). Images stay *references* until collation: a path, encoded bytes or a PIL
image.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NotRequired, TypedDict, overload

from mllm_cl.data.problems import RowError


class Row(TypedDict):
    """The keys that every row has; rows may carry more (fields of a scorer, `task`, ...)."""

    id: str
    messages: list[dict[str, Any]]
    images: list[Any]
    answers: NotRequired[list[str]]


@dataclass(frozen=True)
class Origin:
    """Where rows were read from, so that a message can name the file and the row.

    Args:
        path (`str`): file, folder or Hub id.
        unit (`str`, defaults to `"row"`): `"line"` where the number is a line number (JSONL).
        numbers (`Sequence[int]`, *optional*): number of each source item; 1, 2, 3, ... when `None`.
        renamed (`Mapping[int, str]`, *optional*): source index -> the id it was given because its own was taken.
        format (`str`, *optional*): row format of the file, and how it was found out.
    """

    path: str
    unit: str = "row"
    numbers: Sequence[int] | None = None
    renamed: Mapping[int, str] | None = None
    format: str | None = None


class Rows(Sequence[Row]):
    """A sequence of rows, converted lazily one by one from whatever holds them.

    Args:
        source (`Sequence`): list, `datasets.Dataset` or anything with `len` and integer indexing.
        convert (`Callable`, *optional*): raw item -> row; the identity by default.
        indices (`Sequence[int]`, *optional*): the view `source[indices]`.
        origin (`Origin`, *optional*): where the source was read from.
    """

    def __init__(
        self,
        source: Sequence[Any],
        convert: Callable[[Any], Row] | None = None,
        indices: Sequence[int] | None = None,
        origin: Origin | None = None,
    ) -> None:
        self._source, self._convert, self._indices, self._origin = source, convert, indices, origin
        self.digest: str | None = None  # kept by `mllm_cl.streams.fingerprint`, so that rows are hashed once

    def __len__(self) -> int:
        return len(self._source) if self._indices is None else len(self._indices)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Rows: ...
    def __getitem__(self, index: int | slice) -> Row | Rows:
        if isinstance(index, slice):
            return self.select(range(*index.indices(len(self))))
        raw = self._source[self._position(index)]
        return raw if self._convert is None else self._convert(raw)

    def __iter__(self) -> Iterator[Row]:
        return (self[index] for index in range(len(self)))

    def select(self, indices: Sequence[int]) -> Rows:
        """Returns the view with these rows, in this order; nothing is copied or converted."""
        if self._indices is not None:
            indices = [self._indices[index] for index in indices]
        return Rows(self._source, self._convert, array("q", indices), self._origin)

    def map(self, function: Callable[[Row, int], Row]) -> Rows:
        """Returns the view whose rows are `function(row, position)`, called when a row is asked for.

        `position` counts the rows of the file from 0, also in a view of it. A `RowError` of the function gets its place.
        """
        whole = Rows(self._source, self._convert, None, self._origin)
        return Rows(_Mapped(whole, function), None, self._indices, self._origin)

    def _position(self, index: int) -> int:
        position = range(len(self))[index]
        return position if self._indices is None else self._indices[position]

    @property
    def origin(self) -> str | None:
        """File, folder or Hub id that the rows were read from; `None` for rows made in memory."""
        return None if self._origin is None else self._origin.path

    @property
    def format(self) -> str | None:
        """Row format of the file, and how it was found out; `None` for rows made in memory."""
        return None if self._origin is None else self._origin.format

    @property
    def unit(self) -> str:
        """What `number` counts: `"row"` or `"line"`."""
        return "row" if self._origin is None else self._origin.unit

    def number(self, index: int) -> int:
        """Returns the number (from 1) of a row in the file it was read from, also in a view of it."""
        position = self._position(index)
        if self._origin is None or self._origin.numbers is None:
            return position + 1
        return self._origin.numbers[position]

    def is_renamed(self, index: int) -> bool:
        """True if the reader had to change the id of this row because an earlier row has the same."""
        return bool(self._origin and self._origin.renamed and self._position(index) in self._origin.renamed)


@dataclass(frozen=True)
class _Mapped(Sequence[Row]):
    rows: Rows
    function: Callable[[Row, int], Row]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index):  # type: ignore[override]
        row = self.rows[index]
        try:
            return self.function(row, index)
        except RowError as error:
            if error.file is not None or self.rows.origin is None:
                raise
            raise error.at(self.rows.origin, self.rows.number(index), self.rows.unit, row["id"]) from error


def text_block(text: str) -> dict[str, str]:
    """Returns a text content block."""
    return {"type": "text", "text": text}


def user_message(text: str, images: int = 0) -> dict[str, Any]:
    """Returns a user turn whose images come first, as every LLaVA-like template expects."""
    return {"role": "user", "content": [{"type": "image"}] * images + [text_block(text)]}


def assistant_message(text: str) -> dict[str, Any]:
    """Returns an assistant turn."""
    return {"role": "assistant", "content": [text_block(text)]}


def message_text(message: Mapping[str, Any]) -> str:
    """Returns the text of a message, images left out."""
    content = message["content"]
    if isinstance(content, str):
        return content
    return "".join(block["text"] for block in content if block["type"] == "text")


def is_answered(row: Mapping[str, Any]) -> bool:
    """True if the last turn is the assistant's."""
    return bool(row["messages"]) and row["messages"][-1]["role"] == "assistant"


def inquiry_of(row: Mapping[str, Any]) -> Row:
    """Returns the row without its final answer: the inquiry that a model is asked at test time."""
    messages = row["messages"][:-1] if is_answered(row) else row["messages"]
    return {**row, "messages": list(messages)}  # type: ignore[typeddict-item]


def reference_answers(row: Mapping[str, Any]) -> list[str]:
    """Returns the accepted answers of a row: its `answers`, or else the text of its final assistant turn."""
    answers = row.get("answers")
    if answers:
        return list(answers)
    return [message_text(row["messages"][-1])] if is_answered(row) else []
