"""`mllm-cl data`: public benchmarks by root, bad rows listed, near-duplicates and the sheet."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


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
