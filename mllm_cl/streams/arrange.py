"""Order, subsets and held-out validation rows of a stream: everything that a recipe may ask of one."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

from mllm_cl.data.problems import RowError
from mllm_cl.data.rows import Row, Rows, reference_answers
from mllm_cl.data.validate import image_key
from mllm_cl.errors import StreamError, suggest
from mllm_cl.streams.fingerprint import fingerprint
from mllm_cl.streams.stream import Stream, Task

_SPLITS = ("train", "validation", "test")


def arrange(
    stream: Stream,
    *,
    order: Sequence[str] | Literal["random"] | None = None,
    limit: int | Mapping[str, int] | None = None,
    seed: int = 0,
    validation_share: float | None = None,
) -> Stream:
    """Returns the stream in another order, with fewer rows, or with validation rows held out of the training rows.

    Args:
        stream (`Stream`): left as it is; rows are shared, not copied.
        order (list of names or `"random"`, *optional*): every task name exactly once; a seeded shuffle when `"random"`.
        limit (`int` or `dict`, *optional*): most rows per task and split; an int is for all splits,
            `{"train": ..., "validation": ..., "test": ...}` for each. The rows kept are drawn so that each answer keeps
            its share, and stay in their order.
        seed (`int`, defaults to 0): of order, subsets and held-out rows. A task draws the same rows in every order.
        validation_share (`float`, *optional*): share of the training rows to hold out for tasks that have no validation
            rows; all rows of an image go to the same side.

    Raises:
        StreamError: names that are no permutation of the tasks, an impossible limit or share.

    Example:

    ```python
    >>> from mllm_cl.streams import Stream, Task, arrange
    >>> stream = Stream("s", (Task("a", train=[], test=[]), Task("b", train=[], test=[])))
    >>> [task.name for task in arrange(stream, order=["b", "a"])]
    ['b', 'a']

    ```
    """
    limits = _limits(limit)
    if validation_share is not None and not 0 < validation_share < 1:
        raise StreamError(f"validation_share: {validation_share} given.", expected="a number between 0 and 1")
    tasks = _ordered(stream, order, seed)
    if validation_share is not None:
        tasks = [_hold_out(task, validation_share, seed) for task in tasks]
    if limits:
        tasks = [_limited(task, limits, seed) for task in tasks]
    if tasks == list(stream.tasks) and stream.fingerprint:
        return stream
    return replace(stream, tasks=tuple(tasks), fingerprint=fingerprint(tasks))


def _ordered(stream: Stream, order: Sequence[str] | None, seed: int) -> list[Task]:
    if order is None:
        return list(stream.tasks)
    if isinstance(order, str):
        if order != "random":
            raise StreamError(f"order: {order!r} given.", expected="a list of task names, or 'random'")
        return random.Random(f"order/{seed}").sample(list(stream.tasks), len(stream))
    names = [task.name for task in stream]
    for name in order:
        if name not in names:
            raise StreamError(f"order: {stream.name} has no task {name!r}.", expected=suggest(str(name), names))
    twice = sorted({name for name in order if list(order).count(name) > 1})
    missing = [name for name in names if name not in order]
    if twice or missing:
        what = [f"given twice: {', '.join(twice)}"] * bool(twice) + [f"missing: {', '.join(missing)}"] * bool(missing)
        raise StreamError(
            f"order: {'; '.join(what)}.", expected=f"every task of {stream.name} exactly once: {', '.join(names)}"
        )
    return [stream[name] for name in order]


def _limits(limit: int | Mapping[str, int] | None) -> dict[str, int]:
    if limit is None:
        return {}
    limits: dict[str, int] = {**limit} if isinstance(limit, Mapping) else dict.fromkeys(_SPLITS, limit)
    for split, value in limits.items():
        if split not in _SPLITS:
            raise StreamError(f"limit.{split}: unknown split.", expected=suggest(str(split), _SPLITS))
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise StreamError(f"limit.{split}: {value!r} given.", expected="a whole number of rows, at least 1")
    return limits


def _limited(task: Task, limits: Mapping[str, int], seed: int) -> Task:
    def keep(split: str, rows: Sequence[Row]) -> Sequence[Row]:
        size = limits.get(split, len(rows))
        if size >= len(rows):
            return rows
        return _select(rows, stratified(rows, size, random.Random(f"limit/{seed}/{task.name}/{split}")))

    return replace(
        task,
        train=keep("train", task.train),
        validation=keep("validation", task.validation),
        test=keep("test", task.test),
    )


def stratified(rows: Sequence[Row], size: int, rng: random.Random) -> list[int]:
    """Returns the sorted positions of `size` rows in which every answer keeps its share.

    Shares are rounded by largest remainders; ties, and the rows of each answer, are drawn.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    for position in range(len(rows)):
        row = _readable(rows, position)
        answers = [] if row is None else reference_answers(row)
        groups[answers[0].strip().casefold() if answers else ""].append(position)
    order = list(groups)
    rng.shuffle(order)
    exact = {answer: size * len(groups[answer]) / len(rows) for answer in order}
    quota = {answer: int(exact[answer]) for answer in order}
    rest = sorted(order, key=lambda answer: quota[answer] - exact[answer])  # stable: ties stay in drawn order
    for answer in rest[: size - sum(quota.values())]:
        quota[answer] += 1
    return sorted(position for answer in order for position in rng.sample(groups[answer], quota[answer]))


def _hold_out(task: Task, share: float, seed: int) -> Task:
    if len(task.validation):
        return task
    groups = _image_groups(task.train)
    random.Random(f"validation/{seed}/{task.name}").shuffle(groups)
    wanted, held = max(1, round(share * len(task.train))), set[int]()
    for group in groups:
        if len(held) + len(group) <= wanted or (not held and len(group) < len(task.train)):
            held.update(group)
        if len(held) >= wanted:
            break
    if not held:
        raise StreamError(
            f"validation_share: no rows of {task.name!r} can be held out, because all {len(task.train)} share images.",
            expected="at least two groups of training rows without a common image",
            fix="give the task a `validation:` file, or leave validation_share out.",
        )
    kept = [position for position in range(len(task.train)) if position not in held]
    return replace(task, train=_select(task.train, kept), validation=_select(task.train, sorted(held)))


def _image_groups(rows: Sequence[Row]) -> list[list[int]]:
    """Groups the rows that share an image, directly or through others; a row without images is a group of its own."""
    parent = list(range(len(rows)))

    def root(position: int) -> int:
        while parent[position] != position:
            parent[position] = parent[parent[position]]
            position = parent[position]
        return position

    first: dict[str, int] = {}
    for position in range(len(rows)):
        row = _readable(rows, position)
        for reference in () if row is None else row["images"]:
            parent[root(position)] = root(first.setdefault(image_key(reference), position))
    groups: dict[int, list[int]] = defaultdict(list)
    for position in range(len(rows)):
        groups[root(position)].append(position)
    return list(groups.values())


def _readable(rows: Sequence[Row], position: int) -> Row | None:
    """Returns the row, or `None` if it is broken: validation, which comes later, names all of those at once."""
    try:
        return rows[position]
    except RowError:
        return None


def _select(rows: Sequence[Row], positions: Sequence[int]) -> Sequence[Row]:
    return rows.select(positions) if isinstance(rows, Rows) else Rows(rows).select(positions)
