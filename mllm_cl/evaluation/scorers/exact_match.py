"""Exact match: an answer is right if it equals one of the accepted answers."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from mllm_cl.errors import EvaluationError

NORMALISATION = "exact_match/1"
"""Version of what `normalise` does; part of every result, since a score without it cannot be compared."""


def normalise(text: str) -> str:
    """Returns `text` in the form that `exact_match` compares. In this order:

    1. Unicode NFKC (full-width letters, ligatures and the like become their plain form);
    2. `str.casefold` (upper and lower case become one; `ß` becomes `ss`), then NFKC again, as folding can undo it;
    3. every run of white space becomes one blank, and none stays at either end;
    4. one `.` at the end is removed, with the blank before it, unless nothing else would be left.

    Nothing else is touched: articles, other punctuation and number words stay as they are.

    Example:

    ```python
    >>> from mllm_cl.evaluation.scorers.exact_match import normalise
    >>> normalise("  A  Red\\nbus. ")
    'a red bus'

    ```
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    collapsed = " ".join(folded.split())
    return collapsed[:-1].rstrip() or collapsed if collapsed.endswith(".") else collapsed


def exact_match(prediction: str, references: Sequence[str], **row_fields: object) -> float:
    """Returns 1.0 if the normalised prediction equals a normalised reference, else 0.0.

    An empty prediction is wrong, whatever the references. See `normalise` for what is compared.

    Example:

    ```python
    >>> from mllm_cl.evaluation.scorers import get_scorer
    >>> get_scorer("exact_match")("Yes.", ["yes"]), get_scorer("exact_match")("yesterday", ["yes"])
    (1.0, 0.0)

    ```
    """
    answer = normalise(prediction)
    return float(any(answer == normalise(reference) for reference in _checked(references)) and answer != "")


def exact_match_strict(prediction: str, references: Sequence[str], **row_fields: object) -> float:
    """Returns 1.0 if the prediction equals a reference character by character and is not empty, else 0.0."""
    return float(prediction in _checked(references) and prediction != "")


def _checked(references: Sequence[str]) -> Sequence[str]:
    if isinstance(references, str) or not references:
        raise EvaluationError(
            f"references: {references!r}.",
            expected="a list of one or more accepted answers",
            fix="give every test row its `answers`.",
        )
    return references
