"""online_ewc: EWC that slowly forgets the importance of old tasks.

Idea: a sum of importances freezes the adapter in a long stream; a decayed sum leaves room.
Formula: as `ewc` with Ω ← decay · Ω + Ω_t, decay below 1.
Stored: Ω and θ*, float32, twice the adapter. Cost per step: 1×; per task one pass over `samples` rows at batch size 1.
Reference: Schwarz et al. 2018 (arXiv 1805.06370).
Fidelity: the regulariser of that paper without its two networks; Ω_t is normalised to mean 1, as in `ewc`.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from mllm_cl.methods.ewc import EWC


class OnlineEWC(EWC):
    """Online elastic weight consolidation.

    Args:
        strength: λ.
        samples: training rows on which Ω is estimated.
        decay: γ.
    """

    name = "online_ewc"
    summary = "EWC whose importance of earlier tasks decays"

    def __init__(
        self,
        *,
        strength: Annotated[float, Field(ge=0)] = 1.0,
        samples: Annotated[int, Field(ge=1)] = 128,
        decay: Annotated[float, Field(gt=0, le=1)] = 0.9,
    ) -> None:
        super().__init__(strength=strength, samples=samples, decay=decay)
