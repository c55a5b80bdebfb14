"""OSF: the same update as PEFT's tuner, nothing in the protected directions for any optimizer, learning that stays."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import nn

from mllm_cl.methods.osf import Osf, Split
from mllm_cl.models.adapters import DEFAULT, TASK, adapter_deltas, lora_layers

K = 5


@pytest.fixture(params=[(7, 12), (12, 7), (9, 9)], ids=str)
def weight(request) -> torch.Tensor:
    return torch.randn(request.param, generator=torch.Generator().manual_seed(0))


def dense(split: Split) -> torch.Tensor:
    lora_a, lora_b = split.factors()
    return (lora_b @ lora_a).detach()


def learn(weight: torch.Tensor, split: Split, optimizer: torch.optim.Optimizer, project: bool) -> float:
    """Towards another matrix, all over the place; returns the last loss."""
    target = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    for _ in range(60):
        lora_a, lora_b = split.factors()
        loss = (weight + lora_b @ lora_a - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if project:
            split.project()
    return loss.item()


def leak(weight: torch.Tensor, split: Split) -> float:
    """The share of ΔW that lies in the protected directions of the weight as it was."""
    u, _, v = torch.linalg.svd(weight, full_matrices=False)
    delta = dense(split)
    return float(((u[:, :K].mT @ delta).norm() + (delta @ v[:K].mT).norm()) / delta.norm())


def test_a_step_of_sgd_is_that_of_pefts_tuner(weight):
    out_features, in_features = weight.shape
    linear = nn.Linear(in_features, out_features, bias=False)
    linear.weight.data.copy_(weight)
    tuned = peft.get_peft_model(
        nn.Sequential(linear), peft.OSFConfig(target_modules=["0"], effective_rank=K, init_weights=True)
    )
    layer = tuned.base_model.model[0]
    inputs, goal = torch.randn(20, in_features), torch.randn(20, out_features)
    split = Split.of(weight, K)
    for parameters, forward in (
        ([p for p in tuned.parameters() if p.requires_grad], tuned),
        ([split.u, split.s, split.v], lambda x: x @ weight.mT + x @ split.factors()[0].mT @ split.factors()[1].mT),
    ):
        optimizer = torch.optim.SGD(parameters, lr=0.05)
        for _ in range(3):
            optimizer.zero_grad()
            (forward(inputs) - goal).square().mean().backward()
            optimizer.step()
    theirs = layer.get_delta_weight("default").detach()
    assert theirs.norm() > 1e-3
    assert torch.allclose(dense(split), theirs, atol=1e-4)


def test_nothing_leaks_into_the_protected_directions_with_adam(weight):
    """The known leak: projected gradients alone do not hold Adam back, projected weights do."""
    leaks = {}
    for project in (False, True):
        split = Split.of(weight, K)
        assert float(dense(split).norm()) < 1e-5
        optimizer = torch.optim.AdamW([split.u, split.s, split.v], lr=0.05, weight_decay=0.0)
        assert learn(weight, split, optimizer, project) < 2.5
        leaks[project] = leak(weight, split)
    assert leaks[True] < 1e-5 < 1e-2 < leaks[False]


def test_momentum_and_weight_decay_stay_outside_too(weight):
    for optimizer in (
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.3),
    ):
        split = Split.of(weight, K)
        learn(weight, split, optimizer([split.u, split.s, split.v]), project=True)
        assert leak(weight, split) < 1e-5


def test_layers_add_the_update_while_the_task_is_on(begin, small_stream):
    _, ctx = begin(small_stream(2, rows=4), method := Osf(protected=0.5))
    name, layer = list(lora_layers(ctx.model))[3]
    split = method.splits[name]
    with torch.no_grad():
        split.u.add_(torch.randn(split.u.shape, generator=torch.Generator().manual_seed(0)))
    inputs = torch.randn(2, 3, layer.in_features, generator=torch.Generator().manual_seed(1))
    base = layer.get_base_layer()(inputs)
    assert torch.allclose(layer(inputs), base + inputs @ dense(split).mT, atol=1e-4)
    for reference in ("base", "previous"):
        with ctx.reference(reference):
            assert torch.equal(layer(inputs), base)


def test_each_task_protects_the_weights_as_the_last_one_left_them(begin, small_stream):
    """What was learnt is in the adapter afterwards (PEFT's `unload` loses it), and the next task leaves it alone."""
    stream = small_stream(2, rows=4)
    learner, ctx = begin(stream, method := Osf(protected=0.5), max_rank=256)
    weights, sizes = {}, {}
    for stage, share in ((1, 0.5), (2, 0.75)):
        past = adapter_deltas(ctx.model, DEFAULT)
        for name, layer in lora_layers(ctx.model):
            weight = layer.get_base_layer().weight.detach()
            split = method.splits[name]
            weights[name] = weight + past[name].dense()
            assert split.u_high.shape[1] == min(round(share * min(weight.shape)), min(weight.shape) - 1)
            sizes[name] = split.u.shape
            with torch.no_grad():
                for place, parameter in enumerate((split.u, split.s, split.v)):
                    noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(10 * stage + place))
                    parameter.add_(0.1 * noise)
        method.after_step(ctx)
        updates = {name: dense(split) for name, split in method.splits.items()}
        inputs = ctx.collate(list(stream[stage - 1].train))
        with torch.no_grad():
            learning = ctx.model.eval()(**inputs).logits
        learner.end_task(ctx)
        assert learner.truncation_error == 0
        with torch.no_grad():
            assert torch.allclose(learner.model.eval()(**inputs).logits, learning, atol=1e-4)
        for name, delta in adapter_deltas(learner.model, DEFAULT).items():
            assert torch.allclose(delta.dense(), past[name].dense() + updates[name], atol=1e-5)
            kept = sizes[name][1]
            u, _, v = torch.linalg.svd(weights[name], full_matrices=False)
            count = len(v) - kept
            size = 1e-4 * updates[name].norm()
            assert float((u[:, :count].mT @ updates[name]).norm()) < size
            assert float((updates[name] @ v[:count].mT).norm()) < size
        if stage == 1:
            learner, ctx = begin(stream, learner=learner)
    assert TASK not in learner.model.peft_config
    assert [Osf(schedule="constant", protected=0.3).share(i, 4) for i in (1, 4)] == [0.3, 0.3]
