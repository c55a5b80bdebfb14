"""Where raw rows come from: JSON files read by byte offset, and tables that datasets memory-maps.

A JSON or JSONL file is parsed once, to find where each row starts and which ids it uses; nothing of the parse is kept,
so a 665k-row file costs a few tens of MiB. A row is parsed again when it is asked for.
"""

from __future__ import annotations

import codecs
import json
import re
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mllm_cl.data.blocks import BLOCK_BYTES, BlockSource
from mllm_cl.data.content import own_id
from mllm_cl.data.heads import check_head
from mllm_cl.data.problems import RowError
from mllm_cl.errors import DataError
from mllm_cl.parse import parse_json

_CHUNK = 1 << 22  # characters; larger than any sane row
_TABLE_ROWS = 10_000  # rows of a table whose ids are read at once
_SPACE = re.compile(r"[ \t\r\n]*")
_UTF8_FIX = "save the file as UTF-8."


class Labels:
    """Sorts rows into named parts while a file is parsed: the positions of each label, in order of first appearance.

    Args:
        label_of (`Callable`): raw row -> label. A row that is broken gets the label `None` and is left out.
    """

    def __init__(self, label_of: Callable[[Any], str | None]) -> None:
        self.label_of = label_of
        self.parts: dict[str, array] = {}
        self.left_out = 0

    def add(self, index: int, raw: Any) -> None:
        """Notes the label of the row at `index`."""
        label = self.label_of(raw)
        if label is None:
            self.left_out += 1
        else:
            self.parts.setdefault(label, array("q")).append(index)


class IdBook:
    """Finds ids that are used twice, with 16 bytes per row: the second row called `x` becomes `x#2`.

    Only hashes are kept while a file is read; the ids of rows with equal hashes are read again and compared.
    """

    def __init__(self) -> None:
        self._hashes, self._positions = array("q"), array("q")

    def add(self, index: int, raw: Any) -> None:
        """Notes the id of the row at `index`, if it brings one."""
        row_id = self._id(raw)
        if row_id is not None:
            self._hashes.append(hash(row_id))
            self._positions.append(index)

    def renamed(self, read: Callable[[int], Any]) -> dict[int, str]:
        """Returns the new ids of rows whose own are taken, by index; `read` gives a raw row once more."""
        hashes = np.frombuffer(self._hashes, dtype=np.int64) if self._hashes else np.zeros(0, np.int64)
        order = np.sort(hashes)
        twice = np.unique(order[1:][order[1:] == order[:-1]])
        renamed: dict[int, str] = {}
        seen: set[str] = set()
        for place in np.flatnonzero(np.isin(hashes, twice)).tolist() if len(twice) else []:
            index = self._positions[place]
            row_id = self._id(read(index))
            if row_id in seen:
                copy = 2
                while f"{row_id}#{copy}" in seen or _is_in(order, hash(f"{row_id}#{copy}")):
                    copy += 1
                row_id = renamed[index] = f"{row_id}#{copy}"
            seen.add(str(row_id))
        return renamed

    @staticmethod
    def _id(raw: Any) -> str | None:
        try:
            return own_id(raw) if isinstance(raw, dict) else None
        except RowError:
            return None  # reported when the row is read


def _is_in(ordered: np.ndarray, value: int) -> bool:
    place = int(np.searchsorted(ordered, value))
    return place < len(ordered) and int(ordered[place]) == value


class JsonSource(BlockSource):
    """The rows of a `.json` list or a `.jsonl` file, read from disk one by one.

    Args:
        path (`Path`): the file. Nothing is kept open, so the source can be sent to loader workers.
        labels (`Labels`, *optional*): is told every row, so that a file can be sorted into parts in the same pass.

    Raises:
        DataError: the file is empty, not UTF-8, not a list of rows, or (JSON list) has a syntax error.
    """

    def __init__(self, path: Path, labels: Labels | None = None) -> None:
        self.path = path
        self.starts, self.lengths, numbers = array("q"), array("q"), array("q")
        book = IdBook()
        is_lines = _is_lines(path)
        found = _scan_lines(path) if is_lines else _scan_list(path)
        for index, (start, length, number, raw) in enumerate(found):
            self.starts.append(start)
            self.lengths.append(length)
            numbers.append(number)
            book.add(index, raw)
            if labels is not None:
                labels.add(index, raw)
        if not self.starts:
            raise DataError(f"{path}: the file has no rows.", expected="at least one row", fix="fill or remove it.")
        self.unit = "line" if is_lines else "row"
        self.numbers: Sequence[int] = numbers if is_lines else range(1, len(self.starts) + 1)
        self.renamed = book.renamed(self.__getitem__)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index):  # type: ignore[override]
        return _parse_row(self.take(index))

    def read_items(self, start: int, stop: int) -> list[bytes]:
        begin, last = self.starts[start], start
        while last + 1 < stop and self.starts[last + 1] + self.lengths[last + 1] - begin <= BLOCK_BYTES:
            last += 1
        with self.path.open("rb") as file:
            file.seek(begin)
            data = file.read(self.starts[last] + self.lengths[last] - begin)
        places = (self.starts[index] - begin for index in range(start, last + 1))
        return [data[place : place + self.lengths[index]] for index, place in enumerate(places, start)]


def _parse_row(data: bytes) -> Any:
    """Returns the value of one row.

    Raises:
        RowError: not UTF-8 or not JSON.
    """
    try:
        return parse_json(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RowError(f"not UTF-8 ({error.reason}).", kind="not_utf8", fix=_UTF8_FIX) from error
    except ValueError as error:
        raise RowError(
            f"not JSON ({error}).", kind="broken_json", expected="one JSON object", fix="correct or remove this row."
        ) from error


def _is_lines(path: Path) -> bool:
    """True for JSONL, also when such a file is called `.json`."""
    with path.open("rb") as file:
        head = file.read(1 << 16)
        check_head(path, head)
        if path.suffix.lower() in (".jsonl", ".ndjson"):
            return True
        head = head.removeprefix(codecs.BOM_UTF8).lstrip()
        if head.startswith(b"["):
            return False
        if head.startswith(b"{"):
            file.seek(0)
            line = file.readline().removeprefix(codecs.BOM_UTF8)
            try:
                first = parse_json(line)
            except ValueError:
                first = None
            if first is not None and (file.readline().strip() or not _lists_of_rows(first)):
                return True
            keys = _lists_of_rows(first) if isinstance(first, dict) else []
            hint = (
                f"keep only the list under `{keys[0]}`."
                if keys
                else "write the rows as a list, or one per line in a `.jsonl` file."
            )
            raise DataError(f"{path}: the top level is an object.", expected="a list of rows", fix=hint)
    start = head[:20].decode("utf-8", "replace")
    raise DataError(
        f"{path}: the file starts with {start!r}.",
        expected="a JSON list `[...]` of rows",
        fix="write it as JSON or JSONL.",
    )


def _lists_of_rows(value: dict[str, Any]) -> list[str]:
    """The keys that hold rows rather than turns: lists of objects without a role."""
    return [
        key
        for key, rows in value.items()
        if isinstance(rows, list) and rows and isinstance(rows[0], dict) and not {"role", "from"} & set(rows[0])
    ]


def _scan_lines(path: Path) -> Iterator[tuple[int, int, int, Any]]:
    start = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            data = line
            if number == 1 and data.startswith(codecs.BOM_UTF8):
                data = data[len(codecs.BOM_UTF8) :]
            offset = start + len(line) - len(data)
            start += len(line)
            if not data.strip():
                continue
            try:
                raw = _parse_row(data)
            except RowError:
                raw = None  # reported when the row is read
            yield offset, len(data), number, raw


def _scan_list(path: Path) -> Iterator[tuple[int, int, int, Any]]:
    """Yields byte offset, byte length, number and value of each element of a JSON list, in bounded memory."""
    text = _Window(path)
    text.skip_space()
    text.expect("[")
    number = 0
    while True:
        text.skip_space()
        if text.peek() == "]" and number == 0:
            break
        start = text.byte
        number += 1
        value = text.decode(number)
        yield start, text.byte - start, number, value
        text.skip_space()
        if text.peek() == "]":
            break
        text.expect(",", number)
    text.expect("]")
    text.skip_space()
    if text.peek():
        raise text.broken("the list ends, but the file goes on")


class _Window:
    """A moving window over a UTF-8 text file that knows its byte position."""

    def __init__(self, path: Path) -> None:
        self.path, self.file = path, path.open("rb")
        self.decoder, self.parser = codecs.getincrementaldecoder("utf-8")(), json.JSONDecoder()
        self.buffer, self.position, self.read, self.size = "", 0, 0, _CHUNK
        self.is_complete = False
        self.byte = 0
        self.fill()
        if self.buffer.startswith("\ufeff"):
            self.advance(1)

    def fill(self) -> None:
        data = self.file.read(self.size)
        self.is_complete = not data
        try:
            self.buffer = self.buffer[self.position :] + self.decoder.decode(data, final=self.is_complete)
        except UnicodeDecodeError as error:
            at = self.read + error.start
            raise DataError(f"{self.path}: not UTF-8 near byte {at}.", expected="UTF-8", fix=_UTF8_FIX) from error
        self.read, self.position = self.read + len(data), 0
        if self.is_complete:
            self.file.close()

    def advance(self, end: int) -> None:
        piece = self.buffer[self.position : end]
        self.byte += len(piece) if piece.isascii() else len(piece.encode())
        self.position = end

    def peek(self) -> str:
        return self.buffer[self.position : self.position + 1]

    def skip_space(self) -> None:
        while True:
            match = _SPACE.match(self.buffer, self.position)
            self.advance(match.end() if match else self.position)
            if self.position < len(self.buffer) or self.is_complete:
                return
            self.fill()

    def expect(self, character: str, number: int | None = None) -> None:
        if self.peek() != character:
            place = "" if number is None else f" after row {number}"
            found = repr(self.peek()) if self.peek() else "the end of the file"
            raise self.broken(f"{character!r} expected{place}, {found} found")
        self.advance(self.position + 1)

    def decode(self, number: int) -> Any:
        while True:
            try:
                value, end = self.parser.raw_decode(self.buffer, self.position)
            except json.JSONDecodeError as error:
                is_certain = not error.msg.startswith("Unterminated") and error.pos < len(self.buffer) - 64
                if is_certain or self.is_complete:
                    self.advance(min(error.pos, len(self.buffer)))
                    raise self.broken(f"row {number}: {error.msg}") from error
            except (ValueError, RecursionError) as error:
                raise self.broken(f"row {number}: {error}") from error
            else:
                if end < len(self.buffer) or self.is_complete:
                    self.advance(end)
                    self.size = _CHUNK
                    return value
            self.fill()
            self.size *= 2  # a row longer than the window: do not start over too often

    def broken(self, what: str) -> DataError:
        self.file.close()
        with self.path.open("rb") as file:
            head = file.read(self.byte)
        line, column = head.count(b"\n") + 1, self.byte - (head.rfind(b"\n") + 1) + 1
        return DataError(
            f"{self.path}, line {line}, column {column}: not JSON ({what}).",
            expected="a JSON list of rows",
            fix="correct the file there (a missing comma, quote or bracket?).",
        )


class TableSource(BlockSource):
    """The rows of a `datasets.Dataset`, with encoded images left encoded.

    Args:
        dataset (`datasets.Dataset`): memory-mapped by datasets; rows are read when asked for.
    """

    unit = "row"

    def __init__(self, dataset: Any) -> None:
        for name, feature in dataset.features.items():
            encoded = _without_decoding(feature)
            if encoded != feature:
                dataset = dataset.cast_column(name, encoded)
        self.dataset = dataset
        self.most = max(1, int(BLOCK_BYTES * len(dataset) / max(1, dataset.data.nbytes)))  # rows of a block
        self.numbers: Sequence[int] = range(1, len(dataset) + 1)
        book = IdBook()
        keys = [key for key in ("id", "question_id") if key in dataset.column_names]
        if keys:
            columns = dataset.select_columns(keys).with_format("arrow")
            index = 0
            for table in columns.iter(batch_size=_TABLE_ROWS):
                for raw in table.to_pylist():
                    book.add(index, raw)
                    index += 1
        self.renamed = book.renamed(lambda index: dataset[index])

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index):  # type: ignore[override]
        return self.take(index)

    def read_items(self, start: int, stop: int) -> list[Any]:
        if stop == start + 1:
            return [self.dataset[start]]
        columns = self.dataset[start : min(stop, start + self.most)]
        return [dict(zip(columns, cells)) for cells in zip(*columns.values())]


def _without_decoding(feature: Any) -> Any:
    """Returns the feature with every image in it, at any depth, switched to encoded bytes."""
    from datasets import Image, LargeList, List

    if isinstance(feature, Image):
        return Image(decode=False)
    if isinstance(feature, (List, LargeList)):
        inner = _without_decoding(feature.feature)
        if inner == feature.feature:
            return feature
        return List(inner, length=feature.length) if isinstance(feature, List) else LargeList(inner)
    if isinstance(feature, dict):
        return {key: _without_decoding(value) for key, value in feature.items()}
    return feature
