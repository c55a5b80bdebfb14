"""The recipes of `mllm-cl demo`. `recipes/quickstart/*.yaml` hold the same, written by

python -m mllm_cl.cli.demo_recipes recipes/quickstart
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

# Sizes and settings of the demo in one place: four runs, two at a time, in 4 minutes on two cores.
DEMO: dict[str, Any] = {
    "limit": {"train": 224, "validation": 40, "test": 60},
    "num_train_epochs": 2,
    "learning_rate": 3.0e-3,
    "per_device_train_batch_size": 4,
    "lora": {"r": 8, "lora_alpha": 16},
    "evaluation": {"general": ["quickstart-general"], "drift": 8},
}

# Name -> methods, and what a reader of the recipe should know.
METHODS: dict[str, tuple[list[dict[str, Any]], str]] = {
    "finetune": ([], "Plain sequential LoRA fine-tuning: the lower bound."),
    "llava_c": (
        [{"spectral_consolidation": {"strength": 1.0}}, {"inquiry_regularization": {}}],
        "LLaVA-c: spectral-aware consolidation (SAC) and unsupervised inquiry regularization (UIR).",
    ),
    "replay": ([{"replay": {}}], "Experience replay: stored rows of earlier tasks are rehearsed."),
    "joint": ([{"joint": {}}], "All tasks at once at the last stage: the upper bound."),
}


def demo_recipe(name: str, output_dir: str, seed: int = 0) -> dict[str, Any]:
    """Returns the recipe of one of `METHODS` as plain data."""
    methods, _ = METHODS[name]
    return {
        "name": f"quickstart-{name}",
        "output_dir": output_dir,
        "seed": seed,
        "model": {"name_or_path": "tiny-llava", "lora": dict(DEMO["lora"])},
        "stream": {"name": "quickstart", "limit": dict(DEMO["limit"])},
        "methods": [dict(entry) for entry in methods],
        "training": {key: DEMO[key] for key in ("learning_rate", "num_train_epochs", "per_device_train_batch_size")},
        "evaluation": copy.deepcopy(DEMO["evaluation"]),
    }


def recipe_text(name: str, output_dir: str = "", seed: int = 0) -> str:
    """Returns the recipe as a commented YAML file."""
    import yaml

    content = demo_recipe(name, output_dir or f"runs/quickstart/{name}", seed)
    return (
        f"# {METHODS[name][1]}\n"
        "# What `mllm-cl demo` runs; sizes and learning rate are ours, chosen for a few minutes on a laptop.\n"
        f"#   mllm-cl run recipes/quickstart/{name}.yaml\n"
        f"{yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=120)}"
    )


def write_demo_recipe(name: str, folder: Path, seed: int) -> Path:
    """Writes the recipe of one of `METHODS` into `folder`; its run goes into a folder beside it. Returns the file."""
    from mllm_cl.files import write_text

    path = folder / f"{name}.yaml"
    write_text(path, recipe_text(name, str(folder / name), seed))
    return path


if __name__ == "__main__":
    for method in METHODS:
        (Path(sys.argv[1]) / f"{method}.yaml").write_text(recipe_text(method), encoding="utf-8")
