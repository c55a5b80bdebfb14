"""GEM: the dual programme against brute force, and the projected gradient by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from mllm_cl.methods.gem import Gem, solve_dual
from mllm_cl.models.adapters import DEFAULT, adapter_parameters


def brute_force(gram: np.ndarray, against: np.ndarray) -> float:
    """The smallest value of ½ uᵀ K u + cᵀ u over u ≥ 0: every set of positive entries is tried."""
    best = 0.0
    for size in range(1, len(gram) + 1):
        for chosen in map(list, itertools.combinations(range(len(gram)), size)):
            u = np.linalg.lstsq(gram[np.ix_(chosen, chosen)], -against[chosen], rcond=None)[0]
            if (u >= 0).all():
                best = min(best, 0.5 * u @ gram[np.ix_(chosen, chosen)] @ u + against[chosen] @ u)
    return best


@pytest.mark.parametrize("seed", range(8))
def test_the_dual_is_solved_exactly(seed):
    rng = np.random.default_rng(seed)
    memories = rng.normal(size=(4, 3 if seed % 2 else 9))  # four gradients in three dimensions depend on each other
    gradient = rng.normal(size=memories.shape[1])
    gram, against = memories @ memories.T, memories @ gradient
    u = solve_dual(gram, against)
    assert (u >= 0).all()
    assert 0.5 * u @ gram @ u + against @ u == pytest.approx(brute_force(gram, against), abs=1e-9)
    projected = gradient + memories.T @ u
    assert (memories @ projected >= -1e-9).all()
    assert np.allclose(u * (memories @ projected), 0, atol=1e-9)  # complementary slackness


def test_the_margin_enters_as_paper_and_code_say():
    gram, against = np.array([[2.0, 0.5], [0.5, 1.0]]), np.array([-1.0, 3.0])
    assert np.allclose(Gem(margin=0.0).factors(gram, against), [0.5, 0.0])
    assert np.allclose(Gem(margin=0.25).factors(gram, against), [0.75, 0.25])
    found = Gem(margin=0.25, variant="released").factors(gram, against)  # u ≥ 1/4, so the second one stays there
    assert np.allclose(found, [(1.0 - 0.5 * 0.25) / 2.001, 0.25])
    assert np.allclose(solve_dual(np.zeros((2, 2)), np.zeros(2)), 0)


def test_no_earlier_task_is_made_worse(begin, disturb, small_stream):
    """Three tasks: the gradient is projected on the cone of both memories, and left alone inside of it."""
    stream = small_stream(3, rows=6)
    learner, ctx = begin(stream, method := Gem(size=6, batch=2, margin=0.0))
    disturb(ctx.model, DEFAULT)
    method.before_step(ctx)  # no memory, nothing to do
    learner.end_task(ctx)
    learner, ctx = begin(stream, learner=learner)
    learner.end_task(ctx)
    again = Gem(size=6, batch=3, margin=0.0)
    again.load_state_dict(method.state_dict())
    assert [sum(task == name for task, _ in again.memory) for name in ("colours", "yes.no")] == [3, 3]
    learner, ctx = begin(stream, learner=learner)
    parameters = list(adapter_parameters(ctx.model, DEFAULT).values())
    memories = []
    for task in (stream[0], stream[1]):
        rows = [row for row in task.train if (task.name, row["id"]) in again.memory]
        inputs = ctx.collate(rows)
        loss = ctx.model.eval()(**inputs, num_items_in_batch=int((inputs["labels"] != -100).sum())).loss
        memories.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]).double())
    memories = torch.stack(memories)
    noise = torch.randn(memories.shape[1], generator=torch.Generator().manual_seed(0)).double()
    noise *= memories[0].norm() / noise.norm()
    for signs in ((-1.0, -1.0), (-1.0, 3.0), (1.0, 1.0)):
        g = torch.tensor(signs).double() @ memories + noise
        place = 0
        for parameter in parameters:
            own = g[place : place + parameter.numel()]
            parameter.grad, place = own.reshape(parameter.shape).float(), place + parameter.numel()
        again.before_step(ctx)
        found = torch.cat([parameter.grad.flatten() for parameter in parameters]).double()
        gram, against = (memories @ memories.mT).numpy(), (memories @ g).numpy()
        u = torch.as_tensor(solve_dual(gram, against)) if (against < 0).any() else torch.zeros(2)
        assert torch.allclose(found, g + u.double() @ memories, atol=1e-3 * float(memories.abs().max()))
        assert bool((memories @ found >= -1e-3 * memories.square().sum(dim=1)).all())
        assert bool(u.any()) == (min(signs) < 0)
    assert ctx.cost["projected_steps"] == 2
    assert ctx.cost["memory_rows"] == 3 * 2 * 3
