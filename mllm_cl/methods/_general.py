"""The general rows that methods protect or mix in: the built-in general mixture, or a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mllm_cl.data.builders.general import general_rows
from mllm_cl.data.readers import read_rows
from mllm_cl.data.rows import Row
from mllm_cl.errors import MethodError

BUILT_IN = "general"


def check_source(source: str, method: str) -> None:
    """Refuses a source that is neither built in nor a file.

    Raises:
        MethodError: it is neither.
    """
    if source != BUILT_IN and not Path(source).exists():
        raise MethodError(
            f"{method}.source: there is no {source!r}.",
            expected=f"{BUILT_IN!r} (built in), or a file of rows",
            fix="correct the path.",
        )


def read_source(source: str, method: str, size: int, seed: int = 0) -> Sequence[Row]:
    """Returns `size` built-in rows drawn with the seed, or all rows of the file."""
    if source == BUILT_IN:
        return general_rows("train", size=size, seed=seed)
    path = Path(source)
    return read_rows(path, image_folder=path.parent, task=method, split="train")
