"""What a reference model answers to inquiries, computed once and kept on disk.

A part is one safetensors file: `lengths` (rows,), every target concatenated along its first axis, and the reference's
texts as JSON in the header. Part k of n holds the rows k, k + n, k + 2n, ...: each process writes one and all read
all. Rows are read back one by one through the memory map, so neither memory nor a training step grows with the pool.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mllm_cl.files import PARTIAL, explained, publish
from mllm_cl.parse import parse_json

_LENGTHS = "lengths"


def part_path(folder: Path, key: str, part: int, parts: int) -> Path:
    """Returns where a part of the targets with this key lies."""
    return folder / f"{key}-{part + 1}-of-{parts}.safetensors"


def write_part(path: Path, texts: Sequence[str], targets: Sequence[Mapping[str, Tensor]]) -> None:
    """Writes one part atomically.

    Args:
        texts: what the reference wrote, one per row.
        targets: name -> (positions of the row, ...), one mapping per row, all with the same names; {} keeps texts only.
    """
    lengths = [len(next(iter(own.values()))) if own else 0 for own in targets]
    tensors = {_LENGTHS: torch.tensor(lengths, dtype=torch.int64)}
    for name in targets[0] if targets else ():
        tensors[name] = torch.cat([own[name] for own in targets]).contiguous()
    temporary = path.with_name(path.name + PARTIAL)
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, temporary, metadata={"texts": json.dumps(list(texts))})
        publish(temporary, path)


class Targets:
    """The targets of all parts as one sequence of rows.

    Args:
        paths: part 1, part 2, ... of one key.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(paths)
        self._open: list[Any] = []
        self._offsets: list[list[int]] = []
        parts: list[list[str]] = []
        for file in self._files():
            parts.append(parse_json(file.metadata()["texts"]))
            ends = file.get_tensor(_LENGTHS).cumsum(0).tolist()
            self._offsets.append([0, *ends])
        total = sum(map(len, parts))
        self.texts: list[str] = [parts[row % len(parts)][row // len(parts)] for row in range(total)]

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        """Returns name -> (positions, ...) of a row."""
        part, index = row % len(self.paths), row // len(self.paths)
        start, end = self._offsets[part][index : index + 2]
        file = self._files()[part]
        return {name: file.get_slice(name)[start:end] for name in file.keys() if name != _LENGTHS}  # noqa: SIM118

    def _files(self) -> list[Any]:
        if not self._open:
            self._open = [safe_open(path, framework="pt") for path in self.paths]
        return self._open

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_open": []}  # a worker process opens the files itself
