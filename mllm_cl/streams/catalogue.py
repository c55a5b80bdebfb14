"""Streams by name or by file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from mllm_cl.data.builders import BENCHMARKS, STREAMS, find_builder
from mllm_cl.data.rows import Row
from mllm_cl.errors import DataError, StreamError
from mllm_cl.streams.arrange import arrange, fingerprint
from mllm_cl.streams.stream import Stream, Task
from mllm_cl.streams.user import read_stream

if TYPE_CHECKING:
    from mllm_cl.recipe import StreamSection


def load_stream(
    name_or_path: str,
    *,
    order: Sequence[str] | str | None = None,
    limit: int | dict[str, int] | None = None,
    validation_share: float | None = None,
    seed: int = 0,
) -> Stream:
    """Returns a built-in stream, or the one that a `stream.yaml` describes.

    Args:
        name_or_path: name of `mllm-cl data list`, or path of a stream file.
        order, limit, validation_share, seed: see `mllm_cl.streams.arrange`.

    Raises:
        StreamError: there is no such stream, or it does not fit these settings.
    """
    if name_or_path in STREAMS:
        stream = _built_in(name_or_path)
    elif name_or_path.endswith((".yaml", ".yml")):
        stream = read_stream(name_or_path)
    else:
        raise StreamError(
            f"{name_or_path!r} is neither a built-in stream nor a stream file.",
            expected="one of: " + ", ".join(STREAMS) + "; or the path of a stream.yaml",
        )
    return arrange(stream, order=order, limit=limit, seed=seed, validation_share=validation_share)  # type: ignore[arg-type]


def stream_of_section(section: StreamSection) -> Stream:
    """Returns the stream that the `stream` section of a recipe names."""
    if section.name is not None and section.name not in STREAMS:
        raise StreamError(
            f"stream.name: {section.name!r} is not a built-in stream.",
            expected="one of: " + ", ".join(STREAMS),
            fix="for a file of your own use `stream.path`.",
        )
    settings: dict[str, Any] = section.model_dump(exclude={"name", "path"})
    if section.name is not None:
        return load_stream(section.name, **settings)
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


def _built_in(name: str) -> Stream:
    return _build(name, find_builder(name, STREAMS))


@cache
def _build(name: str, builder: Callable[[], list[dict[str, Any]]]) -> Stream:
    """Kept, because `mllm-cl demo` learns the same stream with several methods."""
    tasks = tuple(Task(**fields) for fields in builder())
    return Stream(name=name, tasks=tasks, fingerprint=fingerprint(tasks))
