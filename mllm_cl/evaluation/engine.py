"""Batched greedy generation: rows in, answers out.

Rows are sorted by their total number of tokens (images count with what they expand to), padded on the left, and generated in
batches; a batch that does not fit into memory is halved. The plan of batches depends on the rows and the batch size alone, so an
interrupted evaluation continues with the same batches and the same answers, and several processes share the same plan.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, ProcessorMixin

from mllm_cl.data.collate import Collator
from mllm_cl.data.images import open_image
from mllm_cl.data.rows import Row, inquiry_of, message_text
from mllm_cl.errors import EvaluationError
from mllm_cl.models.adapters import weighted

logger = logging.getLogger(__name__)

FIRST_BATCH_SIZE = 64
_ROWS_WORTH_A_WORKER = 512

Route = Callable[[Sequence[Row]], list[dict[str, float]] | None]


@dataclass(frozen=True)
class GenerationSettings:
    """How answers are generated.

    Args:
        max_new_tokens: longest answer.
        batch_size: rows per batch; `auto` starts at 64 and halves when memory runs out.
        num_workers: processes that decode images; `auto` uses none for few rows.
    """

    max_new_tokens: int = 16
    batch_size: int | str = "auto"
    num_workers: int | str = "auto"

    @property
    def rows_per_batch(self) -> int:
        """The planned batch size."""
        return FIRST_BATCH_SIZE if self.batch_size == "auto" else int(self.batch_size)

    def workers(self, rows: int) -> int:
        """The number of decoding processes for so many rows."""
        if self.num_workers != "auto":
            return int(self.num_workers)
        return 0 if rows < _ROWS_WORTH_A_WORKER else min(4, max(0, (os.cpu_count() or 1) - 1))


def token_counts(processor: ProcessorMixin, rows: Sequence[Row]) -> list[int]:
    """Returns the number of tokens of each inquiry, images included; no pixel is decoded."""
    texts = [" ".join(message_text(message) for message in inquiry_of(row)["messages"]) for row in rows]
    counts = [len(ids) for ids in processor.tokenizer(texts, add_special_tokens=False)["input_ids"]]
    per_size: dict[tuple[int, int], int] = {}
    for index, row in enumerate(rows):
        for reference in row["images"]:
            width, height = open_image(reference).size
            if (height, width) not in per_size:
                sizes = processor._get_num_multimodal_tokens(image_sizes=[[height, width]])
                per_size[height, width] = sizes.num_image_tokens[0]
            counts[index] += per_size[height, width]
    return counts


def plan_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Returns the batches as row indices, longest rows first (so memory runs out at once or never)."""
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def generate_batches(
    model: PreTrainedModel | PeftModel,
    processor: ProcessorMixin,
    rows: Sequence[Row],
    batches: Sequence[list[int]],
    settings: GenerationSettings,
    route: Route | None = None,
) -> Iterator[tuple[list[int], list[str]]]:
    """Yields `(row indices, answers)` batch by batch.

    Raises:
        EvaluationError: a single row does not fit into memory.
    """
    collator = Collator(processor, for_generation=True)
    loader = DataLoader(
        [[rows[index] for index in batch] for batch in batches],  # type: ignore[arg-type]
        batch_size=None,
        collate_fn=lambda chosen: (chosen, collator(chosen)),
        num_workers=settings.workers(sum(map(len, batches))),
    )
    was_training = model.training
    model.eval()
    try:
        for batch, (chosen, inputs) in zip(batches, loader):
            yield batch, _answer(model, collator, chosen, inputs, settings.max_new_tokens, route)
    finally:
        model.train(was_training)


def generate(
    model: PreTrainedModel | PeftModel,
    processor: ProcessorMixin,
    rows: Sequence[Row],
    settings: GenerationSettings,
    route: Route | None = None,
) -> list[str]:
    """Returns the greedy answer to every row, in the order of the rows."""
    answers = [""] * len(rows)
    if not len(rows):
        return answers
    batches = plan_batches(token_counts(processor, rows), settings.rows_per_batch)
    for batch, texts in generate_batches(model, processor, rows, batches, settings, route):
        for index, text in zip(batch, texts):
            answers[index] = text
    return answers


def _answer(
    model: nn.Module,
    collator: Collator,
    rows: list[Row],
    inputs: dict[str, Any],
    max_new_tokens: int,
    route: Route | None,
) -> list[str]:
    try:
        return _routed(model, collator, rows, inputs, max_new_tokens, route)
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        if len(rows) == 1:
            raise EvaluationError(
                f"row {rows[0]['id']}: one row alone does not fit into memory ({inputs['input_ids'].shape[1]} tokens).",
                fix="use smaller images, fewer new tokens, a smaller dtype or a larger device.",
            ) from error
    logger.warning("out of memory with %d rows per batch; halving", len(rows))
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    half = (len(rows) + 1) // 2
    parts = [rows[:half], rows[half:]]
    return [
        answer
        for part in parts
        for answer in _answer(model, collator, part, collator(part), max_new_tokens, route)
    ]


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error).lower()
    return "out of memory" in text or "can't allocate memory" in text or "not enough memory" in text


def _routed(
    model: nn.Module,
    collator: Collator,
    rows: list[Row],
    inputs: dict[str, Any],
    max_new_tokens: int,
    route: Route | None,
) -> list[str]:
    """Generates with every row's own adapters: rows that share a route share a forward pass."""
    choices = route(rows) if route is not None else None
    if choices is None:
        return _greedy(model, collator.processor, inputs, max_new_tokens)
    groups: dict[tuple[tuple[str, float], ...], list[int]] = {}
    for index, choice in enumerate(choices):
        groups.setdefault(tuple(sorted(choice.items())), []).append(index)
    answers = [""] * len(rows)
    for weights, members in groups.items():
        own = inputs if len(members) == len(rows) else collator([rows[index] for index in members])
        with weighted(model, dict(weights)):  # type: ignore[arg-type]
            texts = _greedy(model, collator.processor, own, max_new_tokens)
        for index, text in zip(members, texts):
            answers[index] = text
    return answers


@torch.no_grad()
def _greedy(model: Any, processor: ProcessorMixin, inputs: dict[str, Any], max_new_tokens: int) -> list[str]:
    device = next(model.parameters()).device
    inputs = {name: value.to(device) if torch.is_tensor(value) else value for name, value in inputs.items()}
    tokens = model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        pad_token_id=processor.tokenizer.pad_token_id,
    )
    new = tokens[:, inputs["input_ids"].shape[1] :]  # (batch, longest answer)
    return [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]
