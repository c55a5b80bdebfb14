"""l2p: a pool of soft prompts, of which every row gets those whose keys fit it best.

Idea: similar rows share prompts, different ones do not meet, and no task has to be named.
Formula: q(x) the row's query, k_m the key of prompt m; S(x) = the `top` prompts with the largest cos(q(x), k_m); input
[P_s for s in S(x); x]; L = ℓ − strength · Σ_{s ∈ S(x)} cos(q(x), k_s). Prompts and keys are trained in every task; a row's choice
is its own, whatever else is in its batch.
Stored once: pool × (length + 1) × hidden float32; nothing per task. Cost per step: 1.5×, for the query is a forward pass of
the base, and top × length tokens more in every sequence; inference: the same pass and tokens.
Reference: Wang et al. 2022 (CVPR, arXiv 2112.08654; google-research/l2p), and its use on language models in TRACE (arXiv
2310.06762). Fidelity: as in the paper; the query is the mean last hidden state of the untouched base over the inquiry
instead of a class token. The released code may choose one set for a whole batch, which makes answers depend on it: not here.
Keys start as directions drawn at random, so with few tasks a part of the pool is never chosen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from mllm_cl.errors import MethodError
from mllm_cl.methods._prompts import ChosenPrompts, Query, Vectors, word_vectors
from mllm_cl.methods._routing import similarities
from mllm_cl.methods.base import Context


class L2P(ChosenPrompts):
    """Learning to prompt.

    Args:
        pool: prompts in the pool.
        top: prompts of every row.
        length: tokens of a prompt.
        strength: weight of the cosine between queries and chosen keys.
    """

    name = "l2p"
    summary = "a pool of soft prompts, chosen per sample by key and query"

    def __init__(
        self,
        *,
        pool: Annotated[int, Field(ge=1)] = 10,
        top: Annotated[int, Field(ge=1)] = 5,
        length: Annotated[int, Field(ge=1)] = 5,
        strength: Annotated[float, Field(ge=0)] = 0.1,
    ) -> None:
        super().__init__()
        if top > pool:
            raise MethodError(
                f"methods.l2p.top: {top} prompts cannot be chosen from a pool of {pool}.",
                expected="top of at most pool",
                fix="lower top, or raise pool.",
            )
        self.pool, self.top, self.length, self.strength = pool, top, length, strength

    def prepare(self, ctx: Context) -> None:
        if not self.learnt:
            words = word_vectors(ctx, self.pool * self.length)
            self.learnt["prompts"] = words.unflatten(0, (self.pool, self.length))  # (pool, length, hidden)
            self.learnt["keys"] = normalize(torch.randn(self.pool, words.shape[1], generator=ctx.rng), dim=1)

    def pick(self, own: Vectors, ask: Callable[[], Query], learning: int | None) -> Tensor | None:
        chosen = similarities(ask().whole, own["keys"].detach()).topk(self.top, dim=1).indices  # (N, top)
        return own["prompts"][chosen].flatten(1, 2)

    def attraction(self, own: Vectors, query: Query, index: int) -> Tensor:
        return -self.strength * similarities(query.whole, own["keys"]).topk(self.top, dim=1).values.sum(dim=1)
