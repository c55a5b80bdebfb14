"""Rows -> model inputs. The one place where training and evaluation meet the processor, so both see the same pixels.

A training batch holds what the model's forward takes (`input_ids`, `attention_mask`, `pixel_values`, ..., `labels`),
with labels only on the assistant's tokens and their end token. Rows may carry *companions* (`{"inquiry": [row, ...]}`):
further rows that methods attach; they are collated apart and travel in the same batch under `batch["companions"]`.

What people write stays text: a `<image>` or `</s>` inside a message is broken by a word joiner (U+2060) before it meets
the tokenizer, in training and in evaluation alike, so it cannot stand for an image or end a turn. (The
`sanitize_control_tokens` of transformers cannot be combined with the mask of the assistant's tokens.)
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import ProcessorMixin

from mllm_cl.data.images import load_image
from mllm_cl.data.rows import Row, inquiry_of
from mllm_cl.errors import DataError

IGNORED = -100
COMPANIONS = "companions"
JOINER = "\u2060"  # word joiner: no width, no meaning


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
        self._control = control_tokens(processor)

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        batch = self.inputs(rows)
        companions: dict[str, list[Row]] = {}
        for row in rows:
            for kind, others in row.get(COMPANIONS, {}).items():
                companions.setdefault(kind, []).extend(others)
        if companions:
            batch[COMPANIONS] = {kind: self._companion(others) for kind, others in companions.items()}
        return batch

    def with_rows(self, rows: Sequence[Row]) -> tuple[Sequence[Row], dict[str, Any]]:
        """Returns the rows beside what they become, for loaders whose user needs both."""
        return rows, self(rows)

    def inputs(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Returns the model inputs of these rows, companions left out."""
        settings: dict[str, Any] = {
            "padding": True,
            "padding_side": "left" if self.for_generation else "right",
            "add_special_tokens": False,
        }
        batch: Any = self.processor.apply_chat_template(
            [self._conversation(row) for row in rows],
            tokenize=True,
            return_dict=True,
            return_tensors=None,  # the mask of the assistant is made token by token, which is slow over tensors
            add_generation_prompt=self.for_generation,
            return_assistant_tokens_mask=not self.for_generation,
            processor_kwargs=settings,
        )
        inputs = dict(batch.convert_to_tensors("pt"))
        if not self.for_generation:
            inputs["labels"] = self._labels(rows, inputs)
        self._check_length(rows, inputs["attention_mask"])
        return inputs

    def _labels(self, rows: Sequence[Row], inputs: dict[str, Any]) -> Tensor:
        mask = inputs.pop("assistant_masks").bool()
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

    def _block(self, block: Mapping[str, Any], images: Iterator[Any], row: Row) -> dict[str, Any]:
        if block["type"] == "text":
            return {**block, "text": self._control.sub(_broken, block["text"])}
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


def control_tokens(processor: ProcessorMixin) -> re.Pattern[str]:
    """Returns what matches every token that steers the model: special ones, and added ones that the template writes."""
    template = str(processor.chat_template)
    tokens = [
        token.content
        for token in processor.tokenizer.added_tokens_decoder.values()
        if len(token.content.strip()) > 1 and (token.special or token.content in template)
    ]
    longest_first = sorted(set(tokens), key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")  # (?!) matches nothing


def plain_text(decoded: str) -> str:
    """Returns a decoded answer as a person would have written it: without the joiners that `Collator` puts in."""
    return decoded.replace(JOINER, "").strip()


def _broken(match: re.Match[str]) -> str:
    return match[0][0] + JOINER + match[0][1:]
