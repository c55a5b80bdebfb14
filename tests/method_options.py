"""Options of methods that suit two tasks of a few rows; methods that are not here have their defaults."""

from __future__ import annotations

from typing import Any

# for adapters of rank 4
SMALL: dict[str, dict[str, Any]] = {
    "model_tailor": {"samples": 6},
    "online_ewc": {"samples": 6},
    "disco": {"samples": 6},
    "agem": {"size": 5, "batch": 3},
    "gem": {"size": 5, "batch": 3},
    "lora_null": {"samples": 4},
    "corda": {"samples": 4},
    "ema": {"decay": 0.5},
    "hide": {"samples": 6},
    "shared_specific": {"samples": 6},
    "inflora": {"samples": 6, "energy": 0.5},
    "keeplora": {"samples": 6, "energy": 0.5},
    "reglora": {"strength": 1.0, "share": 0.1},
    "n_lora": {"strength": 0.01},
    "clora": {"strength": 0.1},
    "mas": {"samples": 6},
    "derpp": {"size": 5, "ratio": 0.3},
    "generic_mix": {"share": 0.2},
    "moelora": {"experts": 2},
    "mr_lora": {"shots": 4, "epochs": 3, "learning_rate": 0.01},
    "smolora": {"blocks": 2},
    "clmoe": {"experts": 2, "important": 1, "samples": 4},
    "branchlora": {"experts": 2, "top": 1, "samples": 4},
    "l2p": {"pool": 4, "top": 2},
}

# for four rows and adapters of rank 2, where nothing but that a method runs is looked at
TINY: dict[str, dict[str, Any]] = {
    **SMALL,
    "inquiry_regularization": {"ratio": 0.3, "rollout": 0},
    "replay": {"size": 4},
    "ewc": {"samples": 2},
    "task_adapters": {"samples": 2},
    "mr_lora": {"shots": 2, "epochs": 1},
    "smolora": {"blocks": 1},
    "progressive_prompts": {"length": 2},
    "l2p": {"pool": 3, "top": 2, "length": 2},
    "modal_prompt": {"length": 2},
}
