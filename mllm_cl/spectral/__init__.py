"""Spectral mathematics of weight updates: exact low-rank updates, their SVD, and rules that rescale singular values.

Pure tensors: this room imports torch and `mllm_cl.errors`, and knows neither models nor adapters. Its one idea is

    D = U diag(sigma) V^T   ->   U diag(c * sigma) V^T

the update `D` of one weight matrix keeps its directions, and a *rate* `c(sigma)` decides how much of each is kept.

- `low_rank.py`: `LowRankDelta`, the update of one matrix, from and to the two factors of a LoRA adapter
- `rates.py`: the named rates (`RATES`)
- `consolidate.py`: rate + calibration of the total strength, for one matrix or for all matrices of a model
- `merges.py`: the named merges of several updates (`MERGES`), for one matrix or for all matrices of a model

Notation used for tensor shapes and symbols, in every file of this room:

- out, in: rows and columns of the weight matrix (`torch.nn.Linear.weight` is `(out, in)`)
- rank: number of singular triplets stored, never more than min(out, in)
- left `(out, rank)`, sigma `(rank,)`, right `(in, rank)`: U, sigma and V; the columns of left and right are
  orthonormal, sigma is positive and descending
- c `(rank,)`: the rate per singular value; strength: the `alpha` of the literature; D: the update, `W_t - W~_{t-1}`
- lora_A `(rank, in)`, lora_B `(out, rank)`, scaling: D = scaling * lora_B @ lora_A

References: SAC of LLaVA-c (arXiv 2506.08666) as far as it is public; its scaling function is not, so which rate is best
is a matter of measurement. The rates and their calibration are our choice.
"""

from __future__ import annotations

from .consolidate import (
    GRANULARITIES,
    MATCHES,
    SCHEDULES,
    consolidate,
    consolidate_many,
    consolidate_vector,
    layer_type,
    strength_at,
)
from .low_rank import LowRankDelta
from .merges import MERGES, find_merge, merge, merge_many
from .rates import RATES

__all__ = [
    "GRANULARITIES",
    "MATCHES",
    "MERGES",
    "RATES",
    "SCHEDULES",
    "LowRankDelta",
    "consolidate",
    "consolidate_many",
    "consolidate_vector",
    "find_merge",
    "layer_type",
    "merge",
    "merge_many",
    "strength_at",
]
