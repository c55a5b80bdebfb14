"""The row contract and its lazy sequence."""

from __future__ import annotations

import pytest

from mllm_cl.data.rows import (
    Origin,
    Rows,
    assistant_message,
    inquiry_of,
    is_answered,
    message_text,
    reference_answers,
    user_message,
)


def test_rows_convert_lazily_and_views_compose() -> None:
    converted = []

    def convert(raw: int) -> dict:
        converted.append(raw)
        return {"id": str(raw), "messages": [], "images": []}

    rows = Rows([10, 20, 30, 40], convert, origin=Origin("f.jsonl", "line", [2, 4, 6, 9]))  # type: ignore[arg-type]
    view = rows.select([3, 1, 0])[1:]
    assert converted == []
    assert [row["id"] for row in view] == ["20", "10"]
    assert (len(view), view.origin, view.unit, [view.number(0), view.number(-1)]) == (2, "f.jsonl", "line", [4, 2])
    assert rows[-1]["id"] == "40"
    with pytest.raises(IndexError):
        view[2]


def test_rows_made_in_memory_have_numbers_but_no_origin() -> None:
    rows = Rows([{"id": "a"}, {"id": "b"}])
    assert (rows.origin, rows.unit, rows.number(1), rows.is_renamed(1)) == (None, "row", 2, False)


def test_inquiry_and_answers() -> None:
    row = {"id": "1", "messages": [user_message("Q", images=1), assistant_message("A")], "images": ["x"]}
    assert is_answered(row)
    assert reference_answers(row) == ["A"]
    assert [message_text(message) for message in inquiry_of(row)["messages"]] == ["Q"]
    assert inquiry_of(inquiry_of(row)) == inquiry_of(row)
    assert reference_answers(inquiry_of(row)) == []
    assert reference_answers({**row, "answers": ["B", "C"]}) == ["B", "C"]
    assert row["messages"][-1]["role"] == "assistant"
    assert message_text({"role": "user", "content": "plain"}) == "plain"
