"""Conversations -> text, and which of that text the assistant says.

A chat template with `{% generation %}` markers says it itself. For all others it is found by rendering: the conversation
is rendered a second time with a placeholder for every answer, and what surrounds the placeholders is looked up in the
real text. An answer begins where the generation prompt ends (the model has to produce all that follows) and includes the
token that ends the turn. A template that ends its turns with nothing gets the tokenizer's end token after the last one,
since the model would otherwise never learn to stop.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from transformers import ProcessorMixin
from transformers.utils.chat_template_utils import render_jinja_template

from mllm_cl.errors import DataError

Messages = Sequence[Mapping[str, Any]]

MARKERS = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
# Renders what is rendered already; the markers carry the spans to the processor, which knows what images expand to.
RENDERED = (
    "{% for part in messages %}{% if part.learnt %}{% generation %}{{ part.text }}{% endgeneration %}"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}"
)
_PLACEHOLDER = "answer{}placeholder"


class Part(NamedTuple):
    """A stretch of rendered text; `learnt` if the assistant says it."""

    text: str
    learnt: bool


class ChatTemplate:
    """The chat template of a processor.

    Args:
        processor (`ProcessorMixin`): whose template and tokenizer are used.
    """

    def __init__(self, processor: ProcessorMixin) -> None:
        tokenizer: Any = processor.tokenizer  # type: ignore[attr-defined]
        template: Any = processor.chat_template
        self.template = str((template["default"] if isinstance(template, dict) else template) or "")
        self.marked = MARKERS.search(self.template) is not None
        self.end = tokenizer.eos_token or ""
        self.control = control_tokens(self.template, tokenizer)
        self._special = {
            key: str(value) for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)
        }
        self._text_only = not hasattr(processor, "image_processor")

    def prompt(self, messages: Messages) -> str:
        """Returns the text of an inquiry, with the generation prompt."""
        return self._render(messages, prompt=True)[0]

    def parts(self, messages: Messages, row: str) -> list[Part]:
        """Returns the text of a conversation, cut where the assistant begins and ends.

        Args:
            messages: turns without control tokens in what people wrote.
            row: name of the row, for the error.

        Raises:
            DataError: the template rewrites an answer in a way that hides where it is.
        """
        text, spans = self._render(messages, marked=True)
        if not self.marked:
            spans = self._spans(messages, text, row)
        spans = [span for span in spans if span[0] < span[1]]
        if messages and messages[-1]["role"] == "assistant" and spans:
            start, end = spans[-1]
            said = text[start:end]
            if self.end and not re.search(rf"(?:{self.control.pattern})\s*$", said):
                text = text[:start] + said.rstrip() + self.end
                spans[-1] = (start, len(text))
        parts, position = [], 0
        for start, end in spans:
            parts += [Part(text[position:start], False), Part(text[start:end], True)]
            position = end
        return [part for part in [*parts, Part(text[position:], False)] if part.text]

    def _spans(self, messages: Messages, text: str, row: str) -> list[tuple[int, int]]:
        """Where the answers are in `text`, by comparison with the same conversation with placeholders."""
        answers = [message for message in messages if message["role"] == "assistant"]
        names = [_PLACEHOLDER.format(number) for number in range(len(answers))]
        replacements = iter(names)
        skeleton, _ = self._render(
            [
                _with_text(message, next(replacements)) if message["role"] == "assistant" else message
                for message in messages
            ]
        )
        around: list[str] = []  # what stands before the first answer, between two answers, after the last
        for name in names:
            before, found, skeleton = skeleton.partition(name)
            if not found:
                raise self._hidden(row)
            around.append(before)
        around.append(skeleton)
        ending = self._ending(around[-1])
        spans, position = [], 0
        for before, after, message in zip(around, around[1:], answers):
            if not text.startswith(before, position):
                raise self._hidden(row)
            position += len(before)
            until = _end_of_answer(text, position, after, _text(message), last=after is around[-1])
            if until < position:
                raise self._hidden(row)
            prompt = before.rfind(self._prompt_text) if self._prompt_text else -1
            unsaid = len(before) - prompt - len(self._prompt_text) if prompt >= 0 else 0
            said = len(ending) if after.startswith(ending) else 0
            spans.append((position - unsaid, until + said))
            position = until
        return spans

    def _ending(self, after: str) -> str:
        """What ends the assistant's turn: the control tokens at the beginning of what follows the last answer, up to the
        tokenizer's end token when it is among them."""
        run = re.match(rf"(?:\s*(?:{self.control.pattern}))*", after)
        ending = run[0] if run else ""
        stop = ending.find(self.end) if self.end else -1
        return ending[: stop + len(self.end)] if stop >= 0 else ending

    @cached_property
    def _prompt_text(self) -> str:
        """What the template writes to ask for an answer."""
        question = [{"role": "user", "content": [{"type": "text", "text": "question"}]}]
        without, within = self._render(question)[0], self._render(question, prompt=True)[0]
        common = 0
        while common < min(len(without), len(within)) and without[common] == within[common]:
            common += 1
        return within[common:]

    def _render(
        self, messages: Messages, *, prompt: bool = False, marked: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        if self._text_only:
            messages = [{**message, "content": _text(message)} for message in messages]
        rendered, spans = render_jinja_template(
            conversations=[list(messages)],  # type: ignore[list-item]
            chat_template=self.template,
            return_assistant_tokens_mask=marked and self.marked,
            add_generation_prompt=prompt,
            **self._special,  # type: ignore[arg-type]
        )
        found: Any = spans[0] if spans else []
        return rendered[0], [(start, end) for start, end in found]

    def _hidden(self, row: str) -> DataError:
        return DataError(
            f"row {row}: the chat template rewrites an answer, so the assistant's tokens cannot be told apart.",
            expected="a template that writes an answer as it is, or with {% generation %}...{% endgeneration %} around it",
            fix="add the markers to chat_template.jinja, or set model.prompt_profile.",
        )


def control_tokens(template: str, tokenizer: Any) -> re.Pattern[str]:
    """Returns what matches every token that steers the model: special ones, and added ones that the template writes."""
    tokens = [
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if len(token.content.strip()) > 1 and (token.special or token.content in template)
    ]
    longest_first = sorted(set(tokens), key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")  # (?!) matches nothing


def _text(message: Mapping[str, Any]) -> str:
    content = message["content"]
    return (
        content if isinstance(content, str) else "".join(block["text"] for block in content if block["type"] == "text")
    )


def _with_text(message: Mapping[str, Any], text: str) -> dict[str, Any]:
    """The message with another text, in the form (text or blocks) that its own has."""
    content = message["content"]
    return {**message, "content": text if isinstance(content, str) else [{"type": "text", "text": text}]}


def _end_of_answer(text: str, start: int, after: str, answer: str, last: bool) -> int:
    """Where the answer that begins at `start` ends: templates leave it as it is or strip it; -1 if neither."""
    for written in (answer, answer.strip(), answer.rstrip(), answer.lstrip()):
        end = start + len(written)
        if text.startswith(written, start) and (text[end:] == after if last else text.startswith(after, end)):
            return end
    return len(text) - len(after) if last and text.endswith(after) else text.find(after, start)
