"""The stream file of a user: what it means, and every mistake in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mllm_cl.data.rows import message_text
from mllm_cl.errors import StreamError
from mllm_cl.streams import read_stream

TASK = "  - name: plates\n    train: plates/train.json\n    test: plates/test.json\n"


def write_split(path: Path, answers: list[str], image: str = "{}.png") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "id": f"{path.stem}-{number}",
            "image": image.format(number),
            "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": answer}],
        }
        for number, answer in enumerate(answers)
    ]
    path.write_text(json.dumps(rows))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for task in ("plates", "menus"):
        write_split(tmp_path / task / "train.json", ["a", "b", "a"])
        write_split(tmp_path / task / "test.json", ["a", "b"])
    (tmp_path / "plates" / "images").mkdir()
    Image.new("RGB", (2, 2)).save(tmp_path / "plates" / "images" / "0.png")
    return tmp_path


def stream_file(folder: Path, content: str | bytes) -> Path:
    path = folder / "stream.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


FULL = """\
name: my-stream
tasks:
  - name: plates
    train: plates/train.json
    test: plates/test.json
    validation: plates/test.json
    image_folder: plates/images
    metric: anls
    instruction_suffix: "Answer with one word."
    format: llava
    max_new_tokens: 7
    description: Reading plates
  - {name: menus, train: menus/train.json, test: menus/test.json}
"""


def test_every_key_has_its_effect(folder: Path) -> None:
    stream = read_stream(stream_file(folder, FULL))
    plates, menus = stream
    assert (stream.name, plates.name, menus.name) == ("my-stream", "plates", "menus")
    assert [len(rows) for rows in (plates.train, plates.validation, plates.test)] == [3, 2, 2]
    assert (plates.metric, plates.max_new_tokens, plates.description) == ("anls", 7, "Reading plates")
    assert (menus.metric, menus.max_new_tokens, len(menus.validation)) == ("exact_match", None, 0)
    assert plates.train[0]["images"] == [str(folder / "plates/images/0.png")]
    assert menus.train[0]["images"] == [str(folder / "menus/0.png")]
    assert message_text(plates.train[0]["messages"][0]) == "What?\nAnswer with one word."
    assert (plates.test[1]["answers"], plates.validation[0]["answers"]) == (["b"], ["a"])
    assert "answers" not in plates.train[0]


def test_a_folder_is_enough(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream_file(folder, "\ufeff" + FULL)
    monkeypatch.chdir(folder)
    assert read_stream(folder).fingerprint == read_stream("stream.yaml").fingerprint


def test_no_image_is_opened(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("an image was opened"))
    assert len(read_stream(stream_file(folder, FULL))) == 2


def test_fingerprint_follows_rows_images_and_order_but_not_the_folder(folder: Path, tmp_path_factory: Any) -> None:
    path = stream_file(folder, FULL)
    first = read_stream(path).fingerprint
    assert len(first) == 64
    assert read_stream(path).fingerprint == first
    moved = tmp_path_factory.mktemp("elsewhere") / "new"
    folder.rename(moved)
    assert read_stream(moved).fingerprint == first
    moved.rename(folder)

    seen = {first}

    def changed() -> None:
        now = read_stream(path).fingerprint
        assert now not in seen
        seen.add(now)

    write_split(folder / "menus" / "test.json", ["a", "c"])
    changed()
    Image.new("RGB", (20, 2)).save(folder / "plates" / "images" / "0.png")
    changed()
    stream_file(folder, FULL.replace("one word", "a word"))
    changed()
    stream_file(folder, FULL.replace("name: menus", "name: cards"))
    changed()


def test_hub_ids_are_not_taken_for_paths(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    calls = []

    def load(name: str, config: str | None = None) -> Any:
        calls.append((name, config))
        return {"train": datasets.Dataset.from_dict({"question": ["Q"], "answer": ["A"]})} | {
            "testdev": datasets.Dataset.from_dict({"question": ["Q"], "answer": ["A"]})
        }

    monkeypatch.setattr(datasets, "load_dataset", load)
    content = "name: s\ntasks:\n- {name: a, train: someone/vqa, test: 'someone/vqa:hard@testdev'}\n"
    stream = read_stream(stream_file(folder, content))
    assert calls == [("someone/vqa", None), ("someone/vqa", "hard")]
    assert stream["a"].test[0]["answers"] == ["A"]


MISTAKES = [
    ("", ["stream.yaml: the file is empty", "`name` and `tasks`"]),
    ("- a\n- b\n", ["stream.yaml: the file is no mapping"]),
    ("name: s\ntasks: [\n", ["stream.yaml, line 3, column 1: not valid YAML", "indentation"]),
    ("name: s\ntasks:\n\t- a\n", ["stream.yaml, line 3", "not valid YAML"]),
    (b"name: caf\xe9\n", ["stream.yaml: not UTF-8", "save the file as UTF-8"]),
    ("name: s\nname: t\n", ["line 2, column 1: not valid YAML (the key 'name' is given twice)"]),
    ("name: !!python/object/apply:os.system [ls]\n", ["not valid YAML", "python/object"]),
    ("name: s\n", ["stream.yaml, tasks: the key is missing", "add `tasks:`"]),
    ("name: s\ntasks: []\n", ["stream.yaml, tasks: the stream has no tasks", "add a task"]),
    ("name: s\ntasks: {}\n", ["stream.yaml, tasks: {} given", "valid list"]),
    ("tasks:\n" + TASK, ["stream.yaml, name: the key is missing"]),
    ("name: 3\ntasks:\n" + TASK, ["stream.yaml, name: 3 given", "put the value in quotes"]),
    ("name: s\ntask:\n" + TASK, ["stream.yaml, task: unknown key", "did you mean 'tasks'?"]),
    ("name: s\ntasks:\n" + TASK + "    metrik: x\n", ["tasks[0].metrik: unknown key", "did you mean 'metric'?"]),
    ("name: s\ntasks:\n" + TASK.replace("train:", "trian:"), ["tasks[0].trian: unknown key", "did you mean 'train'?"]),
    ("name: s\ntasks:\n" + TASK.rsplit("    test", 1)[0], ["tasks[0].test: the key is missing", "hold some rows out"]),
    ("name: s\ntasks:\n" + TASK + "    max_new_tokens: 0\n", ["tasks[0].max_new_tokens: 0 given", "greater than"]),
    ("name: s\ntasks:\n" + TASK + "    max_new_tokens: '5'\n", ["tasks[0].max_new_tokens: '5' given", "valid integer"]),
    ("name: s\ntasks:\n" + TASK + "    format: lava\n", ["tasks[0].format: unknown format 'lava'", "mean 'llava'?"]),
    (
        "name: s\ntasks:\n" + TASK.replace("plates\n", "../x\n"),
        ["tasks[0].name: '../x' cannot be a", "no dot in front"],
    ),
    ("name: s\ntasks:\n" + TASK.replace(" plates\n", " .hidden\n"), ["tasks[0].name: '.hidden' cannot be"]),
    ("name: s\ntasks:\n" + TASK.replace(" plates\n", " a b\n"), ["tasks[0].name: 'a b' cannot be a task name"]),
    ("name: s\ntasks:\n" + TASK.replace(" plates\n", " no\n"), ["tasks[0].name: False given", "in quotes"]),
    ("name: s\ntasks:\n" + TASK + TASK, ["tasks[1].name: 'plates' is also the name of tasks[0]"]),
    ("name: s\ntasks:\n" + TASK + TASK.replace(" plates\n", " Plates\n"), ["tasks[1].name: 'Plates' is also"]),
    ("name: s\ntasks:\n" + TASK.replace("test.json", "tset.json"), ["tasks[0].test: ", "did you mean", "test.json"]),
    (
        "name: s\ntasks:\n" + TASK.replace("plates/train", "palets/train"),
        ["tasks[0].train: ", "palets' does not exist"],
    ),
    ("name: s\ntasks:\n" + TASK + "    image_folder: imgs\n", ["tasks[0].image_folder: the folder", "does not exist"]),
    ("name: s\ntasks:\n" + TASK.replace("train.json", "stream.yaml"), ["tasks[0].train: ", "does not exist"]),
    ("name: s\ntasks:\n- 5\n", ["tasks[0]: 5 given"]),
]


@pytest.mark.parametrize(("content", "parts"), MISTAKES)
def test_mistakes_in_the_stream_file(folder: Path, content: str | bytes, parts: list[str]) -> None:
    path = stream_file(folder, content)
    with pytest.raises(StreamError) as caught:
        read_stream(path)
    assert str(caught.value).startswith(str(path))
    assert [part for part in parts if part not in str(caught.value)] == [], str(caught.value)


def test_missing_stream_file(tmp_path: Path) -> None:
    with pytest.raises(StreamError, match=r"stream\.yaml: the stream file does not exist"):
        read_stream(tmp_path)
    (tmp_path / "mine.yaml").write_text("name: s")
    with pytest.raises(StreamError, match=r"does not exist(.|\n)*there is: mine\.yaml"):
        read_stream(tmp_path / "other.yaml")
