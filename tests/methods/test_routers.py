"""Ridge, DISCO, HiDe and the shared branch: choices and gates by hand, what is deployed on dense matrices."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from mllm_cl.data.inquiry import question_of
from mllm_cl.errors import MethodError
from mllm_cl.methods import RouteBatch
from mllm_cl.methods._held import answered
from mllm_cl.methods._layers import decoder_blocks
from mllm_cl.methods._routing import gates, gaussian_scores, ridge_scores, similarities
from mllm_cl.methods.disco import Disco
from mllm_cl.methods.hide import FUSED, TOP, HiDe
from mllm_cl.methods.mr_lora import ROUTER, MRLoRA, letter_number, routing_question
from mllm_cl.methods.shared_specific import SharedSpecific
from mllm_cl.methods.task_adapters import TaskAdapters
from mllm_cl.models.adapters import (
    DEFAULT,
    active,
    adapter_deltas,
    adapter_names,
    adapter_parameters,
    adapter_state,
    lora_factors,
    lora_layers,
    remove_adapter,
    task_adapter,
)
from mllm_cl.streams import Stream

FIRST, SECOND = task_adapter("colours"), task_adapter("yes.no")


@pytest.fixture
def two_tasks(begin, disturb, small_stream):
    """Learns two tasks without training; returns learner, context and what each adapter was before its task ended."""

    def story(method, embeddings=None):
        stream, learner, updates = small_stream(2, rows=4), None, []
        for number in (0, 1):
            learner, ctx = begin(stream, method, learner=learner)
            if embeddings is not None:
                own = embeddings[number]
                ctx = dataclasses.replace(
                    ctx, embed=own if callable(own) else lambda rows, own=own: torch.tensor(own)[: len(rows)]
                )
            disturb(ctx.model, task_adapter(stream[number].name), seed=number)
            updates.append(
                {k: d.dense() for k, d in adapter_deltas(ctx.model, task_adapter(stream[number].name)).items()}
            )
            learner.end_task(ctx)
        return learner, stream, updates

    return story


def routed(method, learner, stream, vectors):
    ctx = learner.context(stream[1], stream, None)
    ctx = dataclasses.replace(ctx, embed=lambda rows: torch.tensor(vectors))
    return method.route(ctx, RouteBatch([stream[0].test[0]] * len(vectors), [None] * len(vectors)))


def test_ridge_is_the_regression_on_all_rows_at_once():
    generator = np.random.default_rng(0)
    rows, tasks = generator.normal(size=(30, 4)), generator.integers(0, 3, size=30)
    target = np.eye(3)[tasks]
    weights = np.linalg.inv(rows.T @ rows + 0.1 * np.eye(4)) @ rows.T @ target
    gram = sum(torch.tensor(rows[tasks == t].T @ rows[tasks == t]) for t in (2, 0, 1))  # added in any order
    sums = torch.stack([torch.tensor(rows[tasks == t].sum(axis=0)) for t in range(3)], dim=1)
    scores = ridge_scores(torch.tensor(rows), gram, sums, 0.1)
    np.testing.assert_allclose(scores.numpy(), rows @ weights, atol=1e-10)


def test_ridge_tells_apart_what_prototypes_do_not(two_tasks):
    """Two tasks with nearly the same mean, told apart by a weak feature."""
    one = [[5.0, 0.2, 1.0], [5.0, 0.2, -1.0], [5.0, 0.2, 0.9], [5.0, 0.2, -0.9]]
    two = [[5.0, -0.2, 4.0], [5.0, -0.2, -4.0], [5.0, -0.2, 3.9], [5.0, -0.2, -3.9]]
    method = TaskAdapters(router="ridge", reject=None, penalty=1e-3)
    learner, stream, _ = two_tasks(method, (one, two))
    asked = [[5.0, 0.2, 4.0], [5.0, -0.2, 0.1], [5.0, 0.2, -3.0]]
    expected = [{FIRST: 1.0}, {SECOND: 1.0}, {FIRST: 1.0}]
    assert routed(method, learner, stream, asked) == expected
    again = TaskAdapters(router="ridge", reject=None, penalty=1e-3)
    again.load_state_dict(method.state_dict())
    assert routed(again, learner, stream, asked) == expected
    far = TaskAdapters(router="ridge", reject=3.0, penalty=1e-3)
    far.load_state_dict(method.state_dict())
    assert routed(far, learner, stream, [[-5.0, 0.2, 0.0]]) == [{}]


def test_generative_scores_are_the_log_likelihoods_of_gaussians_with_one_covariance():
    generator = np.random.default_rng(1)
    rows, tasks = generator.normal(size=(40, 3)) @ np.diag([3.0, 1.0, 0.2]), generator.integers(0, 3, size=40)
    rows = rows + np.eye(3)[tasks]
    means = np.stack([rows[tasks == t].mean(axis=0) for t in range(3)])
    pooled = (rows - means[tasks]).T @ (rows - means[tasks]) / 40
    covariance = 0.9 * pooled + 0.1 * np.trace(pooled) / 3 * np.eye(3)
    expected = np.array([[-0.5 * (x - m) @ np.linalg.inv(covariance) @ (x - m) for m in means] for x in rows])
    scatters = [(rows[tasks == t] - means[t]).T @ (rows[tasks == t] - means[t]) for t in (1, 2, 0)]
    given = [torch.tensor(array) for array in (rows, means, sum(scatters))]
    found = gaussian_scores(*given, count=40, shrinkage=0.1).numpy()
    np.testing.assert_allclose(found - found[:, :1], expected - expected[:, :1], atol=1e-9)


def test_the_generative_router_knows_how_rows_vary(two_tasks):
    """The first feature varies within both tasks, the second tells them apart; cosines see the first alone."""
    one, two = [[3.0, 0.3], [9.0, 0.3], [5.0, 0.2], [7.0, 0.4]], [[3.0, -0.1], [11.0, -0.1], [6.0, 0.0], [8.0, -0.2]]
    method = TaskAdapters(router="generative", reject=None, shrinkage=1e-3)
    learner, stream, _ = two_tasks(method, (one, two))
    asked = [[2.0, 0.05], [12.0, 0.15], [5.0, 0.25], [12.0, -0.1]]
    expected = [{SECOND: 1.0}, {FIRST: 1.0}, {FIRST: 1.0}, {SECOND: 1.0}]
    assert routed(method, learner, stream, asked) == expected
    again = TaskAdapters(router="generative", reject=None, shrinkage=1e-3)
    again.load_state_dict(method.state_dict())
    assert routed(again, learner, stream, asked) == expected
    nearest = TaskAdapters(reject=None)
    nearest.load_state_dict(method.state_dict())
    assert routed(nearest, learner, stream, asked) != expected
    far = TaskAdapters(router="generative", reject=3.0, shrinkage=1e-3)
    far.load_state_dict(method.state_dict())
    assert routed(far, learner, stream, [[-5.0, 0.3]]) == [{}]


def test_letters_are_read_strictly():
    assert [letter_number(text, 3) for text in ("A", " b.", "C) yes", "D", "", "?", "3")] == [
        0,
        1,
        2,
        None,
        None,
        None,
        None,
    ]


def test_the_model_is_taught_to_say_which_task_a_question_is(begin, small_stream):
    stream = small_stream(2, rows=6)
    method, learner = MRLoRA(shots=4, epochs=8, learning_rate=0.02, batch=4), None
    for _ in stream:
        learner, ctx = begin(stream, method, learner=learner)
        learner.end_task(ctx)
        if learner.stage == 1:
            assert method.route(ctx, RouteBatch([{}, {}], [None] * 2)) == [{FIRST: 1.0}] * 2  # nothing to choose
    assert [task for task, _ in method.memory] == ["colours"] * 4 + ["yes.no"] * 4
    assert ctx.cost["router_rows"] == 8 * 8
    questions = [routing_question(row, method.options) for row in (stream[0].train[1], stream[1].train[0])]
    assert questions[1]["images"] == stream[1].train[0]["images"]
    asked = questions[1]["messages"][0]["content"][-1]["text"]
    assert asked.startswith("Is this red?")
    assert "A. colours\nB. yes.no\n" in asked
    lesson = ctx.collate([answered(row, letter) for row, letter in zip(questions, "AB")])
    losses = []
    for names in ((), (ROUTER,)):
        with torch.no_grad(), active(learner.model.eval(), names):
            losses.append(float(learner.model(**lesson).loss))
    assert losses[1] < 0.85 * losses[0]
    ctx = learner.context(stream[1], stream, None)
    state, expected = method.state_dict(), adapter_state(learner.model, ROUTER)
    remove_adapter(learner.model, ROUTER)
    again = MRLoRA()
    again.load_state_dict(state)
    seen = []

    def generate(rows, longest):
        assert next(lora_layers(learner.model))[1].active_adapters == [ROUTER]
        seen.extend(rows)
        return ["B", "a)", "Z"][: len(rows)]

    ctx = dataclasses.replace(ctx, generate=generate)
    rows = [stream[0].test[0], stream[1].test[0], stream[1].test[1]]
    assert again.route(ctx, RouteBatch(rows, [None] * 3)) == [{SECOND: 1.0}, {FIRST: 1.0}, {}]
    assert [question_of(row).split("\n")[0] for row in seen] == [question_of(row) for row in rows]
    found = adapter_state(learner.model, ROUTER)  # the router adapter comes from the state
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_more_tasks_than_letters_are_refused_before_the_first_is_learnt(begin, small_stream):
    (task,) = small_stream(1, rows=2)
    tasks = tuple(dataclasses.replace(task, name=f"task-{number}") for number in range(27))
    begin(Stream("long", tasks[:26]), MRLoRA())
    with pytest.raises(MethodError, match="the stream has 27 tasks"):
        begin(Stream("long", tasks), MRLoRA())


def test_every_process_trains_the_same_router(begin, small_stream):
    """Dropout draws from global numbers, which processes with other rows have gone through to other places."""
    stream, routers = small_stream(2, rows=4), []
    for process in (0, 1):
        method, learner = MRLoRA(shots=2, epochs=2, learning_rate=0.02), None
        for _ in stream:
            learner, ctx = begin(stream, method, learner=learner, dropout=0.5)
            torch.manual_seed(process)
            learner.end_task(ctx)
        routers.append(method.router)
    assert all(torch.equal(routers[1][name], tensor) for name, tensor in routers[0].items())


def test_disco_mixes_by_the_softmax_of_the_cosines(two_tasks):
    method = Disco(temperature=0.5)
    learner, stream, _ = two_tasks(method, ([[1.0, 0.0]] * 4, [[0.0, 2.0]] * 4))
    choices = routed(method, learner, stream, [[1.0, 0.0], [1.0, 1.0], [3.0, 4.0]])
    for (x, y), choice in zip([(1.0, 0.0), (0.5**0.5, 0.5**0.5), (0.6, 0.8)], choices):
        weights = np.exp(np.array([x, y]) / 0.5)
        weights /= weights.sum()
        assert [choice[FIRST], choice[SECOND]] == pytest.approx(weights.tolist(), rel=1e-5)


def test_disco_reads_the_question_alone(begin, small_stream):
    _, ctx = begin(small_stream(1, rows=4), method := Disco())
    seen = []
    ctx = dataclasses.replace(ctx, embed=lambda rows: seen.extend(rows) or torch.ones(len(rows), 2))
    method.embed(ctx, list(ctx.task.train))
    assert all(not row["images"] and len(row["messages"]) == 1 for row in seen)
    assert "red" not in repr(seen)


def test_hide_adds_up_all_blocks_but_the_last(two_tasks):
    method = HiDe(temperature=0.1)
    learner, stream, updates = two_tasks(method, ([[1.0, 0.0]] * 4, [[0.0, 1.0]] * 4))
    choices = routed(method, learner, stream, [[1.0, 0.0], [3.0, 4.0]])
    assert choices[1][FUSED] == 1.0
    expected = gates(torch.tensor([[0.6, 0.8]]), 0.1)[0].tolist()
    assert [choices[1][TOP + "0"], choices[1][TOP + "1"]] == pytest.approx(expected, rel=1e-5)
    blocks = decoder_blocks(learner.model)
    assert set(blocks.values()) == {0, 1}
    fused, tops = adapter_deltas(learner.model, FUSED), [adapter_deltas(learner.model, TOP + i) for i in "01"]
    for module in updates[0]:
        both, last = updates[0][module] + updates[1][module], blocks.get(module) == 1
        assert torch.allclose(fused[module].dense(), torch.zeros_like(both) if last else both, atol=1e-5)
        for top, update in zip(tops, updates):
            own = update[module] if last else torch.zeros_like(both)
            assert torch.allclose(top[module].dense(), own, atol=1e-5)
    method.begin_task(learner.context(stream[1], stream, None))
    assert not any(name == FUSED or name.startswith(TOP) for name in adapter_names(learner.model))


def test_hide_sums_the_adapters_that_were_loaded_last(two_tasks, disturb, tmp_path):
    method = HiDe(samples=2)
    learner, stream, _ = two_tasks(method, ([[1.0, 0.0]] * 4, [[0.0, 1.0]] * 4))
    learner.save_adapters(tmp_path / "adapter")
    learner.save_states(tmp_path / "method")
    routed(method, learner, stream, [[1.0, 0.0]])
    expected = adapter_state(learner.model, FUSED)
    for name in (FIRST, SECOND):
        disturb(learner.model, name)
    learner.load_stage(tmp_path / "adapter", tmp_path / "method", 2)
    disturb(learner.model, FUSED)  # as it would be of the adapters from before
    routed(method, learner, stream, [[1.0, 0.0]])
    found = adapter_state(learner.model, FUSED)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_hide_as_released_sums_the_factors(two_tasks):
    method = HiDe(variant="released")
    learner, stream, _ = two_tasks(method, ([[1.0, 0.0]] * 4, [[0.0, 1.0]] * 4))
    routed(method, learner, stream, [[1.0, 0.0]])
    blocks, own = decoder_blocks(learner.model), [lora_factors(learner.model, name) for name in (FIRST, SECOND)]
    fused = adapter_deltas(learner.model, FUSED)
    for module, delta in fused.items():
        a, b = (own[0][f"{module}/{part}"] + own[1][f"{module}/{part}"] for part in "AB")
        expected = torch.zeros(delta.shape) if blocks.get(module) == 1 else b @ a
        assert torch.allclose(delta.dense(), expected, atol=1e-5)


def test_hide_compares_with_the_mean_of_both_cosines(two_tasks):
    """The whole inquiries of a task differ (their mean is 0.6 long), its questions do not."""
    method = HiDe(temperature=0.1)

    def embed(whole, question):
        return lambda rows: torch.tensor(whole if rows[0]["images"] else [question] * len(rows))[: len(rows)]

    tasks = [([[0.6, 0.8], [0.6, -0.8]] * 2, [0.0, 1.0]), ([[-1.0, 0.0]] * 4, [1.0, 0.0])]
    learner, stream, _ = two_tasks(method, [embed(*task) for task in tasks])
    ctx = learner.context(stream[1], stream, None)
    ctx = dataclasses.replace(ctx, embed=embed([[1.0, 0.0]], [0.6, 0.8]))
    row = next(row for row in stream[0].test if row["images"])
    similarity = method.compare(ctx, RouteBatch([row], [None]))[1]
    assert similarity[0].tolist() == pytest.approx([(1.0 + 0.8) / 2, (-1.0 + 0.6) / 2], abs=1e-6)


def test_gates_are_per_row():
    similarity = similarities(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.eye(2))
    assert torch.equal(similarity, torch.eye(2))
    alone = gates(similarity[:1], 0.3)
    assert torch.equal(gates(similarity, 0.3)[:1], alone)


@pytest.mark.parametrize("slowness", [0.0, 0.25])
def test_the_shared_branch_is_part_of_every_adapter_and_slow(slowness, begin, disturb, small_stream):
    stream, method = small_stream(2, rows=4), SharedSpecific(router="oracle", slowness=slowness)
    learner, ctx = begin(stream, method)
    assert next(lora_layers(ctx.model))[1].active_adapters == [DEFAULT, FIRST]
    live = adapter_parameters(ctx.model, DEFAULT)
    assert all(parameter.requires_grad for parameter in live.values())
    disturb(ctx.model, DEFAULT, seed=1)
    disturb(ctx.model, FIRST, seed=2)
    method.after_step(ctx)
    parts = [adapter_deltas(ctx.model, name) for name in (DEFAULT, FIRST)]
    expected = {name: parts[0][name].dense() + parts[1][name].dense() for name in parts[0]}
    learner.end_task(ctx)
    first = {name: delta.dense() for name, delta in adapter_deltas(learner.model, FIRST).items()}
    assert all(torch.allclose(first[name], expected[name], atol=1e-5) for name in expected)

    again = SharedSpecific(router="oracle", slowness=slowness)
    again.load_state_dict(method.state_dict())
    with torch.no_grad():
        for parameter in adapter_parameters(learner.model, DEFAULT).values():
            parameter.zero_()  # as in a new process: the shared branch comes from the state
    learner.methods[0] = method = again
    learner, ctx = begin(stream, learner=learner)
    live = adapter_parameters(ctx.model, DEFAULT)
    before = {name: parameter.detach().clone() for name, parameter in live.items()}
    assert max(float(tensor.abs().max()) for tensor in before.values()) > 0.1
    assert all(parameter.requires_grad == (slowness > 0) for parameter in live.values())
    if slowness:
        disturb(ctx.model, DEFAULT, seed=3)
        moved = {name: parameter.detach().clone() for name, parameter in live.items()}
        method.after_step(ctx)
        for name, parameter in live.items():
            assert torch.allclose(parameter, before[name] + slowness * (moved[name] - before[name]), atol=1e-6)
    learner.end_task(ctx)
    after = adapter_deltas(learner.model, FIRST)
    assert all(torch.equal(after[name].dense(), first[name]) for name in first)  # past tasks stay as they were
