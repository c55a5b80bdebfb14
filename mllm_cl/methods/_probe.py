"""What of a model's answer to an inquiry is compared with the reference's, where, and by which distance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mllm_cl.data.collate import IGNORED
from mllm_cl.methods._terms import cosine_distance, normalised_distance, top_k_divergence, top_log_probabilities

Target = Literal["logits", "hidden_last", "hidden_multi"]
Positions = Literal["answer", "last", "all"]
Distance = Literal["kl", "reverse_kl", "l2", "cosine"]

DISTANCES: dict[Target, tuple[Distance, ...]] = {
    "logits": ("kl", "reverse_kl"),
    "hidden_last": ("l2", "cosine"),
    "hidden_multi": ("l2", "cosine"),
}
_DEPTHS = (0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Probe:
    """One way of looking at a model.

    Args:
        target: `logits`, the states after the final norm (`hidden_last`), or those at 1/4, 1/2, 3/4 and all of the
            depth (`hidden_multi`).
        positions: where the answer's tokens are predicted (`answer`), where it would start (`last`), or at every token
            before it (`all`).
        distance: `kl` = KL(p_ref ‖ p), `reverse_kl` = KL(p ‖ p_ref), `l2` = ‖n(h) − n(h_ref)‖²/D with n(h) = h/rms(h),
            `cosine` = 1 − cos(h, h_ref).
        top_k: tokens of the reference's distribution that are kept per position.
        temperature: T of the distributions; the divergence is multiplied by T².
    """

    target: Target
    positions: Positions
    distance: Distance
    top_k: int = 32
    temperature: float = 1.0

    def mask(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Returns the positions that are compared: (batch, length), at least one per row.

        Args:
            inputs: collated rows with an assistant turn (an empty one ends at once), padded on either side.
        """
        answer = torch.zeros_like(inputs["labels"], dtype=torch.bool)
        answer[:, :-1] = inputs["labels"][:, 1:] != IGNORED
        if self.positions == "answer":
            return answer
        started = answer.long().cumsum(dim=1)
        if self.positions == "last":
            return answer & (started == 1)
        onset = answer & (started == 1)
        return inputs["attention_mask"].bool() & ((started == 0) | onset)

    def states(self, model: nn.Module, inputs: Mapping[str, Any], mask: Tensor) -> Tensor:
        """Runs the model and returns what is compared: (positions, vocabulary), (positions, D) or (positions, 4, D)."""
        forward = {name: value for name, value in inputs.items() if name not in ("labels", "targets")}
        if self.target == "logits":
            return model(**forward).logits[mask]
        layers = model(**forward, output_hidden_states=True).hidden_states
        if self.target == "hidden_last":
            return layers[-1][mask]
        return torch.stack([layers[round(depth * (len(layers) - 1))][mask] for depth in _DEPTHS], dim=1)

    def keep(self, states: Tensor) -> dict[str, Tensor]:
        """Returns what has to be stored of the reference's states."""
        if self.target != "logits":
            return {"hidden": states.cpu().clone()}
        values, ids = top_log_probabilities(states / self.temperature, self.top_k)
        return {"values": values.cpu(), "ids": ids.cpu()}

    def distances(self, states: Tensor, kept: Mapping[str, Sequence[Tensor]]) -> Tensor:
        """Returns the distance at each position: (positions,).

        Args:
            states: of the current model, rows in the order of `kept`.
            kept: what `keep` returned for each row.
        """
        stored = {name: torch.cat(list(rows)).to(states.device) for name, rows in kept.items()}
        if self.target == "logits":
            logits = states / self.temperature
            reverse = self.distance == "reverse_kl"
            return self.temperature**2 * top_k_divergence(logits, stored["values"], stored["ids"], reverse=reverse)
        distance = normalised_distance if self.distance == "l2" else cosine_distance
        return distance(states, stored["hidden"]).reshape(len(states), -1).mean(dim=1)
