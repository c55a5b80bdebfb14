"""The pure terms, against NumPy and against what they promise."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mllm_cl.methods._terms import (
    distillation,
    normalised_distance,
    quadratic_penalty,
    target_logits,
    top_k_divergence,
    top_log_probabilities,
)


def softmax(values: np.ndarray) -> np.ndarray:
    exponentials = np.exp(values - values.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return (p * (np.log(p) - np.log(q))).sum(axis=-1)


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(5, 7, generator=generator) * 2, torch.randn(5, 7, generator=generator) * 2


def test_target_logits_predict_the_next_label():
    logits = torch.arange(2 * 4 * 3, dtype=torch.float32).view(2, 4, 3)
    labels = torch.tensor([[5, -100, 1, 2], [-100, 1, -100, -100]])
    expected = torch.stack([logits[0, 1], logits[0, 2], logits[1, 0]])
    assert torch.equal(target_logits(logits, labels), expected)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_distillation_is_the_divergence_from_the_reference(pair, temperature):
    new, old = (tensor.double().numpy() for tensor in pair)
    expected = temperature**2 * kl(softmax(old / temperature), softmax(new / temperature)).mean()
    assert distillation(*pair, temperature).item() == pytest.approx(expected, rel=1e-5)
    reverse = temperature**2 * kl(softmax(new / temperature), softmax(old / temperature)).mean()
    assert abs(expected - reverse) > 1e-3  # the direction matters


def test_top_k_divergence_is_full_when_k_is_the_vocabulary(pair):
    new, old = pair
    values, ids = top_log_probabilities(old, 7)
    expected = kl(softmax(old.double().numpy()), softmax(new.double().numpy()))
    assert np.allclose(top_k_divergence(new, values, ids).numpy(), expected, rtol=1e-4)
    wider, wider_ids = top_log_probabilities(old, 100)
    assert torch.equal(wider_ids, ids)
    assert torch.equal(wider, values)


def test_top_k_divergence_bounds_the_full_one_from_below(pair):
    new, old = pair
    full = top_k_divergence(new, *top_log_probabilities(old, 7))
    before = torch.zeros(5)
    for k in range(1, 8):
        bound = top_k_divergence(new, *top_log_probabilities(old, k))
        assert (bound >= before - 1e-5).all()  # more detail, larger divergence
        assert (bound <= full + 1e-5).all()
        before = bound


def test_top_k_divergence_by_hand():
    reference, current = torch.tensor([[0.5, 0.3, 0.2]]).log(), torch.tensor([[0.25, 0.5, 0.25]]).log()
    expected = 0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)
    assert top_k_divergence(current, *top_log_probabilities(reference, 1)).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("k", [1, 3, 7])
def test_top_k_divergence_rests_at_the_reference(pair, k):
    _, old = pair
    logits = old.clone().requires_grad_(True)
    value = top_k_divergence(logits, *top_log_probabilities(old, k))
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    assert value.abs().max() < 1e-6
    assert gradient.abs().max() < 1e-6


def test_top_k_divergence_stays_finite_at_certainty():
    certain = torch.tensor([[60.0, 0.0, 0.0]])
    doubtful = torch.tensor([[0.0, 60.0, 0.0]], requires_grad=True)
    value = top_k_divergence(doubtful, *top_log_probabilities(certain, 1))
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert torch.isfinite(doubtful.grad).all()
    assert value.item() == pytest.approx(60.0, rel=1e-3)


def test_normalised_distance_by_hand_and_free_of_scale():
    one, two = torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0]])
    rms = np.sqrt(12.5)
    expected = ((3 / rms - np.sqrt(2)) ** 2 + (4 / rms) ** 2) / 2
    assert normalised_distance(one, two).item() == pytest.approx(expected, rel=1e-5)
    assert normalised_distance(one * 9, two / 7).item() == pytest.approx(expected, rel=1e-5)
    same = one.clone().requires_grad_(True)
    value = normalised_distance(same, one)
    value.sum().backward()
    assert value.item() == 0
    assert same.grad.abs().max() == 0


def test_quadratic_penalty_by_hand():
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    anchor, importance = torch.tensor([[0.0, 2.0], [1.0, 5.0]]), torch.tensor([[2.0, 9.0], [0.5, 0.0]])
    penalty = quadratic_penalty({"w": weight}, {"w": anchor}, {"w": importance})
    assert penalty.item() == pytest.approx(0.5 * (2 * 1 + 0 + 0.5 * 4 + 0))
    penalty.backward()
    assert weight.grad.tolist() == [[2.0, 0.0], [1.0, 0.0]]


def test_chunks_change_nothing_and_keep_little():
    from mllm_cl.methods._terms import mean_in_chunks

    generator = torch.Generator().manual_seed(0)
    one, two = torch.randn(2, 150, 7, generator=generator)
    one.requires_grad_(True)
    whole = ((one - two).pow(2).sum(dim=-1)).mean()
    whole.backward()
    expected, one.grad = one.grad, None
    kept: list[int] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        chunked = mean_in_chunks(lambda a, b: (a - b).pow(2).sum(dim=-1), (one, two), size=64)
    assert chunked.item() == pytest.approx(whole.item(), rel=1e-6)
    chunked.backward()
    assert torch.allclose(one.grad, expected, atol=1e-7)
    assert all(size <= 64 * 7 for size in kept)
