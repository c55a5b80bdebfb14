"""Writes a stream as a folder with `stream.yaml`, so that what a recipe has made of a benchmark can be kept and read back.

Image files are referenced by their full path and never copied; images that exist only in memory become PNG files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from mllm_cl.data.images import encode_png
from mllm_cl.data.rows import Row
from mllm_cl.errors import StreamError
from mllm_cl.files import write_text
from mllm_cl.streams.stream import Stream


def write_stream(stream: Stream, folder: str | Path) -> Path:
    """Returns the path of the `stream.yaml` that was written; `read_stream` gives the same rows back.

    Raises:
        StreamError: the folder has one already.
        RunError: the folder cannot be written.
    """
    folder = Path(folder)
    path = folder / "stream.yaml"
    if path.exists():
        raise StreamError(f"{path}: there is a stream already.", fix="choose another folder, or delete it.")
    entries = []
    for task in stream:
        entry: dict[str, Any] = {"name": task.name}
        for split, rows in (("train", task.train), ("validation", task.validation), ("test", task.test)):
            if len(rows):
                entry[split] = f"{task.name}/{split}.jsonl"
                _write_rows(rows, folder, folder / task.name / f"{split}.jsonl")
        entry |= {"format": "messages", "metric": task.metric}
        entry |= {"max_new_tokens": task.max_new_tokens} if task.max_new_tokens is not None else {}
        entries.append(entry | ({"description": task.description} if task.description else {}))
    content = {"name": stream.name, "tasks": entries}
    write_text(path, yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
    return path


def _write_rows(rows: Sequence[Row], folder: Path, path: Path) -> None:
    lines = []
    for row in rows:
        references = [_plain(reference, folder / "images") for reference in row["images"]]
        lines.append(json.dumps({**row, "images": references}, ensure_ascii=False) + "\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(lines))


def _plain(reference: Any, folder: Path) -> Any:
    """A reference that JSON can hold."""
    if isinstance(reference, Image.Image):
        reference = encode_png(reference)
    if isinstance(reference, (str, Path)):
        return str(Path(reference).absolute())
    assert isinstance(reference, Mapping)
    if reference.get("tiles"):
        return {**reference, "tiles": [_plain(tile, folder) for tile in reference["tiles"]]}
    if reference.get("bytes") is None:
        return {**reference, "path": str(Path(str(reference["path"])).absolute())}
    data = reference["bytes"]
    path = folder / f"{hashlib.sha256(data).hexdigest()[:24]}.png"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return str(path.absolute())
