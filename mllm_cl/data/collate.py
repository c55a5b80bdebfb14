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

import torch
from PIL.Image import Image
from PIL.Image import new as new_image
from transformers import ProcessorMixin

from mllm_cl.data.conversation import RENDERED, ChatTemplate, Part
from mllm_cl.data.images import fit_image, load_image
from mllm_cl.data.prefix import Conversation, prefix_inputs, takes_suffix
from mllm_cl.data.rows import Row, inquiry_of
from mllm_cl.errors import DataError
from mllm_cl.model_section import InputSettings

IGNORED = -100
COMPANIONS = "companions"
JOINER = "\u2060"  # word joiner: no width, no meaning


class Collator:
    """Turns rows into model inputs with one processor call.

    Args:
        processor (`ProcessorMixin`): tokenizer, image processor and chat template of the model. How images are fitted
            and how long a row may be comes with it (`InputSettings`), so training and evaluation cannot differ.
        for_generation (`bool`, defaults to `False`): render the inquiry with the generation prompt, padded on the left;
            otherwise the whole conversation with labels, padded on the right.
    """

    def __init__(self, processor: ProcessorMixin, *, for_generation: bool = False) -> None:
        self.processor, self.for_generation = processor, for_generation
        self.settings = InputSettings.of(processor)
        self.chat = ChatTemplate(processor)
        self.prefixed = takes_suffix(processor)
        self.background = background(processor)

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

    def prompt(self, row: Row) -> tuple[str, Sequence[Image]]:
        """Returns the rendered inquiry with one placeholder per image, and the fitted images; for engines that expand
        placeholders themselves."""
        messages, images = self._conversation(row)
        return self.chat.prompt(messages, row["id"]), images

    def inputs(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Returns the model inputs of these rows, companions left out.

        Raises:
            DataError: images and image blocks do not match, a row is too long, or the model takes no such row.
        """
        conversations = [self._conversation(row) for row in rows]
        if self.prefixed:
            names = [row["id"] for row in rows]
            inputs = prefix_inputs(self.processor, conversations, names, for_generation=self.for_generation)
        else:
            inputs = self._chat_inputs(conversations, rows)
        if not self.for_generation:
            inputs["labels"][[bool(row.get("ignored")) for row in rows]] = IGNORED
        return self._of_length(rows, inputs)

    def _chat_inputs(self, conversations: Sequence[Conversation], rows: Sequence[Row]) -> dict[str, Any]:
        settings: dict[str, Any] = {
            "padding": True,
            "padding_side": "left" if self.for_generation else "right",
            "add_special_tokens": False,
        }
        batch: Any = self.processor.apply_chat_template(
            [self._rendered(conversation, row) for conversation, row in zip(conversations, rows)],
            chat_template=RENDERED,
            tokenize=True,
            return_dict=True,
            return_tensors=None,  # the mask of the assistant is made token by token, which is slow over tensors
            return_assistant_tokens_mask=not self.for_generation,
            processor_kwargs=settings,
        )
        inputs = dict(batch.convert_to_tensors("pt"))
        if not self.for_generation:
            learnt = inputs.pop("assistant_masks").bool() & inputs["attention_mask"].bool()
            inputs["labels"] = inputs["input_ids"].masked_fill(~learnt, IGNORED)
        return inputs

    def _rendered(self, conversation: Conversation, row: Row) -> list[dict[str, Any]]:
        """The row as the parts of its text, with the decoded images in the first."""
        messages, images = conversation
        parts = (
            [Part(self.chat.prompt(messages, row["id"]), False)]
            if self.for_generation
            else self.chat.parts(messages, row["id"])
        )
        blocks = [{"type": "image", "image": image} for image in images]
        return [
            {"role": "user", "text": part.text, "learnt": part.learnt, "content": [] if number else blocks}
            for number, part in enumerate(parts)
        ]

    def _companion(self, rows: list[Row]) -> dict[str, Any]:
        """Companions keep their tensors (reference targets, one per row) beside their inputs."""
        batch = self.inputs(rows)
        names = rows[0].get("targets", {}).keys()
        batch["targets"] = {name: [row["targets"][name] for row in rows] for name in names}  # type: ignore[typeddict-item]
        return batch

    def _conversation(self, row: Row) -> Conversation:
        """The turns with text that cannot steer the model, and the decoded images that their blocks stand for."""
        references = iter(row["images"])
        images: list[Image] = []
        conversation: list[dict[str, Any]] = []
        for message in (inquiry_of(row) if self.for_generation else row)["messages"]:
            content = message["content"]
            blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
            images += [self._image(references, row) for block in blocks if block["type"] == "image"]
            conversation.append({**message, "content": [self._block(block) for block in blocks]})
        if next(references, None) is not None:
            raise DataError(
                f"row {row['id']}: has more images than image blocks.", fix="run `mllm-cl data validate` on the stream."
            )
        if images and not hasattr(self.processor, "image_processor"):
            raise DataError(
                f"row {row['id']}: has an image, but this model reads text only.",
                fix="choose an image-text model, or remove the images from the rows.",
            )
        return conversation, images

    def _block(self, block: Mapping[str, Any]) -> dict[str, Any]:
        if block["type"] == "text":
            return {**block, "text": self.chat.control.sub(_broken, block["text"])}
        return {"type": "image"} if block["type"] == "image" else dict(block)

    def _image(self, references: Iterator[Any], row: Row) -> Image:
        reference = next(references, None)
        if reference is None:
            raise DataError(
                f"row {row['id']}: has more image blocks than images.", fix="run `mllm-cl data validate` on the stream."
            )
        return fit_image(load_image(reference), self.settings.image_mode, self.background)

    def _of_length(self, rows: Sequence[Row], inputs: dict[str, Any]) -> dict[str, Any]:
        """Refuses training rows that are too long, or cuts the end of their text off when the settings say so."""
        limit, mask = self.settings.max_length, inputs["attention_mask"]
        if limit is None or self.for_generation or mask.shape[1] <= limit:
            return inputs
        lengths = mask.sum(dim=1).tolist()
        longest = max(range(len(rows)), key=lengths.__getitem__)
        given = f"row {rows[longest]['id']}: {lengths[longest]} tokens with its images, model.max_length is {limit}"
        if not self.settings.truncate:
            raise DataError(
                f"{given}.",
                fix="raise model.max_length, use smaller images, shorten the row, or set model.truncate: true.",
            )
        cut = inputs["input_ids"][:, limit:]
        images = torch.isin(cut, torch.tensor(image_token_ids(self.processor), dtype=cut.dtype)).any(dim=1).tolist()
        for index, row in enumerate(rows):
            given = f"row {row['id']}: {lengths[index]} tokens; a cut at model.max_length = {limit} would"
            if images[index]:
                raise DataError(
                    f"{given} go through its images.",
                    expected="all image tokens among the first tokens that are kept",
                    fix=f"set model.max_length to at least {lengths[index]}, or use fewer or smaller images.",
                )
            if not row.get("ignored") and not (inputs["labels"][index, :limit] != IGNORED).any():
                raise DataError(
                    f"{given} leave nothing of its answer.",
                    fix=f"set model.max_length to at least {lengths[index]}, or shorten the question.",
                )
        whole = tuple(mask.shape)  # (rows, length)
        return {
            name: value[:, :limit] if tuple(value.shape[:2]) == whole and not value.is_floating_point() else value
            for name, value in inputs.items()
        }


def image_token_ids(processor: ProcessorMixin) -> list[int]:
    """Returns the ids of the tokens that stand for images in a sequence."""
    return [token for token in processor.image_token_ids if token is not None]


def image_tokens(processor: ProcessorMixin, size: tuple[int, int]) -> int:
    """Returns the number of tokens that an image of this width and height expands to."""
    width, height = size
    if hasattr(processor, "_get_num_multimodal_tokens"):  # most processors know without looking at pixels
        known: Any = processor._get_num_multimodal_tokens(image_sizes=[[height, width]])  # type: ignore[attr-defined]
        return known.num_image_tokens[0]
    blank: Any = new_image("RGB", size)
    inputs: Any = processor(images=[[blank]], text=[processor.image_token], add_special_tokens=False)  # type: ignore[operator,attr-defined]
    return len(inputs["input_ids"][0])


def background(processor: ProcessorMixin) -> tuple[int, int, int]:
    """Returns the colour that becomes zero after normalisation: what padding is filled with; black when unknown."""
    mean = getattr(getattr(processor, "image_processor", None), "image_mean", None) or (0.0, 0.0, 0.0)
    red, green, blue = (int(255 * value) for value in mean)
    return red, green, blue


def plain_text(decoded: str) -> str:
    """Returns a decoded answer as a person would have written it: without the joiners that `Collator` puts in."""
    return decoded.replace(JOINER, "").strip()


def _broken(match: re.Match[str]) -> str:
    return match[0][0] + JOINER + match[0][1:]
