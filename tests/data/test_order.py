"""The order of rows over processes and epochs: every row once, and continued where it stopped."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mllm_cl.data.order import Permutation, share, shuffled
from mllm_cl.data.rows import Rows
from mllm_cl.errors import DataError


def rows(count: int) -> Rows:
    return Rows([{"id": str(number), "messages": [], "images": []} for number in range(count)])


def ids(found: Any) -> list[str]:
    return [row["id"] for row in found]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 600), st.text(max_size=8))
def test_it_is_a_permutation(length: int, key: str) -> None:
    order = Permutation(length, key)
    assert sorted(order[position] for position in range(length)) == list(range(length))
    with pytest.raises(IndexError):
        order[length]


def test_it_shuffles_and_depends_on_its_key() -> None:
    first, other = (Permutation(5000, key) for key in ("0/0", "0/1"))
    values = [first[position] for position in range(5000)]
    assert values != [other[position] for position in range(5000)]
    rises = sum(a < b for a, b in itertools.pairwise(values)) / 4999
    assert 0.45 < rises < 0.55
    assert abs(sum(values[:1000]) / 1000 - 2500) < 200
    assert sum(a + 1 == b for a, b in itertools.pairwise(values)) < 10


def test_long_streams_need_no_memory() -> None:
    order = Permutation(10**12, "0")
    assert 0 <= order[10**12 - 1] < 10**12
    assert len({order[position] for position in range(2000)}) == 2000


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 80), st.integers(1, 7), st.integers(0, 3))
def test_over_all_processes_every_row_comes_once(count: int, processes: int, epoch: int) -> None:
    parts = [ids(shuffled(rows(count), epoch=epoch, rank=rank, processes=processes)) for rank in range(processes)]
    assert sorted(itertools.chain(*parts), key=int) == [str(number) for number in range(count)]
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_it_goes_on_where_it_stopped_and_reads_nothing_before() -> None:
    read: list[str] = []
    watched = rows(50).map(lambda row, position: (read.append(row["id"]), row)[1])
    whole = ids(shuffled(watched, seed=3, rank=1, processes=2))
    read.clear()
    assert ids(shuffled(watched, seed=3, rank=1, processes=2, start=20)) == whole[20:]
    assert read == whole[20:]
    assert ids(shuffled(watched, seed=4, rank=1, processes=2)) != whole
    with pytest.raises(DataError, match="rank 2 of 2 processes"):
        share(10, 2, 2)
