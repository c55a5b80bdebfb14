"""Replay memories: which rows of earlier tasks are kept. References, never pixels or texts.

A memory is a list of `(task, row id)` pairs; the rows themselves are looked up in the stream when they are replayed.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from torch import Tensor

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


def first_of_each(memory: Sequence[Entry], new: Sequence[Entry], size: int) -> list[Entry]:
    """Keeps the first floor(size / t) rows of each of the t tasks (the first `size mod t` tasks one more).

    For memories whose rows stand in an order of merit: a shorter list is then the list that would have been made.
    """
    by_task: dict[str, list[Entry]] = {}
    for entry in [*memory, *new]:
        by_task.setdefault(entry[0], []).append(entry)
    share, extra = divmod(size, len(by_task)) if by_task else (0, 0)
    return [
        entry for position, entries in enumerate(by_task.values()) for entry in entries[: share + (position < extra)]
    ]


def class_order(labels: Sequence[str], rng: random.Random) -> list[int]:
    """Returns an order of the rows in which every beginning has the classes as evenly as they last: one row of each
    class in turn, rows and classes shuffled."""
    classes: dict[str, list[int]] = {}
    for index in rng.sample(range(len(labels)), len(labels)):
        classes.setdefault(labels[index], []).append(index)
    rounds = max((len(members) for members in classes.values()), default=0)
    return [members[turn] for turn in range(rounds) for members in classes.values() if turn < len(members)]


def herding_order(features: Tensor, count: int) -> list[int]:
    """Returns rows whose running mean stays nearest to the mean of all (iCaRL, Rebuffi et al. 2017, arXiv 1611.07725).

    Row k + 1 is argmin_x |mean − (x + Σ chosen) / (k + 1)|.

    Args:
        features: (rows, features).
        count: rows to choose.
    """
    features = features.double()
    mean, chosen, total = features.mean(dim=0), [], features.new_zeros(features.shape[1])
    free = features.new_ones(len(features)).bool()
    for number in range(1, min(count, len(features)) + 1):
        distance = (mean - (features + total) / number).norm(dim=1)  # (rows,)
        best = int(distance.masked_fill(~free, float("inf")).argmin())
        chosen.append(best)
        free[best] = False
        total = total + features[best]
    return chosen


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
