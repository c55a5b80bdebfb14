"""Validation of a stream: all tasks and splits in one pass, and what must not cross between splits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from mllm_cl.data.problems import format_problems
from mllm_cl.data.validate import Checks
from mllm_cl.errors import StreamError
from mllm_cl.streams import Stream, Task, ensure_valid, read_stream, validate_stream

FILE = """\
name: s
tasks:
  - {name: plates, train: train.jsonl, test: test.json}
"""


def line(name: str, image: str, answer: str = "A", question: str = "<image>Q") -> dict:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": name, "image": image, "conversations": turns}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a", "b", "c"):
        Image.new("RGB", (4, 4), "red").save(tmp_path / f"{name}.png")
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps(line(name, f"{name}.png")) for name in "ab"))
    (tmp_path / "test.json").write_text(json.dumps([line("c", "c.png")]))
    (tmp_path / "stream.yaml").write_text(FILE)
    return tmp_path


def test_a_good_stream(folder: Path) -> None:
    seen = []
    report = validate_stream(folder, checks=Checks(progress=lambda *place: seen.append(place)))
    assert (report.name, report.problems, report.is_valid) == ("s", [], True)
    assert report.counts == {"plates": {"train": 2, "test": 1}}
    assert seen == [("plates/train", 2, 2), ("plates/test", 1, 1)]
    assert names(ensure_valid(folder / "stream.yaml")) == ["plates"]
    stream = read_stream(folder)
    assert ensure_valid(stream) is stream


def names(stream: Stream) -> list[str]:
    return [task.name for task in stream]


def test_what_splits_share_is_a_warning(folder: Path) -> None:
    (folder / "test.json").write_text(json.dumps([line("c", "c.png"), line("a", "./b.png")]))
    report = validate_stream(folder)
    assert [(problem.kind, problem.severity) for problem in report.problems] == [
        ("shared_id", "warning"),
        ("shared_image", "warning"),
    ]
    assert "1 id is used in train and test of plates, e.g. 'a'" in report.problems[0].message
    assert (report.problems[1].row, report.problems[1].file) == (2, str(folder / "test.json"))
    assert "1 image is in train and test of plates" in report.problems[1].message
    assert report.is_valid
    assert len(ensure_valid(folder)) == 1


def test_problems_of_all_tasks_in_one_report(folder: Path) -> None:
    (folder / "stream.yaml").write_text(
        FILE + "  - {name: menus, train: none.json, test: test.json, image_folder: nowhere}\n"
        "  - {name: cards, train: none.json, test: broken.json}\n"
    )
    (folder / "train.jsonl").write_text('{"id": 1,\n' + json.dumps(line("b", "z.png", answer="")))
    (folder / "broken.json").write_text("[{]")
    report = validate_stream(folder)
    file = str(folder / "stream.yaml")
    assert [(problem.file, problem.row, problem.kind) for problem in report.errors] == [
        (str(folder / "train.jsonl"), 1, "broken_json"),
        (str(folder / "train.jsonl"), 2, "empty_answer"),
        (str(folder / "train.jsonl"), 2, "image_missing"),
        (file, None, "file"),
        (file, None, "file"),
        (file, None, "file"),
        (file, None, "file"),
    ]
    messages = format_problems(report.problems)
    for part in (
        "tasks[1].image_folder: the folder",
        "tasks[1].train: ",
        "tasks[2].train: ",
        "none.json: the file does not exist",
        "tasks[2].test: ",
        "broken.json, line 1, column 3: not JSON",
    ):
        assert part in messages
    assert report.counts == {
        "plates": {"train": 2, "test": 1},
        "menus": {"train": 0, "test": 1},
        "cards": {"train": 0, "test": 0},
    }


def test_a_broken_stream_file_is_one_problem(tmp_path: Path) -> None:
    (tmp_path / "stream.yaml").write_text("name: s\ntasks: [")
    report = validate_stream(tmp_path / "stream.yaml")
    assert [problem.kind for problem in report.problems] == ["file"]
    assert "line 2" in report.problems[0].message
    assert validate_stream(tmp_path / "none.yaml").problems[0].message.startswith("the stream file does not exist")


def test_streams_made_in_memory() -> None:
    task = Task("a", train=[{"id": "1", "messages": [], "images": []}], test=())
    report = validate_stream(Stream("s", (task,)))
    assert [(problem.file, problem.row, problem.kind) for problem in report.errors] == [
        ("a/train", 1, "no_user_turn"),
        ("a/train", 1, "no_final_answer"),
        ("a/test", None, "empty_split"),
    ]
    assert report.counts == {"a": {"train": 1, "test": 0}}


def test_ensure_valid_names_the_first_problems_and_their_number(folder: Path) -> None:
    rows = [line(f"r{number}", f"{number}.png") for number in range(30)]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(StreamError) as caught:
        ensure_valid(folder)
    message = str(caught.value)
    assert message.startswith("s: 30 problems in the data.\n")
    assert f"error: {folder / 'train.jsonl'}, line 20 (id 'r19'): the image" in message
    assert "line 21 " not in message
    assert "... and 10 more" in message
    assert "to fix: correct the rows" in message
