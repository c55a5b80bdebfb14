"""Merges an adapter into its base model: a full model that needs neither PEFT nor this package."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllm_cl.errors import ModelError
from mllm_cl.files import new_folder
from mllm_cl.model_section import ModelSection
from mllm_cl.models.adapters import DEFAULT, load_adapter, lora_layers
from mllm_cl.models.load import load_from_section
from mllm_cl.models.lora_folders import CONFIG


@dataclass(frozen=True)
class Merged:
    """What was written: dtype of the weights, matrices that the adapter changed."""

    dtype: str
    matrices: int


def write_merged(section: ModelSection, adapter: Path, out: Path, *, dtype: str | None = None) -> Merged:
    """Writes base + adapter as one model folder with its processor: config, safetensors, tokenizer, chat template.

    W + B A · scale is rounded to the dtype of the base: in float32 the answers are those of base + adapter, in bfloat16
    nearly. A base that the recipe quantises is loaded unquantised, since quantised weights cannot hold the sum.

    Args:
        section: which base model, and how.
        adapter: a plain LoRA folder.
        dtype: dtype of the result; that of `section` when not given.

    Raises:
        ModelError: several adapters that a router chooses from, no LoRA folder, or another base model's.
    """
    if not (adapter / CONFIG).is_file() and any(adapter.glob(f"*/{CONFIG}")):
        raise ModelError(
            f"{adapter}: holds one adapter per task, and a router chooses among them for every row.",
            expected="one adapter",
            fix=f"merge one of them, {adapter}/TASK, for a server that answers one task.",
        )
    changes: dict[str, Any] = {"quantization": None} | ({} if dtype is None else {"dtype": dtype})
    model, processor = load_from_section(ModelSection.model_validate(section.model_dump() | changes))
    weights = next(model.parameters()).dtype
    peft = load_adapter(model, adapter, DEFAULT)
    matrices = sum(1 for _ in lora_layers(peft))
    try:
        plain = peft.merge_and_unload(safe_merge=True, adapter_names=[DEFAULT])  # type: ignore[operator]
    except ValueError as error:
        raise ModelError(f"{adapter}: cannot be merged ({error}).", fix="use the adapter beside its base.") from error
    with new_folder(out) as place:
        plain.save_pretrained(str(place))
        processor.save_pretrained(str(place))
    return Merged(str(weights).removeprefix("torch."), matrices)
