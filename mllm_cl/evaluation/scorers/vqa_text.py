"""How the VQA evaluators rewrite an answer before they compare it (official, EvalAI / m4c, VLMEvalKit).

All three share the same rules and differ in details, which `Dialect` names. Sources: the official evaluator
(GT-Vision-Lab/VQA), the EvalAI processor of Pythia that LLaVA and lmms-eval 0.7.3 carry, VLMEvalKit of August 2026.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

MARKS = tuple(';/[]"{}()=+\\_-><@`,?!')
"""Marks that are deleted or become a blank; colon, apostrophe, %, $, # and & are none of them."""

_NAMED = "zero one two three four five six seven eight nine ten"
NUMBER_WORDS = {"none": "0", **{word: str(value) for value, word in enumerate(_NAMED.split())}}
ARTICLES = ("a", "an", "the")
MOST_PERIODS = 32  # the evaluators pass a flag where `re.sub` expects a count

_CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""


def _misspellings() -> dict[str, str]:
    """Every contraction with one of its apostrophes left out -> the contraction; and one entry that is the wrong way
    round in the evaluators. Their capitalised keys can never match lower-cased text and are not kept."""
    table = {"somebody'd": "somebodyd"}
    for word in _CONTRACTED.split():
        for place in (index for index, letter in enumerate(word) if letter == "'"):
            table[word[:place] + word[place + 1 :]] = word
    return table


CONTRACTIONS = _misspellings()


@dataclass(frozen=True)
class Dialect:
    """What one evaluator does in its own way.

    Args:
        comma: commas between digits; one anywhere in the text makes every mark vanish instead of becoming a blank.
        period: which periods are deleted.
    """

    comma: re.Pattern[str]
    period: re.Pattern[str]


OFFICIAL = Dialect(re.compile(r"\d,\d"), re.compile(r"\.(?!\d)"))  # the look-behind of the original never applies
EVALAI = Dialect(re.compile(r"\d,+\d"), re.compile(r"\.(?!\d)"))
VLMEVALKIT = Dialect(re.compile(r"\d,\d"), re.compile(r"(?<!\d)\.(?!\d)"))


def clean(text: str) -> str:
    """Returns `text` with newlines and tabs as blanks and none at the ends."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def strip_marks(text: str, dialect: Dialect = OFFICIAL) -> str:
    """Returns `text` without marks and periods.

    A mark is deleted if the text has that mark beside a blank anywhere, or a comma between digits anywhere; else it
    becomes a blank. The tests look at the text as it was given, so `$1,000-$2,000` becomes `$1000$2000`.
    """
    fuse, result = dialect.comma.search(text) is not None, text
    for mark in MARKS:
        beside = f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if fuse or beside else " ")
    return dialect.period.sub("", result, count=MOST_PERIODS)


def strip_words(text: str) -> str:
    """Returns `text` in lower case with number words as digits, without articles, with apostrophes put back."""
    words = [NUMBER_WORDS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def normalise(text: str, dialect: Dialect = OFFICIAL) -> str:
    """Returns `strip_words(strip_marks(text))`.

    Example:

    ```python
    >>> from mllm_cl.evaluation.scorers.vqa_text import normalise
    >>> normalise("The two-story house, isnt it?")
    "2 story house isn't it"

    ```
    """
    return strip_words(strip_marks(text, dialect))


def evalai(text: str) -> str:
    """Returns what the EvalAI processor makes of an answer: commas and question marks go first, `'s` becomes ` 's`."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return normalise(clean(text), EVALAI)
