"""LwF: the distillation of the previous stage on the current inputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mllm_cl.methods.lwf import LwF
from mllm_cl.models import adapters


@pytest.mark.parametrize("policy", ["one", "stacked"])
def test_the_term_is_the_divergence_from_the_previous_stage(policy, begin, disturb, small_stream, micro_batch):
    stream, method = small_stream(2, rows=4), LwF(strength=0.7, temperature=3.0)
    learner, ctx = begin(stream, method, policy=policy)
    batch = micro_batch(ctx.collate(list(stream[0].train)))
    assert method.loss_terms(ctx, ctx.model, batch, ctx.model(**batch.inputs)) == {}

    disturb(ctx.model, "default", 1)
    learner.end_task(ctx)
    learner, ctx = begin(stream, learner=learner)
    outputs = ctx.model(**batch.inputs)
    assert method.loss_terms(ctx, ctx.model, batch, outputs)["lwf"].item() == pytest.approx(0, abs=1e-6)

    with adapters.active(ctx.model, [adapters.PREVIOUS if policy == "one" else adapters.DEFAULT]), torch.no_grad():
        old = ctx.model(**batch.inputs).logits
    disturb(ctx.model, learner.trained_name(stream[1]), 2)
    outputs = ctx.model(**batch.inputs)
    term = method.loss_terms(ctx, ctx.model, batch, outputs)["lwf"]

    def probabilities(logits: torch.Tensor) -> np.ndarray:
        labels = batch.inputs["labels"]
        chosen = torch.cat([logits[row, :-1][labels[row, 1:] != -100] for row in range(len(labels))])
        values = np.exp(chosen.detach().double().numpy() / 3.0)
        return values / values.sum(axis=-1, keepdims=True)

    p, q = probabilities(old), probabilities(outputs.logits)
    expected = 0.7 * 9.0 * (p * np.log(p / q)).sum(axis=-1).mean()
    assert term.item() == pytest.approx(expected, rel=1e-4)
    term.backward()
    moved = {name for name, parameter in ctx.model.named_parameters() if parameter.grad is not None}
    assert moved
    assert all(f".{learner.trained_name(stream[1])}." in name for name in moved)


def test_batches_without_targets_cost_nothing(begin, small_stream, micro_batch, make_row):
    stream, method = small_stream(2, rows=4), LwF()
    learner, ctx = begin(stream, method)
    learner.end_task(ctx)
    learner, ctx = begin(stream, learner=learner)
    batch = micro_batch(ctx.collate([{**make_row("a", "?", "x"), "ignored": True}]))
    term = method.loss_terms(
        ctx, ctx.model, batch, ctx.model(**{k: v for k, v in batch.inputs.items() if k != "labels"})
    )
    assert term["lwf"].item() == 0
    term["lwf"].backward()


@pytest.mark.parametrize("top_k", [3, 10_000])
def test_top_k_is_the_divergence_over_the_kept_tokens(top_k, begin, disturb, small_stream, micro_batch):
    stream, method = small_stream(2, rows=4), LwF(temperature=2.0, top_k=top_k)
    learner, ctx = begin(stream, method)
    learner.end_task(ctx)
    learner, ctx = begin(stream, learner=learner)
    disturb(ctx.model, "default", 2)
    batch = micro_batch(ctx.collate(list(stream[0].train)))
    outputs = ctx.model(**batch.inputs)
    term = method.loss_terms(ctx, ctx.model, batch, outputs)["lwf"].item()
    exact = LwF(temperature=2.0).loss_terms(ctx, ctx.model, batch, outputs)["lwf"].item()
    assert term == pytest.approx(exact, rel=1e-4) if top_k > 3 else 0 < term < exact
