"""Pure routing mathematics: embeddings and prototypes in, choices or gates out; always one row at a time.

Notation: N rows, T tasks, F features, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity


def similarities(embeddings: Tensor, prototypes: Tensor) -> Tensor:
    """Cosine of every row with every prototype: (N, F), (T, F) -> (N, T)."""
    return cosine_similarity(embeddings.unsqueeze(1), prototypes.unsqueeze(0), dim=-1)


def gates(similarity: Tensor, temperature: float) -> Tensor:
    """Softmax over the tasks, per row: (N, T) -> (N, T)."""
    return (similarity / temperature).softmax(dim=-1)


def ridge_scores(embeddings: Tensor, gram: Tensor, sums: Tensor, penalty: float) -> Tensor:
    """Scores h (G + λ I)⁻¹ P of the ridge regression on one-hot tasks, in closed form.

    G = Σ h hᵀ and P = Σ h e_tᵀ are sums over rows, so tasks can be added in any order without any old row.

    Args:
        embeddings: h (N, F).
        gram: G (F, F).
        sums: P (F, T).

    Returns:
        (N, T)
    """
    system = gram.double() + penalty * torch.eye(len(gram), dtype=torch.float64, device=gram.device)
    return embeddings.double() @ torch.linalg.solve(system, sums.double())


def gaussian_scores(embeddings: Tensor, means: Tensor, scatter: Tensor, count: int, shrinkage: float) -> Tensor:
    """Log-likelihood of every row under N(μ_t, Σ) of every task, but for a constant of the row: (N, T).

    Σ = (1 − ε) S / n + ε tr(S / n) / F · I. Computed in float64, as differences from the mean of the means.

    Args:
        embeddings: (N, F).
        means: μ (T, F).
        scatter: S (F, F), the sum over tasks of Σ (h − μ_t)(h − μ_t)ᵀ.
        count: n, the rows that S is a sum over.
        shrinkage: ε in (0, 1].
    """
    pooled = scatter.double() / count
    features = len(pooled)
    level = pooled.trace().clamp_min(torch.finfo(torch.float32).tiny) / features
    pooled = (1 - shrinkage) * pooled + shrinkage * level * torch.eye(
        features, dtype=torch.float64, device=pooled.device
    )
    centre = means.double().mean(dim=0)
    own, rows = means.double() - centre, embeddings.double() - centre
    weights = torch.linalg.solve(pooled, own.mT)  # Σ⁻¹ μ: (F, T)
    return rows @ weights - 0.5 * (own.mT * weights).sum(dim=0)


def token_gates(inputs: Tensor, router: Tensor) -> Tensor:
    """Softmax over the experts of R x, for every token alone: (..., in), (E, in) -> (..., E)."""
    return (inputs @ router.mT).softmax(dim=-1)


def top_gates(scores: Tensor, count: int) -> Tensor:
    """Softmax over the `count` largest scores, 0 elsewhere: (..., E) -> (..., E)."""
    kept = scores.topk(min(count, scores.shape[-1]), dim=-1)
    return torch.zeros_like(scores).scatter(-1, kept.indices, kept.values.softmax(dim=-1))


def top_probability(scores: Tensor) -> Tensor:
    """The largest probability in its place, 0 elsewhere: (..., E) -> (..., E); gradients reach the scores through it."""
    probabilities = scores.softmax(dim=-1)
    best = probabilities.argmax(dim=-1, keepdim=True)
    return torch.zeros_like(probabilities).scatter(-1, best, probabilities.gather(-1, best))
