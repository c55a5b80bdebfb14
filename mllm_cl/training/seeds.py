"""Seeds of everything random in a run, derived from the recipe's one seed."""

from __future__ import annotations

import hashlib


def derived_seed(seed: int, purpose: str, stage: int = 0) -> int:
    """Returns a seed below 2³² for one purpose at one stage.

    A hash rather than a sum: loaders add the epoch to their seed, so seeds of neighbouring stages must not be neighbours, and
    seed 0 at stage 2 must not be seed 1 at stage 1.
    """
    return int.from_bytes(hashlib.sha256(f"{seed}/{purpose}/{stage}".encode()).digest()[:4], "big")
