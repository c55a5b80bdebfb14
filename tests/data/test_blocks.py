"""Reading ahead: the same rows in every order of asking, few reads in order, single reads otherwise."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mllm_cl.data import blocks
from mllm_cl.data.blocks import BlockSource
from mllm_cl.data.order import shuffled
from mllm_cl.data.readers import read_rows
from mllm_cl.data.sources import JsonSource, TableSource


class Numbers(BlockSource):
    """Items are fresh lists; every read is written down."""

    def __init__(self, length: int, most: int = 10_000) -> None:
        self.length, self.most = length, most
        self.reads: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index):  # type: ignore[override]
        return self.take(index)

    def read_items(self, start: int, stop: int) -> Sequence[Any]:
        stop = min(stop, start + self.most)
        self.reads.append((start, stop))
        return [[number] for number in range(start, stop)]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(-40, 39), max_size=80), st.sampled_from([1, 3, 1000]))
def test_any_order_gives_the_items(asked: list[int], most: int) -> None:
    source = Numbers(40, most)
    for index in [*asked, *range(40), *reversed(range(40)), *asked]:
        assert source[index] == [index % 40]
    with pytest.raises(IndexError):
        source[40]
    assert all(0 <= start < stop <= 40 for start, stop in source.reads)


def test_in_order_reads_blocks_and_shuffled_reads_single_items() -> None:
    source = Numbers(5000)
    assert [item[0] for item in source] == list(range(5000))
    assert len(source.reads) <= 2 + 5
    source.reads.clear()
    every_other = [source[index][0] for index in range(0, 5000, 2)]
    assert every_other == list(range(0, 5000, 2))
    assert len(source.reads) <= 2 + 5
    source = Numbers(5000)
    list(shuffled(source))  # type: ignore[arg-type]
    blocks_read = [read for read in source.reads if read[1] - read[0] > 1]
    assert len(source.reads) == 5000
    assert len(blocks_read) < 5


def test_nobody_gets_an_object_twice() -> None:
    source = Numbers(20)
    first = [source[index] for index in range(20)]
    for item in first:
        item.append("changed")
    assert [source[index] for index in range(20)] == [[index] for index in range(20)]


def test_a_copy_for_a_worker_holds_no_block() -> None:
    source = Numbers(5000)
    for index in range(10):
        source[index]
    assert len(pickle.dumps(source)) < 500
    assert pickle.loads(pickle.dumps(source))[7] == [7]


@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet"])
def test_files_are_the_same_in_order_and_one_by_one(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_ROWS", 16)
    rows = [
        {"id": str(n), "query": f"What? {'é' * n}", "response": "A", "images": ["a.png"] * (n % 3)} for n in range(200)
    ]
    path = tmp_path / f"rows.{kind}"
    if kind == "parquet":
        from datasets import Dataset

        Dataset.from_list(rows).to_parquet(path)
    elif kind == "json":
        path.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
    else:
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        path.write_bytes("\r\n\n".join(lines).encode())
    found = read_rows(path)
    in_order = list(found)
    assert [row["id"] for row in in_order] == [str(n) for n in range(200)]
    assert in_order == [found[index] for index in reversed(range(200))][::-1]
    view = found.select([n for n in range(200) if n % 5])
    assert [row["id"] for row in view] == [str(n) for n in range(200) if n % 5]


def test_a_block_is_no_larger_than_its_bytes(tmp_path: Path) -> None:
    rows = [{"id": str(n), "query": "x" * 300_000, "response": "A"} for n in range(12)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    source = JsonSource(path)
    assert len(source.read_items(0, 12)) == 3  # a megabyte
    assert len(source.read_items(11, 12)) == 1
    from datasets import Dataset

    table = TableSource(Dataset.from_list(rows))
    assert 1 <= len(table.read_items(0, 12)) <= 4
    assert [row["id"] for row in table] == [str(n) for n in range(12)]


def test_a_broken_line_is_an_error_of_its_own_row_only(tmp_path: Path) -> None:
    from mllm_cl.data.problems import RowError

    lines = [json.dumps({"id": str(n), "query": "Q", "response": "A"}) for n in range(30)]
    lines[17] = '{"id": "17", '
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    rows = read_rows(tmp_path / "rows.jsonl")
    for index in range(30):
        if index == 17:
            with pytest.raises(RowError, match="line 18"):
                rows[index]
        else:
            assert rows[index]["id"] == str(index)
