"""Replay memories: which rows of earlier tasks are kept. References, never pixels or texts.

A memory is a list of `(task, row id)` pairs; the rows themselves are looked up in the stream when they are replayed.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from mllm_cl.data.rows import Row, Rows
from mllm_cl.errors import DataError

Entry = tuple[str, str]


def reservoir(memory: Sequence[Entry], seen: int, new: Sequence[Entry], size: int, rng: random.Random) -> list[Entry]:
    """Reservoir sampling (Vitter 1985, algorithm R): after n items each is kept with probability min(1, size/n).

    Args:
        memory: what is kept of the `seen` items so far.
        new: the items that arrive now, in order.
        size: number of places.

    Returns:
        the memory after them; `seen` grows by `len(new)`.
    """
    kept = list(memory)
    for item in new:
        seen += 1
        if len(kept) < size:
            kept.append(item)
        else:
            place = rng.randrange(seen)
            if place < size:
                kept[place] = item
    return kept


def balanced(memory: Sequence[Entry], new: Sequence[Entry], size: int, rng: random.Random) -> list[Entry]:
    """Keeps floor(size / t) rows of each of the t tasks (the first `size mod t` tasks one more), drawn at random."""
    by_task: dict[str, list[Entry]] = {}
    for entry in [*memory, *new]:
        by_task.setdefault(entry[0], []).append(entry)
    share, extra = divmod(size, len(by_task)) if by_task else (0, 0)
    kept: list[Entry] = []
    for position, entries in enumerate(by_task.values()):
        quota = share + (position < extra)
        kept += entries if len(entries) <= quota else rng.sample(entries, quota)
    return kept


def look_up(memory: Sequence[Entry], rows_of_task: Mapping[str, Sequence[Row]]) -> Rows:
    """Returns the rows that the entries name, in their order.

    Raises:
        DataError: a task or row is not there any more (the stream was changed since the memory was filled).
    """
    wanted: dict[str, set[str]] = {}
    for task, row_id in memory:
        wanted.setdefault(task, set()).add(row_id)
    found: dict[Entry, Row] = {}
    for task, ids in wanted.items():
        for row in rows_of_task.get(task, ()):
            if row["id"] in ids:
                found[task, row["id"]] = row
    for entry in memory:
        if entry not in found:
            raise DataError(
                f"replay memory: row {entry[1]!r} of task {entry[0]!r} is not in the stream any more.",
                fix="start a new run: the stream was changed after the memory was filled.",
            )
    return Rows([found[entry] for entry in memory])
