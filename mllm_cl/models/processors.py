"""Loads the processor of any model: image-text, image-text without torchvision, or text only.

Processors of models that also read videos need torchvision for the video half alone. Without torchvision that half is left
away; images are processed by Pillow either way.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoProcessor, PreTrainedTokenizerBase, ProcessorMixin
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING, processor_class_from_name
from transformers.utils import PROCESSOR_NAME
from transformers.utils.hub import cached_file
from transformers.utils.import_utils import is_torchvision_available

from mllm_cl.errors import ModelError
from mllm_cl.parse import parse_json


class TextProcessor(ProcessorMixin):
    """A processor around the tokenizer of a model that reads text only, so that nothing else has to know the difference."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None = None, chat_template: Any = None) -> None:
        super().__init__(tokenizer, chat_template=chat_template)

    def _get_num_multimodal_tokens(self, **sizes: Any) -> Any:
        raise ModelError("this model reads text only, but a row has an image.", fix="choose an image-text model.")


def load_processor(source: str, **settings: Any) -> ProcessorMixin:
    """Loads the processor that belongs to a model.

    Args:
        source: a Hub id or a local folder.
        settings: `revision`, `trust_remote_code`.
    """
    if not is_torchvision_available():
        kind = _processor_class(source, **settings)
        if kind is not None and "video_processor" in kind.get_attributes():
            return without_video(kind).from_pretrained(source, **settings)
    processor = AutoProcessor.from_pretrained(source, **settings)
    if isinstance(processor, PreTrainedTokenizerBase):
        return TextProcessor(processor, chat_template=processor.chat_template)
    return processor


def _processor_class(source: str, **settings: Any) -> type[ProcessorMixin] | None:
    """The class of a model's processor: the one that its files name, else the usual one of its kind."""
    file = cached_file(
        source, PROCESSOR_NAME, revision=settings.get("revision"), _raise_exceptions_for_missing_entries=False
    )
    name = parse_json(Path(file).read_text(encoding="utf-8")).get("processor_class") if file is not None else None
    if name is not None:
        return processor_class_from_name(name)
    usual: Any = PROCESSOR_MAPPING.get(type(AutoConfig.from_pretrained(source, **settings)), None)
    return usual


def without_video(kind: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """The processor class without its video half; it is saved under the name of the whole one."""

    class ImageHalf(kind):  # type: ignore[misc,valid-type]
        @classmethod
        def get_attributes(cls) -> list[str]:
            return [name for name in super().get_attributes() if name != "video_processor"]

    ImageHalf.__name__ = ImageHalf.__qualname__ = kind.__name__
    return ImageHalf
