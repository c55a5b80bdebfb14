"""Task and Stream: what a run learns, in which order, and what it is measured on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from mllm_cl.data.rows import Row
from mllm_cl.errors import StreamError, suggest


@dataclass(frozen=True)
class Task:
    """One instruction-tuning data set with a test split and a metric.

    Args:
        name (`str`): unique in its stream; becomes a folder name, so letters, digits, `.`, `_` and `-` only.
        train, test (`Sequence[Row]`): rows; see `mllm_cl.data.rows`.
        validation (`Sequence[Row]`, *optional*): rows to choose settings on; empty when there are none.
        metric (`str`, defaults to `"exact_match"`): name of a scorer.
        max_new_tokens (`int`, *optional*): longest answer to generate; the recipe's value when `None`.
        description (`str`): one line for listings.
        sizes (`dict`, *optional*): split -> rows as published; `validate_stream` warns of another number.
    """

    name: str
    train: Sequence[Row]
    test: Sequence[Row]
    validation: Sequence[Row] = ()
    metric: str = "exact_match"
    max_new_tokens: int | None = None
    description: str = ""
    sizes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Stream:
    """An ordered list of tasks; iterating over it gives the tasks in order.

    Args:
        name (`str`): for reports.
        tasks (`Sequence[Task]`): in the order of learning.
        fingerprint (`str`): changes when rows or order change; part of every cache key.
    """

    name: str
    tasks: Sequence[Task] = field(default_factory=tuple)
    fingerprint: str = ""

    def __post_init__(self) -> None:
        names = [task.name for task in self.tasks]
        for name in names:
            if names.count(name) > 1:
                raise StreamError(f"{self.name}: two tasks are called {name!r}.", fix="give every task its own name.")

    def __iter__(self) -> Iterator[Task]:
        return iter(self.tasks)

    def __len__(self) -> int:
        return len(self.tasks)

    def __getitem__(self, key: int | str) -> Task:
        if isinstance(key, int):
            return self.tasks[key]
        for task in self.tasks:
            if task.name == key:
                return task
        raise StreamError(
            f"{self.name}: no task is called {key!r}.", expected=suggest(key, [task.name for task in self.tasks])
        )
