"""Pure loss terms: tensors in, scalar tensors out. The methods name them and decide when.

Notation: B rows, N target positions, V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, log_softmax
from torch.utils.checkpoint import checkpoint


def target_logits(logits: Tensor, labels: Tensor, ignored: int = -100) -> Tensor:
    """Returns the logits that predict the target tokens, row after row.

    Args:
        logits: (B, L, V); position i predicts token i + 1.
        labels: (B, L), `ignored` where nothing is learnt.

    Returns:
        (N, V)
    """
    return logits[:, :-1][labels[:, 1:] != ignored]


def row_likelihoods(logits: Tensor, labels: Tensor, ignored: int = -100) -> Tensor:
    """Mean log-probability of each row's target tokens: (B, L, V), (B, L) -> (B,) float32; 0 for a row without any."""
    targets, known = labels[:, 1:], labels[:, 1:] != ignored
    chosen = log_softmax(logits[:, :-1].float(), dim=-1).gather(-1, targets.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    return (chosen * known).sum(dim=1) / known.sum(dim=1).clamp_min(1)


def distillation(logits: Tensor, reference: Tensor, temperature: float = 1.0) -> Tensor:
    """T² · mean over positions of KL(p_ref^(1/T) ‖ p^(1/T)) (Hinton et al. 2015; LwF, Li and Hoiem 2016).

    Args:
        logits, reference: (N, V).
    """

    def divergence(logits: Tensor, reference: Tensor) -> Tensor:
        current = log_softmax(logits.float() / temperature, dim=-1)
        target = log_softmax(reference.float() / temperature, dim=-1)
        return (target.exp() * (target - current)).sum(dim=-1)

    return temperature**2 * mean_in_chunks(divergence, (logits, reference))


def top_k_distillation(
    logits: Tensor, reference_log_probabilities: Tensor, ids: Tensor, temperature: float = 1.0
) -> Tensor:
    """`distillation` that knows the reference's k most likely tokens only; the others are one further outcome.

    Args:
        logits: (N, V).
        reference_log_probabilities, ids: (N, k), of the reference at the same temperature.
    """

    def divergence(logits: Tensor, values: Tensor, ids: Tensor) -> Tensor:
        return top_k_divergence(logits.float() / temperature, values, ids)

    return temperature**2 * mean_in_chunks(divergence, (logits, reference_log_probabilities, ids))


def mean_in_chunks(function: Callable[..., Tensor], tensors: Sequence[Tensor], size: int = 64) -> Tensor:
    """Mean over rows of `function(rows of each tensor)`, (n, ...) -> (n,), computed `size` rows at a time.

    What a chunk needs for its gradient is computed again in the backward pass, so that nothing of size (N, V) is kept
    besides the logits themselves.
    """
    pieces = zip(*(tensor.split(size) for tensor in tensors))
    parts = [checkpoint(lambda *rows: function(*rows).sum(), *rows, use_reentrant=False) for rows in pieces]
    return torch.stack(parts).sum() / len(tensors[0])


def top_log_probabilities(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Returns the k largest log-probabilities and their token ids: (N, k) each."""
    values, ids = log_softmax(logits.float(), dim=-1).topk(min(k, logits.shape[-1]), dim=-1)
    return values, ids


def top_k_divergence(
    logits: Tensor, reference_log_probabilities: Tensor, ids: Tensor, *, reverse: bool = False
) -> Tensor:
    """KL(p_ref ‖ p) per position, with everything outside the reference's top k as one further outcome.

    Zero, with zero gradient, where p = p_ref; a lower bound of the full divergence (data-processing inequality).

    Args:
        logits: (N, V) of the current model.
        reference_log_probabilities, ids: (N, k) as `top_log_probabilities` returns them.
        reverse: KL(p ‖ p_ref) instead.

    Returns:
        (N,)
    """
    current = log_softmax(logits.float(), dim=-1).gather(-1, ids)
    reference = reference_log_probabilities
    if ids.shape[-1] < logits.shape[-1]:
        current, reference = _with_rest(current), _with_rest(reference)
    if reverse:
        current, reference = reference, current
    return (reference.exp() * (reference - current)).sum(dim=-1)


def _with_rest(log_probabilities: Tensor) -> Tensor:
    """Appends the logarithm of what is missing to 1: (N, k) -> (N, k + 1)."""
    smallest = torch.finfo(torch.float32).eps
    rest = (1 - log_probabilities.exp().sum(dim=-1, keepdim=True)).clamp_min(smallest)
    return torch.cat([log_probabilities, rest.log()], dim=-1)


def normalised_distance(hidden: Tensor, reference: Tensor) -> Tensor:
    """‖n(h) − n(h_ref)‖² / D per position, n(h) = h / rms(h): (N, ..., D), (N, ..., D) -> (N, ...)."""

    def normalise(states: Tensor) -> Tensor:
        states = states.float()
        return states / states.pow(2).mean(dim=-1, keepdim=True).add(1e-12).sqrt()

    return (normalise(hidden) - normalise(reference)).pow(2).mean(dim=-1)


def cosine_distance(hidden: Tensor, reference: Tensor) -> Tensor:
    """1 − cos(h, h_ref) over the last dimension: (N, ..., D), (N, ..., D) -> (N, ...)."""
    return 1 - cosine_similarity(hidden.float(), reference.float(), dim=-1)


def quadratic_penalty(
    parameters: Mapping[str, Tensor], anchors: Mapping[str, Tensor], importance: Mapping[str, Tensor]
) -> Tensor:
    """½ Σ Ω_i (θ_i − θ*_i)² (EWC, Kirkpatrick et al. 2017, eq. 3 with λ left to the caller)."""
    terms = [
        (importance[name] * (parameter.float() - anchors[name]).pow(2)).sum() for name, parameter in parameters.items()
    ]
    return 0.5 * torch.stack(terms).sum()
