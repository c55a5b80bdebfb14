"""Reading rows: every format, every container, every mistake in a file."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mllm_cl.data import sources
from mllm_cl.data.formats import FORMATS
from mllm_cl.data.images import encode_png
from mllm_cl.data.problems import RowError
from mllm_cl.data.readers import detect_format, read_rows
from mllm_cl.data.rows import message_text
from mllm_cl.errors import DataError

IMAGE = {"type": "image"}


def text(value: str) -> dict[str, str]:
    return {"type": "text", "text": value}


def user(*blocks: dict[str, str]) -> dict[str, Any]:
    return {"role": "user", "content": list(blocks)}


def assistant(value: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [text(value)]}


def turns(*values: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[number % 2], "value": value} for number, value in enumerate(values)]


def write(path: Path, content: Any) -> Path:
    """Writes bytes, text, or values as a JSON list or as JSONL, whichever the name says."""
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, str):
        path.write_bytes(content.encode())
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in content))
    else:
        path.write_text(json.dumps(content, indent=1))
    return path


QUESTION = [user(IMAGE, text("What?")), assistant("A cat")]
SAME_ROW = [  # one row in every format: name, row, is its format also detected
    ("llava", {"image": "a.png", "conversations": turns("<image>\nWhat?", "A cat")}),
    ("llava_test", {"question_id": 7, "image": "a.png", "text": "<image>\nWhat?", "answer": "A cat"}),
    (
        "sharegpt",
        {
            "images": ["a.png"],
            "conversations": [
                {"role": "user", "content": "<image>What?"},
                {"role": "assistant", "content": "A cat"},
            ],
        },
    ),
    (
        "messages",
        {
            "images": ["a.png"],
            "messages": [
                {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]},
                {"role": "assistant", "content": "A cat"},
            ],
        },
    ),
    (
        "messages",
        {
            "messages": [
                {"role": "user", "content": [{"type": "image", "image": "a.png"}, text("What?")]},
                {"role": "assistant", "content": "A cat"},
            ],
        },
    ),
    ("prompt_completion", {"prompt": "What?", "completion": "A cat", "image": "a.png"}),
    (
        "prompt_completion",
        {
            "prompt": [{"role": "user", "content": "<image>What?"}],
            "completion": [{"role": "assistant", "content": "A cat"}],
            "images": ["a.png"],
        },
    ),
    ("query_response", {"query": "<image>What?", "response": "A cat", "images": ["a.png"]}),
    ("query_response", {"question": "What?", "answer": "A cat", "image": {"path": "a.png", "bytes": None}}),
    ("alpaca", {"instruction": "What?", "input": "", "output": "A cat", "images": ["a.png"]}),
    ("turn_pairs", {"conversation": [{"human": "<image>What?", "assistant": "A cat"}], "images": ["a.png"]}),
    ("turn_pairs", {"texts": [{"user": "What?", "assistant": "A cat", "source": "VQAv2"}], "images": ["a.png"]}),
]


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize(("format", "raw"), SAME_ROW)
def test_every_format_gives_the_same_row(tmp_path: Path, format: str, raw: dict, split: str, suffix: str) -> None:
    path = write(tmp_path / f"rows{suffix}", [raw])
    assert detect_format(path)[0] == format
    row = read_rows(path, split=split, task="cats")[0]
    assert row["messages"][0] == QUESTION[0]
    assert row["images"] == [str(tmp_path / "a.png")]
    assert row["id"] == ("7" if "question_id" in raw else f"cats/{split}/0")
    if split == "test":
        assert row.get("answers") == ["A cat"]
    else:
        assert row["messages"] == QUESTION
    assert read_rows(path, split=split, task="cats", format=format)[0] == row


@pytest.mark.parametrize(
    ("value", "images", "blocks"),
    [
        ("<image>\nWhat?", 1, [IMAGE, text("What?")]),
        ("What?\n<image>", 1, [text("What?"), IMAGE]),
        ("<image>\n<image>\n\nCompare.", 2, [IMAGE, IMAGE, text("Compare.")]),
        (
            "First: <image>\nSecond: <image>\nSame?",
            2,
            [text("First: "), IMAGE, text("\nSecond: "), IMAGE, text("\nSame?")],
        ),
        ("<image>", 1, [IMAGE]),
        ("What?", 1, [IMAGE, text("What?")]),
        ("What?", 2, [IMAGE, IMAGE, text("What?")]),
        ("  What?\n", 0, [text("  What?\n")]),
    ],
)
def test_placeholders_keep_their_place(tmp_path: Path, value: str, images: int, blocks: list) -> None:
    path = write(tmp_path / "a.json", [{"image": ["x.png"] * images, "conversations": turns(value, "A")}])
    assert read_rows(path)[0]["messages"][0] == user(*blocks)


def test_images_without_placeholder_go_to_the_first_user_turn(tmp_path: Path) -> None:
    messages = [{"role": role, "content": role} for role in ("system", "user", "assistant", "user", "assistant")]
    path = write(tmp_path / "a.json", [{"messages": messages, "images": ["x.png"]}])
    row = read_rows(path)[0]
    assert [message["content"][0] for message in row["messages"]] == [text("system"), IMAGE, *map(text, (
        "assistant", "user", "assistant"))]  # fmt: skip


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("<image>\nWhat?", [IMAGE, text("What?\nOne word.")]),
        ("<image>\nWhat?\nOne word.", [IMAGE, text("What?\nOne word.")]),
        ("What?\n<image>", [text("What?\nOne word."), IMAGE]),
        ("<image>", [IMAGE, text("One word.")]),
    ],
)
def test_suffix_is_added_once_to_the_last_user_turn(tmp_path: Path, question: str, expected: list) -> None:
    rows = [{"image": "x.png", "conversations": turns(question, "A")}]
    row = read_rows(write(tmp_path / "a.json", rows), suffix="One word.")[0]
    assert row["messages"][0] == user(*expected)
    rows = [{"conversations": turns("First?", "A", "Last?", "B")}]
    row = read_rows(write(tmp_path / "b.json", rows), suffix="One word.")[0]
    assert [message_text(message) for message in row["messages"]] == ["First?", "A", "Last?\nOne word.", "B"]


@pytest.mark.parametrize(
    ("given", "answers"),
    [
        ({"answer": "a"}, ["a"]),
        ({"answers": ["a", "b"]}, ["a", "b"]),
        ({"answer": ["a", "b"]}, ["a", "b"]),
        ({"answer": 3}, ["3"]),
        ({"answer": 2.5}, ["2.5"]),
        ({"answer": True}, ["true"]),
        ({"answers": [3, "three"]}, ["3", "three"]),
        ({"answer": 10**40}, [str(10**40)]),
        ({"answer": [0.1, 0.2, 0.5, 0.6]}, ["[0.1, 0.2, 0.5, 0.6]"]),
        ({"answers": [[0.1, 0.2], [0.3, 0.4]]}, ["[0.1, 0.2]", "[0.3, 0.4]"]),
        ({"answers": [{"answer": "a", "confidence": 1}, {"answer": "b"}]}, ["a", "b"]),
        ({"answers": [], "answer": "a"}, ["a"]),
        ({}, None),
    ],
)
def test_answers_become_a_list_of_texts(tmp_path: Path, given: dict, answers: list[str] | None) -> None:
    path = write(tmp_path / "a.jsonl", [{"question_id": 1, "text": "Q", **given}])
    assert read_rows(path, split="test")[0].get("answers") == answers


def test_unknown_keys_and_question_id_are_kept(tmp_path: Path) -> None:
    raw = {"question_id": 5, "text": "Q", "answer": "a", "type": "count", "size": [3, 4], "answer_bbox": [1, 2]}
    row = read_rows(write(tmp_path / "a.json", [raw]), split="test")[0]
    kept = {key: row.get(key) for key in ("question_id", "answer", "type", "size", "answer_bbox")}
    assert kept == {key: raw[key] for key in kept}
    assert "text" not in row


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_ids_are_made_unique_and_stable(tmp_path: Path, suffix: str) -> None:
    raw = [{"id": value, "conversations": turns("Q", "A")} for value in ("a", "a", 7, None, "a", "", "b#2", "b", "b")]
    rows = read_rows(write(tmp_path / f"a{suffix}", raw), task="t")
    ids = [row["id"] for row in rows]
    assert ids == ["a", "a#2", "7", "t/train/3", "a#3", "t/train/5", "b#2", "b", "b#3"]
    assert [rows.is_renamed(index) for index in (0, 1, 4)] == [False, True, True]
    view = rows.select([4, 1])
    assert [row["id"] for row in view] == ["a#3", "a#2"]
    assert view.is_renamed(0)


def test_history_system_and_long_conversations(tmp_path: Path) -> None:
    rows = [
        {"system": "Be brief.", "query": "Q2", "response": "A2", "history": [["Q1", "A1"]]},
        {"instruction": "Translate.", "input": "chat", "output": "cat"},
    ]
    first = read_rows(write(tmp_path / "a.json", rows[:1]))[0]["messages"]
    assert [message["role"] for message in first] == ["system", "user", "assistant", "user", "assistant"]
    second = read_rows(write(tmp_path / "b.json", rows[1:]))[0]["messages"]
    assert message_text(second[0]) == "Translate.\nchat"


def test_image_references(tmp_path: Path) -> None:
    def images(value: Any, **options: Any) -> list:
        path = write(tmp_path / "a.json", [{"image": value, "conversations": turns("Q", "A")}])
        return list(read_rows(path, **options)[0]["images"])

    assert images("x/a.png", image_folder=tmp_path / "pictures") == [str(tmp_path / "pictures/x/a.png")]
    assert images("/data/a.png", image_folder="elsewhere") == ["/data/a.png"]
    assert images("file:///data/a.png") == ["/data/a.png"]
    assert images(["a.png", "b.png"]) == [str(tmp_path / "a.png"), str(tmp_path / "b.png")]
    assert images("data:image/png;base64,QUJD") == [{"bytes": b"ABC", "path": None}]
    assert images(None) == images("") == images([]) == []


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_bom_crlf_unicode_and_blank_lines(tmp_path: Path, name: str) -> None:
    rows = [{"conversations": turns(f"Où est le 猫? \u2028 {number} 😀", "là-bas")} for number in range(3)]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    body = "\r\n\r\n".join(lines) + "\r\n" if name.endswith("l") else "[" + ",\r\n".join(lines) + "]\r\n"
    path = write(tmp_path / name, b"\xef\xbb\xbf" + body.encode())
    read = read_rows(path)
    assert len(read) == 3
    assert message_text(read[2]["messages"][0]) == "Où est le 猫? \u2028 2 😀"
    assert read.number(2) == (5 if name.endswith("l") else 3)
    assert read.origin == str(path)


def test_json_list_is_found_across_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"id": f"é{n}", "conversations": turns("Ω" * n, '[{\\"' * (n % 5))} for n in range(60)]
    plain = write(tmp_path / "a.json", json.dumps(rows, ensure_ascii=False))
    spaced = write(tmp_path / "b.json", json.dumps(rows, indent=3))
    for chunk in (1, 7, 64, 1000):
        monkeypatch.setattr(sources, "_CHUNK", chunk)
        for path in (plain, spaced):
            read = read_rows(path)
            assert [row["id"] for row in read] == [row["id"] for row in rows]
            assert message_text(read[59]["messages"][1]) == rows[59]["conversations"][1]["value"]


def test_jsonl_named_json_is_read(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"conversations": turns("Q", "A")}) + "\n" for _ in range(2))
    assert len(read_rows(write(tmp_path / "a.json", lines))) == 2
    assert len(read_rows(write(tmp_path / "b.json", lines.split("\n")[0]))) == 1


def test_no_image_is_opened_and_rows_are_converted_on_demand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("an image was opened")

    monkeypatch.setattr(Image, "open", forbidden)
    raw = [{"id": str(number), "image": "missing.png", "conversations": turns("<image>Q", "A")} for number in range(5)]
    rows = read_rows(write(tmp_path / "a.jsonl", [*raw, {"conversations": 3}]))
    assert len(rows) == 6
    assert [row["id"] for row in rows[1:4]] == ["1", "2", "3"]
    with pytest.raises(RowError, match="line 6"):
        rows[5]


def test_rows_can_be_sent_to_loader_workers(tmp_path: Path) -> None:
    rows = read_rows(write(tmp_path / "a.jsonl", [{"conversations": turns("Q", "A")}] * 2)).select([1])
    assert pickle.loads(pickle.dumps(rows))[0] == rows[0]
    with pytest.raises(RowError) as caught:
        read_rows(write(tmp_path / "b.json", [{"messages": 1}]))[0]
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


# --- tables


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    picture = encode_png(Image.new("RGB", (4, 4), "red"))
    rows = {
        "id": ["a", "a", "c"],
        "image": [picture, picture, None],
        "question": ["What?", "Where?", "Why?"],
        "answer": ["cat", "home", "so"],
    }
    features = datasets.Features({key: datasets.Value("string") for key in rows} | {"image": datasets.Image()})
    return datasets.Dataset.from_dict(rows, features=features)


def check_table(rows: Any) -> None:
    assert [row["id"] for row in rows] == ["a", "a#2", "c"]
    assert rows[0]["messages"][0] == user(IMAGE, text("What?"))
    assert set(rows[0]["images"][0]) == {"bytes", "path"}
    assert rows[0]["images"][0]["bytes"].startswith(b"\x89PNG")
    assert rows[2]["images"] == []
    assert rows[1]["answers"] == ["home"]


def test_parquet_file_shards_and_saved_folders(tmp_path: Path, table: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    (tmp_path / "shards").mkdir()
    for name in ("one.parquet", "shards/test-00000-of-00002.parquet", "shards/train-00000-of-00001.parquet"):
        table.to_parquet(tmp_path / name)
    table.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict(test=table, train=table.select([0])).save_to_disk(tmp_path / "dict")
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("an image was opened"))
    for name in ("one.parquet", "shards", "saved", "dict", "dict@test"):
        check_table(read_rows(tmp_path / name, split="test"))
    assert len(read_rows(tmp_path / "dict")) == 1
    assert detect_format(tmp_path / "saved")[0] == "query_response"
    with pytest.raises(DataError, match=r"no split 'validation'(.|\n)*test, train"):
        read_rows(tmp_path / "dict", split="validation")
    with pytest.raises(DataError, match=r"no split 'validation'(.|\n)*test, train"):
        read_rows(tmp_path / "shards", split="validation")


def test_typed_blocks_and_nested_images_in_parquet(tmp_path: Path, table: Any) -> None:
    import datasets

    blocks = [[{"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "Q"}]}]]
    picture = encode_png(Image.new("L", (2, 2)))
    string = datasets.Value("string")
    turn = {"role": string, "content": [{"type": string, "text": string}]}
    features = datasets.Features({"messages": [turn], "images": datasets.List(datasets.Image())})
    data = datasets.Dataset.from_dict({"messages": blocks, "images": [[picture]]}, features=features)
    data.to_parquet(tmp_path / "a.parquet")
    row = read_rows(tmp_path / "a.parquet")[0]
    assert row["messages"] == [user(IMAGE, text("Q"))]
    assert row["images"][0]["bytes"] == picture["bytes"]


def test_image_folder_with_metadata(tmp_path: Path, table: Any) -> None:
    folder = tmp_path / "pictures" / "train"
    folder.mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(folder / "a.png")
    write(folder / "metadata.jsonl", [{"file_name": "a.png", "question": "What?", "answer": "black"}])
    row = read_rows(tmp_path / "pictures")[0]
    assert row["messages"] == [user(IMAGE, text("What?")), assistant("black")]
    assert row["images"] == [str(folder / "a.png")]


def test_hub_ids(monkeypatch: pytest.MonkeyPatch, table: Any) -> None:
    import datasets

    calls = []

    def load(name: str, config: str | None = None) -> Any:
        calls.append((name, config))
        return datasets.DatasetDict(testdev=table, val=table)

    monkeypatch.setattr(datasets, "load_dataset", load)
    check_table(read_rows("someone/vqa:balanced@testdev", split="test"))
    check_table(read_rows("someone/vqa", split="validation"))
    assert calls == [("someone/vqa", "balanced"), ("someone/vqa", None)]

    def fail(*_: Any) -> None:
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError, match=r"someone/vqa: neither a local path nor(.|\n)*reach the Hub(.|\n)*connection"):
        read_rows("someone/vqa")


# --- mistakes: (file name, content, parts of the message)

FILES = [
    ("a.json", b"", ["a.json: the file is empty", "to fix"]),
    ("a.jsonl", b" \n\n", ["a.jsonl: the file is empty"]),
    ("a.json", "[]", ["a.json: the file has no rows", "at least one row"]),
    (
        "a.json",
        '{"data": [{"text": "Q"}]}',
        ["top level is an object", "a list of rows", "the list under `data`"],
    ),
    ("a.json", '{\n "a": 1}', ["top level is an object", ".jsonl"]),
    ("a.json", '"hello"', ["starts with '\"hello\"'", "a JSON list"]),
    ("a.json", '[{"text": 1}\n{"text": 2}]', ["a.json, line 2, column 1: not JSON", "',' expected after row 1"]),
    ("a.json", '[{"text": 1},\n{"text": }]' + " " * 99, ["a.json, line 2", "row 2: Expecting value"]),
    ("a.json", '[{"text": "a}', ["row 1: Unterminated string", "quote"]),
    ("a.json", '[{"text": 1}', ["',' expected after row 1, the end of the file found"]),
    ("a.json", '[{"text": 1}] trailing', ["the list ends, but the file goes on"]),
    ("a.json", '[{"text": 1},]', ["row 2: Expecting value"]),
    ("a.json", '[{"n": ' + "9" * 5000 + "}]", ["row 1: Exceeds the limit"]),
    ("a.json", b'[{"text": "caf\xe9"}]', ["a.json: not UTF-8 near byte 14", "save the file as UTF-8"]),
    ("a.json", '[{"text": "a"}]'.encode("utf-16"), ["a.json: the file is UTF-16", "UTF-8"]),
    ("a.jsonl", '{"text": \n{"text" 2}\n', ["a.jsonl, line 1: not JSON", "correct or remove this row"]),
    ("a.jsonl", b'{"text": "caf\xe9"}\n', ["a.jsonl, line 1: not UTF-8", "save the file as UTF-8"]),
    ("a.jsonl", '{"foo": 1, "bar": 2}\n', ["rows with the keys foo, bar are of no known format", "llava: `conv"]),
    ("a.jsonl", "[1, 2]\n", ["rows that are no objects"]),
    ("a.csv", "a,b\n1,2\n", ["unknown kind of file '.csv'", ".parquet"]),
    ("a.parquet", b"not parquet", ["a.parquet: datasets cannot read it"]),
    ("a.parquet", b"", ["a.parquet: the file is empty"]),
]


@pytest.mark.parametrize(("name", "content", "parts"), FILES)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, content: Any, parts: list[str]) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(DataError) as caught:
        read_rows(path)
    assert str(caught.value).startswith(str(tmp_path))
    assert [part for part in parts if part not in str(caught.value)] == [], str(caught.value)


def test_paths_that_do_not_exist(tmp_path: Path) -> None:
    write(tmp_path / "train.json", "[]")
    with pytest.raises(DataError, match=r"trian\.json: the file does not exist(.|\n)*did you mean .*train\.json"):
        read_rows(tmp_path / "trian.json")
    with pytest.raises(DataError, match=r"does not exist(.|\n)*the folder .*nowhere' does not exist either"):
        read_rows(tmp_path / "nowhere/a.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="the folder is empty"):
        read_rows(tmp_path / "empty")
    with pytest.raises(DataError, match=r"unknown format 'lava'(.|\n)*did you mean 'llava'"):
        read_rows(tmp_path / "train.json", format="lava")


ROWS = [  # split, format, row, kind, parts of the message
    ("auto", [1, 2], "not_an_object", ["the row is a list"]),
    ("auto", {"messages": "hi"}, "wrong_type", ["`messages` is a text", "a list of turns"]),
    ("auto", {"messages": ["hi"]}, "wrong_type", ["`messages[0]` is a text"]),
    ("auto", {"messages": [{"role": "user", "content": 3}]}, "wrong_type", ["`messages[0]` is a number"]),
    ("auto", {"messages": [{"role": "tool", "content": "x"}]}, "unknown_role", ["unknown role 'tool'", "user"]),
    ("auto", {"messages": [{"role": ["user"], "content": "x"}]}, "unknown_role", ["unknown role ['user']"]),
    ("auto", {"messages": [{"content": "x"}]}, "unknown_role", ["unknown role None"]),
    (
        "auto",
        {"messages": [{"role": "user", "content": [{"type": "video"}]}]},
        "wrong_type",
        ["`messages[0][0]` is a block of type 'video'", "video and audio"],
    ),
    ("llava", {"conversations": None}, "missing_key", ["no `conversations`", "format 'llava'", "add `conversations`"]),
    ("llava", {"text": "Q", "answer": "A"}, "missing_key", ["it looks like format 'llava_test'", "set `format:`"]),
    ("llava", {"conversations": [{"from": "user", "value": "Q"}]}, "unknown_role", ["unknown role 'user'", "sharegpt"]),
    ("auto", {"conversations": [{"from": "human"}]}, "missing_key", ["`conversations[0]` has no `value`"]),
    (
        "auto",
        {"conversations": turns("<image><image>", "A"), "image": "a.png"},
        "placeholders",
        ["2 `<image>`", "1 im"],
    ),
    (
        "auto",
        {"conversations": turns("<image>\nQ", "A")},
        "placeholders",
        ["1 `<image>`", "0 images", "correct `image`"],
    ),
    ("auto", {"conversations": turns("Q", "<image>"), "image": "a.png"}, "placeholders", ["turn of the assistant"]),
    ("auto", {"conversations": turns("Q", "A"), "image": 5}, "wrong_type", ["`image` is a number", "a path"]),
    ("auto", {"conversations": turns("Q", "A"), "images": [""]}, "wrong_type", ["`images` is a text"]),
    ("auto", {"conversations": turns("Q", "A"), "image": "http://x/a.png"}, "wrong_type", ["the URL", "download"]),
    ("auto", {"conversations": turns("Q", "A"), "image": "data:image/png,x"}, "wrong_type", ["base64"]),
    ("auto", {"conversations": turns("Q", "A"), "video": "a.mp4"}, "wrong_type", ["has `video`", "frames"]),
    ("auto", {"conversations": turns("Q", "A"), "id": ["x"]}, "wrong_type", ["`id` is a list", "text or a number"]),
    ("auto", {"conversations": turns("Q", "A"), "id": False}, "wrong_type", ["`id` is false"]),
    ("auto", {"text": "Q", "answer": float("nan")}, "wrong_type", ["`answer` is nan", "missing cell", "fill in"]),
    ("auto", {"text": "Q", "answers": [["a"], ["b"]]}, "wrong_type", ["`answers[..]` is a list", "accepted answers"]),
    ("auto", {"text": "Q", "answers": ["a", None]}, "wrong_type", ["`answers[..]` is null"]),
    ("auto", {"text": "Q", "answer": {"label": 1}}, "wrong_type", ["`answer` is an object"]),
    ("auto", {"text": ["Q"], "answer": "A"}, "wrong_type", ["`text[0]` is a text"]),
    ("auto", {"query": "Q", "response": "A", "history": [["Q"]]}, "wrong_type", ["`history[0]`", "a pair"]),
]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize(("format", "raw", "kind", "parts"), ROWS)
def test_rows_that_cannot_be_used(
    tmp_path: Path, name: str, format: str, raw: Any, kind: str, parts: list[str]
) -> None:
    good = {"conversations": turns("Q", "A")}
    if isinstance(raw, dict) and "conversations" not in raw and format == "auto":
        good = SAME_ROW[{"messages": 4, "query": 7}.get(next(iter(raw)), 1)][1]
    rows = read_rows(write(tmp_path / name, [good, raw]), split="test", format=format)
    if format == "auto":
        assert rows[0]["messages"]
    with pytest.raises(RowError) as caught:
        rows[1]
    unit = "line" if name.endswith("l") else "row"
    assert str(caught.value).startswith(f"{tmp_path / name}, {unit} 2")
    assert (caught.value.kind, caught.value.number, caught.value.file) == (kind, 2, str(tmp_path / name))
    assert "\n  to fix: " in str(caught.value)
    assert [part for part in parts if part not in str(caught.value)] == [], str(caught.value)


def test_every_format_has_a_case() -> None:
    assert {name for name, _ in SAME_ROW} == set(FORMATS)
