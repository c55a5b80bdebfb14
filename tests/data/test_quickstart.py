"""The quickstart stream: sizes, splits, and nothing that the general mixture already contains."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from mllm_cl.data.builders.general import general_pictures, general_rows
from mllm_cl.data.builders.quickstart import QUICKSTART_TASKS, SPLIT_SIZES, TASKS, build, build_task
from mllm_cl.data.builders.scenes import COLOURS, NUMBER_WORDS, SHAPES
from mllm_cl.data.builders.sources import GENERAL_PHOTOS
from mllm_cl.data.builders.wording import WORDINGS
from mllm_cl.data.images import load_image
from mllm_cl.data.rows import is_answered, message_text

SPLITS = ("train", "validation", "test")
SHARED_ANSWERS = {"yes", "no", "A", "B", "C", "D", "E", "1", "2", "3", "4"}  # answer formats, not labels


@pytest.fixture(scope="module")
def tasks():
    return build()


def test_at_least_six_tasks_in_order_with_the_stated_sizes(tasks):
    assert [task["name"] for task in tasks] == list(QUICKSTART_TASKS)
    assert len(tasks) >= 6
    for task in tasks:
        assert {split: len(task[split]) for split in SPLITS} == SPLIT_SIZES
        assert set(task) == {"name", *SPLITS, "metric", "max_new_tokens", "description"}


def test_rows_follow_the_contract(tasks):
    for task in tasks:
        for split in SPLITS:
            assert len({row["id"] for row in task[split]}) == len(task[split])
            for number, row in enumerate(task[split]):
                assert row["id"] == f"{task['name']}/{split}/{number:05d}"
                assert [block["type"] for block in row["messages"][0]["content"]] == ["image", "text"]
                assert is_answered(row) == (split != "test")
                assert len(row["answers"]) == len(row["images"]) == 1
                assert load_image(row["images"][0]).size == (32, 32)


def test_splits_share_no_source_image(tasks, sources_of, common_sources):
    for one, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
        # over all tasks together: the digits of one task's test are in no task's training either
        first = set().union(*(sources_of(task[one]) for task in tasks))
        second = set().union(*(sources_of(task[other]) for task in tasks))
        assert not common_sources(first, second)


def test_nothing_is_shared_with_the_general_mixture(tasks, sources_of, common_sources):
    general = sources_of(general_rows("train", size=3000)) | sources_of(general_rows("test"))
    stream = set().union(*(sources_of(task[split]) for task in tasks for split in SPLITS))
    assert not common_sources(general, stream)
    fonts = {source.split(":")[1] for source in general if source.startswith("glyph:")}
    assert not fonts & {source.split(":")[1] for source in stream if source.startswith("glyph:")}

    templates = {template for wording in WORDINGS.values() for template in wording.train + wording.held_out}
    assert not templates & {question for _, questions, _, _ in TASKS.values() for question in questions}
    asked = {question.text for _, questions in general_pictures("train", 2000, 4) for question in questions}
    assert not asked & {message_text(row["messages"][0]) for task in tasks for row in task["test"]}


def test_labels_are_new_apart_from_answer_formats(tasks):
    known = {*COLOURS, *SHAPES, *GENERAL_PHOTOS, *NUMBER_WORDS}
    known |= {question.answer for _, questions in general_pictures("train", 2000, 4) for question in questions}
    for task in tasks:
        answers = {row["answers"][0] for split in SPLITS for row in task[split]}
        assert not (answers - SHARED_ANSWERS) & known, task["name"]
        assert {row["answers"][0] for row in task["test"]} <= {row["answers"][0] for row in task["train"]}


def test_the_formats_differ(tasks):
    patterns = {
        "digit-parity": r"even|odd",
        "face-check": r"yes|no",
        "compass": r"[ns]?[ew]|[nsc]",
        "surface-options": r"[A-E]",
        "coin-count": r"[1-4]",
        "ink-list": r"\w+(, \w+)?",
    }
    for task in tasks:
        assert all(re.fullmatch(patterns[task["name"]], row["answers"][0]) for row in task["test"])


def test_answers_are_balanced_enough_that_guessing_fails(tasks):
    for task in tasks:
        answers = [row["answers"][0] for row in task["test"]]
        assert max(answers.count(answer) for answer in set(answers)) / len(answers) <= 0.6


def test_the_stream_is_deterministic_and_fast(tasks):
    started = time.process_time()
    again = build()
    assert time.process_time() - started < 8
    for task, other in zip(tasks, again):
        assert [row["images"][0]["bytes"] for row in task["train"]] == [
            row["images"][0]["bytes"] for row in other["train"]
        ]
        assert [row["messages"] for row in task["test"]] == [row["messages"] for row in other["test"]]
    assert build_task("compass", seed=1)["train"][0]["images"] != build_task("compass")["train"][0]["images"]


def test_the_documentation_states_the_row_counts():
    text = (Path(__file__).parents[2] / "docs" / "quickstart_stream.md").read_text(encoding="utf-8")
    for name in QUICKSTART_TASKS:
        line = next(line for line in text.splitlines() if line.startswith(f"| `{name}`"))
        assert all(f"| {size} " in line for size in SPLIT_SIZES.values()), line
