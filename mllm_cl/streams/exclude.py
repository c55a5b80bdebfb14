"""Rows to leave out: the list that a validation writes, and a stream without them. Data files stay as they are.

One JSON object a line: `{"task", "split", "position", "id", "file", "row", "kind", "message"}`. A list belongs to the
very stream it was written for: where position and id do not fit, it is refused.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mllm_cl.data.problems import Problem, RowError
from mllm_cl.data.rows import Row, Rows
from mllm_cl.errors import StreamError
from mllm_cl.files import write_text
from mllm_cl.parse import parse_json
from mllm_cl.streams.fingerprint import fingerprint
from mllm_cl.streams.stream import Stream, Task

SPLITS = ("train", "validation", "test")


def write_exclusions(path: Path, problems: Iterable[tuple[str, str, Problem]]) -> int:
    """Writes the list of rows that have errors; returns how many rows it names.

    Args:
        path (`Path`): the file; replaced if it exists.
        problems: (task, split, problem) as `StreamReport.located` gives them.

    Raises:
        RunError: the file cannot be written.
    """
    lines: dict[tuple[str, str, int], dict[str, Any]] = {}
    for task, split, problem in problems:
        if problem.severity != "error" or problem.position is None:
            continue
        entry = lines.setdefault(
            (task, split, problem.position),
            {
                "task": task,
                "split": split,
                "position": problem.position,
                "id": problem.id,
                "file": problem.file,
                "row": problem.row,
                "kind": problem.kind,
                "message": problem.message,
            },
        )
        entry["id"] = entry["id"] or problem.id
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines.values())
    write_text(path, text.encode("utf-8", "backslashreplace").decode())  # half a surrogate pair as JSON's own escape
    return len(lines)


def exclude_rows(stream: Stream, path: str | Path) -> Stream:
    """Returns the stream without the rows of a list.

    Raises:
        StreamError: the file is no such list, or was written for another stream.
    """
    listed = _read(Path(path))
    for task, split in listed:
        stream[task]  # raises for a task that the stream does not have
        if split not in SPLITS:
            raise StreamError(f"{path}: unknown split {split!r}.", expected=", ".join(SPLITS))
    tasks = [_without(task, listed, path) for task in stream]
    return replace(stream, tasks=tuple(tasks), fingerprint=fingerprint(tasks))


def _without(task: Task, listed: dict[tuple[str, str], dict[int, str | None]], path: str | Path) -> Task:
    def kept(split: str, rows: Sequence[Row]) -> Sequence[Row]:
        positions = listed.get((task.name, split), {})
        if not positions:
            return rows
        for position, row_id in positions.items():
            if not 0 <= position < len(rows) or not _is(rows, position, row_id):
                raise StreamError(
                    f"{path}: {task.name}/{split} has no row {row_id!r} at position {position}.",
                    expected="the list that `mllm-cl data validate STREAM --drop-bad` wrote for this very stream",
                    fix="validate the stream again.",
                )
        view = rows if isinstance(rows, Rows) else Rows(rows)
        return view.select([position for position in range(len(rows)) if position not in positions])

    splits = {"train": task.train, "validation": task.validation, "test": task.test}
    sizes = {split: count for split, count in task.sizes.items() if (task.name, split) not in listed}
    return replace(task, **{split: kept(split, rows) for split, rows in splits.items()}, sizes=sizes)


def _is(rows: Sequence[Row], position: int, row_id: str | None) -> bool:
    """True if the row is broken or has this id."""
    try:
        return row_id is None or rows[position].get("id") == row_id
    except RowError:
        return True


def _read(path: Path) -> dict[tuple[str, str], dict[int, str | None]]:
    found: dict[tuple[str, str], dict[int, str | None]] = defaultdict(dict)
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            entry = parse_json(line)
            found[str(entry["task"]), str(entry["split"])][int(entry["position"])] = entry["id"]
    except FileNotFoundError as error:
        raise StreamError(f"{path}: the list of rows to exclude does not exist.", fix="correct the path.") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StreamError(
            f"{path}: not a list of rows to exclude ({type(error).__name__}: {error}).",
            expected="what `mllm-cl data validate STREAM --drop-bad` writes",
        ) from error
    return found
