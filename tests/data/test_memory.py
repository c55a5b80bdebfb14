"""Replay memories: every row has the same chance, tasks get their quotas, and only references are kept."""

from __future__ import annotations

import json
import random
from collections import Counter

import pytest
from scipy.stats import chisquare

from mllm_cl.data.memory import balanced, look_up, reservoir
from mllm_cl.data.rows import Rows
from mllm_cl.errors import DataError


def entries(task: str, count: int) -> list[tuple[str, str]]:
    return [(task, str(index)) for index in range(count)]


def test_reservoir_gives_every_row_the_same_chance_over_tasks():
    size, kept = 6, Counter()
    streams = [entries("a", 10), entries("b", 4), entries("c", 16)]
    for seed in range(4000):
        rng, memory, seen = random.Random(seed), [], 0
        for new in streams:
            memory = reservoir(memory, seen, new, size, rng)
            seen += len(new)
        assert len(memory) == len(set(memory)) == size
        kept.update(memory)
    counts = [kept[entry] for stream in streams for entry in stream]
    assert chisquare(counts).pvalue > 0.001
    assert sum(counts) == 4000 * size


def test_reservoir_keeps_everything_while_there_is_room():
    rng = random.Random(0)
    assert reservoir([], 0, entries("a", 3), 5, rng) == entries("a", 3)
    assert reservoir(entries("a", 3), 3, entries("b", 2), 5, rng) == entries("a", 3) + entries("b", 2)


@pytest.mark.parametrize("size", [1, 2, 7, 10, 100])
def test_balanced_memories_keep_their_quotas(size):
    rng, memory = random.Random(0), []
    for position, task in enumerate("abc", start=1):
        memory = balanced(memory, entries(task, 20), size, rng)
        counts = Counter(task for task, _ in memory)
        quotas = {t: size // position + (i < size % position) for i, t in enumerate("abc"[:position])}
        assert counts == {t: min(quota, 20) for t, quota in quotas.items() if quota}
    assert len(memory) == len(set(memory)) <= size


def test_balanced_memories_draw_at_random_within_a_task():
    kept = Counter()
    for seed in range(3000):
        kept.update(balanced([], entries("a", 12), 3, random.Random(seed)))
    assert chisquare([kept[entry] for entry in entries("a", 12)]).pvalue > 0.001


def test_rows_are_looked_up_in_the_order_of_the_memory(make_row):
    rows = {task: Rows([make_row(str(i), task, str(i)) for i in range(4)]) for task in "ab"}
    memory = [("b", "3"), ("a", "0"), ("b", "1"), ("b", "3")]
    found = look_up(memory, rows)
    assert [(row["messages"][0]["content"][1]["text"], row["id"]) for row in found] == memory
    assert json.loads(json.dumps(memory)) == [list(entry) for entry in memory]


def test_rows_that_have_gone_are_named(make_row):
    rows = {"a": Rows([make_row("0", "?", "x")])}
    with pytest.raises(DataError, match="row '9' of task 'a' is not in the stream any more"):
        look_up([("a", "0"), ("a", "9")], rows)
    with pytest.raises(DataError, match="task 'gone'"):
        look_up([("gone", "0")], rows)
