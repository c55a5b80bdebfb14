"""Rows that are unusual but legal in their format, thirty per format: what becomes of each, in full.

`legal_rows.jsonl` holds the rows as the public documentation of LLaVA, ShareGPT, TRL, ms-swift, LLaMA-Factory and the
Cauldron describes them, with the format that is found and all of the converted row. The tests below add what cannot be
written down as one JSON line.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mllm_cl.data.formats import FORMATS, convert_row, detect_row_format
from mllm_cl.data.images import encode_png
from mllm_cl.data.problems import RowError
from mllm_cl.data.readers import read_rows
from mllm_cl.errors import DataError

_LINES = (Path(__file__).parent / "legal_rows.jsonl").read_text("utf-8").strip().split("\n")  # a row holds U+2028
CASES = [json.loads(line) for line in _LINES]


def shown(row: Any) -> str:
    """Everything of a row, a line each."""
    lines = [f"id {row['id']}"]
    for message in row["messages"]:
        blocks = ("<image>" if block["type"] == "image" else block["text"] for block in message["content"])
        lines.append(f"{message['role']}: " + "|".join(blocks))
    images = (image if isinstance(image, str) else f"{len(image['bytes'])} bytes" for image in row["images"])
    kept = [key for key in row if key not in ("id", "messages", "images", "answers")]
    answers = row.get("answers", [])
    return "\n".join(
        [*lines, f"images: {', '.join(images)}", f"answers: {' / '.join(answers)}", f"kept: {', '.join(kept)}"]
    )


def test_there_are_thirty_of_each_format() -> None:
    counts = Counter(case["format"] for case in CASES)
    assert set(counts) == set(FORMATS)
    assert min(counts.values()) >= 30


@pytest.mark.parametrize("format", list(FORMATS))
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_every_row_in_full(format: str, name: str, tmp_path: Path) -> None:
    cases = [case for case in CASES if case["format"] == format]
    raws = [case["raw"] for case in cases]
    text = json.dumps(raws) if name == "rows.json" else "\n".join(json.dumps(raw) for raw in raws)
    (tmp_path / name).write_text(text, encoding="utf-8")
    rows = read_rows(tmp_path / name, format=format, split=cases[0]["split"], image_folder="", task="legal")
    for index, (case, row) in enumerate(zip(cases, rows, strict=True)):
        assert (detect_row_format(case["raw"]) or [None])[0] == case["detected"], case["raw"]
        expected = case["shown"].replace("id default\n", f"id legal/{case['split']}/{index}\n", 1)
        if not rows.is_renamed(index):
            assert shown(row) == expected


def convert(raw: dict[str, Any], format: str) -> Any:
    return convert_row(raw, format=format, default_id="x")


BOXES = {"messages": [{"role": "user", "content": "<bbox>"}, {"role": "assistant", "content": "<ref-object>"}]}
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("messages", BOXES | {"objects": {"ref": ["a"], "bbox": []}}, "1 `<bbox>` in the texts but 0 in `objects.bbox`"),
    ("messages", BOXES | {"objects": {"bbox": [[1, 2]]}}, "1 `<ref-object>` in the texts but 0"),
    ("messages", BOXES | {"objects": {"ref": ["a"], "bbox": [[1, 2, 3]]}}, "`objects.bbox` holds [1, 2, 3]"),
    ("messages", BOXES | {"objects": {"ref": [3], "bbox": [[1, 2]]}}, "`objects.ref` holds 3"),
    (
        "messages",
        {"messages": [{"role": "assistant", "content": "<image>text"}], "images": ["a"]},
        "turn of the assistant",
    ),
    ("messages", {"messages": [{"role": "tool", "content": "{}"}]}, "unknown role 'tool'"),
    ("messages", BOXES | {"tools": [{"name": "search"}]}, "the row has `tools`"),
    ("messages", BOXES | {"videos": ["a.mp4"]}, "the row has `videos`"),
    ("messages", {"messages": [{"role": "assistant", "content": "A", "loss": False}]}, "not to be learnt"),
    ("sharegpt", {"conversations": [{"from": "gpt", "value": "A", "weight": 0}]}, "not to be learnt"),
    ("sharegpt", {"conversations": [{"from": "function_call", "value": "{}"}]}, "unknown role 'function_call'"),
    ("turn_pairs", {"conversation": "text"}, "`conversation` is a text"),
    ("alpaca", {"instruction": "Q", "output": "A", "history": ["q"]}, "`history[0]` is a text"),
    ("llava", {"image": ["a", "b"], "conversations": [{"from": "human", "value": "<image>"}]}, "1 `<image>` in"),
]


@pytest.mark.parametrize(("format", "raw", "message"), REFUSED)
def test_what_cannot_be_kept_is_refused(format: str, raw: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError) as caught:
        convert(raw, format)
    assert message in str(caught.value)
    assert caught.value.fix


@pytest.mark.parametrize("prompt", ["<image>What?", [{"role": "user", "content": "What?"}]])
def test_a_table_with_the_image_feature(prompt: Any, tmp_path: Path) -> None:
    from datasets import Dataset, Features, List, Value
    from datasets import Image as ImageFeature

    picture = encode_png(Image.new("RGB", (3, 2), "red"))
    turn = {"role": Value("string"), "content": Value("string")}
    kind = Value("string") if isinstance(prompt, str) else List(turn)
    for column, images, feature in (
        ("image", picture, ImageFeature()),
        ("images", [picture], List(ImageFeature())),
        ("image", None, ImageFeature()),
    ):
        features = Features({"prompt": kind, "completion": Value("string"), column: feature})
        data = {"prompt": [prompt.replace("<image>", "") if images is None and isinstance(prompt, str) else prompt]}
        table = Dataset.from_dict(data | {"completion": ["A"], column: [images]}, features=features)
        table.to_parquet(tmp_path / f"{column}.parquet")
        row = read_rows(tmp_path / f"{column}.parquet")[0]
        assert [image["bytes"] for image in row["images"]] == [picture["bytes"]] * (images is not None)
        kinds = [block["type"] for block in row["messages"][0]["content"]]
        assert kinds == ["image"] * (images is not None) + ["text"]


def write_info(folder: Path, entries: Any, **files: Any) -> Path:
    for name, rows in files.items():
        (folder / f"{name}.json").write_text(json.dumps(rows), encoding="utf-8")
    (folder / "dataset_info.json").write_text(json.dumps(entries), encoding="utf-8")
    return folder / "dataset_info.json"


def test_llama_factory_descriptions(tmp_path: Path) -> None:
    path = write_info(
        tmp_path,
        {
            "plain": {"file_name": "plain.json"},
            "columns": {
                "file_name": "columns.json",
                "columns": {"prompt": "ask", "query": "more", "response": "say", "system": "sys", "images": "pics"},
            },
            "talk": {"file_name": "talk.json", "formatting": "sharegpt", "columns": {"images": "images", "system": "s"}},
            "openai": {
                "file_name": "openai.json",
                "formatting": "sharegpt",
                "columns": {"messages": "messages", "images": "images"},
                "tags": {
                    "role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant",
                },
            },
        },
        plain=[{"instruction": "Q", "input": "x", "output": "A", "system": "not named", "history": [["q", "a"]]}],
        columns=[{"id": 7, "ask": "Q<image>", "more": "", "say": "A", "sys": "S", "pics": ["i/a.png"], "tag": "t"}],
        talk=[
            {"conversations": [{"from": "human", "value": "<image>Q"}, {"from": "gpt", "value": "A"}], "images": ["a.png"]},
            {"conversations": [{"from": "system", "value": "T"}, {"from": "human", "value": "Q"}], "s": "column"},
        ],
        openai=[
            {"messages": [{"role": "user", "content": "<image>Q"}, {"role": "assistant", "content": "A"}], "images": ["a"]},
            {"messages": [{"role": "observation", "content": "{}"}]},
        ],
    )  # fmt: skip
    rows = read_rows(f"{path}@plain")
    assert rows.format == "alpaca (as dataset_info.json says)"
    assert shown(rows[0]).startswith("id task/train/0\nuser: Q\nx\nassistant: A\nimages")  # by default no history
    row = read_rows(f"{path}@columns")[0]
    expected = [
        "id 7",
        "system: S",
        "user: Q|<image>",
        "assistant: A",
        f"images: {tmp_path}/i/a.png",
        "answers: ",
        "kept: tag",
    ]
    assert shown(row).splitlines() == expected
    talk = read_rows(f"{path}@talk")
    assert shown(talk[0]).splitlines()[1:4] == ["user: <image>|Q", "assistant: A", f"images: {tmp_path}/a.png"]
    assert shown(talk[1]).splitlines()[1:3] == ["system: T", "user: Q"]
    rows = read_rows(f"{path}@openai")
    assert shown(rows[0]).splitlines()[1:3] == ["user: <image>|Q", "assistant: A"]
    with pytest.raises(RowError, match=r"row 2.*unknown role 'observation'"):
        rows[1]


@pytest.mark.parametrize(
    ("name", "entry", "message"),
    [
        ("", {}, "2 data sets are described"),
        ("nine", {}, "no data set 'nine'"),
        ("one", {"ranking": True}, "one.ranking: true given"),
        ("one", {"formatting": "vicuna"}, "one.formatting: 'vicuna' given"),
        ("one", {"columns": ["a"]}, "one.columns"),
        ("one", {"columns": {"kto_tag": "label"}}, "feedback is not learnt from"),
        ("one", {"num_samples": 5}, "`limit` of the recipe"),
        ("one", {"script_url": "code"}, "loading scripts are not run"),
        ("one", {"file_name": "none.json"}, "one.file_name"),
    ],
)
def test_llama_factory_mistakes(name: str, entry: dict[str, Any], message: str, tmp_path: Path) -> None:
    rows = [{"instruction": "Q", "output": "A"}]
    path = write_info(tmp_path, {"one": {"file_name": "a.json"} | entry, "two": {"file_name": "a.json"}}, a=rows)
    with pytest.raises(DataError) as caught:
        read_rows(f"{path}@{name}" if name else path)
    assert message in str(caught.value)
