"""What a scorer is given: accepted answers, and the choices of a question; odd forms are understood, never guessed at."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence

Choices = Mapping[str, str]


def accepted(references: object) -> list[str]:
    """Returns the accepted answers as a list of strings; a single string is one answer, `None` is none."""
    if references is None:
        return []
    if isinstance(references, str) or not isinstance(references, Sequence):
        return [str(references)]
    return [str(reference) for reference in references]


def lettered(choices: object) -> dict[str, str]:
    """Returns choices as `{"A": text, "B": text, ...}`; a list gets its letters in order, at most 26.

    Example:

    ```python
    >>> from mllm_cl.evaluation.scorers.references import lettered
    >>> lettered(["hot", "cold"])
    {'A': 'hot', 'B': 'cold'}

    ```
    """
    if isinstance(choices, Mapping):
        return {str(letter): str(text) for letter, text in choices.items()}
    if isinstance(choices, Sequence) and not isinstance(choices, str):
        return {letter: str(text) for letter, text in zip(string.ascii_uppercase, choices)}
    return {}


def number(text: str) -> float | None:
    """Returns what Python's `float` reads, or `None`; `1,000`, `$5` and words are no numbers to it."""
    try:
        return float(text)
    except ValueError:
        return None
