"""Named combinations of the settings of `inquiry_regularization`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mllm_cl.errors import MethodError, suggest
from mllm_cl.methods._probe import DISTANCES

_DEFAULTS: dict[str, Any] = {
    "weight": 1.0,
    "ratio": 0.25,
    "source": "pool",
    "modality": "text",
    "images": "both",
    "target": "hidden_last",
    "positions": None,
    "distance": "l2",
    "rollout": 0,
    "reference": "base",
    "inquiry_memory": 0,
    "memory_ratio": 0.0,
}
_SELF = {"modality": "image", "target": "logits", "distance": "kl", "rollout": 8}
PRESETS: dict[str, dict[str, Any]] = {
    "uir_memory": {**_SELF, "weight": 2.0, "ratio": 0.5, "inquiry_memory": 64, "memory_ratio": 0.5},
    "uir_self": {**_SELF, "weight": 2.0, "ratio": 1.0},
    "uir_kl": {"target": "logits", "distance": "kl"},
    "uir_feat": {},
    "uir_cos": {"distance": "cosine"},
    "uir_image": {"modality": "image", "positions": "last"},
    "uir_task": {"source": "task"},
    "uir_prev": {"reference": "previous"},
}


def inquiry_settings(preset: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of a preset; what was given beside it (not None) wins.

    Raises:
        MethodError: there is no such preset, or the settings contradict each other.
    """
    if preset not in PRESETS:
        raise MethodError(
            f"inquiry_regularization.preset: {preset!r} does not exist.", expected=suggest(preset, PRESETS)
        )
    settings = _DEFAULTS | PRESETS[preset] | {name: value for name, value in given.items() if value is not None}
    settings["positions"] = settings["positions"] or ("answer" if settings["rollout"] else "all")
    if settings["distance"] not in DISTANCES[settings["target"]]:
        raise MethodError(
            f"inquiry_regularization: distance {settings['distance']!r} does not fit target {settings['target']!r}.",
            expected=" or ".join(DISTANCES[settings["target"]]),
            fix="set both `target` and `distance`.",
        )
    if settings["positions"] == "answer" and not settings["rollout"]:
        raise MethodError(
            "inquiry_regularization.positions: 'answer' needs an answer, and `rollout` is 0.",
            expected="`rollout` above 0, or positions 'last' or 'all'",
        )
    return settings
