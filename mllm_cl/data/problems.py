"""What is wrong with a row: the error that names its place, and the entry of a validation listing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mllm_cl.errors import DataError


class RowError(DataError):
    """One row cannot be used. A program reads `kind`, `file`, `number` and `row_id`; a person reads the message.

    Args:
        message (`str`): what was found in the row.
        kind (`str`, defaults to `"row"`): short name of the mistake, as in `Problem.kind`.
        expected, fix (`str`, *optional*): as in `MllmClError`.
        partial (`dict`, *optional*): the row as far as it could be converted, for further checks.
        file (`str`, *optional*), number (`int`, *optional*), unit (`str`), row_id (`str`, *optional*): its place.
    """

    def __init__(
        self,
        message: str,
        *,
        kind: str = "row",
        expected: str | None = None,
        fix: str | None = None,
        partial: dict[str, Any] | None = None,
        file: str | None = None,
        number: int | None = None,
        unit: str = "row",
        row_id: str | None = None,
    ) -> None:
        self.message, self.kind, self.partial = message, kind, partial
        self.file, self.number, self.unit, self.row_id = file, number, unit, row_id
        place = "" if file is None else f"{file}, {unit} {number}"
        name = "" if row_id is None else f" (id {row_id!r})"
        super().__init__(f"{place}{name}: {message}" if place else message, expected=expected, fix=fix)

    def at(self, file: str, number: int, unit: str = "row", row_id: str | None = None) -> RowError:
        """Returns the same error with its place."""
        return RowError(
            self.message,
            kind=self.kind,
            expected=self.expected,
            fix=self.fix,
            partial=self.partial,
            file=file,
            number=number,
            unit=unit,
            row_id=row_id,
        )


@dataclass(frozen=True)
class Problem:
    """One entry of a validation listing.

    Args:
        file (`str`): file, folder, Hub id, or `task/split` for rows made in memory.
        row (`int`, *optional*): number of the row from 1 (line number in JSONL); `None` when the file is meant.
        id (`str`, *optional*): id of the row, when it has one.
        kind (`str`): short name, e.g. `"image_missing"`.
        message (`str`): what was found.
        fix (`str`): what to do.
        severity (`str`, defaults to `"error"`): `"warning"` where training may go on.
        unit (`str`, defaults to `"row"`): what `row` counts.
        position (`int`, *optional*): index of the row in the rows that were checked, from 0.
    """

    file: str
    row: int | None
    id: str | None
    kind: str
    message: str
    fix: str
    severity: str = "error"
    unit: str = "row"
    position: int | None = None

    def __str__(self) -> str:
        place = self.file if self.row is None else f"{self.file}, {self.unit} {self.row}"
        name = "" if self.id is None else f" (id {self.id!r})"
        return f"{self.severity}: {place}{name}: {self.message}\n    to fix: {self.fix}"


def problem_of(error: DataError, file: str) -> Problem:
    """Returns the listing entry of an error met while reading `file`."""
    if isinstance(error, RowError):
        message = error.message if error.expected is None else f"{error.message} Expected: {error.expected}."
        fix = error.fix or "correct or remove the row."
        return Problem(error.file or file, error.number, error.row_id, error.kind, message, fix, unit=error.unit)
    given = error.given.removeprefix(f"{file}: ").removeprefix(f"{file}, ")
    message = given if error.expected is None else f"{given} Expected: {error.expected}."
    return Problem(file, None, None, "file", message, error.fix or "correct the file.")


def format_problems(problems: Sequence[Problem], limit: int | None = 20) -> str:
    """Returns a readable listing: errors before warnings, then how many of each kind there are.

    Args:
        problems (`Sequence[Problem]`): what a validation found.
        limit (`int`, *optional*, defaults to 20): most entries to print; all when `None`.

    Example:

    ```python
    >>> from mllm_cl.data.problems import Problem, format_problems
    >>> print(format_problems([Problem("a.jsonl", 3, "7", "empty_answer", "the answer is empty.", "fill it in.")]))
    error: a.jsonl, row 3 (id '7'): the answer is empty.
        to fix: fill it in.
    1 problem: 1 x empty_answer

    ```
    """
    if not problems:
        return "no problems"
    ordered = sorted(problems, key=lambda problem: problem.severity != "error")
    shown = ordered if limit is None else ordered[:limit]
    lines = [str(problem) for problem in shown]
    if len(shown) < len(ordered):
        lines.append(f"... and {len(ordered) - len(shown)} more")
    kinds = Counter(problem.kind for problem in ordered).most_common()
    noun = "problem" if len(ordered) == 1 else "problems"
    lines.append(f"{len(ordered)} {noun}: " + ", ".join(f"{count} x {kind}" for kind, count in kinds))
    return "\n".join(lines)
