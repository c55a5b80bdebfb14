"""Names that the tools of the field use for the same thing, and columns that the user renames."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mllm_cl.data.columns import rename_columns
from mllm_cl.data.formats import convert_row, detect_row_format
from mllm_cl.data.problems import RowError
from mllm_cl.data.readers import read_rows
from mllm_cl.data.rows import message_text
from mllm_cl.data.validate import validate_rows
from mllm_cl.errors import DataError, StreamError
from mllm_cl.streams import read_stream


def turns(raw: dict[str, Any], format: str) -> list[tuple[str, str]]:
    row = convert_row(raw, format=format, default_id="x")
    return [(message["role"], message_text(message)) for message in row["messages"]]


@pytest.mark.parametrize(
    ("raw", "format"),
    [
        ({"prompt": "q", "response": "a"}, "query_response"),
        ({"instruction": "q", "response": "a"}, "query_response"),
        ({"input": "q", "output": "a"}, "query_response"),
        ({"problem": "q", "solution": "a"}, "query_response"),
        ({"problem": "q", "answer": "a", "solution": "long"}, "query_response"),
        ({"query": "q", "target": "a"}, "query_response"),
        ({"conversation": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, "sharegpt"),
        ({"messages": [{"from": "user", "value": "q"}, {"from": "assistant", "value": "a"}]}, "messages"),
        ({"prompt": "q", "completion": "a", "solution": "long"}, "prompt_completion"),
        ({"instruction": "q", "output": "a"}, "alpaca"),
    ],
)
def test_names_of_ms_swift(raw: dict[str, Any], format: str) -> None:
    found = detect_row_format(raw)
    assert found is not None
    assert found[0] == format
    assert turns(raw, format) == [("user", "q"), ("assistant", "a")]


def test_the_system_prompt_of_a_query() -> None:
    raw = {"query": "q", "response": "a", "system_prompt": "s"}
    assert turns(raw, "query_response")[0] == ("system", "s")


@pytest.mark.parametrize("key", ["image_path", "img", "image_file", "file_name", "picture", "images_paths", "Image"])
@pytest.mark.parametrize("value", ["a.PNG", ["a/b.jpg", "c.jpg"], {"bytes": b"x", "path": None}])
def test_an_image_under_another_name_is_not_dropped(key: str, value: Any) -> None:
    raw = {"question": "q", "answer": "a", key: value}
    with pytest.raises(RowError, match=rf"`{key}` looks like one") as caught:
        convert_row(raw, format="query_response", default_id="x")
    assert f"columns: {{{key}: image}}" in str(caught.value)
    row = convert_row({**raw, "image": "real.png"}, format="query_response", default_id="x")
    assert row["images"] == ["real.png"]


@pytest.mark.parametrize(
    "extra", [{"image_path": ""}, {"file_name": "notes.txt"}, {"source_image": "a.png"}, {"img": 3}]
)
def test_other_columns_of_text_rows_stay(extra: dict[str, Any]) -> None:
    row = convert_row({"question": "q", "answer": "a", **extra}, format="query_response", default_id="x")
    assert row["images"] == []


def test_a_path_in_the_text_is_refused() -> None:
    with pytest.raises(RowError, match="names an image in the text"):
        turns({"query": "<img>a/b.jpg</img>What?", "response": "a"}, "query_response")
    html = "Close the tag: <img>nothing</img>"
    assert turns({"query": html, "response": "a"}, "query_response")[0] == ("user", html)


def stream_file(folder: Path, columns: str) -> Path:
    for split in ("train", "test"):
        rows = [{"pic": f"{split}{n}.png", "problem": "What?", "truth": f"t{n}", "kind": "ab"[n]} for n in range(2)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / "stream.yaml"
    task = f"{{name: a, train: train.jsonl, test: test.jsonl, columns: {columns}"
    path.write_text(f"name: s\ntasks:\n  - {task}}}\n  - {task.replace('name: a', 'name: b, split_by: kind')}}}\n")
    return path


def test_columns_are_renamed(tmp_path: Path) -> None:
    stream = read_stream(stream_file(tmp_path, "{pic: image, truth: answer}"))
    assert [task.name for task in stream] == ["a", "b-a", "b-b"]
    row = stream["a"].train[1]
    assert row["images"] == [str(tmp_path / "train1.png")]
    assert [message_text(message) for message in row["messages"]] == ["What?", "t1"]
    assert "pic" not in row
    assert stream["b-b"].test[0].get("answers") == ["t1"]
    problems = validate_rows(stream["a"].train, split="train", name="a")
    assert {problem.kind for problem in problems} == {"image_missing"}


@pytest.mark.parametrize(
    ("columns", "parts"),
    [
        ("{pict: image}", ["no row has 'pict'", "did you mean 'pic'?"]),
        ("{pic: imag}", ["columns.pic: no row format reads 'imag'", "did you mean 'image'?"]),
        ("{pic: image, problem: image}", ["two columns would get one name"]),
        ("[pic]", ["columns"]),
    ],
)
def test_mistakes_in_columns(columns: str, parts: list[str], tmp_path: Path) -> None:
    with pytest.raises(StreamError) as caught:
        read_stream(stream_file(tmp_path, columns))
    assert all(part in str(caught.value) for part in ["stream.yaml, tasks[0]", *parts])


def test_nothing_to_rename_leaves_the_source_and_broken_rows_do_not_hide_a_column(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{broken\n[1]\n{"question": "q", "truth": "a"}\n')
    rows = read_rows(path, columns={"truth": "answer"})
    assert message_text(rows[2]["messages"][-1]) == "a"
    with pytest.raises(DataError, match="no row has 'answer'"):
        read_rows(path, columns={"answer": "answer"})
    source: Any = [{"a": 1}]
    assert rename_columns(source, {}, "x") is source
