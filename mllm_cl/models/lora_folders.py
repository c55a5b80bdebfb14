"""Plain PEFT LoRA folders without their base model: read as exact updates, written back as a plain LoRA."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mllm_cl.errors import ModelError
from mllm_cl.parse import parse_json
from mllm_cl.spectral import LowRankDelta

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_A, _B = ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True)
class LoraFolder:
    """An adapter as it lies on disk.

    Args:
        config: its settings.
        updates: the exact update of each matrix (out, in), by the module's name in PEFT's files.
    """

    config: LoraConfig
    updates: dict[str, LowRankDelta]


def read_lora_folder(folder: Path) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Returns settings and tensors of a plain PEFT LoRA folder.

    Raises:
        ModelError: the folder is not a LoRA folder, or cannot be read.
    """
    try:
        settings = parse_json((folder / CONFIG).read_text(encoding="utf-8"))
        state = load_file(folder / WEIGHTS)
        kind = settings.get("peft_type")
        config = LoraConfig.from_pretrained(str(folder)) if kind == "LORA" else None
    except FileNotFoundError as error:
        below = sorted(path.parent for path in folder.glob(f"*/{CONFIG}"))
        raise ModelError(
            f"{folder}: not an adapter folder ({Path(error.filename or '').name} is missing).",
            expected=f"{CONFIG} and {WEIGHTS}",
            fix=f"give {' or '.join(map(str, below))}." if below else None,
        ) from error
    except (OSError, ValueError, TypeError, AttributeError, SafetensorError) as error:
        raise ModelError(f"{folder}: the adapter cannot be read ({error}).", fix="save it again.") from error
    if not isinstance(config, LoraConfig):
        raise ModelError(f"{folder}: holds a {kind} adapter.", expected="LORA")
    return config, state


def read_updates(folder: Path) -> LoraFolder:
    """Returns the exact updates of a LoRA folder.

    Raises:
        ModelError: as `read_lora_folder`, or if the adapter is more than a low-rank update (DoRA, biases, whole modules).
    """
    config, state = read_lora_folder(folder)
    updates, read = {}, set()
    for key in state:
        if key.endswith(_A):
            module = key.removesuffix(_A)
            if module + _B not in state:
                raise ModelError(f"{folder}: {module} has no lora_B.", fix="save the adapter again.")
            try:
                scaling = _scaling(config, module)
            except (TypeError, ValueError, AttributeError, ArithmeticError, re.error) as error:
                raise ModelError(
                    f"{folder}: {CONFIG}: r, lora_alpha and their patterns give no scaling ({error}).",
                    expected="positive numbers",
                    fix="save the adapter again.",
                ) from error
            updates[module] = LowRankDelta.from_lora(state[key], state[module + _B], scaling)
            read |= {key, module + _B}
    left = sorted(state.keys() - read)
    if left or config.use_dora or not updates:
        what = "weight-decomposed (DoRA)" if config.use_dora else f"more than LoRA factors (for example {left[:1]})"
        raise ModelError(
            f"{folder}: {what if updates else 'without LoRA factors'}; that is not a low-rank update.",
            expected="plain LoRA on linear layers",
        )
    return LoraFolder(config, updates)


def _scaling(config: LoraConfig, module: str) -> float:
    """alpha / r, or alpha / √r for rank-stabilised LoRA, with the patterns that override r and alpha."""
    name = module.removeprefix("base_model.model.")
    ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
    rank = ranks.get(get_pattern_key(list(ranks), name), config.r)
    alpha = alphas.get(get_pattern_key(list(alphas), name), config.lora_alpha)
    scaling = alpha / rank**0.5 if config.use_rslora else alpha / rank
    if not (rank > 0 and math.isfinite(scaling)):
        raise ValueError(f"{alpha} / {rank}")
    return scaling


def write_updates(folder: Path, like: LoraConfig, updates: Mapping[str, LowRankDelta]) -> int:
    """Writes updates as a plain LoRA folder with scaling 1; returns its rank, the largest of any matrix.

    Args:
        like: says on which modules, and of which base model.
    """
    rank = max(1, *(update.rank for update in updates.values()))
    state = {}
    for module, update in updates.items():
        lora_a, lora_b = update.to_lora(rank)
        state |= {module + _A: lora_a.contiguous(), module + _B: lora_b.contiguous()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    config = plain_config(like, rank)
    config.inference_mode, config.task_type = True, like.task_type
    config.base_model_name_or_path = like.base_model_name_or_path
    config.save_pretrained(str(folder))
    return rank


def plain_config(config: Any, rank: int) -> LoraConfig:
    """Returns the configuration of a plain LoRA on the same modules: one rank, scaling 1, usual initialisation."""
    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        lora_dropout=0.0,
        target_modules=config.target_modules,
        exclude_modules=config.exclude_modules,
        layers_to_transform=config.layers_to_transform,
        layers_pattern=config.layers_pattern,
        fan_in_fan_out=config.fan_in_fan_out,
    )
