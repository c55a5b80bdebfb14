"""Transforms of training rows: other answer styles, other words for the same instruction. Rule-based and seeded.

```yaml
stream:
  transforms:
    - answer_styles: {share: 0.2}          # the data half of SEFE (arXiv 2505.02486)
    - rewrite_instructions: {share: 1.0}
    - boxes: {tasks: [Grounding], given: square, wanted: thousand}     # see `mllm_cl.streams.boxes`
```

Which rows change, and how, depends on the seed and the row's id alone: not on order, subset or process. Test and
validation rows are never changed, except by `boxes`, which rewrites references too. A row with several answers (a
conversation) is left as it is by the first two.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mllm_cl.data.inquiry import question_of
from mllm_cl.data.problems import RowError
from mllm_cl.data.rows import Row, Rows, assistant_message, message_text, text_block
from mllm_cl.errors import StreamError, suggest
from mllm_cl.streams.boxes import convert_boxes
from mllm_cl.streams.making import view
from mllm_cl.streams.statistics import answer_format
from mllm_cl.streams.stream import Task

SHORT = (
    "Answer the question using a single word or phrase.",
    "Give a short answer of a word or a phrase.",
    "Reply with one word or a short phrase only.",
    "Keep the answer to a single word or phrase.",
    "Respond in as few words as possible.",
)
LETTER = (
    "Answer with the option's letter from the given choices directly.",
    "Give only the letter of the right option.",
    "Choose one of the options and reply with its letter.",
    "Reply with the letter of the correct choice.",
    "State the letter of the answer and nothing else.",
)
CAPTION = (
    "Provide a one-sentence caption for the provided image.",
    "Describe the image in one sentence.",
    "Write a single sentence that describes this picture.",
    "What does the image show? Answer in one sentence.",
    "Give the picture a caption of one sentence.",
)
PARAPHRASES = (SHORT, LETTER, CAPTION)
STYLES = ("yes_no", "choice", "sentence")
_POOL = 2000  # answers that distractors are drawn from
_LONGEST = 60  # characters of an answer that can become an option


def transform(tasks: Sequence[Task], transforms: Sequence[Mapping[str, Any]], seed: int) -> list[Task]:
    """Returns the tasks with their training rows transformed, one transform after another.

    Raises:
        StreamError: an unknown transform or option.
    """
    for number, entry in enumerate(transforms):
        if not isinstance(entry, Mapping) or len(entry) != 1:
            raise StreamError(f"transforms[{number}]: {entry!r} given.", expected="one `name: {options}`")
        name, options = next(iter(entry.items()))
        if name == "boxes":
            tasks = convert_boxes(tasks, f"transforms[{number}].boxes", **_options(convert_boxes, name, options))
            continue
        if name not in TRANSFORMS:
            known = [*TRANSFORMS, "boxes"]
            raise StreamError(f"transforms[{number}]: unknown transform {name!r}.", expected=suggest(name, known))
        make = TRANSFORMS[name]
        tasks = [replace(task, train=make(task, seed, f"transforms[{number}].{name}", **_options(make, name, options)))
                 for task in tasks]  # fmt: skip
    return list(tasks)


def _options(make: Callable[..., Any], name: str, options: Any) -> dict[str, Any]:
    known = [key for key in make.__annotations__ if key not in ("task", "stream", "seed", "place", "return")]
    for key in options or {}:
        if key not in known:
            raise StreamError(f"transforms.{name}.{key}: unknown option.", expected=suggest(str(key), known))
    return dict(options or {})


def answer_styles(
    task: Task, seed: int, place: str, share: float = 0.2, styles: Sequence[str] = STYLES
) -> Rows:  # fmt: skip
    """Asks a share of the training questions in another answer style.

    Args:
        share (`float`, defaults to 0.2): SEFE's best X.
        styles (several of `STYLES`): `yes_no`: is a proposed answer right (half of them are); `choice`: lettered options;
            `sentence`: the same answer in a sentence. Wrong answers are other answers of the task in the same format. A
            row for which no style applies (a long answer, a task with one answer) stays as it is.
    """
    _check_share(place, share)
    for style in styles:
        if style not in STYLES:
            raise StreamError(f"{place}.styles: {style!r} given.", expected=suggest(str(style), STYLES))
    return view(task.train).map(_Styles(_pool(task), share, tuple(styles), f"styles/{seed}/{task.name}"))


def rewrite_instructions(
    task: Task,
    seed: int,
    place: str,
    share: float = 1.0,
    phrases: Sequence[Sequence[str]] | None = None,
) -> Rows:
    """Replaces the instruction at the end of a training question by another with the same meaning.

    Args:
        share (`float`, defaults to 1): share of the rows.
        phrases (lists of texts, *optional*): texts of one meaning each, by default the instructions of LLaVA-1.5 and four
            paraphrases of each. A question that ends with none of them stays as it is.
    """
    _check_share(place, share)
    for group in phrases or ():
        if isinstance(group, str) or len(group) < 2 or not all(isinstance(text, str) and text for text in group):
            raise StreamError(f"{place}.phrases: {group!r} given.", expected="lists of at least two texts")
    groups = tuple(tuple(group) for group in phrases or PARAPHRASES)
    return view(task.train).map(_Rewrite(groups, share, f"rewrite/{seed}/{task.name}"))


TRANSFORMS: dict[str, Callable[..., Rows]] = {
    "answer_styles": answer_styles,
    "rewrite_instructions": rewrite_instructions,
}


def _check_share(place: str, share: Any) -> None:
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
        raise StreamError(f"{place}.share: {share!r} given.", expected="a share above 0, at most 1")


def _pool(task: Task) -> dict[str, tuple[str, ...]]:
    """Short answers of a task by format, in the order of their rows."""
    step = max(1, len(task.train) // _POOL)
    found: dict[str, dict[str, None]] = {}
    for position in range(0, len(task.train), step):
        try:
            answer = _answer(task.train[position])
        except RowError:
            continue  # validation, which comes later, names it
        if answer is not None:
            found.setdefault(answer_format(answer), {}).setdefault(answer)
    return {name: tuple(answers) for name, answers in found.items()}


def _answer(row: Row) -> str | None:
    """The short answer of a row with one question, `None` for conversations and long answers."""
    if not _is_plain(row):
        return None
    turns = [message for message in row["messages"] if message["role"] == "assistant"]
    text = message_text(turns[0]).strip() if len(turns) == 1 and row["messages"][-1] is turns[0] else ""
    return text if text and len(text) <= _LONGEST and "\n" not in text else None


@dataclass(frozen=True)
class _Styles:
    pool: Mapping[str, tuple[str, ...]]
    share: float
    styles: tuple[str, ...]
    salt: str

    def __call__(self, row: Row, position: int) -> Row:
        rng = random.Random(f"{self.salt}/{row['id']}")
        answer = _answer(row)
        if rng.random() >= self.share or answer is None:
            return row
        kind = answer_format(answer)
        question = bare(question_of(row))
        others = [other for other in self.pool.get(kind, ()) if other.casefold() != answer.casefold()]
        styles = [style for style in self.styles if _fits(style, kind, others)]
        if not styles:
            return row
        style = rng.choice(styles)
        if style == "sentence":
            return _asked(
                row, f"{question}\nAnswer in a complete sentence.", f"The answer is {answer.rstrip('.')}.", style
            )
        if style == "yes_no":
            is_right = rng.random() < 0.5
            proposed = answer if is_right else rng.choice(others)
            text = f'{question}\nIs the answer "{proposed}"? Answer yes or no.'
            return _asked(row, text, "Yes" if is_right else "No", style)
        options = [answer, *rng.sample(others, min(3, len(others)))]
        rng.shuffle(options)
        listed = "\n".join(f"{letter}. {option}" for letter, option in zip("ABCD", options))
        return _asked(row, f"{question}\n{listed}\n{LETTER[0]}", "ABCD"[options.index(answer)], style)


def _fits(style: str, kind: str, others: Sequence[str]) -> bool:
    if kind in ("letter", "list", "sentence"):
        return False  # options that the question itself gives; boxes; what is a sentence already
    return style == "sentence" or (bool(others) and kind != "yes/no")


@dataclass(frozen=True)
class _Rewrite:
    groups: tuple[tuple[str, ...], ...]
    share: float
    salt: str

    def __call__(self, row: Row, position: int) -> Row:
        rng = random.Random(f"{self.salt}/{row['id']}")
        question = question_of(row)
        if rng.random() >= self.share or not _is_plain(row):
            return row
        for group in self.groups:
            found = next((text for text in group if question.endswith(text)), None)
            if found is not None:
                other = rng.choice([text for text in group if text != found])
                return _asked(row, question.removesuffix(found) + other, None, "rewritten")
        return row


def _is_plain(row: Row) -> bool:
    """True if the last user turn is images and then one text, so that the text can be exchanged."""
    users = [message for message in row["messages"] if message["role"] == "user"]
    if not users:
        return False
    content = users[-1]["content"]
    return not isinstance(content, str) and [block["type"] for block in content].count("text") == 1 and (
        content[-1]["type"] == "text"
    )  # fmt: skip


def bare(question: str) -> str:
    """Returns a question without the instruction at its end that says how to answer."""
    for text in (text for group in PARAPHRASES for text in group):
        if question.endswith(text) and question != text:
            return question.removesuffix(text).rstrip()
    return question


def _asked(row: Row, question: str, answer: str | None, style: str) -> Row:
    """The row with another last question (its images stay in front of the text) and another answer."""
    messages = list(row["messages"])
    place = max(number for number, message in enumerate(messages) if message["role"] == "user")
    images = [block for block in messages[place]["content"] if block["type"] == "image"]
    messages[place] = {"role": "user", "content": [*images, text_block(question)]}
    changed: dict[str, Any] = {**row, "messages": messages, "style": style}
    if answer is not None:
        messages[-1] = assistant_message(answer)
        if row.get("answers"):
            changed["answers"] = [answer]
    return changed  # type: ignore[return-value]
