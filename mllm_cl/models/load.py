"""Loads a model and its processor, and identifies the base weights."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin
from transformers.utils import logging as transformers_logging

from mllm_cl.errors import ModelError
from mllm_cl.models.tiny import TINY_LLAVA, tiny_llava_folder

if TYPE_CHECKING:
    from mllm_cl.recipe import ModelSection

_HASHED_WHOLE = 2**20


def resolve_model(name_or_path: str) -> str:
    """Returns what transformers should load: the folder of the built-in model, or the name as it was given."""
    return str(tiny_llava_folder()) if name_or_path == TINY_LLAVA else name_or_path


def load_model(
    name_or_path: str = TINY_LLAVA,
    *,
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Loads an image-text model and its processor.

    Args:
        name_or_path (`str`, defaults to `"tiny-llava"`): the built-in model, a Hub id or a local folder.
        dtype (`str`): dtype of the weights; `auto` is what the checkpoint says.
        revision (`str`, *optional*): branch, tag or commit on the Hub.
        trust_remote_code (`bool`): execute code that comes with the checkpoint.

    Raises:
        ModelError: nothing usable is there, or the processor has no chat template.
    """
    source = resolve_model(name_or_path)
    settings = {"revision": revision, "trust_remote_code": trust_remote_code}
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        processor = AutoProcessor.from_pretrained(source, **settings)
        model = AutoModelForImageTextToText.from_pretrained(source, dtype=dtype, **settings)
    except (OSError, ValueError, KeyError, ImportError, json.JSONDecodeError) as error:
        raise ModelError(
            f"{name_or_path}: cannot be loaded ({_first_line(error)}).",
            expected="`tiny-llava`, a Hub id of an image-text model, or a folder with config.json, weights, processor",
            fix="check `model.name_or_path` (and the network, for a Hub id).",
        ) from error
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
    check_processor(processor, name_or_path)
    model.name_or_path = name_or_path
    model.eval()
    return model, processor


def load_from_section(section: ModelSection) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Loads what the `model` section of a recipe names."""
    return load_model(
        section.name_or_path,
        dtype=section.dtype,
        revision=section.revision,
        trust_remote_code=section.trust_remote_code,
    )


def check_processor(processor: ProcessorMixin, name: str) -> None:
    """Refuses a processor that cannot say which tokens are the assistant's.

    Raises:
        ModelError: no chat template, or one without `{% generation %}` markers.
    """
    template = getattr(processor, "chat_template", None)
    if not template:
        raise ModelError(
            f"{name}: the processor has no chat template.", fix="save one as chat_template.jinja in the model folder."
        )
    if "{% generation" not in template.replace("{%-", "{%"):
        raise ModelError(
            f"{name}: the chat template has no generation markers, so the assistant's tokens cannot be told apart.",
            expected="{% generation %}...{% endgeneration %} around the assistant's content and its end token",
            fix="add the markers to chat_template.jinja.",
        )


def base_fingerprint(model: nn.Module) -> str:
    """Identifies base weights: names, shapes and every value, adapters left out.

    Values are read after rounding to bfloat16, so a checkpoint loaded in another dtype keeps its fingerprint. Large
    tensors enter with checksums that are computed where they lie (a sum, and a sum that depends on the places), small
    ones whole.
    """
    digest = hashlib.sha256()
    tensors = {
        name.replace(".base_layer.", ".").removeprefix("base_model.model."): tensor
        for name, tensor in model.state_dict().items()
        if ".lora_" not in name
    }
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        values = tensor.detach().flatten().to(torch.bfloat16).view(torch.int16)
        if values.numel() > _HASHED_WHOLE:
            values = torch.cat([_checksums(part) for part in values.split(_HASHED_WHOLE)])
        digest.update(values.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _checksums(values: Tensor) -> Tensor:
    """Two 64-bit sums of up to 2^20 16-bit numbers: (n,) -> (2,); any single change and any swap of two change the
    second."""
    values = values.long()
    places = torch.arange(1, values.numel() + 1, device=values.device)
    return torch.stack([values.sum(), (values * places).sum()])


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__
