"""Validation of a whole stream: every row and image of every split, and what must not cross between splits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from mllm_cl.data.problems import Problem, format_problems, problem_of
from mllm_cl.data.rows import Row, Rows
from mllm_cl.data.validate import FULL, Checks, SplitReport, check_split
from mllm_cl.errors import DataError, StreamError
from mllm_cl.streams.stream import Stream, Task
from mllm_cl.streams.user import SPLITS, image_folder_of, open_split, read_stream, read_stream_file

BEFORE_TRAINING = Checks(images="header")


@dataclass
class StreamReport:
    """What the validation of a stream found.

    Args:
        name (`str`): name of the stream; the path when it could not be read.
        counts (`dict`): task -> split -> number of rows.
        problems (`list[Problem]`): errors and warnings, task by task.
        located (`list`): (task, split, problem) of the problems of single rows.
    """

    name: str
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    located: list[tuple[str, str, Problem]] = field(default_factory=list)

    @property
    def errors(self) -> list[Problem]:
        """The problems that forbid training."""
        return [problem for problem in self.problems if problem.severity == "error"]

    @property
    def warnings(self) -> list[Problem]:
        """The problems that may be meant: shared images, ids that had to be changed."""
        return [problem for problem in self.problems if problem.severity != "error"]

    @property
    def is_valid(self) -> bool:
        """True if there is no error."""
        return not self.errors


def validate_stream(
    stream: Stream | str | Path,
    *,
    checks: Checks = FULL,
) -> StreamReport:
    """Returns everything that is wrong with a stream; never raises because of its content.

    Args:
        stream (`Stream`, `str` or `Path`): the stream, or its stream file.
        checks (`Checks`, *optional*): what to do with images; progress is told as (`task/split`, rows done, rows).
    """
    if isinstance(stream, Stream):
        report = StreamReport(stream.name)
        for task in stream:
            opened = {"train": task.train, "validation": task.validation, "test": task.test}
            splits = {split: rows for split, rows in opened.items() if split != "validation" or len(rows)}
            _check_task(report, task.name, splits, checks)
            report.problems += _published(task)
        return report
    report = StreamReport(str(stream))
    try:
        file, content = read_stream_file(stream)
    except StreamError as error:
        report.problems.append(_file_problem(str(stream), error))
        return report
    report.name = content.name
    for index, entry in enumerate(content.tasks):
        folder, here = None, checks
        try:
            folder = image_folder_of(file, content, index)
        except StreamError as error:
            report.problems.append(_file_problem(str(file), error))
            here = replace(checks, images="none")  # every image would be missing
        tasks: dict[str, dict[str, Sequence[Row]]] = {}
        for split in SPLITS:
            try:
                opened = open_split(file, content, index, split, folder)
            except StreamError as error:
                report.counts.setdefault(entry.name, {})[split] = 0
                report.problems.append(_file_problem(str(file), error))
                continue
            for name, rows in opened.items():
                tasks.setdefault(name, {})[split] = rows
        for name, splits in tasks.items():
            _check_task(report, name, splits, here)
    return report


def ensure_valid(
    stream: Stream | str | Path,
    *,
    checks: Checks = BEFORE_TRAINING,
    first: int = 20,
) -> Stream:
    """Returns the stream if it has no errors; what training calls before it starts.

    Args:
        stream (`Stream`, `str` or `Path`): the stream, or its stream file.
        checks (`Checks`, *optional*): by default images are opened but not decoded, a compromise for large streams.
        first (`int`, defaults to 20): how many errors to name.

    Raises:
        StreamError: there are errors; names the first of them and how many there are.
    """
    report = validate_stream(stream, checks=checks)
    errors = report.errors
    if errors:
        noun = "problem" if len(errors) == 1 else "problems"
        raise StreamError(
            f"{report.name}: {len(errors)} {noun} in the data.\n{format_problems(errors, first)}",
            fix="correct the rows; `mllm-cl data validate` lists all of them.",
        )
    return stream if isinstance(stream, Stream) else read_stream(stream)


def _file_problem(file: str, error: StreamError) -> Problem:
    problem = problem_of(DataError(error.given, expected=error.expected, fix=error.fix), file)
    return Problem(file, None, None, "file", problem.message.removeprefix(f"{file}, "), problem.fix)


def _check_task(
    report: StreamReport,
    task: str,
    splits: dict[str, Sequence[Row]],
    checks: Checks,
) -> None:
    counts = report.counts.setdefault(task, {})
    checked: dict[str, SplitReport] = {}
    for split, rows in splits.items():
        name = f"{task}/{split}"
        checked[split] = check_split(rows, split=split, name=name, checks=checks)
        counts[split] = checked[split].rows
        report.problems += checked[split].problems
        report.located += [
            (task, split, problem) for problem in checked[split].problems if problem.position is not None
        ]
    names = list(checked)
    for number, split in enumerate(names):
        for other in names[number + 1 :]:
            report.problems += _shared(task, split, other, checked, splits)


def _published(task: Task) -> list[Problem]:
    """Warns of splits that have another number of rows than their authors published."""
    problems = []
    for split, count in task.sizes.items():
        rows: Sequence[Row] = {"train": task.train, "validation": task.validation, "test": task.test}[split]
        if len(rows) and len(rows) != count:
            place = (rows.origin if isinstance(rows, Rows) else None) or f"{task.name}/{split}"
            message = f"{len(rows)} {split} rows, but {task.name} was published with {count}."
            fix = "compare results only with runs on the same rows; prepare the data again if rows are missing."
            problems.append(Problem(place, None, None, "row_count", message, fix, severity="warning"))
    return problems


def _shared(
    task: str, split: str, other: str, checked: dict[str, SplitReport], splits: dict[str, Sequence[Row]]
) -> list[Problem]:
    """Warns of ids and images that two splits have in common, with one example each."""
    problems = []
    rows = splits[other]
    origin = (rows.origin if isinstance(rows, Rows) else None) or f"{task}/{other}"
    ids = sorted(checked[split].ids & checked[other].ids)
    if ids:
        noun = "id is" if len(ids) == 1 else "ids are"
        message = f"{len(ids)} {noun} used in {split} and {other} of {task}, e.g. {ids[0]!r}."
        fix = "give every row of a task its own id, if they are not the same rows."
        problems.append(Problem(origin, None, None, "shared_id", message, fix, severity="warning"))
    keys = [key for key in checked[other].images if key in checked[split].images]
    if keys:
        position = checked[other].images[keys[0]]
        number, unit = (rows.number(position), rows.unit) if isinstance(rows, Rows) else (position + 1, "row")
        noun = "image is" if len(keys) == 1 else "images are"
        message = f"{len(keys)} {noun} in {split} and {other} of {task}, first here: {keys[0]!r}."
        fix = "split by image if scores shall say something about new images."
        problems.append(Problem(origin, number, None, "shared_image", message, fix, severity="warning", unit=unit))
    return problems
