"""Batched greedy generation: rows in, answers out.

Rows are sorted by their total number of tokens (images count with what they expand to) with the questions on one image
side by side, padded on the left, and generated in batches; a batch that does not fit into memory is halved, and so are the
later ones. The plan of batches depends on the rows and the batch size alone, so an interrupted evaluation continues with
the same batches and the same answers, and several processes share the same plan.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import GenerationConfig, PreTrainedModel, ProcessorMixin

from mllm_cl.data.collate import Collator, image_tokens, plain_text
from mllm_cl.data.images import fitted_size, open_image
from mllm_cl.data.rows import Row, inquiry_of, message_text
from mllm_cl.errors import EvaluationError
from mllm_cl.evaluation.prepared import Prepared
from mllm_cl.evaluation.resampling import cluster_of
from mllm_cl.evaluation.shared_prefix import SharedPrefix
from mllm_cl.evaluation.vision_features import VisionFeatures
from mllm_cl.model_section import InputSettings
from mllm_cl.models.adapters import weighted
from mllm_cl.models.soft_prompts import with_prompts

logger = logging.getLogger(__name__)

FIRST_BATCH_SIZE = 64
_ROWS_WORTH_A_WORKER = 512
_ALIKE = 1.06  # rows of one image stay together while their lengths differ by no more than that

Route = Callable[[Sequence[Row]], list[dict[str, float]] | None]
Option = bool | int | float | str | tuple[str, ...]


@dataclass(frozen=True)
class GenerationSettings:
    """How answers are generated.

    Args:
        max_new_tokens: longest answer.
        batch_size: rows per batch; `auto` starts at 64 and halves when memory runs out.
        num_workers: processes that decode images; `auto` uses none for few rows.
        options: further fields of `GenerationConfig` by name, such as `("num_beams", 5)`; greedy without any.
        seed: of sampling, when the options ask for it.
        keep_going: a row that cannot be answered becomes a `Failed` instead of ending the evaluation.
    """

    max_new_tokens: int = 16
    batch_size: int | str = "auto"
    num_workers: int | str = "auto"
    options: tuple[tuple[str, Option], ...] = ()
    seed: int = 0
    keep_going: bool = False

    @property
    def rows_per_batch(self) -> int:
        """The planned batch size."""
        return FIRST_BATCH_SIZE if self.batch_size == "auto" else int(self.batch_size)

    def workers(self, rows: int) -> int:
        """The number of decoding processes for so many rows."""
        if self.num_workers != "auto":
            return int(self.num_workers)
        return 0 if rows < _ROWS_WORTH_A_WORKER else min(4, max(0, (os.cpu_count() or 1) - 1))


@dataclass(frozen=True)
class Failed:
    """Stands in the place of an answer that could not be generated."""

    error: str


def token_counts(processor: ProcessorMixin, rows: Sequence[Row]) -> list[int]:
    """Returns the number of tokens of each inquiry, images included; no pixel is decoded."""
    texts = [" ".join(message_text(message) for message in inquiry_of(row)["messages"]) for row in rows]
    counts = [len(ids) for ids in processor.tokenizer(texts, add_special_tokens=False)["input_ids"]]
    per_size: dict[tuple[int, int], int] = {}
    mode = InputSettings.of(processor).image_mode
    for index, row in enumerate(rows):
        for reference in row["images"]:
            size = fitted_size(open_image(reference).size, mode)
            if size not in per_size:
                per_size[size] = image_tokens(processor, size)
            counts[index] += per_size[size]
    return counts


def image_groups(rows: Sequence[Row]) -> list[int]:
    """Returns a number for each row; rows have the same number if they name the same images.

    Images that are objects in memory have no name that holds for another process, so their rows stand alone.
    """
    groups: dict[str, int] = {}
    numbers = []
    for index, row in enumerate(rows):
        named = row["images"] and all(isinstance(image, (str, os.PathLike, Mapping)) for image in row["images"])
        numbers.append(groups.setdefault(cluster_of(row), index) if named else index)
    return numbers


def plan_batches(lengths: Sequence[int], batch_size: int, groups: Sequence[int] | None = None) -> list[list[int]]:
    """Returns the batches as row indices, longest rows first (so memory runs out at once or never).

    Args:
        lengths: number of tokens of each row.
        groups: see `image_groups`; among rows of about the same length, those of a group follow each other.
    """
    if groups is None:
        order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    else:
        steps = [int(math.log(max(1, length), _ALIKE)) for length in lengths]
        order = sorted(range(len(lengths)), key=lambda index: (-steps[index], groups[index], -lengths[index], index))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def planned(processor: ProcessorMixin, rows: Sequence[Row], settings: GenerationSettings) -> list[list[int]]:
    """Returns the batches of these rows; the same in every process and after every interruption."""
    return plan_batches(token_counts(processor, rows), settings.rows_per_batch, image_groups(rows))


def generate_batches(
    model: PreTrainedModel | PeftModel,
    processor: ProcessorMixin,
    rows: Sequence[Row],
    batches: Sequence[list[int]],
    settings: GenerationSettings,
    route: Route | None = None,
    engine_type: type[Engine] | None = None,
    prepared: Prepared | None = None,
) -> Iterator[tuple[list[int], Sequence[str | Failed]]]:
    """Yields `(row indices, answers)` batch by batch.

    Args:
        engine_type: what answers; the greedy engine by default.
        prepared: inputs and features that other checkpoints of this model left for these rows; what is new is added.

    Raises:
        EvaluationError: a single row does not fit into memory.
    """
    engine = (engine_type or Engine)(model, Collator(processor, for_generation=True), settings, route)
    asked = image_groups([rows[index] for batch in batches for index in batch])
    if prepared is not None:
        engine.features = prepared.features
    elif len(set(asked)) < len(asked):  # else nothing would be used twice
        engine.features = VisionFeatures(model)
    missing = [batch for batch in batches if prepared is None or prepared.get(batch) is None]
    workers = settings.workers(sum(map(len, missing)))
    loader = DataLoader(
        [[rows[index] for index in batch] for batch in missing],  # type: ignore[arg-type]
        batch_size=None,
        collate_fn=engine.collator.with_rows,
        num_workers=workers,
        worker_init_fn=_quiet_tokenizers if workers else None,
    )
    was_training = model.training
    model.eval()
    try:
        loaded = iter(loader)
        for batch in batches:
            try:
                inputs = None if prepared is None else prepared.get(batch)
                if inputs is None:
                    _, inputs = next(loaded)
                    if prepared is not None:
                        prepared.keep(batch, inputs)
                answers: Sequence[str | Failed] = engine.answer([rows[index] for index in batch], inputs)
            except Exception as error:
                if not settings.keep_going:
                    raise
                logger.warning("a batch of %d rows failed (%s); trying its rows one by one", len(batch), error)
                answers = engine.one_by_one([rows[index] for index in batch])
            yield batch, answers
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
    batches = planned(processor, rows, settings)
    for batch, texts in generate_batches(model, processor, rows, batches, replace(settings, keep_going=False), route):
        for index, text in zip(batch, texts):
            answers[index] = str(text)
    return answers


def route_groups(rows: Sequence[Row], route: Route | None) -> list[tuple[list[int], dict[str, float] | None]]:
    """Returns which rows share which adapter weights; `None` means the adapters that are active."""
    choices = route(rows) if route is not None else None
    if choices is None:
        return [(list(range(len(rows))), None)]
    groups: dict[tuple[tuple[str, float], ...], list[int]] = {}
    for index, choice in enumerate(choices):
        groups.setdefault(tuple(sorted(choice.items())), []).append(index)
    return [(members, dict(weights)) for weights, members in groups.items()]


class Engine:
    """Answers batches; `limit` is the most rows that have not run out of memory so far."""

    features: VisionFeatures | None = None

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        collator: Collator,
        settings: GenerationSettings,
        route: Route | None,
    ) -> None:
        self.model: Any = model
        self.seed = settings.seed
        self.collator, self.route = collator, route
        self.limit = sys.maxsize
        self.device = next(model.parameters()).device
        base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        tokenizer = collator.processor.tokenizer
        end = base.generation_config.eos_token_id if base.generation_config is not None else None
        fields: dict[str, Any] = {
            "max_new_tokens": settings.max_new_tokens,
            "do_sample": False,
            "num_beams": 1,
            "use_cache": True,
            "eos_token_id": tokenizer.eos_token_id if end is None else end,
            "pad_token_id": tokenizer.pad_token_id,
            # the neutral values: what a checkpoint says about sampling does not hold here, and would be warned about
            "temperature": 1.0,
            "top_p": 1.0,
            "top_k": 50,
        }
        self.config = GenerationConfig(**{**fields, **dict(settings.options)})
        stops = self.config.stop_strings
        self.stop_strings = (stops,) if isinstance(stops, str) else tuple(stops or ())
        self.prefixes = SharedPrefix(model, collator, self.config)

    def answer(self, rows: list[Row], inputs: dict[str, Any]) -> list[str]:
        if len(rows) <= self.limit:
            try:
                return self._routed(rows, inputs)
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not _is_out_of_memory(error):
                    raise
                if len(rows) == 1:
                    length = inputs["input_ids"].shape[1]
                    raise EvaluationError(
                        f"row {rows[0]['id']}: one row alone does not fit into memory ({length} tokens).",
                        fix="use smaller images, fewer new tokens, a smaller dtype or a larger device.",
                    ) from error
            self.limit = (len(rows) + 1) // 2
            logger.warning("out of memory with %d rows per batch; going on with %d", len(rows), self.limit)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        parts = [rows[start : start + self.limit] for start in range(0, len(rows), self.limit)]
        return [text for part in parts for text in self.answer(part, self.collator(part))]

    def one_by_one(self, rows: list[Row]) -> list[str | Failed]:
        """Answers what can be answered of a batch that failed, and names what cannot."""
        answers: list[str | Failed] = []
        for row in rows:
            try:
                answers += self.answer([row], self.collator([row]))
            except Exception as error:  # a row that fails is counted and named; the caller decides what that means
                answers.append(Failed(f"{type(error).__name__}: {error}"))
        return answers

    def _routed(self, rows: list[Row], inputs: dict[str, Any]) -> list[str]:
        """Generates with every row's own adapters: rows that share a route share a forward pass."""
        answers = [""] * len(rows)
        for members, weights in route_groups(rows, self.route):
            own = inputs if len(members) == len(rows) else self.collator([rows[index] for index in members])
            kept = contextlib.nullcontext() if self.features is None else self.features.used()
            with contextlib.nullcontext() if weights is None else weighted(self.model, weights), kept:
                texts = self.reply([rows[index] for index in members], own)
            for index, text in zip(members, texts):
                answers[index] = text
        return answers

    def reply(self, rows: Sequence[Row], inputs: dict[str, Any]) -> list[str]:
        """Returns the answers to rows that share their adapters."""
        return self._generated(rows, inputs)

    def on_device(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {name: value.to(self.device) if torch.is_tensor(value) else value for name, value in inputs.items()}

    @torch.no_grad()
    def _generated(self, rows: Sequence[Row], inputs: dict[str, Any]) -> list[str]:
        if (inputs["attention_mask"][:, -1] == 0).any():
            raise EvaluationError(
                "a batch is padded on the right, where its answers would begin.",
                expected="padding on the left",
                fix="let the processor pad on the left for generation (`padding_side`).",
            )
        inputs = self.on_device(inputs)
        if self.config.do_sample:  # the same batch draws the same, also when an evaluation was interrupted
            torch.manual_seed(self.seed + zlib.crc32(inputs["input_ids"].cpu().numpy().tobytes()))
        stopping = {"tokenizer": self.collator.processor.tokenizer} if self.stop_strings else {}
        new = self.prefixes.generate(rows, image_groups(rows), inputs, **stopping)  # (batch, longest answer)
        if new is None:
            with with_prompts(self.model, inputs) as written:
                tokens = self.model.generate(**written, generation_config=self.config, **stopping)
            new = tokens[:, written["input_ids"].shape[1] :]
        texts = self.collator.processor.batch_decode(new, skip_special_tokens=True)
        return [plain_text(_cut(text, self.stop_strings)) for text in texts]


def _cut(text: str, stops: Sequence[str]) -> str:
    """The text before the first stop string."""
    places = [text.index(stop) for stop in stops if stop in text]
    return text[: min(places)] if places else text


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error).lower()
    return "out of memory" in text or "can't allocate memory" in text or "not enough memory" in text


def _quiet_tokenizers(worker: int) -> None:
    """A forked process uses one thread per tokenizer; said here, it is not warned about."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
