"""Everything that a recipe may ask of a stream: order, subsets, held-out validation rows, and what `making` makes."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from mllm_cl.data.image_keys import image_key
from mllm_cl.data.problems import RowError
from mllm_cl.data.rows import Row, reference_answers
from mllm_cl.errors import StreamError, suggest
from mllm_cl.streams import making
from mllm_cl.streams.exclude import exclude_rows
from mllm_cl.streams.fingerprint import fingerprint
from mllm_cl.streams.stream import Stream, Task
from mllm_cl.streams.transforms import transform

_SPLITS = ("train", "validation", "test")


def arrange(
    stream: Stream,
    *,
    tasks: Sequence[str] | None = None,
    order: Sequence[str] | Literal["random", "similar", "dissimilar"] | None = None,
    limit: int | Mapping[str, int] | None = None,
    seed: int = 0,
    validation_share: float | None = None,
    exclude: str | Path | None = None,
    merge: Mapping[str, Sequence[str] | Mapping[str, float]] | None = None,
    repeat: int | Mapping[str, int] = 1,
    blur: float | None = None,
    task_free: bool = False,
    transforms: Sequence[Mapping[str, Any]] = (),
) -> Stream:
    """Returns a stream made of another: what a recipe's `stream` section asks for.

    Applied in this order: exclude, tasks, order, merge, validation_share, limit, repeat, blur, task_free, transforms.

    Args:
        stream (`Stream`): left as it is; rows are shared, not copied.
        tasks (list of names, *optional*): leave the others out; the order stays.
        order (list of names, *optional*): every task name exactly once; `"random"`: a seeded shuffle; `"similar"`: each
            task is followed by the one whose questions are most alike, `"dissimilar"`: least alike.
        limit (`int` or `dict`, *optional*): most rows per task and split; an int is for all splits,
            `{"train": ..., "validation": ..., "test": ...}` for each. The rows kept are drawn so that each answer keeps
            its share, and stay in their order.
        seed (`int`, defaults to 0): of everything that is drawn. A task draws the same rows in every order.
        validation_share (`float`, *optional*): share of the training rows to hold out for tasks that have no validation
            rows; all rows of an image go to the same side.
        exclude (`str` or `Path`, *optional*): list of rows to leave out, as `mllm-cl data validate --drop-bad` writes it.
        merge (`dict`, *optional*): new name -> tasks (or task -> share of its rows) that are learnt as one.
        repeat (`int` or `dict`, defaults to 1): appearances of all tasks, or task -> appearances; the training rows of a
            task that comes back are divided among its appearances.
        blur (`float`, *optional*): share of each task's training rows that is learnt with its neighbours.
        task_free (`bool`, defaults to `False`): cut all training rows into segments that do not end where tasks end.
        transforms (list of `{name: options}`): see `mllm_cl.streams.transforms`.

    Raises:
        StreamError: names that are no permutation of the tasks, an impossible limit or share, an unknown transform.

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
    if exclude is not None:
        stream = exclude_rows(stream, exclude)
    if tasks is not None:
        stream = _only(stream, tasks)
    arranged = _ordered(stream, order, seed)
    if merge:
        arranged = making.merge(stream, arranged, merge, seed)
    if validation_share is not None:
        arranged = [_hold_out(task, validation_share, seed) for task in arranged]
    if limits:
        arranged = [_limited(task, limits, seed) for task in arranged]
    if repeat != 1:
        arranged = making.repeat(arranged, repeat, seed)
    if blur is not None:
        arranged = making.blur(arranged, blur, seed)
    if task_free:
        arranged = making.without_boundaries(arranged, seed)
    if transforms:
        arranged = transform(arranged, transforms, seed)
    if arranged == list(stream.tasks) and stream.fingerprint:
        return stream
    return replace(stream, tasks=tuple(arranged), fingerprint=fingerprint(arranged))


def _only(stream: Stream, names: Sequence[str]) -> Stream:
    known = [task.name for task in stream]
    for name in names:
        if name not in known:
            raise StreamError(f"tasks: {name!r} is not a task of {stream.name}.", expected=suggest(name, known))
    chosen = tuple(task for task in stream if task.name in names)
    if not chosen:
        raise StreamError("tasks: none given.", expected=f"some of: {', '.join(known)}")
    return stream if len(chosen) == len(known) else replace(stream, tasks=chosen, fingerprint=fingerprint(chosen))


def _ordered(stream: Stream, order: Sequence[str] | str | None, seed: int) -> list[Task]:
    if order is None:
        return list(stream.tasks)
    if isinstance(order, str):
        if order == "random":
            return random.Random(f"order/{seed}").sample(list(stream.tasks), len(stream))
        if order in ("similar", "dissimilar"):
            return making.by_similarity(stream.tasks, far=order == "dissimilar")
        raise StreamError(
            f"order: {order!r} given.", expected="a list of task names, 'random', 'similar' or 'dissimilar'"
        )
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
        sizes={},
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
    return replace(task, train=_select(task.train, kept), validation=_select(task.train, sorted(held)), sizes={})


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
    return making.view(rows).select(positions)
