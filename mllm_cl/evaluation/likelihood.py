"""The metric `choice_likelihood`: the likeliest of the allowed answers, read from a forward pass; nothing is generated.

A model may find the right letter likeliest and still write a sentence, so this is another metric than any that scores
generated answers. It has a name of its own, and neither can be computed from the predictions of the other.

The candidates of a row are the letters of its `choices` where every reference of the task is one, else the texts of its
`choices`; without `choices`, `Yes` and `No` where every reference is yes or no. A candidate's score is the sum of the log
probabilities of its tokens behind the inquiry, without the end of the turn. Candidates of one token each are read from the
same forward pass over the inquiry. Longer ones take a pass over the inquiry, whose keys and values all candidates of the
row then share; models that want more than tokens, mask and cache behind it take one pass over all candidates with it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import DynamicCache

from mllm_cl.data.rows import Row, assistant_message, inquiry_of, reference_answers
from mllm_cl.errors import EvaluationError
from mllm_cl.evaluation.engine import Engine
from mllm_cl.evaluation.scorers import CHOICE_LIKELIHOOD
from mllm_cl.evaluation.scorers.references import lettered
from mllm_cl.evaluation.scorers.yesno import read_yes_no
from mllm_cl.models.soft_prompts import SoftPrompts

_BEFORE_THE_ANSWER = frozenset({"input_ids", "attention_mask", "pixel_values", "image_sizes", "pixel_attention_mask"})
"""Inputs that are used up when an inquiry has been passed; behind it, tokens, mask and cache are enough."""


def candidates(rows: Sequence[Row]) -> dict[str, list[str]]:
    """Returns the allowed answers of every row by its id.

    Raises:
        EvaluationError: a row has fewer than two.
    """
    options = {row["id"]: lettered(row.get("choices")) for row in rows}
    if all(options.values()):
        letters = all(ref in options[row["id"]] for row in rows for ref in reference_answers(row))
        allowed = {name: list(own) if letters else list(own.values()) for name, own in options.items()}
    elif not any(options.values()) and all(read_yes_no(ref) for row in rows for ref in reference_answers(row)):
        allowed = {name: ["Yes", "No"] for name in options}
    else:
        allowed = {name: list(own) for name, own in options.items()}
    for name, own in allowed.items():
        if len(own) < 2:
            raise EvaluationError(
                f"row {name}: {CHOICE_LIKELIHOOD} has nothing to choose from.",
                expected="`choices` in every row, or yes-or-no answers in all",
                fix="give the rows `choices`, or score generated answers.",
            )
    return allowed


class Ranker(Engine):
    """An engine whose answer is the likeliest candidate."""

    allowed: Mapping[str, list[str]]

    @classmethod
    def over(cls, rows: Sequence[Row]) -> type[Ranker]:
        """Returns the engine for these rows."""
        return type(cls.__name__, (cls,), {"allowed": candidates(rows)})

    def _routed(self, rows: list[Row], inputs: dict[str, Any]) -> list[str]:
        """Rows that will pass one by one are routed one by one: what a method keeps of a route is about these rows."""
        if self.route is None or len(rows) == 1 or self._short(map(self._candidates, rows)):
            return super()._routed(rows, inputs)
        return [text for row in rows for text in super(Ranker, self)._routed([row], self.collator([row]))]

    @torch.no_grad()
    def reply(self, rows: Sequence[Row], inputs: dict[str, Any]) -> list[str]:
        tokens = list(map(self._candidates, rows))
        if self._short(tokens):
            inputs = self.on_device(inputs)
            scores = self._logits(inputs, 1)[:, -1].float().log_softmax(-1)  # (rows, vocabulary)
            best = [
                max(range(len(own)), key=lambda i, o=own, s=score: s[o[i][0]].item())
                for own, score in zip(tokens, scores)
            ]
        else:
            best = [self._best(row, own) for row, own in zip(rows, tokens)]
        return [self.allowed[row["id"]][place] for row, place in zip(rows, best)]

    def _best(self, row: Row, tokens: Sequence[Sequence[int]]) -> int:
        """The place of the likeliest of several candidates of any length."""
        longest = max(map(len, tokens))
        ids, mask = torch.zeros(2, len(tokens), longest, dtype=torch.long, device=self.device)
        for place, own in enumerate(tokens):
            ids[place, : len(own)], mask[place, : len(own)] = torch.tensor(own), 1
        steps = self._behind_shared(self.on_device(self.collator([row])), ids, mask)
        if steps is None:
            steps = self._together(self.on_device(self.collator([row] * len(tokens))), ids, mask)
        scores = (steps.log_softmax(-1).gather(-1, ids[..., None])[..., 0] * mask).sum(1)
        return int(scores.argmax())

    def _behind_shared(self, inputs: dict[str, Any], ids: Tensor, mask: Tensor) -> Tensor | None:
        """Logits of every token of the candidates, the inquiry passed once. Shape (candidates, longest, vocabulary).

        `None` where more than tokens, mask, keys and values is needed behind it (positions of Qwen-VL, Mllama's images).
        """
        if not set(inputs) <= _BEFORE_THE_ANSWER or SoftPrompts.of(self._base()) is not None:
            return None
        before = self.model(**inputs, use_cache=True, **self._keep(1))
        first, cache = before.logits[:, -1:], before.past_key_values  # (1, 1, vocabulary)
        if not isinstance(cache, DynamicCache):
            return None
        cache.batch_repeat_interleave(len(ids))
        whole = torch.cat([inputs["attention_mask"].expand(len(ids), -1), mask], dim=1)
        after = self.model(input_ids=ids, attention_mask=whole, past_key_values=cache, use_cache=True).logits
        return torch.cat([first.expand(len(ids), -1, -1), after[:, :-1]], dim=1).float()

    def _together(self, inputs: dict[str, Any], ids: Tensor, mask: Tensor) -> Tensor:
        """The same by one pass over inquiry and candidate of each."""
        tails = {"input_ids": ids, "attention_mask": mask}
        whole, longest = inputs["input_ids"].shape, ids.shape[1]
        for name, value in inputs.items():
            if not torch.is_tensor(value) or value.shape[:2] != whole:
                continue
            if value.ndim == 2:
                tail = tails.get(name, torch.zeros_like(ids)).to(value.dtype)
            elif name.endswith(
                "mask"
            ):  # which images a token sees (Mllama): the answer sees what the token before it saw
                tail = value[:, -1:].expand(-1, longest, *value.shape[2:])
            else:
                continue
            inputs[name] = torch.cat([value, tail], dim=1)
        return self._logits(inputs, longest + 1)[:, -longest - 1 : -1].float()

    def _logits(self, inputs: dict[str, Any], last: int) -> Tensor:
        return self.model(**inputs, **self._keep(last)).logits

    def _keep(self, last: int) -> dict[str, int]:
        """Asks for the logits of the last positions only, where a model can be asked."""
        base = self._base()
        short = "logits_to_keep" in inspect.signature(base.forward).parameters and SoftPrompts.of(base) is None
        return {"logits_to_keep": last} if short else {}

    def _base(self) -> Any:
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    def _candidates(self, row: Row) -> list[list[int]]:
        return [self._tokens(row, text) for text in self.allowed[row["id"]]]

    @staticmethod
    def _short(tokens: Iterable[list[list[int]]]) -> bool:
        """Whether every candidate is one token."""
        return all(len(ids) == 1 for own in tokens for ids in own)

    def _tokens(self, row: Row, text: str) -> list[int]:
        """The tokens of a candidate where the chat template puts it."""
        tokenizer: Any = self.collator.processor.tokenizer  # type: ignore[attr-defined]
        if self.collator.prefixed:
            return tokenizer(text, add_special_tokens=False)["input_ids"]
        chat = self.collator.chat
        messages: list[Any] = [
            {
                **message,
                "content": [block if block["type"] == "text" else {"type": "image"} for block in message["content"]],
            }
            if not isinstance(message["content"], str)
            else {**message, "content": [{"type": "text", "text": message["content"]}]}
            for message in [*inquiry_of(row)["messages"], assistant_message(text)]
        ]
        prompt = chat.prompt(messages[:-1], row["id"])
        whole = "".join(part.text for part in chat.parts(messages, row["id"]))
        end = whole.find(text, len(prompt)) + len(text)
        before, after = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (prompt, whole[:end]))
        if not whole.startswith(prompt) or len(after) <= len(before) or after[: len(before)] != before:
            raise EvaluationError(
                f"row {row['id']}: the tokens of {text!r} cannot be told from those of the inquiry.",
                expected="a chat template that puts an answer behind the generation prompt",
                fix=f"score generated answers instead of {CHOICE_LIKELIHOOD}.",
            )
        return after[len(before) :]
