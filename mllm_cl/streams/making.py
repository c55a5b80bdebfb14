"""Streams made of other streams: tasks merged, coming back, with blurred boundaries, or without any.

All of it is views of the same rows and seeded; test rows never move. A row that is learnt with another task keeps the
name of its own in `row["task"]` and in front of its id.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mllm_cl.data.inquiry import question_of
from mllm_cl.data.rows import Row, Rows
from mllm_cl.errors import StreamError, suggest
from mllm_cl.streams.stream import Stream, Task

_SAMPLE = 400  # training questions per task that similarity looks at


def view(rows: Sequence[Row]) -> Rows:
    """Returns rows with `select`."""
    return rows if isinstance(rows, Rows) else Rows(rows)


@dataclass(frozen=True)
class Labelled(Sequence[Row]):
    """Rows of several tasks in one sequence.

    Args:
        parts (tuple of (name, rows)): where they come from.
        places (`np.ndarray`, (n, 2)): part and position of each row.
        own (`str`): name of the task that keeps its ids; the others' get their name in front.
        scorers (tuple of names, *optional*): scorer of each part, which its rows then name.
    """

    parts: tuple[tuple[str, Sequence[Row]], ...]
    places: np.ndarray
    own: str = ""
    scorers: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index):  # type: ignore[override]
        part, position = self.places[index].tolist()
        name, rows = self.parts[part]
        row = rows[position]
        if name == self.own:
            return row
        scorer = {"scorer": self.scorers[part]} if self.scorers else {}
        return {**row, "id": f"{name}/{row['id']}", "task": name, **scorer}


def places_of(part: int, positions: Sequence[int]) -> np.ndarray:
    """Returns (part, position) pairs, (n, 2)."""
    return np.stack([np.full(len(positions), part), np.asarray(positions, dtype=np.int64)], axis=1)


def by_similarity(tasks: Sequence[Task], far: bool = False) -> list[Task]:
    """Returns the tasks in a chain from the first: each followed by the most (or least) similar one that is left.

    Similarity: cosine of TF-IDF vectors of the words of up to 400 training questions of a task. No image is opened.
    """
    words = []
    for task in tasks:
        step = max(1, len(task.train) // _SAMPLE)
        positions = range(0, len(task.train), step)[:_SAMPLE]
        texts = (question_of(task.train[position]).casefold() for position in positions)
        words.append(Counter(word for text in texts for word in re.findall(r"\w+", text)))
    vocabulary = sorted(set().union(*words))
    if not vocabulary:
        raise StreamError("order: the tasks have no questions to compare.", fix="give the order as a list of names.")
    counts = np.array([[found[word] for word in vocabulary] for found in words], dtype=float)  # (tasks, words)
    rarity = np.log((1 + len(tasks)) / (1 + (counts > 0).sum(axis=0))) + 1
    vectors = counts * rarity
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    similarity = vectors @ vectors.T  # (tasks, tasks)
    chain, left = [0], set(range(1, len(tasks)))
    while left:
        sign = -1 if far else 1
        chain.append(max(sorted(left), key=lambda index: sign * similarity[chain[-1], index]))
        left.remove(chain[-1])
    return [tasks[index] for index in chain]


def merge(
    stream: Stream, tasks: Sequence[Task], groups: Mapping[str, Sequence[str] | Mapping[str, float]], seed: int
) -> list[Task]:
    """Returns the tasks with groups of them made one: training rows mixed, test and validation rows in one list.

    Where scorers differ, every row is scored by its own task's (`each:NAME,NAME`).

    Args:
        groups: new name -> names of its tasks, or name -> share of the training rows to take.

    Raises:
        StreamError: an unknown name, a name in two groups, or an impossible share.
    """
    by_name = {task.name: task for task in tasks}
    taken: dict[str, str] = {}
    made: dict[str, Task] = {}
    for group, members in groups.items():
        shares = dict(members) if isinstance(members, Mapping) else dict.fromkeys(members, 1.0)
        for name, share in shares.items():
            if name not in by_name:
                raise StreamError(
                    f"merge.{group}: {stream.name} has no task {name!r}.", expected=suggest(name, by_name)
                )
            if name in taken:
                raise StreamError(f"merge.{group}: {name!r} is also in {taken[name]!r}.", fix="name it once.")
            if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
                raise StreamError(f"merge.{group}.{name}: {share!r} given.", expected="a share above 0, at most 1")
            taken[name] = group
        if not shares:
            raise StreamError(f"merge.{group}: no tasks given.", expected="names of tasks")
        made[group] = _merged(group, [by_name[name] for name in shares], list(shares.values()), seed)
    merged: list[Task] = []
    for task in tasks:
        group = taken.get(task.name)
        if group is None:
            merged.append(task)
        elif group in made:
            merged.append(made.pop(group))
    return merged


def _merged(name: str, tasks: Sequence[Task], shares: Sequence[float], seed: int) -> Task:
    metrics = sorted({task.metric for task in tasks})
    scorers = tuple(task.metric for task in tasks) if len(metrics) > 1 else ()
    rng = np.random.default_rng([seed, sum(map(ord, name))])
    train = np.concatenate(
        [
            places_of(part, np.sort(rng.permutation(len(task.train))[: round(share * len(task.train))]).tolist())
            for part, (task, share) in enumerate(zip(tasks, shares))
        ]
    )

    def whole(split: str) -> Rows | tuple[()]:
        parts = tuple((task.name, _split(task, split)) for task in tasks)
        places = np.concatenate([places_of(part, range(len(rows))) for part, (_, rows) in enumerate(parts)])
        return Rows(Labelled(parts, places, scorers=scorers)) if len(places) else ()

    limits = [task.max_new_tokens for task in tasks if task.max_new_tokens is not None]
    return Task(
        name,
        train=Rows(Labelled(tuple((task.name, task.train) for task in tasks), rng.permutation(train))),
        validation=whole("validation"),
        test=whole("test"),
        metric=f"each:{','.join(metrics)}" if scorers else metrics[0],
        max_new_tokens=max(limits, default=None),
        description="together: " + ", ".join(task.name for task in tasks),
    )


def _split(task: Task, split: str) -> Sequence[Row]:
    return {"train": task.train, "validation": task.validation, "test": task.test}[split]


def repeat(tasks: Sequence[Task], times: int | Mapping[str, int], seed: int) -> list[Task]:
    """Returns the tasks in rounds: a task that comes back has its training rows divided among its appearances.

    Args:
        times: rounds of all tasks, or name -> rounds. The second appearance of `a` is called `a-2`.

    Raises:
        StreamError: an unknown name, or a number below 1 or above the number of rows.
    """
    counts = {task.name: times for task in tasks} if isinstance(times, int) else {task.name: 1 for task in tasks}
    if isinstance(times, Mapping):
        for name in times:
            if name not in counts:
                raise StreamError(f"repeat.{name}: there is no such task.", expected=suggest(name, counts))
        counts |= times
    for task in tasks:
        count = counts[task.name]
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= max(1, len(task.train)):
            raise StreamError(
                f"repeat: {count!r} appearances of {task.name!r}, which has {len(task.train)} training rows.",
                expected="a whole number from 1 to the number of rows",
            )
    rounds: list[Task] = []
    for number in range(1, max(counts.values()) + 1):
        for task in tasks:
            count = counts[task.name]
            if number > count:
                continue
            order = list(range(len(task.train)))
            random.Random(f"repeat/{seed}/{task.name}").shuffle(order)
            rows = task.train if count == 1 else view(task.train).select(sorted(order[number - 1 :: count]))
            name = task.name if number == 1 else f"{task.name}-{number}"
            rounds.append(replace(task, name=name, train=rows, sizes={} if count > 1 else task.sizes))
    return rounds


def blur(tasks: Sequence[Task], share: float, seed: int) -> list[Task]:
    """Returns the tasks with a share of each one's training rows learnt with its neighbours instead.

    Half of the rows go to the task before and half to the task after; at both ends all go to the only neighbour.

    Raises:
        StreamError: the share is not between 0 and 1, or there is one task only.
    """
    if isinstance(share, bool) or not 0 < share < 1:
        raise StreamError(f"blur: {share!r} given.", expected="a share between 0 and 1")
    if len(tasks) < 2:
        raise StreamError("blur: the stream has one task.", expected="at least two tasks")
    parts = tuple((task.name, task.train) for task in tasks)
    received: list[list[np.ndarray]] = [[] for _ in tasks]
    for index, task in enumerate(tasks):
        rng = np.random.default_rng([seed, index, 1])
        order, moved = rng.permutation(len(task.train)), round(share * len(task.train))
        before = 0 if index == 0 else moved if index == len(tasks) - 1 else moved // 2
        if before:
            received[index - 1].append(places_of(index, order[:before].tolist()))
        if moved > before:
            received[index + 1].append(places_of(index, order[before:moved].tolist()))
        received[index].append(places_of(index, order[moved:].tolist()))
    blurred = []
    for index, (task, places) in enumerate(zip(tasks, received)):
        order = np.random.default_rng([seed, index, 2]).permutation(np.concatenate(places))
        blurred.append(replace(task, train=Rows(Labelled(parts, order, own=task.name)), sizes={}))
    return blurred


def without_boundaries(tasks: Sequence[Task], seed: int) -> list[Task]:
    """Returns the tasks in task-free mode: all training rows in order, cut into as many segments of equal size.

    The end of a segment is no longer the end of a task, so a method cannot learn from it when the data change. Rows of
    one task are shuffled. Test rows, scorers and names stay where they are.
    """
    parts = tuple((task.name, task.train) for task in tasks)
    places = np.concatenate(
        [
            places_of(index, np.random.default_rng([seed, index, 3]).permutation(len(rows)).tolist())
            for index, (_, rows) in enumerate(parts)
        ]
    )
    segments = np.array_split(places, len(tasks))
    if not all(len(segment) for segment in segments):
        raise StreamError(
            f"task_free: {len(places)} training rows for {len(tasks)} tasks.", expected="at least a row each"
        )
    return [
        replace(task, train=Rows(Labelled(parts, segment, own=task.name)), sizes={})
        for task, segment in zip(tasks, segments)
    ]
