"""`mllm-cl data`: public benchmarks by root, bad rows listed, near-duplicates and the sheet."""

from __future__ import annotations

import html
import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image


@pytest.fixture
def coin(public_folder: Callable[[str], Path]) -> Path:
    return public_folder("coin")


def test_a_public_benchmark_is_shown_validated_and_prepared(call: Any, coin: Path) -> None:
    outcome = call("data", "show", "coin", "--root", coin, "--option", "scoring=corrected")
    assert outcome.code == 0, outcome.err
    for text in ("licence: ", "coin: 8 tasks", "box_accuracy@0.5", "llava (as asked for)", "lengths in characters"):
        assert text in outcome.out
    assert "coin: no errors" in call("data", "validate", "coin", "--root", coin).out
    assert f"coin: found in {coin} and checked, 80 rows" in call("data", "prepare", "coin", "--root", coin).out
    assert "CoIN, 8 tasks" in call("data", "list").out


def test_without_the_data_the_card_and_the_script_are_named(call: Any, tmp_path: Path) -> None:
    outcome = call("data", "show", "ucit", "--root", tmp_path / "none")
    assert outcome.code == 2
    assert "citation: Guo et al." in outcome.out
    assert "python data_scripts/ucit.py" in outcome.err
    for text in ("scoring", "=1"):
        assert "not an option" in call("data", "show", "ucit", "--option", text).err


def test_near_duplicates_and_the_sheet(call: Any, coin: Path, tmp_path: Path) -> None:
    sheet = tmp_path / "sheet.html"
    outcome = call("data", "show", "coin", "--root", coin, "--duplicates", "50", "--html", sheet, "--samples", "1")
    assert outcome.code == 0, outcome.err
    assert "near-duplicates: " in outcome.out
    assert "more; `--html` shows all" in outcome.out
    html = sheet.read_text()
    assert html.count("<h3>") == 16
    assert html.count("data:image/jpeg;base64,") == 16
    assert "[&lt;image&gt; x 16]" in html
    assert "<mark>A&lt;/s&gt;</mark>" in html  # what a training row learns: the answer and its end
    assert "train: train-0" in html


def test_bad_rows_are_dropped_on_request_only(call: Any, tmp_path: Path, stream_file: Path) -> None:
    folder = Path(shutil.copytree(stream_file.parent, tmp_path / "stream"))
    rows = json.loads((folder / "same/train.json").read_text())
    rows[1]["image"], rows[4]["conversations"][1]["value"] = "nope.png", ""
    (folder / "same/train.json").write_text(json.dumps(rows))
    listed = tmp_path / "bad.jsonl"
    assert call("data", "validate", folder).code == 2
    assert not listed.exists()
    outcome = call("data", "validate", folder, "--drop-bad", listed)
    assert outcome.code == 0, outcome.err
    assert "2 rows with errors are listed" in outcome.out
    assert "no errors in the rows that are left" in outcome.out
    assert [json.loads(line)["position"] for line in listed.read_text().splitlines()] == [1, 4]
    (folder / "same/test.json").write_text("[{]")
    outcome = call("data", "validate", folder, "--drop-bad", listed)
    assert outcome.code == 2
    assert "1 error in the data" in outcome.err
    assert "unknown check" in call("data", "validate", folder, "--images", "look").err


class Elements(HTMLParser):
    """The elements of a page, and the attributes that run code."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.events: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.events += [name for name, _ in attrs if name.startswith("on")]


def write_stream(folder: Path, train: Any, test: Any, image: str = "a.png") -> Path:
    folder.mkdir(exist_ok=True)
    Image.new("RGB", (60, 40), "red").save(folder / image)
    for name, content in (("train", train), ("test", test)):
        (folder / f"{name}.json").write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    task = '{name: one, train: train.json, test: test.json, description: "<script>d</script> [red]"}'
    (folder / "stream.yaml").write_text(f'name: "<b>evil</b>"\ntasks:\n  - {task}\n')
    return folder


QUESTION = "[bold]Is[/bold] \x1b[31m<script>alert(1)</script> & {{7*7}} ]]>?"
ANSWER = "</mark></pre><script>alert(2)</script>"


def hostile(number: int, **more: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": ANSWER}]
    return {"id": f"<img src=x onerror=alert(1)>\x1b[2J{number}", "image": "a.png", "conversations": turns} | more


def test_hostile_texts_stay_texts(call: Any, tmp_path: Path) -> None:
    folder = write_stream(tmp_path / "data", [hostile(0), hostile(1)], [hostile(2)])
    sheet = tmp_path / "sheet.html"
    outcome = call("data", "show", folder, "--html", sheet, "--duplicates", "10", "--samples", "1")
    assert outcome.code == 0, outcome.err
    assert "\x1b" not in outcome.out
    assert "100.0 %" in outcome.out  # the answer that every row has
    page = sheet.read_text()
    found = Elements()
    found.feed(page)
    assert not found.names & {"script", "b", "red", "iframe"}
    assert not found.events
    prompts = [html.unescape(re.sub("</?mark>", "", text)) for text in re.findall(r"<pre[^>]*>(.*?)</pre>", page, re.S)]
    assert prompts == [
        f"<s><|user|>[<image> x 16]{QUESTION}<|assistant|>{ANSWER}</s>",
        f"<s><|user|>[<image> x 16]{QUESTION}<|assistant|>",
    ]
    assert f"<mark>{html.escape(ANSWER, quote=False)}&lt;/s&gt;</mark>" in page
    assert "<td>1 of 1</td><td>100.0 %</td>" in page  # the test row is a training row


BROKEN: list[tuple[str, Any, str]] = [
    ("truncated", b'[{"id": 1, "conver', "not JSON (row 1: Unterminated string"),
    ("UTF-16", json.dumps([hostile(0)]).encode("utf-16"), "the file is UTF-16"),
    ("latin-1", b'[{"id": "caf\xe9"}]', "not UTF-8"),
    ("a pointer", b"version https://git-lfs.github.com/spec/v1\n", "pointer of Git LFS"),
    ("half an emoji", [hostile(0, id="\ud83d", image="none.png")], "the image"),
    ("half an emoji in a question", [hostile(0, conversations=[{"from": "human", "value": "\ud83d"}])], "surrogate"),
    ("wrong type", [hostile(0, conversations=3)], "`conversations` is a number"),
]


@pytest.mark.parametrize(("train", "message"), [case[1:] for case in BROKEN], ids=[case[0] for case in BROKEN])
def test_broken_files_end_with_two_and_leave_nothing(call: Any, tmp_path: Path, train: Any, message: str) -> None:
    folder = write_stream(tmp_path / "data", train, [hostile(2)])
    outcome = call("data", "validate", folder)
    assert outcome.code == 2
    assert message in outcome.out + outcome.err
    assert not outcome.trace
    sheet = tmp_path / "sheet.html"
    shown = call("data", "show", folder, "--html", sheet)
    assert shown.code == 2
    assert shown.err.strip()
    assert not shown.trace
    assert sorted(item.name for item in tmp_path.iterdir()) == ["data"]
    listed = tmp_path / "bad.jsonl"
    outcome = call("data", "validate", folder, "--drop-bad", listed)
    named = [json.loads(line) for line in listed.read_text().splitlines()]
    assert outcome.code == (0 if named else 2), outcome.err
    assert len(named) == isinstance(train, list)
