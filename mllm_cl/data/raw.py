"""Rows as a file, folder or Hub data set holds them, not converted: for benchmarks with a schema of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mllm_cl.data.readers import _open_source
from mllm_cl.data.sources import TableSource


def raw_rows(path: str | Path, *, split: str = "test") -> Sequence[Mapping[str, Any]]:
    """Returns the raw rows at `path`, read one by one when asked for; images stay encoded.

    Args:
        path: as in `mllm_cl.data.readers.read_rows`; `owner/name:config@split` for the Hub.
        split: which split of a folder or data set that has several.

    Raises:
        DataError: nothing readable there.
    """
    return _open_source(path, split)[0]


def only_columns(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Sequence[Mapping[str, Any]]:
    """Returns raw rows with these columns only, so that going through all of them reads no images."""
    if not isinstance(rows, TableSource):
        return rows
    return rows.dataset.select_columns([name for name in names if name in rows.dataset.column_names])
