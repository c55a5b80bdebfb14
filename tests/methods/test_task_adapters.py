"""Task adapters: who is routed where, by hand."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from mllm_cl.methods import RouteBatch
from mllm_cl.methods.task_adapters import TaskAdapters
from mllm_cl.models.adapters import task_adapter


@pytest.fixture
def embedded(begin, small_stream):
    """Ends two tasks with embeddings that the test chooses; returns the function that routes others."""

    def story(method: TaskAdapters, *embeddings: list[list[float]]):
        stream, learner = small_stream(2, rows=4), None
        for own in embeddings:
            learner, ctx = begin(stream, method, learner=learner)
            ctx = dataclasses.replace(ctx, embed=lambda rows, own=own: torch.tensor(own)[: len(rows)])
            learner.end_task(ctx)
        assert learner is not None

        def route(*vectors: list[float], tasks=None):
            ctx = learner.context(stream[learner.stage - 1], stream, None)
            ctx = dataclasses.replace(ctx, embed=lambda rows: torch.tensor(vectors))
            rows = [stream[0].test[0]] * len(vectors)
            return method.route(ctx, RouteBatch(rows, tasks or [None] * len(vectors)))

        return route

    return story


def test_every_sample_goes_to_the_nearest_prototype(embedded):
    method = TaskAdapters(reject=None)
    route = embedded(method, [[1.0, 0.1], [1.0, -0.1]], [[0.1, 2.0], [-0.1, 2.0]])
    assert torch.allclose(method.prototypes["colours"], torch.tensor([1.0, 0.0]))
    assert torch.allclose(method.prototypes["yes.no"], torch.tensor([0.0, 1.0]))
    first, second = {task_adapter("colours"): 1.0}, {task_adapter("yes.no"): 1.0}
    assert route([3.0, 1.0], [0.2, 0.9], [5.0, 4.9], [-9.0, -1.0]) == [first, second, first, second]


def test_samples_far_from_every_task_go_to_the_base(embedded):
    method = TaskAdapters(reject=2.0)
    route = embedded(method, [[1.0, 0.0], [3.0, 4.0]], [[0.0, 1.0]])
    # prototype of the first task: the direction of (4, 4) / 2; similarities of its rows 1/sqrt 2 and 7/(5 sqrt 2)
    one, two = 1 / 2**0.5, 7 / (5 * 2**0.5)
    mean, deviation = method.similarity["colours"]
    assert mean == pytest.approx((one + two) / 2, rel=1e-5)
    assert deviation == pytest.approx((two - one) / 2, rel=1e-4)
    limit = mean - 2 * deviation

    def at(similarity: float) -> list[float]:
        across = (1 - similarity**2) ** 0.5
        return [(similarity + across) / 2**0.5, (similarity - across) / 2**0.5]

    assert route(at(limit + 0.01)) == [{task_adapter("colours"): 1.0}]
    assert route(at(limit - 0.01)) == [{}]
    assert route([0.0, 7.0]) == [{task_adapter("yes.no"): 1.0}]  # a task of one row accepts what equals it


def test_before_the_first_task_everything_goes_to_the_base(begin, small_stream):
    learner, ctx = begin(small_stream(1), TaskAdapters())
    assert learner.methods[0].route(ctx, RouteBatch([{}, {}], ["colours", None])) == [{}, {}]


def test_the_oracle_follows_the_task_of_the_row(embedded):
    method = TaskAdapters(router="oracle")
    assert method.needs == {"task_id"}
    assert not TaskAdapters().needs
    route = embedded(method, [[0.0]], [[0.0]])
    choice = route([0.0], [0.0], [0.0], [0.0], tasks=["yes.no", None, "colours", "never seen"])
    assert choice == [{task_adapter("yes.no"): 1.0}, {}, {task_adapter("colours"): 1.0}, {}]
    assert not method.prototypes


def test_easy_tasks_are_told_apart(begin, make_row):
    from mllm_cl.data.rows import Rows
    from mllm_cl.streams import Stream, Task

    def task(name: str, question: str, colour: tuple[int, int, int]) -> Task:
        rows = [make_row(f"{name}/{i}", question + "?" * (i % 3), "x", (colour[0], colour[1], i)) for i in range(12)]
        return Task(name, Rows(rows[:8]), Rows(rows[8:]))

    stream = Stream("s", (task("a", "What is this", (250, 0, 0)), task("b", "Is it so or not so", (0, 250, 0))))
    method, learner = TaskAdapters(reject=None), None
    for _ in stream:
        learner, ctx = begin(stream, method, learner=learner)
        learner.end_task(ctx)
    assert learner is not None
    rows = [*stream[0].test, *stream[1].test]
    choices = method.route(ctx, RouteBatch(rows, [None] * 8))
    assert choices == [{task_adapter("a"): 1.0}] * 4 + [{task_adapter("b"): 1.0}] * 4
    assert not any("lora" in name for name in method.state_dict().tensors)
    assert method.prototypes["a"].shape == (2 * 32,)
    assert method.prototypes["a"].dtype == torch.float32


def test_states_round_trip(embedded):
    method = TaskAdapters()
    embedded(method, [[1.0, 0.0]], [[0.0, 1.0], [0.2, 1.0]])
    again = TaskAdapters()
    again.load_state_dict(method.state_dict())
    assert again.tasks == method.tasks
    assert again.similarity == method.similarity
    assert all(torch.equal(again.prototypes[name], method.prototypes[name]) for name in method.prototypes)
