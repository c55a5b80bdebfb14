"""What the tests of the built-in pictures share: which sources rows name, and which of them overlap."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest


def _overlaps(one: str, other: str) -> bool:
    if not (one.startswith("photo:") and other.startswith("photo:")):
        return one == other
    (_, name, box), (_, other_name, other_box) = one.split(":"), other.split(":")
    x, y, w, h = map(int, box.split(","))
    u, v, k, m = map(int, other_box.split(","))
    return name == other_name and x < u + k and u < x + w and y < v + m and v < y + h


@pytest.fixture(scope="session")
def common_sources() -> Callable[[Sequence[str], Sequence[str]], list[tuple[str, str]]]:
    """Returns the pairs of sources that are the same image, or crops of a photograph that share pixels."""
    return lambda ones, others: [(one, other) for one in ones for other in others if _overlaps(one, other)]


@pytest.fixture(scope="session")
def sources_of() -> Callable[[Sequence[Any]], set[str]]:
    """Returns the sources that rows of the built-in data name."""
    return lambda rows: {source for row in rows for source in row["source"].split()}
