"""A hash of what a stream holds, for cache keys: cheap, and the same after the folder has been moved.

What goes in: task names and their order; of every row the id, the messages and the accepted answers; of every image a
path's last two parts and the file's size, or the hash of embedded bytes. What does not: pixels of image files (a
picture replaced by another of exactly the same size in bytes goes unnoticed), further keys of the rows, metric and
limits of a task. Cost: about 6 s per 100,000 rows with one image file each; embedded images are read once.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mllm_cl.data.image_keys import image_key
from mllm_cl.data.problems import RowError
from mllm_cl.data.rows import Row, Rows
from mllm_cl.streams.stream import Task

_VERSION = "mllm_cl-stream-1"


def fingerprint(tasks: Sequence[Task]) -> str:
    """Returns the SHA-256 (hex) of tasks in their order."""
    total = hashlib.sha256(_VERSION.encode())
    for task in tasks:
        splits = [digest_rows(rows) for rows in (task.train, task.validation, task.test)]
        total.update(json.dumps([task.name, *splits]).encode())
    return total.hexdigest()


def digest_rows(rows: Sequence[Row]) -> str:
    """Returns the SHA-256 (hex) of some rows; a row that cannot be read counts with its error message."""
    if isinstance(rows, Rows) and rows.digest is not None:
        return rows.digest
    total = hashlib.sha256()
    for index in range(len(rows)):
        try:
            row = rows[index]
        except RowError as error:
            total.update(error.message.encode("utf-8", "replace"))
            continue
        text = [row.get("id"), row.get("messages"), row.get("answers"), list(map(_identity, row.get("images") or []))]
        total.update(json.dumps(text, sort_keys=True, default=str).encode())
    digest = total.hexdigest()
    if isinstance(rows, Rows):
        rows.digest = digest
    return digest


def _identity(reference: Any) -> list[Any]:
    if isinstance(reference, Mapping) and reference.get("tiles"):
        return ["tiles", reference.get("columns", 1), *map(_identity, reference["tiles"])]
    if isinstance(reference, Mapping) and reference.get("bytes") is None:
        if reference.get("crop"):
            return ["crop", list(reference["crop"]), *_identity(reference.get("path"))]
        reference = reference.get("path")
    if not isinstance(reference, (str, Path)):
        return [image_key(reference)]
    try:
        size = os.stat(reference).st_size
    except (OSError, ValueError):
        size = -1
    folder, name = os.path.split(str(reference))
    return [f"{os.path.basename(folder)}/{name}", size]
