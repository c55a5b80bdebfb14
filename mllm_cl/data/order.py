"""The order in which processes go through rows: shuffled, each row exactly once, and continued at any point.

For loops of your own over streams of any length. The trainer uses transformers' sampler, which gives the same guarantees
but keeps a number per row (tests/training/test_row_order.py). Here a permutation is computed position by position, so
nothing of the length of the data is kept: position -> row by a four-round Feistel network over the next power of four,
walking on while the result lies beyond the last row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from mllm_cl.data.rows import Row
from mllm_cl.errors import DataError

_ROUNDS = 4


@dataclass(frozen=True)
class Permutation:
    """A seeded permutation of `range(length)` in constant memory.

    Args:
        length (`int`): number of rows, at least 1.
        key (`str`): what the permutation depends on, e.g. seed and epoch.

    Example:

    ```python
    >>> from mllm_cl.data.order import Permutation
    >>> order = Permutation(10, "seed 0, epoch 0")
    >>> sorted(order[position] for position in range(10)) == list(range(10))
    True

    ```
    """

    length: int
    key: str

    @cached_property
    def _seeds(self) -> tuple[int, ...]:
        digest = hashlib.sha256(self.key.encode()).digest()
        return tuple(int.from_bytes(digest[8 * number : 8 * number + 8], "big") for number in range(_ROUNDS))

    @cached_property
    def _half(self) -> int:
        return max(1, ((self.length - 1).bit_length() + 1) // 2)

    def __getitem__(self, position: int) -> int:
        if not 0 <= position < self.length:
            raise IndexError(position)
        value = position
        while True:  # at most three of four values lie beyond the end: four steps on average at worst
            value = self._mix(value)
            if value < self.length:
                return value

    def _mix(self, value: int) -> int:
        """A permutation of the numbers of `2 * _half` bits."""
        mask = (1 << self._half) - 1
        left, right = value >> self._half, value & mask
        for seed in self._seeds:
            mixed = ((right + seed) * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
            mixed = ((mixed ^ mixed >> 29) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
            left, right = right, left ^ (mixed >> 32 & mask)
        return left << self._half | right


def shuffled(
    rows: Sequence[Row], *, seed: int = 0, epoch: int = 0, rank: int = 0, processes: int = 1, start: int = 0
) -> Iterator[Row]:
    """Yields the rows of one process in one epoch.

    Over all processes every row comes exactly once; another epoch has another order. To go on after an interruption, give
    the number of rows that the process has already had as `start`: nothing is read before it.

    Args:
        rows (`Sequence[Row]`): all rows, the same in every process.
        seed, epoch (`int`): what the order depends on.
        rank, processes (`int`): which process this is, of how many.
        start (`int`, defaults to 0): rows of this process to leave out at the beginning.

    Raises:
        DataError: an impossible rank.
    """
    positions = share(len(rows), rank, processes)
    order = Permutation(max(1, len(rows)), f"{seed}/{epoch}")
    for position in positions[start:]:
        yield rows[order[position]]


def share(length: int, rank: int, processes: int) -> range:
    """Returns the positions of an epoch that one process takes: every `processes`-th, none twice, none left out."""
    if processes < 1 or not 0 <= rank < processes:
        raise DataError(f"rank {rank} of {processes} processes.", expected="a rank from 0 to processes - 1")
    return range(rank, length, processes)
