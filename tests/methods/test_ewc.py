"""EWC: Fisher information example by example, its online sum, and the penalty."""

from __future__ import annotations

import pytest
import torch

from mllm_cl.methods.base import MethodState
from mllm_cl.methods.ewc import EWC, fisher_information
from mllm_cl.models.adapters import DEFAULT, adapter_parameters


def by_hand(ctx, rows) -> dict[str, torch.Tensor]:
    """Mean of squared gradients of each row's own log-likelihood, summed over its target tokens."""
    parameters = adapter_parameters(ctx.model, DEFAULT)
    total = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for row in rows:
        inputs = ctx.collate([row])
        labels = inputs.pop("labels")
        logits = ctx.model.eval()(**inputs).logits
        log_probabilities = logits[0, :-1].log_softmax(dim=-1)
        targets = labels[0, 1:]
        likelihood = sum(log_probabilities[i, token] for i, token in enumerate(targets.tolist()) if token != -100)
        for name, gradient in zip(parameters, torch.autograd.grad(likelihood, list(parameters.values()))):
            total[name] += gradient**2 / len(rows)
    return total


@pytest.fixture
def story(begin, disturb, small_stream):
    stream, method = small_stream(2, rows=5), EWC(samples=5, decay=0.5, strength=3.0)
    learner, ctx = begin(stream, method)
    disturb(ctx.model, "default", 1)
    return stream, method, learner, ctx


def test_fisher_is_the_mean_of_per_example_squares(story):
    stream, _, _, ctx = story
    fisher = fisher_information(ctx, adapter_parameters(ctx.model, DEFAULT), 5)
    expected = by_hand(ctx, list(stream[0].train))
    assert sum(float(tensor.sum()) for tensor in expected.values()) > 0
    for name, tensor in fisher.items():
        assert torch.allclose(tensor, expected[name], rtol=1e-3, atol=1e-9)
    assert all(parameter.grad is None for parameter in ctx.model.parameters())


def test_fisher_leaves_the_mode_of_the_model_alone(story):
    _, _, _, ctx = story
    ctx.model.train()
    fisher_information(ctx, adapter_parameters(ctx.model, DEFAULT), 2)
    assert ctx.model.training


def test_importance_accumulates_online_with_mean_one(story, begin, disturb):
    stream, method, learner, ctx = story
    learner.end_task(ctx)
    first = {name: tensor.clone() for name, tensor in method.importance.items()}
    assert torch.cat([tensor.flatten() for tensor in first.values()]).mean().item() == pytest.approx(1.0, rel=1e-4)
    anchors = {name: tensor.clone() for name, tensor in method.anchors.items()}
    assert all(torch.equal(anchors[name], p) for name, p in adapter_parameters(ctx.model, DEFAULT).items())

    learner, ctx = begin(stream, learner=learner)
    disturb(ctx.model, "default", 2)
    fisher = by_hand(ctx, list(stream[1].train))
    mean = torch.cat([tensor.flatten() for tensor in fisher.values()]).mean()
    learner.end_task(ctx)
    for name, tensor in method.importance.items():
        assert torch.allclose(tensor, fisher[name] / mean + 0.5 * first[name], rtol=1e-3, atol=1e-6)
    assert any(not torch.equal(method.anchors[name], anchors[name]) for name in anchors)


def test_the_penalty_is_half_the_weighted_square(story, begin, disturb, micro_batch):
    stream, method, learner, ctx = story
    batch = micro_batch(ctx.collate(list(stream[0].train)))
    assert method.loss_terms(ctx, ctx.model, batch, None) == {}
    learner.end_task(ctx)
    learner, ctx = begin(stream, learner=learner)
    assert method.loss_terms(ctx, ctx.model, batch, None)["ewc"].item() == 0
    disturb(ctx.model, "default", 3)
    parameters = adapter_parameters(ctx.model, DEFAULT)
    expected = sum(
        float((method.importance[name] * (parameter.detach() - method.anchors[name]) ** 2).sum())
        for name, parameter in parameters.items()
    )
    term = method.loss_terms(ctx, ctx.model, batch, None)["ewc"]
    assert term.item() == pytest.approx(3.0 * 0.5 * expected, rel=1e-5)
    term.backward()
    name, parameter = next(iter(parameters.items()))
    gradient = 3.0 * method.importance[name] * (parameter.detach() - method.anchors[name])
    assert torch.allclose(parameter.grad, gradient, rtol=1e-5)


def test_rows_without_images_do_not_touch_the_bridge(begin, disturb, make_row, make_learner):
    from mllm_cl.data.rows import Rows
    from mllm_cl.streams import Stream, Task

    rows = Rows([make_row("a", "?", "x", None), make_row("b", "?", "x", None)])
    _, ctx = begin(Stream("text", (Task("t", rows, rows),)), EWC(samples=2), bridge=True)
    disturb(ctx.model, "default", 1)
    fisher = fisher_information(ctx, adapter_parameters(ctx.model, DEFAULT), 2)
    bridge = [tensor for name, tensor in fisher.items() if "projector" in name]
    assert bridge
    assert all(float(tensor.abs().sum()) == 0 for tensor in bridge)


def test_states_restore_everything(story):
    _, method, learner, ctx = story
    learner.end_task(ctx)
    state, again = method.state_dict(), EWC()
    again.load_state_dict(MethodState(tensors=dict(state.tensors), data=state.data))
    assert again.importance.keys() == method.importance.keys()
    assert all(torch.equal(again.anchors[name], method.anchors[name]) for name in method.anchors)
    again.load_state_dict(MethodState())
    assert not again.importance
