"""Conversations -> text, and which of that text the assistant says.

A chat template with `{% generation %}` markers says it itself. For all others it is found by rendering: the conversation
is rendered a second time with a placeholder for every answer, and what surrounds the placeholders is looked up in the
real text. An answer begins where the generation prompt ends (the model has to produce all that follows, a space before it
too) and includes what ends the turn: the control tokens behind it, but not those that begin another turn. A template that
ends its turns with nothing gets the tokenizer's end token after the last one, since the model would otherwise never learn
to stop.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from jinja2 import TemplateError
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
_QUESTION = [{"role": "user", "content": [{"type": "text", "text": "question"}]}]


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

    def prompt(self, messages: Messages, row: str) -> str:
        """Returns the text of an inquiry, with the generation prompt.

        Raises:
            DataError: the template refuses these turns.
        """
        return self._render(messages, row, prompt=True)[0]

    def parts(self, messages: Messages, row: str) -> list[Part]:
        """Returns the text of a conversation, cut where the assistant begins and ends.

        Args:
            messages: turns without control tokens in what people wrote.
            row: name of the row, for the error.

        Raises:
            DataError: the template refuses these turns, or rewrites an answer in a way that hides where it is.
        """
        text, spans = self._render(messages, row, marked=True)
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
            ],
            row,
        )
        around: list[str] = []  # what stands before the first answer, between two answers, after the last
        for name in names:
            before, found, skeleton = skeleton.partition(name)
            if not found:
                raise self._hidden(row)
            around.append(before)
        around.append(skeleton)
        spans, position = [], 0
        for before, after, message in zip(around, around[1:], answers):
            if not text.startswith(before, position):
                raise self._hidden(row)
            position += len(before)
            until = _end_of_answer(text, position, after, _text(message), last=after is around[-1])
            if until < position:
                raise self._hidden(row)
            spans.append((position - self._unsaid(before), until + self._ending(after)))
            position = until
        return spans

    def _unsaid(self, before: str) -> int:
        """How much of what stands before an answer the model has to say itself: all behind the generation prompt."""
        asked, lead = self._prompt_text, self._around[0]
        if not asked:
            return len(lead) if before.endswith(lead) else 0
        prompt = before.rfind(asked)
        return len(before) - prompt - len(asked) if prompt >= 0 else 0

    def _ending(self, after: str) -> int:
        """How much of what follows an answer ends the assistant's turn: the control tokens that follow the last answer of
        a row too, up to the tokenizer's end token when it is among them."""
        length = 0
        for ends, follows in zip(self._around[1], self._leading(after)):
            if ends != follows:
                break
            length += len(ends)
            if self.end and ends.endswith(self.end):
                break
        return length

    def _leading(self, text: str) -> list[str]:
        """The control tokens at the beginning of a text, each with the space before it."""
        found, token = [], re.compile(rf"\s*(?:{self.control.pattern})")
        while match := token.match(text, sum(map(len, found))):
            found.append(match[0])
        return found

    @cached_property
    def _prompt_text(self) -> str:
        """What the template writes to ask for an answer."""
        without, within = (self._render(_QUESTION, "question", prompt=prompt)[0] for prompt in (False, True))
        common = 0
        while common < min(len(without), len(within)) and without[common] == within[common]:
            common += 1
        return within[common:]

    @cached_property
    def _around(self) -> tuple[str, list[str]]:
        """What the template writes between a question and its answer, and the control tokens after the answer."""
        answered = [*_QUESTION, {"role": "assistant", "content": [{"type": "text", "text": _PLACEHOLDER}]}]
        asked, text = (self._render(messages, "question")[0] for messages in (_QUESTION, answered))
        before, _, after = text.partition(_PLACEHOLDER)
        return before.removeprefix(asked) if before.startswith(asked) else "", self._leading(after)

    def _render(
        self, messages: Messages, row: str, *, prompt: bool = False, marked: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        if self._text_only:
            messages = [{**message, "content": _text(message)} for message in messages]
        try:
            rendered, spans = render_jinja_template(
                conversations=[list(messages)],  # type: ignore[list-item]
                chat_template=self.template,
                return_assistant_tokens_mask=marked and self.marked,
                add_generation_prompt=prompt,
                **self._special,  # type: ignore[arg-type]
            )
        except (
            TemplateError,
            TypeError,
        ) as error:  # `raise_exception` of the template, or contents that it cannot read
            roles = ", ".join(message["role"] for message in messages)
            raise DataError(
                f"row {row}: the model's chat template refuses it ({error}).",
                expected=f"turns that the template knows, in an order that it knows; the row has {roles}",
                fix="change the turns of the row, or the template (chat_template.jinja), or set model.prompt_profile.",
            ) from error
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
