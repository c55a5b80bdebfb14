"""Reading ahead: rows that are asked for in order come from blocks, others one by one.

One block per source is kept, of about a megabyte, so going through a source of any length takes constant memory.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

BLOCK_ROWS = 1000
BLOCK_BYTES = 1 << 20
_NEAR = 8  # rows left out that still count as going on in order: a view of most rows is read in blocks too
_RUN = 2  # steps in order before reading ahead begins, so that a shuffled order does not cause it


class BlockSource(Sequence[Any]):
    """A sequence whose items are cheaper to read many at a time."""

    _last, _run = -1, 0
    _block: dict[int, Any] | None = None  # items of the block that have not been taken yet

    @abstractmethod
    def read_items(self, start: int, stop: int) -> Sequence[Any]:
        """Returns the stored items from `start` on: at least one, at most `stop - start`, about `BLOCK_BYTES` together."""

    def take(self, index: int) -> Any:
        """Returns the stored item at `index`. Nobody gets the same object twice, so it may be changed.

        Raises:
            IndexError: there is no such item.
        """
        index = range(len(self))[index]
        item = self._block.pop(index, None) if self._block else None
        self._run = self._run + 1 if 0 < index - self._last <= _NEAR else 0
        self._last = index
        if item is not None:
            return item
        if self._run < _RUN:
            return self.read_items(index, index + 1)[0]
        items = self.read_items(index, min(index + BLOCK_ROWS, len(self)))
        self._block = dict(enumerate(items[1:], index + 1))
        return items[0]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_block", "_last", "_run")}
