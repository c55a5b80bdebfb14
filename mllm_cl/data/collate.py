"""Rows -> model inputs. The one place where training and evaluation meet the processor, so both see the same pixels.

A training batch holds what the model's forward takes (`input_ids`, `attention_mask`, `pixel_values`, ..., `labels`), with
labels only on the assistant's tokens and their end token. Rows may carry *companions* (`{"inquiry": [row, ...]}`): further
rows that methods attach; they are collated apart and travel in the same batch under `batch["companions"]`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import ProcessorMixin

from mllm_cl.data.images import load_image
from mllm_cl.data.rows import Row, inquiry_of
from mllm_cl.errors import DataError

IGNORED = -100
COMPANIONS = "companions"


class Collator:
    """Turns rows into model inputs with one processor call.

    Args:
        processor (`ProcessorMixin`): tokenizer, image processor and chat template of the model.
        for_generation (`bool`, defaults to `False`): render the inquiry with the generation prompt, padded on the left;
            otherwise the whole conversation with labels, padded on the right.
        max_length (`int`, *optional*): a longer row is an error (a cut through image tokens would break the model).
    """

    def __init__(
        self, processor: ProcessorMixin, *, for_generation: bool = False, max_length: int | None = None
    ) -> None:
        self.processor, self.for_generation, self.max_length = processor, for_generation, max_length

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        batch = self.inputs(rows)
        companions: dict[str, list[Row]] = {}
        for row in rows:
            for kind, others in row.get(COMPANIONS, {}).items():
                companions.setdefault(kind, []).extend(others)
        if companions:
            batch[COMPANIONS] = {kind: self._companion(others) for kind, others in companions.items()}
        return batch

    def inputs(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Returns the model inputs of these rows, companions left out."""
        conversations = [self._conversation(row) for row in rows]
        settings: dict[str, Any] = {
            "padding": True,
            "padding_side": "left" if self.for_generation else "right",
            "add_special_tokens": False,
        }
        batch = self.processor.apply_chat_template(
            conversations,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=self.for_generation,
            return_assistant_tokens_mask=not self.for_generation,
            processor_kwargs=settings,
        )
        inputs = dict(batch)
        if not self.for_generation:
            inputs["labels"] = self._labels(rows, inputs)
        self._check_length(rows, inputs["attention_mask"])
        return inputs

    def _labels(self, rows: Sequence[Row], inputs: dict[str, Any]) -> Tensor:
        mask = torch.as_tensor(inputs.pop("assistant_masks"), dtype=torch.bool)
        labels = inputs["input_ids"].masked_fill(~(mask & inputs["attention_mask"].bool()), IGNORED)
        for index, row in enumerate(rows):
            if row.get("ignored"):
                labels[index] = IGNORED
        return labels

    def _companion(self, rows: list[Row]) -> dict[str, Any]:
        """Companions keep their tensors (reference targets, one per row) beside their inputs."""
        batch = self.inputs(rows)
        names = rows[0].get("targets", {}).keys()
        batch["targets"] = {name: [row["targets"][name] for row in rows] for name in names}  # type: ignore[typeddict-item]
        return batch

    def _conversation(self, row: Row) -> list[dict[str, Any]]:
        """Puts decoded images into the blocks that stand for them."""
        images = iter(row["images"])
        conversation = []
        for message in (inquiry_of(row) if self.for_generation else row)["messages"]:
            content = message["content"]
            blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
            conversation.append({**message, "content": [self._block(block, images, row) for block in blocks]})
        if next(images, None) is not None:
            raise DataError(
                f"row {row['id']}: has more images than image blocks.", fix="run `mllm-cl data validate` on the stream."
            )
        return conversation

    @staticmethod
    def _block(block: Mapping[str, Any], images: Any, row: Row) -> dict[str, Any]:
        if block["type"] != "image":
            return dict(block)
        reference = next(images, None)
        if reference is None:
            raise DataError(
                f"row {row['id']}: has more image blocks than images.", fix="run `mllm-cl data validate` on the stream."
            )
        return {"type": "image", "image": load_image(reference)}

    def _check_length(self, rows: Sequence[Row], attention_mask: Tensor) -> None:
        if self.max_length is None or attention_mask.shape[1] <= self.max_length:
            return
        lengths = attention_mask.sum(dim=1).tolist()
        longest = max(range(len(rows)), key=lengths.__getitem__)
        raise DataError(
            f"row {rows[longest]['id']}: {lengths[longest]} tokens with its images, the model takes {self.max_length}.",
            fix="shorten the row, use smaller images, or raise the limit.",
        )
