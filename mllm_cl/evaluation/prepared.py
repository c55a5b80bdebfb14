"""What several checkpoints of one base model share while they answer the same rows: the plan of batches, the decoded and
tokenised inputs of each batch, and image features where nothing but the base model makes them.

Inputs do not depend on weights. Features are those of `VisionFeatures`, which refuses a model with anything on its vision
side; checkpoints are then adapters on other parts of the one model, so they all see the same features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from mllm_cl.evaluation.vision_features import VisionFeatures

MOST_BYTES = 2**30


class Prepared:
    """Kept while one task is measured.

    Args:
        model: the model that all checkpoints are adapters of.
        batches: row indices of each batch.
        most_bytes: bound of the inputs that are kept; those of further batches are prepared every time.
    """

    def __init__(self, model: nn.Module, batches: Sequence[list[int]], most_bytes: int = MOST_BYTES) -> None:
        self.batches = batches
        self.features = VisionFeatures(model)
        self.most_bytes, self.bytes = most_bytes, 0
        self._inputs: dict[tuple[int, ...], dict[str, Any]] = {}

    def get(self, batch: Sequence[int]) -> dict[str, Any] | None:
        """Returns the inputs of a batch, if they were kept."""
        return self._inputs.get(tuple(batch))

    def keep(self, batch: Sequence[int], inputs: dict[str, Any]) -> None:
        """Keeps the inputs of a batch while there is room."""
        size = sum(value.nbytes for value in inputs.values() if isinstance(value, Tensor))
        if self.bytes + size <= self.most_bytes:
            self._inputs[tuple(batch)] = inputs
            self.bytes += size
