"""The general mixture: contract, splits that share nothing, paraphrases that are really held out."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import subprocess
import sys
from collections import Counter

import pytest

from mllm_cl.data.builders import sources
from mllm_cl.data.builders.general import KINDS, ROWS_PER_KIND, general_inquiries, general_rows
from mllm_cl.data.builders.wording import WORDINGS
from mllm_cl.data.images import load_image
from mllm_cl.data.rows import is_answered, message_text
from mllm_cl.errors import DataError

FORMATS = {"number", "word", "letter", "phrase", "caption", "yes_no", "option", "list"}


def fingerprint(rows) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([row["id"], row["messages"], row.get("answers"), row["source"]]).encode())
        for image in row["images"]:
            digest.update(image["bytes"])
    return digest.hexdigest()


@pytest.fixture(scope="module")
def splits():
    return {
        "train": general_rows("train", size=1500),
        "validation": general_rows("validation"),
        "test": general_rows("test"),
    }


def test_the_benchmark_is_balanced_over_at_least_twelve_kinds_and_all_formats(splits):
    kinds = Counter(row["kind"] for row in splits["test"])
    assert len(kinds) >= 12
    assert set(kinds) == set(KINDS) == set(WORDINGS)
    assert set(kinds.values()) == {ROWS_PER_KIND}
    assert len(splits["test"]) == ROWS_PER_KIND * len(KINDS)
    assert {row["format"] for row in splits["test"]} == FORMATS
    assert {row["kind"] for row in splits["train"]} == set(KINDS)


def test_rows_follow_the_contract(splits):
    for split, rows in splits.items():
        assert len({row["id"] for row in rows}) == len(rows)
        for row in rows:
            blocks = [block["type"] for block in row["messages"][0]["content"]]
            assert blocks == ["image"] * len(row["images"]) + ["text"]
            assert is_answered(row) == (split != "test")
            assert row["answers"]
            assert all(row["answers"])
            for reference in row["images"]:
                assert load_image(reference).size == (32, 32)


def test_splits_share_no_source_image(splits, sources_of, common_sources):
    seen = {split: sources_of(rows) for split, rows in splits.items()}
    for one, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert not common_sources(seen[one], seen[other])
    fonts = {split: {source.split(":")[1] for source in seen[split] if source.startswith("glyph:")} for split in seen}
    assert not fonts["train"] & fonts["test"]


def test_parts_of_every_source_are_disjoint():
    for shares in (sources.digit_shares(), sources.face_shares(), sources.coin_shares(), sources.FONTS, sources.TILES):
        members = [member for part in shares.values() for member in part]
        assert len(members) == len(set(members))
    assert len(sources.COIN_CENTRES) == sum(sources.COIN_COUNTS.values())
    assert not set(sources.GENERAL_PHOTOS) & set(sources.STREAM_PHOTOS)


def test_paraphrases_of_the_benchmark_are_held_out(splits):
    trained = {template for wording in WORDINGS.values() for template in wording.train}
    held_out = {template for wording in WORDINGS.values() for template in wording.held_out}
    assert not trained & held_out
    assert all(len(wording.train) >= 4 and len(wording.held_out) >= 2 for wording in WORDINGS.values())

    def questions(split):
        return {message_text(row["messages"][0]) for row in splits[split]}

    assert not questions("test") & (questions("train") | questions("validation"))


def test_the_same_picture_gets_different_questions():
    from mllm_cl.data.builders.general import general_pictures

    for picture, questions in general_pictures("train", 50, 4):
        assert len({(question.text, question.answer) for question in questions}) == len(questions)
        if picture.family in ("digit", "letter", "shape", "several", "photo"):
            assert len({question.kind for question in questions}) >= 3


def test_inquiries_have_no_answers_and_some_no_image(sources_of, common_sources):
    rows = general_inquiries(64)
    assert not any(is_answered(row) or "answers" in row for row in rows)
    assert {len(row["images"]) for row in rows} >= {0, 1}
    assert not common_sources(sources_of(rows), sources_of(general_rows("test")))


def test_rows_are_the_same_in_every_process_and_differ_by_seed():
    code = (
        "import hashlib, json; from mllm_cl.data.builders.general import general_rows\n"
        "d = hashlib.sha256()\n"
        "for r in general_rows('train', size=40):\n"
        "    d.update(json.dumps([r['id'], r['messages'], r.get('answers'), r['source']]).encode())\n"
        "    [d.update(i['bytes']) for i in r['images']]\n"
        "print(d.hexdigest())"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == fingerprint(general_rows("train", size=40))
    assert fingerprint(general_rows("train", size=40, seed=1)) != fingerprint(general_rows("train", size=40))
    assert fingerprint(general_rows("test", size=60)) == fingerprint(general_rows("test")[:60])


def test_a_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    sources.photograph.cache_clear()
    with pytest.raises(DataError, match=r'pip install "mllm_cl\[demo\]"'):
        sources.photograph("coffee")
