"""Validation lists every mistake of a split in one pass."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mllm_cl.data.problems import Problem, format_problems
from mllm_cl.data.readers import read_rows
from mllm_cl.data.rows import assistant_message, user_message
from mllm_cl.data.validate import Checks, validate_file, validate_rows


def talk(*values: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[number % 2], "value": value} for number, value in enumerate(values)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    noise.save(tmp_path / "good.png")
    for name in ("cut.png", "cut.jpg"):
        buffer = io.BytesIO()
        noise.save(buffer, format="PNG" if name.endswith("png") else "JPEG")
        (tmp_path / name).write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    (tmp_path / "text.png").write_text("no image at all")
    return tmp_path


def row(**changes: Any) -> dict[str, Any]:
    return {"id": "1", "messages": [user_message("Q"), assistant_message("A")], "images": [], **changes}


MISTAKES = [  # split, row, kind, part of the message, part of the fix
    ("train", 3, "not_an_object", "the row is a number", "correct or remove"),
    ("train", row(id=3), "wrong_type", "`id` is a number", "give the row an id"),
    ("train", row(messages=None), "wrong_type", "`messages` is null", "as a list"),
    ("train", row(messages=[{"role": "user"}]), "wrong_type", "`messages[0]` is no message", "content"),
    ("train", row(messages=[{"role": "user", "content": [{"type": "text"}]}]), "wrong_type", "`messages[0]`", "blocks"),
    ("train", row(images=None), "wrong_type", "`images` is null", "empty for a text-only row"),
    ("train", row(images=["a.png"]), "placeholders", "0 image blocks but 1 images", "as many"),
    (
        "train",
        row(messages=[user_message("Q", 2), assistant_message("A")]),
        "placeholders",
        "2 image blocks",
        "as many",
    ),
    ("train", row(messages=[]), "no_user_turn", "no user turn", "add the question"),
    ("train", row(messages=[assistant_message("A")]), "no_user_turn", "no user turn", "add the question"),
    ("train", row(messages=[user_message("Q"), user_message("Q")]), "roles", "user, user", "write user, assistant"),
    ("test", row(messages=[assistant_message("A"), user_message("Q")]), "roles", "assistant, user", "write user"),
    ("train", row(messages=[user_message("Q")]), "no_final_answer", "does not end with an answer", "add the answer"),
    ("train", row(messages=[user_message("Q"), assistant_message(" \n")]), "empty_answer", "is empty", "fill in"),
    ("test", row(messages=[user_message("Q")]), "no_answers", "the test row has no answers", "`answers`"),
    ("test", row(answers=["", " "]), "empty_answer", "the answer is empty", "fill in"),
    ("test", row(answers=[1]), "wrong_type", "`answers` is not a list of texts", "as a text"),
    ("test", row(answers="A"), "wrong_type", "`answers` is not a list of texts", "as a text"),
    ("train", row(messages=[user_message("\ud83d"), assistant_message("A")]), "not_utf8", "surrogate", "repair"),
]


@pytest.mark.parametrize(("split", "bad", "kind", "message", "fix"), MISTAKES)
def test_each_mistake_is_found(split: str, bad: Any, kind: str, message: str, fix: str) -> None:
    problems = validate_rows([row(id="0"), bad], split=split, name="mine", checks=Checks(images="none"))
    found = [problem for problem in problems if problem.kind == kind]
    assert found, problems
    assert (found[0].file, found[0].row, found[0].severity) == ("mine", 2, "error")
    assert message in found[0].message
    assert fix in found[0].fix


@pytest.mark.parametrize("split", ["train", "test", "validation"])
def test_good_rows_have_no_problems(split: str) -> None:
    system = {"role": "system", "content": "Be brief."}
    rows = [row(), row(id="2", messages=[system, *row()["messages"], *row()["messages"]], further={"keys": [1]})]
    assert validate_rows(rows, split=split) == []


def test_duplicate_ids_and_empty_splits() -> None:
    problems = validate_rows([row(), row(id="2"), row()])
    assert [(problem.kind, problem.row, problem.message) for problem in problems] == [
        ("duplicate_id", 3, "the id is also that of row 1.")
    ]
    assert [problem.kind for problem in validate_rows([], split="test")] == ["empty_split"]


def test_one_pass_lists_broken_lines_rows_and_images_with_their_line_numbers(folder: Path) -> None:
    lines = [
        json.dumps({"id": "a", "image": "good.png", "conversations": talk("<image>Q", "A")}),
        '{"id": "b", "conversations": [',
        "",
        json.dumps({"id": "c", "image": "missing.png", "conversations": talk("<image><image>Q", "A")}),
        json.dumps({"id": "d", "image": "cut.png", "conversations": talk("Q", "")}),
        json.dumps({"id": "e", "image": "cut.jpg", "conversations": talk("Q", "A")}),
        json.dumps({"id": "f", "image": "text.png", "conversations": talk("Q", "A")}),
        json.dumps({"id": "a", "image": "text.png", "conversations": talk("Q", "A")}),
        '{"id": "caf\xe9"}',
    ]
    path = folder / "rows.jsonl"
    path.write_bytes("\n".join(lines).encode("latin-1"))
    problems = validate_file(path)
    assert {problem.file for problem in problems} == {str(path)}
    assert [(problem.row, problem.id, problem.kind, problem.severity) for problem in problems] == [
        (2, None, "broken_json", "error"),
        (4, "c", "placeholders", "error"),
        (4, "c", "image_missing", "error"),
        (5, "d", "empty_answer", "error"),
        (5, "d", "image_unreadable", "error"),
        (6, "e", "image_unreadable", "error"),
        (7, "f", "image_unreadable", "error"),
        (8, "a#2", "duplicate_id", "warning"),
        (9, None, "not_utf8", "error"),
    ]
    assert all(problem.fix for problem in problems)
    listing = format_problems(problems, limit=3)
    assert f"error: {path}, line 2: not JSON" in listing
    assert f"error: {path}, line 4 (id 'c'): 2 `<image>` in the text but 1 image." in listing
    assert "to fix: add or remove `<image>` in the text" in listing
    assert listing.splitlines()[-2:] == [
        "... and 6 more",
        "9 problems: 3 x image_unreadable, 1 x broken_json, 1 x placeholders, 1 x image_missing, 1 x empty_answer, "
        "1 x not_utf8, 1 x duplicate_id",
    ]


@pytest.mark.parametrize(("check", "names"), [("decode", "cmt"), ("header", "mt"), ("exists", "m"), ("none", "")])
def test_how_far_images_are_checked(folder: Path, check: Any, names: str) -> None:
    images = {"good": "good.png", "c": "cut.png", "m": "missing.png", "t": "text.png"}
    rows = [
        {"id": key, "image": name, "conversations": talk("<image>Q", "A")} for key, name in images.items() for _ in "12"
    ]
    path = folder / "rows.json"
    path.write_text(json.dumps(rows))
    seen = []
    problems = validate_rows(read_rows(path), checks=Checks(images=check, progress=lambda *told: seen.append(told)))
    assert [problem.id for problem in problems if problem.severity == "error"] == list(names)
    assert seen == [("rows", 8, 8)]


def test_embedded_images_are_checked(folder: Path) -> None:
    encoded = [{"bytes": (folder / name).read_bytes(), "path": None} for name in ("good.png", "cut.png")]
    messages = [user_message("Q", 1), assistant_message("A")]
    rows = [row(id=str(number), messages=messages, images=[image]) for number, image in enumerate(encoded)]
    rows.append(row(id="pil", messages=messages, images=[Image.new("RGB", (2, 2))]))
    rows.append(row(id="odd", messages=messages, images=[3]))
    rows.append(row(id="void", messages=messages, images=[{"bytes": None, "path": None}]))
    problems = validate_rows(rows)
    assert [(problem.id, problem.kind) for problem in problems] == [
        ("1", "image_unreadable"),
        ("odd", "image_unreadable"),
        ("void", "image_unreadable"),
    ]


def test_a_file_that_cannot_be_read_is_one_problem(tmp_path: Path) -> None:
    problem = validate_file(tmp_path / "none.jsonl")[0]
    assert (problem.kind, problem.row) == ("file", None)
    assert problem.message.startswith("the file does not exist.")
    (tmp_path / "a.json").write_text("[{}")
    problem = validate_file(tmp_path / "a.json")[0]
    assert "line 1, column 4: not JSON" in problem.message


def test_listing_puts_errors_first() -> None:
    warning = Problem("a", 1, None, "shared_id", "m.", "f.", severity="warning")
    error = Problem("b", None, None, "file", "m.", "f.")
    assert format_problems([]) == "no problems"
    assert format_problems([warning, error]).splitlines()[0] == "error: b: m."
