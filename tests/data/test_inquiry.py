"""Inquiries: pools, question memories, and how they are spread over rows."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from mllm_cl.data.inquiry import ask, attach, question_of, questions_of, read_pool, without_format
from mllm_cl.data.rows import Rows, assistant_message, is_answered, user_message
from mllm_cl.errors import DataError


def test_text_pools_have_one_inquiry_per_line(tmp_path):
    path = tmp_path / "pool.txt"
    path.write_text("What is it?\n\n  Why?  \nHow?\n", encoding="utf-8")
    pool = read_pool(str(path), 10, seed=0)
    assert [question_of(row) for row in pool] == ["What is it?", "Why?", "How?"]
    assert not any(row["images"] for row in pool)
    assert len(read_pool(str(path), 2, seed=0)) == 2
    assert read_pool(str(path), 2, seed=0) == read_pool(str(path), 2, seed=0)


def test_pools_of_rows_lose_their_answers(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "a cat"}]
    (tmp_path / "pool.json").write_text(json.dumps([{"id": "1", "image": "a.png", "conversations": turns}]))
    (row,) = read_pool(str(tmp_path / "pool.json"), 5, seed=0)
    assert not is_answered(row)
    assert len(row["images"]) == 1


def test_unusable_pools_are_explained(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        read_pool(str(tmp_path / "none.txt"), 3, seed=0)
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(DataError, match="the inquiry pool is empty"):
        read_pool(str(tmp_path / "empty.txt"), 3, seed=0)


def test_the_built_in_pool_has_pictures_and_no_answers():
    pool = read_pool("general", 20, seed=3)
    assert len(pool) == 20
    assert any(row["images"] for row in pool)
    assert not any(is_answered(row) or "answers" in row for row in pool)


def test_the_question_is_the_last_user_turn():
    row = {"id": "x", "images": [], "messages": [{"role": "system", "content": "Be brief."}, user_message(" One? ", 1)]}
    assert question_of(row) == "One?"
    row["messages"] += [assistant_message("1"), user_message("Two?"), assistant_message("2")]
    assert question_of(row) == "Two?"
    assert question_of({**row, "messages": row["messages"][:1]}) == ""


def test_question_memories_hold_distinct_texts_only(make_row):
    rows = Rows([make_row(str(i), f"Question {i % 4}?", f"secret {i}") for i in range(40)])
    texts = questions_of(rows, 10, seed=0)
    assert sorted(texts) == [f"Question {i}?" for i in range(4)]
    assert len(questions_of(rows, 3, seed=0)) == 3
    assert questions_of(rows, 3, seed=1) == questions_of(rows, 3, seed=1)


@pytest.mark.parametrize(("rows", "inquiries"), [(8, 8), (8, 2), (8, 3), (5, 12), (1, 4), (7, 1), (3, 0)])
def test_inquiries_are_spread_evenly_and_none_is_lost(make_row, rows, inquiries):
    task = Rows([make_row(str(i), "?", "x") for i in range(rows)])
    attached = attach(task, [ask("?", [], f"q{i}") for i in range(inquiries)])
    own = [[other["id"] for other in row.get("companions", {}).get("inquiry", [])] for row in attached]
    assert [name for names in own for name in names] == [f"q{i}" for i in range(inquiries)]
    assert max(map(len, own)) - min(map(len, own)) <= 1
    assert [row["id"] for row in attached] == [row["id"] for row in task]


def test_companions_of_other_kinds_are_kept(make_row):
    task = Rows([make_row("0", "?", "x")])
    both = attach(attach(task, [ask("?", [], "q")], "first"), [ask("?", [], "p")], "second")
    assert set(both[0]["companions"]) == {"first", "second"}
    assert "companions" not in task[0]


def test_every_epoch_brings_its_own_inquiries(make_row):
    task, now = Rows([make_row(str(i), "?", "x") for i in range(4)]), [0]
    attached = attach(task, [ask("?", [], f"q{i}") for i in range(6)], epoch=lambda: now[0], epochs=3)
    seen = []
    for now[0] in range(4):
        seen.append([other["id"] for row in attached for other in row.get("companions", {}).get("inquiry", [])])
    assert seen == [["q0", "q1"], ["q2", "q3"], ["q4", "q5"], ["q0", "q1"]]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("What is it? Answer with one word.", "What is it?"),
        ("What is it?\nAnswer the question using a single word or phrase.", "What is it?"),
        ("Which?\nA. x\nB. y\nAnswer with the option's letter from the given choices directly.", "Which?\nA. x\nB. y"),
        ("What is it?", "What is it?"),
        ("Answer with one word.", "Answer with one word."),
    ],
)
def test_format_instructions_are_taken_off(text, expected):
    assert without_format([text]) == [expected]


def test_what_nearly_all_questions_end_with_is_a_format_instruction():
    texts = [f"Is this plate number {i}? Say it in French." for i in range(19)] + ["Who? Say it in German."]
    assert without_format(texts) == [f"Is this plate number {i}?" for i in range(19)] + ["Who? Say it in German."]
