"""Pure routing mathematics: embeddings and prototypes in, choices or gates out; always one row at a time.

Notation: N rows, T tasks, F features.
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
