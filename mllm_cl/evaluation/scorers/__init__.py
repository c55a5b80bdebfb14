"""Scorers: how one answer is compared with the accepted answers. One file per family; this dict is the catalogue."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from mllm_cl.errors import EvaluationError, suggest
from mllm_cl.evaluation.scorers.exact_match import exact_match, exact_match_strict


class Scorer(Protocol):
    """Scores one answer: 0.0 is wrong, 1.0 is right, soft scores lie between. Further row fields come by name."""

    def __call__(self, prediction: str, references: Sequence[str], **row_fields: object) -> float: ...


class ScorerEntry(NamedTuple):
    """A scorer with one line for listings."""

    scorer: Scorer
    description: str


SCORERS: dict[str, ScorerEntry] = {
    "exact_match": ScorerEntry(exact_match, "equal after NFKC, case folding, white space and one final period"),
    "exact_match_strict": ScorerEntry(exact_match_strict, "equal character by character"),
}


def get_scorer(name: str) -> Scorer:
    """Returns the scorer called `name`.

    Raises:
        EvaluationError: no scorer has that name; the message suggests one.

    Example:

    ```python
    >>> from mllm_cl.evaluation.scorers import get_scorer
    >>> get_scorer("exact_match")("A bus", ["a bus"])
    1.0

    ```
    """
    if name not in SCORERS:
        raise EvaluationError(f"no scorer is called {name!r}.", expected=suggest(name, SCORERS))
    return SCORERS[name].scorer


__all__ = ["SCORERS", "Scorer", "ScorerEntry", "get_scorer"]
