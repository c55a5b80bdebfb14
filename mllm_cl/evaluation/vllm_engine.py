"""Answers from vLLM instead of our own engine: the same prompts token for token, the same pictures, greedy.

vLLM (0.14 or later) is looked for when it is used; nothing here imports it before. It applies plain LoRA to the language part
alone, at ranks up to `LARGEST_RANK`, as its `PEFTHelper` and `LoRAConfig` say.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mllm_cl.data.collate import Collator, plain_text
from mllm_cl.data.rows import Row
from mllm_cl.errors import EvaluationError
from mllm_cl.evaluation.engine import Failed, GenerationSettings

MAX_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What `max_lora_rank` may be (`vllm.config.lora.MaxLoRARanks`, vLLM 0.14 to 0.22)."""
LARGEST_RANK = MAX_LORA_RANKS[-1]
ROWS_AT_ONCE = 512
"""Rows that are handed over together; vLLM makes its own batches of them, and what it has answered is on disk then."""

_SAMPLING = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "repetition_penalty": "repetition_penalty",
    "min_new_tokens": "min_tokens",
    "stop_strings": "stop",
}
_ONLY_SAMPLING = ("temperature", "top_p", "top_k")


def sampling(settings: GenerationSettings) -> dict[str, Any]:
    """Returns the fields of vLLM's `SamplingParams` that mean the same as our settings; greedy without `do_sample`.

    Raises:
        EvaluationError: a setting that vLLM does not have, such as beams.
    """
    options = dict(settings.options)
    sampled = bool(options.pop("do_sample", False))
    if options.get("num_beams") == 1:
        del options["num_beams"]
    unknown = sorted(options.keys() - _SAMPLING.keys())
    if unknown:
        raise EvaluationError(
            f"--gen_kwargs {unknown[0]}: vLLM has no such setting.",
            expected=", ".join(["do_sample", *(name for name in _SAMPLING if name != "stop_strings"), "until"]),
            fix="leave it out, or measure with --model hf.",
        )
    fields: dict[str, Any] = {"max_tokens": settings.max_new_tokens, "temperature": 0.0}
    for name, value in options.items():
        if sampled or name not in _ONLY_SAMPLING:
            fields[_SAMPLING[name]] = list(value) if isinstance(value, tuple) else value
    if sampled:
        fields = {**fields, "temperature": options.get("temperature", 1.0), "seed": settings.seed}
    return fields


def rank_for(rank: int) -> int:
    """Returns the smallest `max_lora_rank` that holds adapters of this rank.

    Raises:
        EvaluationError: there is none.
    """
    fitting = [allowed for allowed in MAX_LORA_RANKS if allowed >= rank]
    if not fitting:
        raise EvaluationError(
            f"vLLM holds adapters up to rank {LARGEST_RANK}; this one has rank {rank}.",
            fix="merge it with `mllm-cl export RUN --merge` and measure the folder, or use --model hf.",
        )
    return fitting[0]


@dataclass(frozen=True)
class VllmModel:
    """A base model in vLLM.

    Args:
        llm: `vllm.LLM`.
        collator: renders prompts and fits pictures as for our own engine.
    """

    llm: Any
    collator: Collator

    @classmethod
    def load(cls, source: str, collator: Collator, images: int, max_rank: int | None, **settings: Any) -> VllmModel:
        """Loads a base model.

        Args:
            source: folder or Hub id.
            images: most pictures in a row.
            max_rank: largest rank of the adapters that will be asked; `None` for the base model alone.
            settings: further arguments of `vllm.LLM`, such as `dtype` and `revision`.
        """
        lora = {} if max_rank is None else {"enable_lora": True, "max_loras": 1, "max_lora_rank": rank_for(max_rank)}
        pictures = {"limit_mm_per_prompt": {"image": images}} if images else {}
        return cls(importlib.import_module("vllm").LLM(model=source, **lora, **pictures, **settings), collator)

    def prompt(self, row: Row) -> Mapping[str, Any]:
        """A row as vLLM takes it: tokens with one placeholder per picture, and the pictures."""
        text, images = self.collator.prompt(row)
        tokens = self.collator.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        return {"prompt_token_ids": tokens, **({"multi_modal_data": {"image": images}} if images else {})}


@dataclass(frozen=True)
class VllmAnswers:
    """Answers of one adapter, or of the base model; what `evaluate_cell` takes as `answers`.

    Args:
        adapter (`Path`, *optional*): a plain PEFT LoRA folder.
        number: tells adapters of one model apart, from 1.
    """

    model: VllmModel
    adapter: Path | None = None
    number: int = 1

    def __call__(
        self, rows: Sequence[Row], batches: Sequence[list[int]], settings: GenerationSettings
    ) -> Iterator[tuple[list[int], Sequence[str | Failed]]]:
        """Yields `(row indices, answers)`; a row that fails alone becomes a `Failed`."""
        for batch in batches:
            try:
                yield batch, self._ask([rows[index] for index in batch], settings)
            except Exception as error:
                if not settings.keep_going:
                    raise
                if len(batch) == 1:
                    yield batch, [Failed(f"{type(error).__name__}: {error}")]
                else:
                    yield from self(rows, [[index] for index in batch], settings)

    def _ask(self, rows: Sequence[Row], settings: GenerationSettings) -> list[str]:
        vllm = importlib.import_module("vllm")
        request = None
        if self.adapter is not None:
            requests = importlib.import_module("vllm.lora.request")
            request = requests.LoRARequest(f"adapter-{self.number}", self.number, str(self.adapter.resolve()))
        outputs = self.model.llm.generate(
            [self.model.prompt(row) for row in rows],
            vllm.SamplingParams(**sampling(settings)),
            lora_request=request,
            use_tqdm=False,
        )
        return [plain_text(output.outputs[0].text) for output in outputs]


def with_large_batches(settings: GenerationSettings) -> GenerationSettings:
    """Returns the settings with as many rows at once as suit vLLM where they say `auto`."""
    return replace(settings, batch_size=ROWS_AT_ONCE) if settings.batch_size == "auto" else settings
