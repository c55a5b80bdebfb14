"""Captions into words as the Penn Treebank tokeniser of the COCO caption evaluation does, without Java.

`ptb-regex/2` splits contractions and possessives (`it's` -> `it 's`, `don't` -> `do n't`), currency, percent and other
signs from what they stand at, keeps hyphenated words, numbers and abbreviations together, lower-cases, and drops
punctuation marks. On ordinary captions it equals Stanford CoreNLP 3.4.1 with `-lowerCase`, as pycocoevalcap 1.2 calls
it; `docs/evaluation.md` names where it differs. Its name is part of every caption result (`scorer`).
"""

from __future__ import annotations

import re

TOKENISER = "ptb-regex/2"

DROPPED = frozenset(('"', "''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"))
"""Tokens that do not count; pycocoevalcap also names brackets, but in upper case, and so never drops them."""

BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}

_SIMPLER = str.maketrans(
    {"’": "'", "‘": "`", "´": "'", "“": "``", "”": "''", "…": "...", "–": "--", "—": "--"}  # marks
    | {"\u00a0": " ", "\u00ad": "", "£": "#", "€": "$", "¢": " cents ", "½": "1/2", "¼": "1/4", "¾": "3/4"}
)
_ABBREVIATIONS = (
    r"(?:mr|mrs|ms|dr|prof|st|jr|sr|gen|rep|sen|gov|lt|col|sgt|capt|rev|hon|co|corp|inc|ltd|bros|vs|etc|ave|blvd|rd|mt|ft"
    r"|jan|feb|mar|apr|jun|jul|aug|sep|sept|oct|nov|dec|mon|tue|tues|wed|thu|thurs|fri|sat|sun|mo|ph\.d)\."
)
_STARTERS = (  # behind `b. ` they begin a sentence; found by asking the Java tokeniser about 250 words
    "A|About|According|Additionally|After|An|As|At|But|Earlier|He|Her|Here|However|If|In|It|Last|Many|More|Now|Once|One"
    "|Other|Our|She|Since|So|Some|Such|That|The|Their|Then|There|These|They|This|We|What|When|While|Yet|You"
)
_TOKEN = re.compile(
    r"(?:https?://|www\.)\S+|\w[\w.+-]*@\w[\w.-]*\w"  # addresses
    r"|\.{2,}(?!\d)|--+|[!?]{2,}"
    rf"|{_ABBREVIATIONS}(?![^\s.])"
    r"|no\.(?=\s*\d)"
    r"|(?:[a-z]\.)+[a-z]\.?(?![a-z])"  # u.s.a., a.m.
    rf"|(?-i:(?<![\w-])[A-Za-z]\.(?!\w|\s+(?:{_STARTERS})\b))"  # plan b.
    r"|(?-i:[A-Z]+&[A-Z]+)"  # AT&T
    r"|\d+(?:st|nd|rd|th)\b"
    r"|(?<!\S)[-+]\d+(?:[.,:]\d+)*|\d*(?:[.,:]\d+)+|\d+(?:[-/]\d+)+"  # 3.5, 1,000, 10:30, 1/2
    r"|\d+(?=')|(?<!\d)'\d+s?\b|'n'|'(?:em|cause|t(?=is|was))|[#@][a-z]\w*"  # 6'2, '80s, rock 'n' roll, #tag, @name
    r"|<[a-z]+>|[a-z]\+\+"  # <tag>, c++
    r"|\w+(?:[-'_/.]\w+)*"  # words, with hyphens, apostrophes, slashes and periods inside
    r"|'(?:s|m|d|ll|re|ve)\b"
    r"|``|''|[^\w\s\U00010000-\U0010ffff]",  # no emoji, as the Java side leaves them out
    re.IGNORECASE,
)
_CLITIC = re.compile(r"^(.+?)(n't|'s|'m|'d|'ll|'re|'ve)$")
_JOINED = {
    "cannot": ("can", "not"),
    "gonna": ("gon", "na"),
    "gotta": ("got", "ta"),
    "wanna": ("wan", "na"),
    "gimme": ("gim", "me"),
    "lemme": ("lem", "me"),
    "y'all": ("y'", "all"),
}


def tokenise(caption: str) -> list[str]:
    """Returns the words of a caption, lower-case, without punctuation.

    Example:

    ```python
    >>> from mllm_cl.evaluation.scorers.caption_text import tokenise
    >>> tokenise("The dog's owner isn't here; it's a T-shirt.")
    ['the', 'dog', "'s", 'owner', 'is', "n't", 'here', 'it', "'s", 'a', 't-shirt']

    ```
    """
    words: list[str] = []
    for token in _TOKEN.findall(caption.translate(_SIMPLER)):
        words += _split(token.lower())
    return [word for word in words if word not in DROPPED and word.strip(".")]


def _split(token: str) -> list[str]:
    if token in _JOINED:
        return list(_JOINED[token])
    if token in BRACKETS:
        return [BRACKETS[token]]
    clitics: list[str] = []
    while (match := _CLITIC.match(token)) is not None:
        token = match.group(1)
        clitics.insert(0, match.group(2))
    return [token, *clitics]
