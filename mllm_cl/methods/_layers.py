"""Which LoRA layer is where: decoder blocks and kinds of matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from peft import PeftModel
from transformers import PreTrainedModel

from mllm_cl.errors import MethodError
from mllm_cl.models.adapters import lora_layers
from mllm_cl.models.parts import decoder_name


def decoder_blocks(model: PeftModel) -> dict[str, int]:
    """Returns the block number of every LoRA layer inside the language decoder."""
    prefix = decoder_name(cast(PreTrainedModel, model.get_base_model()))
    blocks = {}
    for module, _ in lora_layers(model):
        if module.startswith(f"{prefix}.") or not prefix:
            number = next((part for part in module.removeprefix(f"{prefix}.").split(".") if part.isdigit()), None)
            if number is not None:
                blocks[module] = int(number)
    return blocks


def is_attention(module: str) -> bool:
    """True for the matrices of an attention layer, by their parent's name (`self_attn.q_proj`)."""
    return any("attn" in part or "attention" in part for part in module.split(".")[-2:-1])


def is_gate_or_up(module: str) -> bool:
    """True for the matrices that open a gated feed-forward layer."""
    return module.rpartition(".")[2] in ("gate_proj", "up_proj", "gate_up_proj")


def train_only(model: PeftModel, method: str, keep: Callable[[str], bool]) -> None:
    """Freezes the LoRA layers that `keep` refuses; their update stays zero.

    Raises:
        MethodError: nothing would be left to train.
    """
    kept = 0
    for module, layer in lora_layers(model):
        if keep(module):
            kept += any(parameter.requires_grad for parameter in layer.parameters())  # type: ignore[attr-defined]
        else:
            layer.requires_grad_(False)  # type: ignore[attr-defined]
    if not kept:
        names = sorted({module.rpartition(".")[2] for module, _ in lora_layers(model)})
        raise MethodError(
            f"methods.{method}: none of the LoRA layers is of the kind that it trains (there are {', '.join(names)}).",
            fix="widen model.lora.target_modules, or remove the method.",
        )
