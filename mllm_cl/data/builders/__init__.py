"""The catalogue of built-in streams and general benchmarks: name -> where it is built, and one line about it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

from mllm_cl.errors import DataError, suggest


class Entry(NamedTuple):
    """One built-in data set: `module:function` and a description."""

    place: str
    description: str


# `function(seed) -> list of tasks`, each a mapping with the fields of `mllm_cl.streams.Task`.
STREAMS: dict[str, Entry] = {
    "quickstart": Entry(
        "mllm_cl.data.builders.quickstart:build",
        "six instruction tasks on real images from ordinary packages; nothing to download",
    ),
}

# `function(split) -> rows` with answers; split is `test` or `validation`.
BENCHMARKS: dict[str, Entry] = {
    "quickstart-general": Entry(
        "mllm_cl.data.builders.general:benchmark",
        "held-out part of the general mixture that tiny-llava was pre-trained on",
    ),
}


def find_builder(name: str, catalogue: dict[str, Entry]) -> Callable[..., Any]:
    """Returns the function behind a name of `STREAMS` or `BENCHMARKS`.

    Raises:
        DataError: there is no such name.
    """
    if name not in catalogue:
        raise DataError(f"{name!r} is not built in.", expected=suggest(name, catalogue))
    module, _, function = catalogue[name].place.partition(":")
    return getattr(importlib.import_module(module), function)
