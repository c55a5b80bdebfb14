"""The study's streams: learnable in principle, no source in two splits, nothing the quickstart stream asks."""

from __future__ import annotations

from collections import Counter

import pytest

from mllm_cl.data.builders import quickstart, study_mixture
from mllm_cl.data.builders.general import KINDS, general_pictures
from mllm_cl.data.builders.study import SPLIT_SIZES, STREAMS
from mllm_cl.data.builders.wording import WORDINGS
from mllm_cl.data.rows import message_text
from mllm_cl.streams import load_benchmark, load_stream


def questions(task) -> set[str]:
    return {message_text(row["messages"][0]) for row in task.train}


@pytest.mark.parametrize("name", STREAMS)
def test_splits_have_their_sizes_and_share_no_font_or_tile(name):
    stream = load_stream(name)
    assert [task.name for task in stream] == list(STREAMS[name])
    for task in stream:
        parts = {split: getattr(task, split) for split in SPLIT_SIZES}
        assert {split: len(rows) for split, rows in parts.items()} == SPLIT_SIZES
        images = {split: {bytes(row["images"][0]["bytes"]) for row in rows} for split, rows in parts.items()}
        assert not images["train"] & images["test"]
        assert not images["train"] & images["validation"]
        if name == "study-letters":  # glyph:FONT:LETTER
            fonts = {
                split: {s.split(":")[1] for r in rows for s in r["source"].split()} for split, rows in parts.items()
            }
            assert not fonts["train"] & fonts["test"]
            assert not fonts["train"] & fonts["validation"]


@pytest.mark.parametrize("name", STREAMS)
def test_no_answer_is_common_enough_to_guess(name):
    for task in load_stream(name):
        answers = Counter(answer for row in task.test for answer in row["answers"])
        assert answers.most_common(1)[0][1] <= 0.6 * len(task.test)
        trained = {answer for row in task.train for answer in row["answers"]}
        assert set(answers) <= trained


def test_questions_are_not_those_of_the_quickstart_stream():
    known = {text for _, texts, _, _ in quickstart.TASKS.values() for text in texts}
    for name in STREAMS:
        for task in load_stream(name):
            assert not questions(task) & known


def test_the_mixture_by_source_asks_everything_but_captions():
    stream = load_stream("study-mixture")
    assert [task.name for task in stream] == list(study_mixture.SOURCES)
    for task in stream:
        assert {split: len(getattr(task, split)) for split in study_mixture.SPLIT_SIZES} == study_mixture.SPLIT_SIZES
        kinds = {row["kind"] for row in task.train}
        assert kinds == {row["kind"] for row in task.test}
        assert kinds == {kind for kind, (families, _) in KINDS.items() if task.name in families} - {"caption"}
        asked = {question for kind in kinds for question in WORDINGS[kind].train}
        assert not {message_text(row["messages"][0]) for row in task.test} & asked
        images = {
            split: {bytes(row["images"][0]["bytes"]) for row in getattr(task, split)} for split in ("train", "test")
        }
        assert not images["train"] & images["test"]
        assert all(len(row["messages"]) == 1 for row in task.test)


def test_the_captions_benchmark_asks_for_descriptions_of_every_source():
    rows = load_benchmark("study-captions")
    assert {row["kind"] for row in rows} == {"caption"}
    assert Counter(row["id"].split("/")[1] for row in rows) == dict.fromkeys(study_mixture.SOURCES, 32)


def test_pictures_are_asked_the_kinds_one_wants():
    everything = list(general_pictures("train", 40, 2))
    captions = list(general_pictures("train", 40, 2, kinds=["caption"]))
    assert {question.kind for _, questions in captions for question in questions} == {"caption"}
    assert 20 < len(captions) < len(everything) == 40  # a text has no caption
