"""Reads rows from whatever a user has: JSON, JSONL, parquet, a folder of datasets, a Hub id.

`read_rows` finds the rows and their format; it opens no image and converts a row only when it is asked for. Hence a
mistake in one row is a `RowError` when that row is read (`mllm_cl.data.validate` lists them all), while a file that
cannot be read at all is a `DataError` at once.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllm_cl.data.columns import Renamed, rename_columns
from mllm_cl.data.content import own_id
from mllm_cl.data.dataset_info import FILE_NAME, Described, open_described
from mllm_cl.data.formats import FORMATS, check_format, convert_row, detect_row_format
from mllm_cl.data.problems import RowError
from mllm_cl.data.rows import Origin, Row, Rows
from mllm_cl.data.sources import JsonSource, Labels, TableSource
from mllm_cl.errors import DataError

Source = JsonSource | TableSource | Described | Renamed

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(:[\w.-]+)?")
_SPLIT_IN_NAME = re.compile(r"(?:^|[/_.-])(train|test|validation|valid|val|dev)(?=[/_.-]|$)")
_SPLIT_NAMES = {"validation": ("validation", "valid", "val", "dev")}
_SUFFIXES = (".json", ".jsonl", ".ndjson", ".parquet", ".arrow")
_SAMPLE = 1000  # rows to look at, at most, until one reveals its format


def read_rows(
    path: str | Path,
    *,
    format: str = "auto",
    image_folder: str | Path | None = None,
    split: str = "train",
    suffix: str | None = None,
    task: str = "task",
    columns: Mapping[str, str] | None = None,
) -> Rows:
    """Returns the rows of a file, a folder or a Hub data set, converted lazily.

    Args:
        path (`str` or `Path`): `.json` (a list, or JSONL under that name), `.jsonl`, `.parquet`, `.arrow`; a folder
            written by `save_to_disk`, of parquet shards, or anything `datasets.load_dataset` reads; a Hub id
            `owner/name` or `owner/name:config`. `@name` at the end picks a split by name: `owner/name@testdev`, or a data
            set that LLaMA-Factory's `dataset_info.json` describes: `data/dataset_info.json@name`.
        format (`str`, defaults to `"auto"`): a key of `mllm_cl.data.formats.FORMATS`; `"auto"` looks at the first rows.
        image_folder (`str` or `Path`, *optional*): what relative image paths are relative to; by default the
            folder of `path`.
        split (`str`, defaults to `"train"`): which split of a data set that has several, and whether rows get `answers`
            (every split but `"train"`).
        suffix (`str`, *optional*): instruction put on a line of its own after the last user turn, unless already there.
        task (`str`, defaults to `"task"`): part of the id `task/split/index` of rows that bring none.
        columns (`dict`, *optional*): column of the file -> key that the format reads, as in `{"image_path": "image"}`.

    Raises:
        DataError: nothing readable at `path`, no rows, an unknown format, or a column that no row has.

    Example:

    ```python
    >>> from mllm_cl.data.readers import read_rows
    >>> rows = read_rows("plates/test.jsonl", split="test")  # doctest: +SKIP
    >>> rows[0]["answers"]  # doctest: +SKIP
    ['AB 123']

    ```
    """
    check_format(format)
    source, place, root = _open_source(path, split)
    source = rename_columns(source, columns or {}, place)
    format, reason = _detect(source, place) if format == "auto" else (format, "as asked for")
    root = str(image_folder) if image_folder is not None else root
    return _rows_of(_Reader(source, place, format, f"{task}/{split}", split, root, suffix), reason)


def _rows_of(reader: _Reader, reason: str) -> Rows:
    source = reader.source
    found = f"{reader.format} ({reason})"
    return Rows(reader, origin=Origin(reader.place, source.unit, source.numbers, source.renamed, found))


def read_rows_by(
    path: str | Path,
    label_of: Callable[[Any], str | None],
    *,
    format: str = "auto",
    image_folder: str | Path | None = None,
    split: str = "train",
    task: str = "task",
    suffix: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> dict[str, Rows]:
    """Returns the rows of one file in parts, found in the pass that indexes it.

    Args:
        path, format, image_folder, split, suffix, columns: as in `read_rows`.
        label_of (`Callable`): raw row -> name of its part, or `None` to leave it out. Rows of a part `NAME/test` or
            `NAME/validation` get `answers` as those of such a split do.
        task (`str`): part of the id of rows that bring none.

    Raises:
        DataError: as `read_rows`.
    """
    check_format(format)
    labels = Labels(label_of)
    source, place, root = _open_source(path, split, labels)
    if isinstance(source.source if isinstance(source, Described) else source, TableSource):
        for index in range(len(source)):
            labels.add(index, source[index])
    source = rename_columns(source, columns or {}, place)
    format, reason = _detect(source, place) if format == "auto" else (format, "as asked for")
    root = str(image_folder) if image_folder is not None else root
    parts: dict[str, Rows] = {}
    for name, positions in labels.parts.items():
        kind = name.rsplit("/", 1)[-1]
        kind = kind if kind in ("train", "validation", "test") else split
        reader = _Reader(source, place, format, f"{task}/{name}", kind, root, suffix)
        parts[name] = _rows_of(reader, reason).select(positions)
    return parts


def detect_format(path: str | Path, *, split: str = "train") -> tuple[str, str]:
    """Returns the format that `format="auto"` would choose for a file, and the reason.

    Raises:
        DataError: the file cannot be read, or its rows look like no known format.
    """
    source, place, _ = _open_source(path, split)
    return _detect(source, place)


@dataclass(frozen=True)
class _Reader(Sequence[Row]):
    """The converted view of a source. Plain data and no open files: loader workers may copy it."""

    source: Source
    place: str
    format: str
    prefix: str
    split: str
    root: str
    suffix: str | None

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index):  # type: ignore[override]
        raw = None
        try:
            raw = self.source[index]
            row = convert_row(
                raw,
                format=self.format,
                default_id=f"{self.prefix}/{index}",
                split=self.split,
                image_root=self.root,
                suffix=self.suffix,
            )
        except RowError as error:
            row_id = self.source.renamed.get(index) or _known_id(raw)
            raise error.at(self.place, self.source.numbers[index], self.source.unit, row_id) from error
        if index in self.source.renamed:
            row["id"] = self.source.renamed[index]
        return row


def _known_id(raw: Any) -> str | None:
    try:
        return own_id(raw) if isinstance(raw, Mapping) else None
    except RowError:
        return None


def _detect(source: Source, place: str) -> tuple[str, str]:
    described = source.source if isinstance(source, Renamed) else source
    if isinstance(described, Described):
        return described.format, f"as {FILE_NAME} says"
    first: RowError | None = None
    keys: list[str] = []
    for index in range(min(len(source), _SAMPLE)):
        try:
            raw = source[index]
        except RowError as error:
            first = first or error.at(place, source.numbers[index], source.unit)
            continue
        if not isinstance(raw, Mapping):
            continue
        found = detect_row_format(raw)
        if found:
            return found[0], f"{source.unit} {source.numbers[index]}: {found[1]}"
        keys = keys or list(map(str, raw))
    if first and not keys:
        raise first
    what = f"rows with the keys {', '.join(keys)}" if keys else "rows that are no objects"
    known = "\n    ".join(f"{name}: {style.description}" for name, style in FORMATS.items())
    raise DataError(
        f"{place}: {what} are of no known format.",
        expected=f"one of\n    {known}",
        fix="rename the keys, or convert the file to `messages` and `images`.",
    )


def _open_source(
    path: str | Path, split: str, labels: Labels | None = None
) -> tuple[JsonSource | TableSource | Described, str, str]:
    """Returns the source, its name for messages and the folder for relative image paths."""
    text = str(path)
    target = Path(text).expanduser()
    wanted = None
    if not target.exists() and "@" in text.rsplit("/", 1)[-1]:
        text, wanted = text.rsplit("@", 1)
        target = Path(text).expanduser()
    try:
        if target.name == FILE_NAME and target.is_file():
            return _open_described(target, wanted, labels), text, str(target.parent)
        if target.is_file():
            return _open_file(target, labels), str(target), str(target.parent)
        if target.is_dir():
            return _open_folder(target, split, wanted), str(target), str(target)
    except (OSError, PermissionError) as error:
        raise DataError(f"{target}: cannot be read ({error}).", fix="check the file and its permissions.") from error
    hub_id = hub_id_of(text)
    if hub_id is None:
        raise _missing(target)
    name, _, config = hub_id.partition(":")
    return TableSource(_load(name, split, wanted, text, config or None)), text, ""


def _open_described(path: Path, name: str | None, labels: Labels | None) -> Described:
    def open_file(target: str, split: str | None) -> tuple[Any, str]:
        source, place, _ = _open_source(target, split or "train", labels)
        return source, place

    def open_hub(hub_id: str, subset: str | None, split: str) -> TableSource:
        return TableSource(_load(hub_id, split, None, hub_id, subset))

    return open_described(path, name, open_file, open_hub)


def hub_id_of(text: str) -> str | None:
    """Returns the Hub id that a path which does not exist can only mean, or `None` if it looks like a local path."""
    path = Path(text)
    is_local = path.suffix.lower() in _SUFFIXES or text.startswith((".", "~")) or path.is_absolute()
    if is_local or not _HUB_ID.fullmatch(text) or path.parent.is_dir():
        return None
    return text


def _missing(target: Path) -> DataError:
    if target.parent.is_dir():
        names = sorted(item.name for item in target.parent.iterdir())
        close = difflib.get_close_matches(target.name, names, n=1)
        fix = f"did you mean {str(target.parent / close[0])!r}?" if close else "correct the path."
    else:
        fix = f"the folder {str(target.parent)!r} does not exist either; correct the path."
    return DataError(f"{target}: the file does not exist.", expected="a file, a folder or a Hub id owner/name", fix=fix)


def _open_file(path: Path, labels: Labels | None = None) -> JsonSource | TableSource:
    suffix = path.suffix.lower()
    if suffix in (".json", ".jsonl", ".ndjson"):
        return JsonSource(path, labels)
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty.", expected="a list of rows", fix="fill or remove it.")
    if suffix == ".parquet":
        return _table(path, lambda: _parquet([path]))
    if suffix == ".arrow":
        from datasets import Dataset

        return _table(path, lambda: Dataset.from_file(str(path)))
    raise DataError(
        f"{path}: unknown kind of file {suffix or path.name!r}.",
        expected=", ".join(_SUFFIXES) + ", a folder or a Hub id",
        fix="convert it, for example with `datasets.load_dataset(...).to_json(...)`.",
    )


def _parquet(paths: Sequence[Path]) -> Any:
    from datasets import Dataset

    return Dataset.from_parquet([str(path) for path in paths])


def _open_folder(path: Path, split: str, wanted: str | None) -> TableSource:
    from datasets import load_from_disk

    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        loaded = _guard(path, lambda: load_from_disk(str(path)))
        return _table(path, lambda: _pick(loaded, split, wanted, str(path)) if isinstance(loaded, dict) else loaded)
    shards = sorted(path.rglob("*.parquet"))
    if shards:
        return _table(path, lambda: _parquet(_shards_of(shards, path, wanted or split)))
    if not any(path.iterdir()):
        raise DataError(f"{path}: the folder is empty.", expected="parquet shards or a datasets folder")
    return TableSource(_load(str(path), split, wanted, str(path), None))


def _shards_of(shards: Sequence[Path], folder: Path, split: str) -> Sequence[Path]:
    """Keeps the shards whose names carry the split (`train-00000-of-00002.parquet`), if names carry splits at all."""
    named: dict[Path, str] = {}
    for shard in shards:
        match = _SPLIT_IN_NAME.search(str(shard.relative_to(folder)))
        if match:
            named[shard] = match.group(1)
    if not named:
        return shards
    wanted = _SPLIT_NAMES.get(split, (split,))
    kept = [shard for shard in shards if named.get(shard) in wanted]
    if not kept:
        raise _no_split(str(folder), split, sorted(set(named.values())))
    return kept


def _load(name: str, split: str, wanted: str | None, place: str, config: str | None) -> Any:
    import datasets

    loaded = _guard(place, lambda: datasets.load_dataset(name, config))
    return _pick(loaded, split, wanted, place)


def _pick(loaded: Any, split: str, wanted: str | None, place: str) -> Any:
    for name in (wanted,) if wanted else _SPLIT_NAMES.get(split, (split,)):
        if name in loaded:
            return loaded[name]
    raise _no_split(place, wanted or split, sorted(loaded))


def _no_split(place: str, split: str, known: Sequence[str]) -> DataError:
    return DataError(
        f"{place}: it has no split {split!r}.",
        expected="one of: " + ", ".join(known),
        fix=f"name one with `@`, e.g. `{place}@{known[0]}`.",
    )


def _table(place: Path, make: Any) -> TableSource:
    dataset = _guard(place, make)
    if not len(dataset):
        raise DataError(f"{place}: the file has no rows.", expected="at least one row", fix="fill or remove it.")
    return TableSource(dataset)


def _guard(place: str | Path, make: Any) -> Any:
    """Calls into datasets, whose many exceptions (and those of pyarrow and the Hub) all mean: not readable."""
    try:
        return make()
    except DataError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        if isinstance(place, str) and not Path(place).exists():
            raise DataError(
                f"{place}: neither a local path nor a data set that could be loaded from the Hub ({reason}).",
                expected="an existing file or folder, or a public Hub id and a network connection",
                fix="correct the path; for the Hub check the name, the connection and (gated data) `hf auth login`.",
            ) from error
        raise DataError(
            f"{place}: datasets cannot read it ({reason}).", fix="check that the files are complete, or convert them."
        ) from error
