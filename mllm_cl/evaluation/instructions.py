"""Instruction-following checks: does an answer have the form that its own question asks for, right or wrong?

The form is read from the wording of the question, the check from the answer alone: no model, no reference, no judge.

* `letter`: "answer with the option's letter": one letter, brackets and a final mark aside;
* `yes_no`: "answer yes or no": that word alone;
* `one_word`: "answer in one word": one word;
* `phrase`: "using a single word or phrase": one line of at most five words;
* `list`: a bulleted, numbered or comma-separated list: every line marked as an item, or one line of several items.

An empty answer has no form. Questions that ask for none of these are not counted.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

MOST_WORDS_OF_A_PHRASE = 5

_ASKS = {  # the narrower first: "Yes or no? Answer with a single word or phrase." wants yes or no
    "letter": r"\boption['’]?s? letter\b|\bletter from the\b"
    r"|\b(?:answer|reply|respond) with (?:only )?(?:the|a|one) (?:\w+ )?letter\b",
    "yes_no": r"\byes['\"’”]?\s*(?:or|/)\s*['\"‘“]?no\b",
    "phrase": r"\b(?:one|single) word \(?or (?:a )?(?:short )?phrase\b|\bshort phrase\b",
    "one_word": r"\b(?:one|single)[ -]word\b|\b(?:only|just) (?:one|a) word\b",
    "list": r"\bbullet(?:ed)?[ -](?:points?|list)\b|\bnumbered list\b|\bas a list\b"
    r"|\bcomma[ -]separated\b|\bseparated by commas\b",
}
_ANSWERS = {
    "letter": re.compile(r"[(\[]?[A-Z][)\]]?[.:]?", re.IGNORECASE | re.ASCII),
    "yes_no": re.compile(r"(?:yes|no)[.!]?", re.IGNORECASE),
}
_ITEM = re.compile(r"\s*(?:[-*•]|\d+[.)])\s+\S")


@dataclass(frozen=True)
class Obedience:
    """How many of the answers to questions that ask for a form have it.

    Args:
        asked: questions that ask for a form.
        obeyed: answers that have the form asked for.
    """

    asked: int
    obeyed: int

    @property
    def percent(self) -> float | None:
        """The share of obedient answers, `None` when no question asks for a form."""
        return 100 * self.obeyed / self.asked if self.asked else None


def asked_form(question: str) -> str | None:
    """Returns the form that a question asks for, `None` when it asks for none known here.

    Example:

    ```python
    >>> from mllm_cl.evaluation.instructions import asked_form
    >>> asked_form("What is it?\\nAnswer the question using a single word or phrase.")
    'phrase'

    ```
    """
    return next((form for form, words in _ASKS.items() if re.search(words, question, re.IGNORECASE)), None)


def has_form(answer: str, form: str) -> bool:
    """Says whether an answer has a form.

    Raises:
        KeyError: there is no such form.
    """
    text = answer.strip()
    lines = [line for line in text.splitlines() if line.strip()]
    if form in _ANSWERS:
        return _ANSWERS[form].fullmatch(text) is not None
    if form == "one_word":
        return len(text.split()) == 1
    if form == "phrase":
        return len(lines) == 1 and len(text.split()) <= MOST_WORDS_OF_A_PHRASE
    if form == "list":
        items = re.split(r"[,;]", text) if len(lines) == 1 else []
        marked = bool(lines) and all(_ITEM.match(line) for line in lines)
        return marked or (len(items) > 1 and all(item.strip() for item in items))
    raise KeyError(form)


def obedience(pairs: Iterable[tuple[str, str]]) -> Obedience:
    """Counts over pairs of question and answer."""
    checks = [has_form(answer, form) for question, answer in pairs if (form := asked_form(question)) is not None]
    return Obedience(len(checks), sum(checks))
