"""`dataset_info.json`, LLaMA-Factory's description of data files: which file, which columns, which role names.

`data/dataset_info.json@NAME` names one entry where a path is expected. Rows come out in the format `alpaca` or
`sharegpt`, under our names of the keys; columns that an entry does not name are not used for prompts.

Source of the keys and their defaults: the readme of LLaMA-Factory's `data` folder (github.com/hiyouga/LLaMA-Factory).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllm_cl.data.problems import RowError
from mllm_cl.data.sources import JsonSource, TableSource
from mllm_cl.errors import DataError, suggest
from mllm_cl.parse import parse_json

FILE_NAME = "dataset_info.json"
_ALPACA = {"prompt": "instruction", "query": "input", "response": "output", "history": "history"}
_SHARED = {"system": "system", "images": "images", "videos": "videos", "audios": "audios", "tools": "tools"}
_OURS = {*_ALPACA.values(), *_SHARED, "messages", "conversations", "image"}  # keys that our formats read
_DEFAULTS = {"prompt": "instruction", "query": "input", "response": "output", "messages": "conversations"}
_TAGS = {
    "role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt", "system_tag": "system",
    "observation_tag": "observation", "function_tag": "function_call",
}  # fmt: skip
_REFUSED = {
    "ranking": "preference pairs are no rows to learn answers from",
    "ms_hub_url": "data sets of ModelScope are not fetched; download it and give `file_name`",
    "script_url": "loading scripts are not run; write the rows to a file and give `file_name`",
    "cloud_file_name": "cloud storage is not read; download the file and give `file_name`",
    "num_samples": "use `limit` of the recipe's `stream` section",
}
Open = Callable[[str, str | None], tuple[JsonSource | TableSource, str]]


@dataclass(frozen=True)
class Described(Sequence[Any]):
    """A source whose rows are renamed as an entry says.

    Args:
        source: the rows as they are stored.
        format (`str`): `alpaca` or `sharegpt`.
        columns (`dict`): our key -> column of the file.
        tags (`dict`): LLaMA-Factory's tags, complete.
        place (`str`): for messages.
    """

    source: JsonSource | TableSource
    format: str
    columns: Mapping[str, str]
    tags: Mapping[str, str]
    place: str

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
        used = {*self.columns, *self.columns.values(), *_OURS}
        row = {key: value for key, value in raw.items() if key not in used}
        row.update({key: raw[column] for key, column in self.columns.items() if raw.get(column) is not None})
        if isinstance(row.get("conversations"), (list, tuple)):
            row["conversations"] = [self._turn(number, turn) for number, turn in enumerate(row["conversations"])]
        return row

    def _turn(self, number: int, turn: Any) -> Any:
        if not isinstance(turn, Mapping):
            return turn
        tags = self.tags
        roles = {tags["user_tag"]: "human", tags["assistant_tag"]: "gpt", tags["system_tag"]: "system"}
        role = turn.get(tags["role_tag"])
        if role is not None and role not in roles:
            raise RowError(
                f"turn {number}: unknown role {role!r}.",
                kind="unknown_role",
                expected=f"the tags of {self.place}: {', '.join(roles)}",
                fix="correct the tags or the row; tool calls and their results are not supported.",
            )
        return {"from": roles.get(role), "value": turn.get(tags["content_tag"])} | {  # type: ignore[arg-type]
            key: turn[key] for key in ("loss", "weight") if key in turn
        }


def open_described(path: Path, name: str | None, open_file: Open, open_hub: Callable[..., TableSource]) -> Described:
    """Returns the rows of one entry of a `dataset_info.json`.

    Args:
        path (`Path`): the description; files are relative to its folder.
        name (`str`, *optional*): the entry; the only one when not given.
        open_file, open_hub (`Callable`): path -> source; Hub id, subset and split -> source.

    Raises:
        DataError: the file is broken, there is no such entry, or the entry asks for what cannot be read.
    """
    entries = _entries(path)
    if name is None and len(entries) > 1:
        raise DataError(
            f"{path}: {len(entries)} data sets are described.",
            expected="one of: " + ", ".join(list(entries)[:20]),
            fix=f"name one, as in `{path}@{next(iter(entries))}`.",
        )
    name = name or next(iter(entries))
    if name not in entries:
        raise DataError(f"{path}: no data set {name!r} is described.", expected=suggest(name, entries))
    entry, place = entries[name], f"{path}, {name}"
    for key, reason in _REFUSED.items():
        if entry.get(key):
            raise DataError(f"{place}.{key}: {json.dumps(entry[key])} given.", fix=f"{reason}.")
    format = entry.get("formatting", "alpaca")
    if format not in ("alpaca", "sharegpt"):
        raise DataError(f"{place}.formatting: {format!r} given.", expected="alpaca or sharegpt")
    given, tags = _part(entry, "columns", place), _part(entry, "tags", place)
    for key in ("kto_tag", "chosen", "rejected"):
        if given.get(key):
            raise DataError(f"{place}.columns.{key}: feedback is not learnt from.", fix="remove the column.")
    names = {"messages": "conversations", **_SHARED} if format == "sharegpt" else _ALPACA | _SHARED
    columns = {ours: given.get(key, _DEFAULTS.get(key)) for key, ours in names.items()}
    columns = {ours: column for ours, column in columns.items() if isinstance(column, str)}
    source = _source(path, entry, place, open_file, open_hub)
    return Described(source, format, columns, _TAGS | tags, place)


def _entries(path: Path) -> dict[str, dict[str, Any]]:
    try:
        content = parse_json(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error}).", fix="correct the file.") from error
    entries = {key: value for key, value in content.items() if _is_entry(value)} if isinstance(content, dict) else {}
    if not entries:
        raise DataError(
            f"{path}: no data set is described.", expected='LLaMA-Factory\'s {"NAME": {"file_name": ..., ...}}'
        )
    return entries


def _is_entry(value: Any) -> bool:
    places = ("file_name", "hf_hub_url", "ms_hub_url", "script_url", "cloud_file_name")
    return isinstance(value, dict) and any(isinstance(value.get(key), str) for key in places)


def _part(entry: Mapping[str, Any], key: str, place: str) -> dict[str, str]:
    part = entry.get(key) or {}
    if not isinstance(part, dict) or not all(value is None or isinstance(value, str) for value in part.values()):
        raise DataError(f"{place}.{key}: {json.dumps(part)[:80]} given.", expected="an object of texts")
    return {name: value for name, value in part.items() if value is not None}


def _source(
    path: Path, entry: Mapping[str, Any], place: str, open_file: Open, open_hub: Callable[..., TableSource]
) -> JsonSource | TableSource:
    split = entry.get("split")
    if entry.get("hf_hub_url"):
        return open_hub(entry["hf_hub_url"], entry.get("subset"), split or "train")
    target = path.parent / Path(entry["file_name"]).expanduser()
    try:
        return open_file(str(target), split)[0]
    except DataError as error:
        raise DataError(f"{place}.file_name: {error.given}", expected=error.expected, fix=error.fix) from error
