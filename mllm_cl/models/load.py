"""Loads a model and its processor, and identifies the base weights."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.utils import logging as transformers_logging

from mllm_cl.errors import ModelError
from mllm_cl.model_section import InputSettings
from mllm_cl.models.processors import TextProcessor, load_processor
from mllm_cl.models.prompts import apply_profile
from mllm_cl.models.quantize import Quantization, check_bitsandbytes, finish_loading, quantization_config
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
    quantization: Quantization | None = None,
    prompt_profile: str | None = None,
    inputs: InputSettings | None = None,
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Loads an image-text model, or a text-only one, and its processor.

    Args:
        name_or_path (`str`, defaults to `"tiny-llava"`): the built-in model, a Hub id or a local folder.
        dtype (`str`): dtype of the weights; `auto` is what the checkpoint says.
        revision (`str`, *optional*): branch, tag or commit on the Hub.
        trust_remote_code (`bool`): execute code that comes with the checkpoint.
        quantization (`str`, *optional*): `4bit` or `8bit` for the language part.
        prompt_profile (`str`, *optional*): `llava_v1`; the model's own chat template when not given.
        inputs (`InputSettings`, *optional*): image mode and longest row, carried by the processor.

    Raises:
        ModelError: nothing usable is there, or the processor has no chat template.
    """
    if quantization is not None:
        check_bitsandbytes(quantization)
    source, settings = resolve_model(name_or_path), _settings(revision, trust_remote_code)
    with _explained(name_or_path):
        check_architecture(AutoConfig.from_pretrained(source, **settings), name_or_path)
        processor = load_processor(source, **settings)
        kind, given = _model_class(source, processor, **settings), dict(settings)
        if quantization is not None:
            given["quantization_config"] = _quantization_config(kind, source, quantization, dtype, settings)
        model = kind.from_pretrained(source, dtype=dtype, **given)
    processor = _prepared(processor, name_or_path, prompt_profile, inputs)
    if quantization is not None:
        finish_loading(model)
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
        quantization=section.quantization,
        prompt_profile=section.prompt_profile,
        inputs=section.inputs,
    )


def config_of_section(section: ModelSection) -> PretrainedConfig:
    """Returns the configuration of a recipe's model; no weights are read.

    Raises:
        ModelError: there is none.
    """
    with _explained(section.name_or_path):
        return AutoConfig.from_pretrained(
            resolve_model(section.name_or_path), **_settings(section.revision, section.trust_remote_code)
        )


def empty_model(section: ModelSection) -> PreTrainedModel:
    """Returns the model of a recipe without weights (on the meta device): its architecture, at the price of nothing.

    Raises:
        ModelError: there is no usable configuration.
    """
    source, settings = resolve_model(section.name_or_path), _settings(section.revision, section.trust_remote_code)
    with _explained(section.name_or_path):
        config = AutoConfig.from_pretrained(source, **settings)
        check_architecture(config, section.name_or_path)
        kind = _model_class(source, load_processor(source, **settings), **settings)
        dtype = (config.dtype or torch.float32) if section.dtype == "auto" else getattr(torch, section.dtype)
        with torch.device("meta"):
            return kind.from_config(config, dtype=dtype, trust_remote_code=section.trust_remote_code)


def processor_of_section(section: ModelSection) -> ProcessorMixin:
    """Returns the processor of a recipe, without its model.

    Raises:
        ModelError: there is none, or it cannot be used.
    """
    settings = _settings(section.revision, section.trust_remote_code)
    with _explained(section.name_or_path):
        processor = load_processor(resolve_model(section.name_or_path), **settings)
    return _prepared(processor, section.name_or_path, section.prompt_profile, section.inputs)


def _settings(revision: str | None, trust_remote_code: bool) -> dict[str, Any]:
    return {"revision": revision, "trust_remote_code": trust_remote_code}


def _prepared(
    processor: ProcessorMixin, name: str, prompt_profile: str | None, inputs: InputSettings | None
) -> ProcessorMixin:
    if prompt_profile is not None:
        apply_profile(processor, prompt_profile)
    check_processor(processor, name)
    (inputs or InputSettings()).attach_to(processor)
    return processor


@contextlib.contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turns what transformers raises into one clear message, and keeps its progress bars away."""
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, json.JSONDecodeError) as error:
        raise ModelError(
            f"{name}: cannot be loaded ({_first_line(error)}).",
            expected="`tiny-llava`, a Hub id of an image-text model, or a folder with config.json, weights, processor",
            fix="check `model.name_or_path` (and the network, for a Hub id).",
        ) from error
    finally:
        if bars:
            transformers_logging.enable_progress_bar()


def _model_class(source: str, processor: ProcessorMixin, **settings: Any) -> Any:
    """The auto class of a model: image-text, or causal for a text-only one."""
    if isinstance(processor, TextProcessor):
        config = AutoConfig.from_pretrained(source, **settings)
        if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
            return AutoModelForCausalLM
    return AutoModelForImageTextToText


def _quantization_config(
    kind: Any, source: str, quantization: Quantization, dtype: str, settings: dict[str, Any]
) -> BitsAndBytesConfig:
    """What to quantise, from the architecture alone; computations are in bfloat16 unless the recipe says otherwise."""
    config = AutoConfig.from_pretrained(source, **settings)
    with torch.device("meta"):
        empty = kind.from_config(config, trust_remote_code=settings["trust_remote_code"])
    return quantization_config(empty, quantization, torch.bfloat16 if dtype == "auto" else getattr(torch, dtype))


def check_architecture(config: PretrainedConfig, name: str) -> None:
    """Refuses a model that does not write its answer behind the question: its labels would mean something else.

    Raises:
        ModelError: question and answer go into an encoder and a decoder of their own.
    """
    if config.is_encoder_decoder or getattr(config.get_text_config(), "is_encoder_decoder", False):
        raise ModelError(
            f"{name}: {config.model_type} has an encoder for the question and a decoder for the answer.",
            expected="a model whose decoder reads images, question and answer as one sequence",
            fix="choose another model.",
        )


def check_processor(processor: ProcessorMixin, name: str) -> None:
    """Refuses a processor that cannot write a conversation, or batches of them.

    Raises:
        ModelError: no chat template, or no padding token.
    """
    if not processor.chat_template and "suffix" not in inspect.signature(type(processor).__call__).parameters:
        raise ModelError(
            f"{name}: the processor has no chat template.",
            fix="save one as chat_template.jinja in the model folder, or set `model.prompt_profile`.",
        )
    tokenizer: Any = processor.tokenizer  # type: ignore[attr-defined]
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ModelError(f"{name}: the tokenizer has neither a padding nor an end token.", fix="give it one.")
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked, so which token it is does not matter


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
