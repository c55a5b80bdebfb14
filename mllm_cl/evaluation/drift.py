"""Drift probes: how far the language side has moved from the untouched model, whatever the tasks score.

- *Language feature shift*: mean over tokens of 1 − cos(h, h_base), h the states after the final norm, on fixed
  inquiries. 0 for the untouched model.
- *Format collapse*: share of one-word answers and mean number of words of the greedy answers to open prompts. A model
  that was taught short answers and now gives nothing else has collapsed.

The inquiries are open prompts over pictures of the stream's own test rows; no answer is read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import ProcessorMixin

from mllm_cl.data.collate import Collator
from mllm_cl.data.rows import Row, user_message
from mllm_cl.evaluation.engine import GenerationSettings, Route, generate, route_groups
from mllm_cl.models.adapters import active, weighted
from mllm_cl.streams import Stream

OPEN_PROMPTS = (
    "Describe this picture.",
    "What can you see here? Explain in a few sentences.",
    "Tell me everything you notice.",
    "Write a caption for this picture.",
    "Explain what is going on.",
    "How would you describe this to someone who cannot see it?",
    "What is unusual about this?",
    "Give a detailed description.",
)
_ROWS_AT_ONCE = 16
_ANSWER = 32  # tokens; enough to tell a sentence from a word


@dataclass(frozen=True)
class Drift:
    """What the probes say about one stage.

    Args:
        feature_shift: mean 1 − cos against the untouched model, in [0, 2].
        one_word_share: share of answers of at most one word, in percent.
        mean_words: mean number of words of an answer.
        n: inquiries asked.
    """

    feature_shift: float
    one_word_share: float
    mean_words: float
    n: int


def open_inquiries(stream: Stream, count: int) -> list[Row]:
    """Returns `count` open prompts, in turn over the tasks with pictures of their test rows; the same for every run."""
    inquiries: list[Row] = []
    for index in range(count):
        turn, place = divmod(index, len(stream))
        rows = stream[place].test
        pictures = rows[turn * 7 % len(rows)]["images"][:1] if len(rows) else []  # 7: neighbours are often alike
        prompt = OPEN_PROMPTS[(turn + place) % len(OPEN_PROMPTS)]
        inquiries.append({"id": f"open/{index}", "messages": [user_message(prompt, len(pictures))], "images": pictures})
    return inquiries


def measure_drift(
    model: PeftModel, processor: ProcessorMixin, inquiries: Sequence[Row], route: Route | None = None
) -> Drift:
    """Runs both probes.

    Args:
        model: with the adapters of the stage active; with all of them off it is the reference.
        route: for methods that choose adapters per sample.
    """
    answers = generate(model, processor, inquiries, GenerationSettings(_ANSWER), route)
    words = [len(answer.split()) for answer in answers]
    shifts = torch.cat(_shifts(model, processor, inquiries, route))
    return Drift(
        feature_shift=shifts.mean().item(),
        one_word_share=100 * sum(count <= 1 for count in words) / len(words),
        mean_words=sum(words) / len(words),
        n=len(words),
    )


@torch.no_grad()
def _shifts(model: PeftModel, processor: ProcessorMixin, inquiries: Sequence[Row], route: Route | None) -> list[Tensor]:
    """1 − cos at every token of every inquiry."""
    collator, device = Collator(processor, for_generation=True), next(model.parameters()).device
    was_training = model.training
    model.eval()
    found = []
    for start in range(0, len(inquiries), _ROWS_AT_ONCE):
        rows = inquiries[start : start + _ROWS_AT_ONCE]
        for members, weights in route_groups(rows, route):
            inputs = {name: value.to(device) for name, value in collator([rows[i] for i in members]).items()}
            mask = inputs["attention_mask"].bool()
            with contextlib.nullcontext() if weights is None else weighted(model, weights):
                now = _last_states(model, inputs)[mask]
            with active(model, []):
                before = _last_states(model, inputs)[mask]
            found.append(1 - cosine_similarity(now.float(), before.float(), dim=-1))
    model.train(was_training)
    return found


def _last_states(model: PeftModel, inputs: dict[str, Any]) -> Tensor:
    return model(**inputs, output_hidden_states=True).hidden_states[-1]
