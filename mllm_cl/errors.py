"""The errors a user of `mllm_cl` can meet.

Every message has up to three parts, in this order: what was given, what was expected, what to do. The command line prints
`str(error)` and exits with code 2, without a traceback; a program catches `MllmClError`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MllmClError(Exception):
    """Base of every error that a mistake of the user (or of the machine around us) can cause.

    Args:
        given (`str`): what was found, naming the place (file, line, row, key).
        expected (`str`, *optional*): what would have been right.
        fix (`str`, *optional*): what to do now.

    Example:

    ```python
    >>> from mllm_cl.errors import RecipeError
    >>> print(RecipeError("training.epochs: unknown key.", expected="num_train_epochs", fix="rename it."))
    training.epochs: unknown key.
      expected: num_train_epochs
      to fix: rename it.

    ```
    """

    def __init__(self, given: str, *, expected: str | None = None, fix: str | None = None) -> None:
        self.given, self.expected, self.fix = given, expected, fix
        lines = [given]
        if expected:
            lines.append(f"  expected: {expected}")
        if fix:
            lines.append(f"  to fix: {fix}")
        super().__init__("\n".join(lines))


class RecipeError(MllmClError):
    """A recipe, or an override on the command line, is not what was expected."""


class DataError(MllmClError):
    """A data file, a row or an image cannot be used."""


class StreamError(MllmClError):
    """A stream file, or the way its tasks fit together, is wrong."""


class ModelError(MllmClError):
    """A model, a processor or an adapter cannot be loaded or does not fit."""


class MethodError(MllmClError):
    """A method is unknown, has wrong options, or cannot be combined with the rest of the recipe."""


class RunError(MllmClError):
    """A run folder cannot be written, read or continued."""


class EvaluationError(MllmClError):
    """An evaluation could not be completed."""


class HubError(MllmClError):
    """The Hub cannot be reached, refuses what was asked, or does not hold what was expected."""


class SpectralError(MllmClError):
    """A tensor given to the spectral mathematics has the wrong shape or an option is out of range."""


def suggest(name: str, known: Iterable[str]) -> str:
    """Returns `did you mean 'x'?` for a misspelt `name`, or the list of what is `known`."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else "one of: " + ", ".join(known)
