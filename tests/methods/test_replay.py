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


def test_class_balanced_keeps_every_answer(begin, make_row):
    from mllm_cl.data.rows import Rows
    from mllm_cl.streams import Stream, Task

    rows = [make_row(f"{i}", "What?", "rare" if i == 7 else f"often {i % 2}") for i in range(20)]
    stream = Stream("s", (Task("one", Rows(rows), Rows([])), Task("two", Rows(rows[:3]), Rows([]))))
    learner, ctx = begin(stream, method := Replay(size=4, policy="class_balanced"))
    learner.end_task(ctx)
    answers = [rows[int(row_id)]["answers"][0] for _, row_id in method.memory]
    assert Counter(answers) in (
        {"rare": 1, "often 0": 2, "often 1": 1},
        {"rare": 1, "often 0": 1, "often 1": 2},
    )
    learner, ctx = begin(stream, learner=learner)
    learner.end_task(ctx)
    assert Counter(task for task, _ in method.memory) == {"one": 2, "two": 2}
    kept = [rows[int(row_id)]["answers"][0] for task, row_id in method.memory if task == "one"]
    assert len(set(kept)) == 2


def test_herding_keeps_what_its_formula_says(begin, small_stream):
    import dataclasses

    import torch

    from mllm_cl.data.memory import herding_order

    # mean 2.2; nearest single 2; (2 + 3)/2 = 2.5 against (2 + 1)/2 = 1.5 and (2 + 5)/2 = 3.5; then (2 + 3 + 1)/3 = 2
    features = torch.tensor([[0.0], [1.0], [2.0], [3.0], [5.0]])
    assert herding_order(features, 3) == [2, 3, 1]
    assert sorted(herding_order(features, 9)) == [0, 1, 2, 3, 4]
    stream, method = small_stream(2, rows=5), Replay(size=3, policy="herding")
    learner, ctx = begin(stream, method)
    ctx = dataclasses.replace(ctx, embed=lambda rows: features[[int(row["id"].split("/")[1]) for row in rows]])
    learner.end_task(ctx)
    assert method.memory == [("colours", "colours/2"), ("colours", "colours/3"), ("colours", "colours/1")]


def test_surprise_keeps_the_least_likely_answers(begin, small_stream):
    from mllm_cl.methods.replay import answer_likelihoods

    stream, method = small_stream(2, rows=6), Replay(size=2, policy="surprise")
    learner, ctx = begin(stream, method)
    likely = answer_likelihoods(ctx, list(stream[0].train))
    for index, row in enumerate(stream[0].train):  # the model's own loss is the mean negative log-likelihood
        assert likely[index].item() == pytest.approx(-ctx.model(**ctx.collate([row])).loss.item(), rel=1e-4)
    learner.end_task(ctx)
    kept = [int(row_id.split("/")[1]) for _, row_id in method.memory]
    assert kept == likely.argsort(stable=True)[:2].tolist()


def test_what_earlier_methods_attach_is_looked_up_late(begin, small_stream):
    """Companions may change with the epoch; replay must not freeze them."""
    from mllm_cl.data.rows import Rows

    stream, epoch = small_stream(2, rows=4), [0]
    learner, ctx = begin(stream, method := Replay(size=4))
    learner.end_task(ctx)
    _, ctx = begin(stream, learner=learner)
    rows = stream[1].train
    late = Rows(range(4), lambda index: {**rows[index], "epoch": epoch[0]})
    mixed = method.train_rows(ctx, late)
    epoch[0] = 5
    assert [row.get("epoch") for row in mixed] == [5] * 4 + [None] * (len(mixed) - 4)
