"""The recipes of `mllm-cl demo`. `recipes/quickstart/*.yaml` hold the same; a test keeps them equal."""

from __future__ import annotations

from typing import Any

# Sizes and settings of the demo in one place: four runs, 4 minutes on two cores.
DEMO: dict[str, Any] = {
    "limit": {"train": 320, "validation": 40, "test": 60},
    "num_train_epochs": 2,
    "learning_rate": 2.0e-3,
    "per_device_train_batch_size": 16,
    "lora": {"r": 8, "lora_alpha": 16},
    "general": ["quickstart-general"],
}

METHODS: dict[str, list[dict[str, Any]]] = {
    "finetune": [],
    "llava_c": [{"spectral_consolidation": {}}, {"inquiry_regularization": {}}],
    "replay": [{"replay": {}}],
    "joint": [{"joint": {}}],
}


def demo_recipe(name: str, output_dir: str, seed: int = 0) -> dict[str, Any]:
    """Returns the recipe of one of `METHODS` as plain data."""
    return {
        "name": f"quickstart-{name}",
        "output_dir": output_dir,
        "seed": seed,
        "model": {"name_or_path": "tiny-llava", "lora": dict(DEMO["lora"])},
        "stream": {"name": "quickstart", "limit": dict(DEMO["limit"])},
        "methods": [dict(entry) for entry in METHODS[name]],
        "training": {key: DEMO[key] for key in ("learning_rate", "num_train_epochs", "per_device_train_batch_size")},
        "evaluation": {"general": list(DEMO["general"])},
    }
