"""Model inputs of prefix-suffix models: the question is a prefix that is read in both directions, the answer a suffix.

Such models have no chat template. Their processors say that they are such by taking `suffix`, and mark the answer
themselves.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import ProcessorMixin

from mllm_cl.errors import DataError

Conversation = tuple[Sequence[Mapping[str, Any]], Sequence[Any]]


def takes_suffix(processor: ProcessorMixin) -> bool:
    """True if the processor wants prefix and suffix instead of a conversation."""
    return "suffix" in inspect.signature(type(processor).__call__).parameters


def prefix_inputs(
    processor: ProcessorMixin,
    conversations: Sequence[Conversation],
    names: Sequence[str],
    *,
    for_generation: bool,
) -> dict[str, Any]:
    """Returns the inputs of some rows, with `labels` on the answers unless they are for generation.

    Args:
        processor: one that takes a suffix.
        conversations: per row its turns and its decoded images; in training one question and one answer.
        names: names of the rows, for errors.

    Raises:
        DataError: a row has several turns, a system turn or no image.
    """
    prefixes, suffixes = [], []
    for (messages, images), name in zip(conversations, names):
        roles = [message["role"] for message in messages]
        if roles not in (["user"], ["user", "assistant"]) or (len(roles) == 1 and not for_generation):
            raise DataError(
                f"row {name}: has the turns {', '.join(roles)}, but this model takes one question and one answer.",
                fix="split conversations into rows of one question each.",
            )
        if not images:
            raise DataError(
                f"row {name}: this model takes no row without an image.", fix="remove the row, or choose another model."
            )
        texts = ["".join(b["text"] for b in message["content"] if b["type"] == "text") for message in messages]
        prefixes.append(str(processor.image_token) * len(images) + texts[0])  # type: ignore[attr-defined]
        suffixes.append(texts[-1])
    call: Any = processor
    batch = call(
        images=[list(images) for _, images in conversations],
        text=prefixes,
        suffix=None if for_generation else suffixes,
        padding=True,
        padding_side="left" if for_generation else "right",
        return_tensors="pt",
    )
    inputs = dict(batch)
    if for_generation:
        inputs.pop("labels", None)
    return inputs
