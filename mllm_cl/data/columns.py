"""Columns under other names: `columns: {image_path: image, problem: question}` of a task in a stream file.

Only whole columns are renamed; what they hold must be what the row format expects.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mllm_cl.data.dataset_info import Described
from mllm_cl.data.sources import JsonSource, TableSource
from mllm_cl.errors import DataError, suggest

KEYS = (
    "id", "image", "images", "messages", "conversations", "conversation", "texts", "prompt", "completion", "query",
    "question", "response", "answer", "answers", "instruction", "input", "output", "text", "system", "history", "objects",
)  # fmt: skip
_SAMPLE = 1000  # rows in which a column must appear at least once


@dataclass(frozen=True)
class Renamed(Sequence[Any]):
    """A source whose rows have some columns under other names.

    Args:
        source: the rows as they are stored.
        columns (`dict`): column of the file -> key that a row format reads, which replaces such a key of the row.
    """

    source: JsonSource | TableSource | Described
    columns: Mapping[str, str]

    @property
    def unit(self) -> str:
        return self.source.unit

    @property
    def numbers(self) -> Sequence[int]:
        return self.source.numbers

    @property
    def renamed(self) -> Mapping[int, str]:
        return self.source.renamed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index):  # type: ignore[override]
        raw = self.source[index]
        if not isinstance(raw, Mapping):
            return raw
        row = {key: value for key, value in raw.items() if key not in self.columns}
        row.update({self.columns[key]: value for key, value in raw.items() if key in self.columns})
        return row


def rename_columns(
    source: JsonSource | TableSource | Described, columns: Mapping[str, str], place: str
) -> JsonSource | TableSource | Described | Renamed:
    """Returns the source with its columns renamed; the source itself if there is nothing to rename.

    Raises:
        DataError: a new name that no format reads, two columns with one new name, or a column that no row has.
    """
    for column, key in columns.items():
        if key not in KEYS:
            raise DataError(f"{place}: columns.{column}: no row format reads {key!r}.", expected=suggest(key, KEYS))
    if len(set(columns.values())) < len(columns):
        raise DataError(f"{place}: columns: two columns would get one name.", fix="give each its own.")
    missing, seen = set(columns), dict[str, None]()
    for index in range(min(len(source), _SAMPLE) if columns else 0):
        try:
            raw = source[index]
        except DataError:
            continue  # validation, which comes later, names it
        if isinstance(raw, Mapping):
            seen.update(dict.fromkeys(map(str, raw)))
            missing -= set(raw)
        if not missing:
            break
    if missing:
        column = sorted(missing)[0]
        raise DataError(f"{place}: columns: no row has {column!r}.", expected=suggest(column, seen))
    return Renamed(source, columns) if columns else source
