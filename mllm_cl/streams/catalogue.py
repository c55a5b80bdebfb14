"""Streams by name or by file."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mllm_cl.data.builders import BENCHMARKS, STREAMS, find_builder, find_family
from mllm_cl.data.rows import Row
from mllm_cl.errors import DataError, StreamError, suggest
from mllm_cl.parse import parse_json
from mllm_cl.streams.arrange import arrange
from mllm_cl.streams.fingerprint import fingerprint
from mllm_cl.streams.stream import Stream, Task
from mllm_cl.streams.user import read_stream

if TYPE_CHECKING:
    from mllm_cl.recipe import StreamSection


def load_stream(
    name_or_path: str,
    *,
    root: str | Path | None = None,
    options: Mapping[str, Any] | None = None,
    **arrangement: Any,
) -> Stream:
    """Returns a built-in stream, or the one that a `stream.yaml` describes.

    Args:
        name_or_path: name of `mllm-cl data list`, or path of a stream file.
        root (`str` or `Path`, *optional*): folder of the downloaded data of a public benchmark; `$MLLM_CL_DATA/NAME`, or
            `data/NAME`, when not given.
        options (`dict`, *optional*): options of the builder; see its file in `mllm_cl/data/builders`.
        arrangement: order, limit, validation_share, seed, ...: see `mllm_cl.streams.arrange`.

    Raises:
        StreamError: there is no such stream, or it does not fit these settings.
    """
    if name_or_path in STREAMS:
        return arrange(_built_in(name_or_path, root, dict(options or {})), **arrangement)
    if not name_or_path.endswith((".yaml", ".yml")):
        raise StreamError(
            f"{name_or_path!r} is neither a built-in stream nor a stream file.",
            expected="one of: " + ", ".join(STREAMS) + "; or the path of a stream.yaml",
        )
    if root is not None or options:
        raise StreamError(
            f"{name_or_path}: `root` and `options` are for built-in streams.",
            fix="write paths into the stream file.",
        )
    return arrange(read_stream(name_or_path), **arrangement)


def stream_of_section(section: StreamSection) -> Stream:
    """Returns the stream that the `stream` section of a recipe names."""
    if section.name is not None and section.name not in STREAMS:
        raise StreamError(
            f"stream.name: {section.name!r} is not a built-in stream.",
            expected="one of: " + ", ".join(STREAMS),
            fix="for a file of your own use `stream.path`.",
        )
    settings: dict[str, Any] = section.model_dump(exclude={"name", "path", "root", "options"})
    if section.name is not None:
        return load_stream(section.name, root=section.root, options=section.options, **settings)
    return arrange(read_stream(section.path or ""), **settings)


def load_benchmark(name: str, split: str = "test") -> Sequence[Row]:
    """Returns the rows of a general benchmark: those to report (`test`) or those to choose settings on (`validation`).

    Raises:
        StreamError: there is no such benchmark.
    """
    try:
        return find_builder(name, BENCHMARKS)(split)
    except DataError as error:
        if name in BENCHMARKS:
            raise
        raise StreamError(f"evaluation.general: {error.given}", expected=error.expected) from error


def _built_in(name: str, root: str | Path | None, options: dict[str, Any]) -> Stream:
    builder = find_builder(name, STREAMS)
    known = [key for key in inspect.signature(builder).parameters if key not in ("root", "seed")]
    if find_family(name) is None:
        known = []
        if root is not None:
            raise StreamError(f"stream.root: {name} is made from installed packages.", fix="leave `root` out.")
    else:
        options["root"] = None if root is None else str(root)
    for key in options:
        if key not in (*known, "root"):
            expected = suggest(key, known) if known else f"no options: {name} has none"
            raise StreamError(f"stream.options.{key}: unknown option of {name}.", expected=expected)
    return _build(name, builder, json.dumps(options, sort_keys=True))


@cache
def _build(name: str, builder: Callable[..., list[dict[str, Any]]], options: str) -> Stream:
    """Kept, because `mllm-cl demo` learns the same stream with several methods."""
    tasks = tuple(Task(**fields) for fields in builder(**parse_json(options)))
    return Stream(name=name, tasks=tasks, fingerprint=fingerprint(tasks))
