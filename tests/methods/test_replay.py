"""Replay: the share that is mixed in, and what is stored."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from mllm_cl.methods.replay import Replay


def ids(rows) -> list[str]:
    return [row["id"] for row in rows]


@pytest.mark.parametrize("policy", ["reservoir", "balanced"])
def test_past_rows_are_mixed_in_at_the_stated_share(policy, begin, small_stream):
    stream, method = small_stream(3, rows=24), Replay(size=6, share=0.25, policy=policy)
    learner, ctx = begin(stream, method)
    assert ids(learner.train_rows(ctx, stream[0].train)) == ids(stream[0].train)
    learner.end_task(ctx)
    _, ctx = begin(stream, learner=learner)
    mixed = learner.train_rows(ctx, stream[1].train)
    replayed = ids(mixed)[24:]
    assert ids(mixed)[:24] == ids(stream[1].train)
    assert len(replayed) == 8  # 8 / 32 = 0.25
    stored = {row_id for _, row_id in method.memory}
    assert set(replayed) == stored  # all of the memory before any row comes again
    assert max(Counter(replayed).values()) == 2
    learner.end_task(ctx)
    tasks = Counter(task for task, _ in method.memory)
    assert sum(tasks.values()) == 6
    if policy == "balanced":
        assert tasks == {"colours": 3, "yes.no": 3}


def test_the_state_holds_references_and_nothing_else(begin, small_stream):
    stream, method = small_stream(2, rows=24), Replay(size=5)
    learner, ctx = begin(stream, method)
    learner.end_task(ctx)
    state = method.state_dict()
    assert not state.tensors
    written = json.dumps(state.data)
    assert "What colour" not in written
    assert "red" not in written
    assert state.data["seen"] == 24
    again = Replay(size=5)
    again.load_state_dict(type(state)(data=json.loads(written)))
    assert again.memory == method.memory
    assert again.seen == method.seen


def test_what_is_drawn_depends_on_the_seed_alone(begin, small_stream):
    stream = small_stream(2, rows=24)

    def story(seed: int) -> list[str]:
        learner, ctx = begin(stream, Replay(size=5), seed=seed)
        learner.end_task(ctx)
        _, ctx = begin(stream, learner=learner)
        return ids(learner.train_rows(ctx, stream[1].train))[24:]

    assert story(1) == story(1)
    assert story(1) != story(2)
