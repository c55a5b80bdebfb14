"""Checkpoints for vLLM: what it cannot do is refused before anything is loaded, the rest is handed to it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from mllm_cl.data.collate import Collator
from mllm_cl.errors import EvaluationError
from mllm_cl.evaluation.engine import GenerationSettings
from mllm_cl.evaluation.vllm_engine import VllmAnswers, VllmModel, rank_for, sampling, with_large_batches
from mllm_cl.files import folder_sha256
from mllm_cl.models.load import empty_model, processor_of_section, resolve_model
from mllm_cl.models.lora_folders import read_lora_folder
from mllm_cl.models.parts import decoder_name
from mllm_cl.training.checkpoint_loading import Checkpoint, Found, routes
from mllm_cl.training.standalone import Measured

_PREFIX, _FACTOR = "base_model.model.", ".lora_A."
_INSTEAD = "merge it with `mllm-cl export RUN --merge` and measure that folder, or use --model hf."


def check_vllm(checkpoints: Mapping[str, Found]) -> None:
    """Refuses what vLLM cannot answer for; reads settings and adapters, no base weights.

    Raises:
        EvaluationError: vLLM is not installed, or a checkpoint is more than plain LoRA on the language part.
    """
    if importlib.util.find_spec("vllm") is None:
        raise EvaluationError(
            "--model vllm: vLLM is not installed here.",
            fix="install `vllm` (0.14 or later) in an environment with mllm_cl, or use --model hf.",
        )
    for name, found in checkpoints.items():
        if routes(found):
            raise EvaluationError(
                f"{name}: chooses its adapters row by row, which vLLM cannot do.", fix="use --model hf."
            )
        if found.model.quantization is not None:
            raise EvaluationError(
                f"{name}: was trained on a base model in {found.model.quantization}, which vLLM would round differently.",
                fix="use --model hf.",
            )
        if Collator(processor_of_section(found.model), for_generation=True).prefixed:
            raise EvaluationError(
                f"{name}: the processor of {found.model.name_or_path} writes prompts of its own kind.",
                fix="use --model hf.",
            )
        if found.folder is not None:
            rank_for(_rank(name, found))


def prepare_vllm(
    checkpoints: Mapping[str, Found], chosen: Sequence[Measured], settings: GenerationSettings
) -> tuple[GenerationSettings, Callable[[Sequence[Found]], list[Checkpoint]]]:
    """Checks everything that can be checked before vLLM starts; returns its settings and what loads checkpoints.

    Raises:
        EvaluationError: vLLM cannot answer for a checkpoint, or has no such generation setting.
    """
    check_vllm(checkpoints)
    sampling(settings)
    images = max((len(row["images"]) for item in chosen for row in item.rows), default=0)
    return with_large_batches(settings), vllm_loader(images)


def vllm_loader(images: int) -> Callable[[Sequence[Found]], list[Checkpoint]]:
    """Returns what loads checkpoints that share a base model into vLLM.

    Args:
        images: most pictures in any row that will be asked.
    """

    def load(several: Sequence[Found]) -> list[Checkpoint]:
        section = several[0].model
        processor = processor_of_section(section)
        ranks = [_rank(found.label, found) for found in several if found.folder is not None]
        source = resolve_model(section.name_or_path)
        model = VllmModel.load(
            source,
            Collator(processor, for_generation=True),
            images,
            max(ranks, default=None),
            dtype=section.dtype,
            revision=section.revision,
            trust_remote_code=section.trust_remote_code,
        )
        base = (
            f"vllm/{_base_identity(section.name_or_path, section.revision, section.trust_remote_code)}/{section.dtype}"
        )
        loaded = []
        for number, found in enumerate(several, start=1):
            adapter = _adapter(found)
            weights = base if adapter is None else f"{base}/{folder_sha256(adapter)}"
            answers = VllmAnswers(model, adapter, number)
            loaded.append(Checkpoint(found.label, None, processor, weights, lambda task: None, answers=answers))
        return loaded

    return load


def _adapter(found: Found) -> Path | None:
    return found.folder / "adapter" if found.kind == "stage" and found.folder is not None else found.folder


def _rank(name: str, found: Found) -> int:
    """The largest rank in an adapter.

    Raises:
        EvaluationError: it is more than plain LoRA on the language part.
    """
    adapter = _adapter(found)
    assert adapter is not None
    config, state = read_lora_folder(adapter)
    for what, given in (
        ("modules_to_save", config.modules_to_save),
        ("DoRA", config.use_dora),
        (f"bias: {config.bias}", config.bias != "none"),
    ):
        if given:
            raise EvaluationError(f"{name}: has {what}, which vLLM does not load.", fix=_INSTEAD)
    language = decoder_name(empty_model(found.model)) + "."
    modules = [key.removeprefix(_PREFIX).partition(_FACTOR)[0] for key in state if _FACTOR in key]
    other = next((module for module in modules if not module.startswith(language)), None)
    if other is not None:
        raise EvaluationError(
            f"{name}: has LoRA on {other}, outside of the language part; vLLM would leave it out.", fix=_INSTEAD
        )
    return max((value.shape[0] for key, value in state.items() if _FACTOR in key), default=config.r)


def _base_identity(name_or_path: str, revision: str | None, trust_remote_code: bool) -> str:
    """Identifies base weights that we do not load: the files of a folder, or the commit of a Hub id."""
    source = resolve_model(name_or_path)
    if Path(source).is_dir():
        return folder_sha256(Path(source))
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
    return f"{source}@{getattr(config, '_commit_hash', None) or revision or 'main'}"
