"""QLoRA: the linear layers of the language part in 4 or 8 bits, everything else as it is.

Vision tower and bridge are small and sensitive, and a name that is matched by accident would quantise them silently; so
the layers outside the decoder are listed by their full names, taken from a model without weights, and what was quantised
is checked after loading.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
from typing import Any, Literal

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from mllm_cl.errors import ModelError
from mllm_cl.models.parts import language_linears

logger = logging.getLogger(__name__)

Quantization = Literal["4bit", "8bit"]


def check_bitsandbytes(kind: str) -> None:
    """Refuses quantisation where bitsandbytes is missing, before any weight is read.

    Raises:
        ModelError: it is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            f"model.quantization: {kind} needs bitsandbytes, which is not installed.",
            fix="pip install 'mllm_cl[quantization]', or remove model.quantization.",
        )


def quantization_config(empty: PreTrainedModel, kind: Quantization, dtype: torch.dtype) -> BitsAndBytesConfig:
    """Returns what transformers needs to quantise the language part alone while it loads.

    Args:
        empty: the model without weights (on the meta device).
        kind: `4bit` (nf4, scales quantised again) or `8bit`.
        dtype: dtype of the computations.
    """
    language = set(language_linears(empty))
    kept = [name for name, module in empty.named_modules() if isinstance(module, nn.Linear) and name not in language]
    if kind == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=kept,
    )


def quantised_names(model: nn.Module) -> list[str]:
    """Returns the names of the layers that bitsandbytes holds in 4 or 8 bits."""
    return [name for name, module in model.named_modules() if is_quantised(module)]


def is_quantised(module: nn.Module) -> bool:
    """True for a linear layer in 4 or 8 bits."""
    return type(getattr(module, "weight", None)).__name__ in ("Params4bit", "Int8Params")


def finish_loading(model: PreTrainedModel) -> None:
    """Checks what was quantised, and keeps 4-bit weights in the one layout that everybody can read.

    On processors with AVX512-BF16 bitsandbytes packs 4-bit weights anew at the first forward pass in evaluation. Such a
    layer has no gradient with respect to its input, and reads of its weight by others are silently wrong; both would hit
    the first task, which is trained after stage 0 has been measured. A layer that its kernels misread there is warned about.

    Raises:
        ModelError: a layer outside the language part was quantised, or none at all.
    """
    language, names = set(language_linears(model)), quantised_names(model)
    outside = [name for name in names if name not in language]
    if outside or not names:
        raise ModelError(
            f"model.quantization: {outside[0] + ' is outside the language part' if outside else 'no layer was quantised'}.",
            expected="all linear layers of the language part and no other",
            fix="remove model.quantization for this model.",
        )
    misread = [name for name in names if is_misread(model.get_submodule(name))]
    if misread:
        logger.warning(
            "model.quantization: on this processor bitsandbytes reads the 4-bit weights of %d layers, %s the first, with "
            "scales of other blocks: their width is no multiple of the block size. The model answers worse here than on others.",
            len(misread),
            misread[0],
        )
    for module in model.modules():
        if is_quantised(module) and hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def is_misread(module: Any) -> bool:
    """True for a 4-bit layer with blocks of scales across rows that bitsandbytes reads otherwise than as one row of blocks: its
    kernels for AVX-512 do (0.50)."""
    import bitsandbytes.functional as functional

    state = getattr(module.weight, "quant_state", None)
    if state is None or state.shape[-1] % state.blocksize == 0 or state.shape.numel() % state.blocksize:
        return False
    flat = copy.copy(state)
    flat.shape = torch.Size([state.shape.numel() // state.blocksize, state.blocksize])
    read = [functional.dequantize_4bit(module.weight.data, own).flatten() for own in (flat, state)]
    return not torch.equal(*read)


def dequantised(module: Any) -> torch.Tensor:
    """Returns the weight of a layer in 4 or 8 bits as float32, (out, in): what its forward pass multiplies with.

    A 4-bit weight that bitsandbytes has packed for its CPU kernels is read as such.
    """
    import bitsandbytes.functional as functional

    weight: Any = module.weight
    if type(weight).__name__ == "Int8Params":
        scales = weight.SCB if weight.SCB is not None else module.state.SCB
        return weight.data.float() * scales.float().view(-1, 1) / 127
    state = weight.quant_state
    if getattr(state, "packing_format_for_cpu", False):
        return _read_packed(weight.data, state)
    return functional.dequantize_4bit(weight.data, state).float()


def _read_packed(data: torch.Tensor, state: Any, block: int = 32) -> torch.Tensor:
    """Undoes the packing for AVX512-BF16: `block` rows are interleaved, a byte holds row r (low half) and the columns in
    pairs; scales lie as (in / blocksize, out).

    Args:
        data: (out, in / 2) uint8.
        state: its quantisation state.
    """
    out, columns = state.shape
    rows = data.reshape(-1, block)  # one row per block of rows and pair of columns: 32 bytes, two codes each
    codes = torch.cat([rows & 0xF, rows >> 4], dim=-1)  # (out / block * in / 2, 2 * block)
    codes = codes.reshape(out // block, columns // 2, block, 2).transpose(1, 2).reshape(out, columns)
    scales = state.absmax.float().T.repeat_interleave(state.blocksize, dim=1)  # (out, in)
    return state.code.float()[codes.long()] * scales
