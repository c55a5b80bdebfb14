"""Embeds inquiries with the model itself: what routers compare."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def embed_inputs(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """Returns an embedding of every row: mean over its tokens and state of the last one, each of unit length.

    Args:
        model: the model, in evaluation mode and with the adapters that should embed.
        inputs: rows rendered for generation, padded on the left; `attention_mask` is (batch, length).

    Returns:
        (batch, 2 * hidden) float32, from the last hidden layer.
    """
    hidden = model(**inputs, output_hidden_states=True).hidden_states[-1].float()  # (batch, length, hidden)
    mask = inputs["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    mean = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
    unit = nn.functional.normalize
    return torch.cat([unit(mean, dim=-1), unit(hidden[:, -1], dim=-1)], dim=-1)
