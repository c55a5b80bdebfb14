"""Validation of a whole stream: every row and image of every split, and what must not cross between splits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mllm_cl.data.problems import Problem, format_problems, problem_of
from mllm_cl.data.rows import Row, Rows
from mllm_cl.data.validate import ImageCheck, SplitReport, check_split
from mllm_cl.errors import DataError, StreamError
from mllm_cl.streams.stream import Stream
from mllm_cl.streams.user import SPLITS, image_folder_of, open_split, read_stream, read_stream_file

Progress = Callable[[str, int, int], None]


@dataclass
class StreamReport:
    """What the validation of a stream found.

    Args:
        name (`str`): name of the stream; the path when it could not be read.
        counts (`dict`): task -> split -> number of rows.
        problems (`list[Problem]`): errors and warnings, task by task.
    """

    name: str
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

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
    images: ImageCheck = "decode",
    progress: Progress | None = None,
    workers: int = 8,
) -> StreamReport:
    """Returns everything that is wrong with a stream; never raises because of its content.

    Args:
        stream (`Stream`, `str` or `Path`): the stream, or its stream file.
        images, workers: as in `mllm_cl.data.validate.validate_rows`.
        progress (`Callable`, *optional*): called with (`task/split`, rows done, rows).
    """
    if isinstance(stream, Stream):
        report = StreamReport(stream.name)
        for task in stream:
            opened = {"train": task.train, "validation": task.validation, "test": task.test}
            splits = {split: rows for split, rows in opened.items() if split != "validation" or len(rows)}
            _check_task(report, task.name, splits, images, progress, workers)
        return report
    report = StreamReport(str(stream))
    try:
        file, content = read_stream_file(stream)
    except StreamError as error:
        report.problems.append(_file_problem(str(stream), error))
        return report
    report.name = content.name
    for index, entry in enumerate(content.tasks):
        splits: dict[str, Sequence[Row]] = {}
        folder, check = None, images
        try:
            folder = image_folder_of(file, content, index)
        except StreamError as error:
            report.problems.append(_file_problem(str(file), error))
            check = "none"  # every image would be missing
        for split in SPLITS:
            try:
                rows = open_split(file, content, index, split, folder)
            except StreamError as error:
                report.counts.setdefault(entry.name, {})[split] = 0
                report.problems.append(_file_problem(str(file), error))
                continue
            if rows is not None:
                splits[split] = rows
        _check_task(report, entry.name, splits, check, progress, workers)
    return report


def ensure_valid(
    stream: Stream | str | Path,
    *,
    images: ImageCheck = "header",
    progress: Progress | None = None,
    first: int = 20,
) -> Stream:
    """Returns the stream if it has no errors; what training calls before it starts.

    Args:
        stream (`Stream`, `str` or `Path`): the stream, or its stream file.
        images (`str`, defaults to `"header"`): images are opened but not decoded, a compromise for large streams.
        progress (`Callable`, *optional*): as in `validate_stream`.
        first (`int`, defaults to 20): how many errors to name.

    Raises:
        StreamError: there are errors; names the first of them and how many there are.
    """
    report = validate_stream(stream, images=images, progress=progress)
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
    images: ImageCheck,
    progress: Progress | None,
    workers: int,
) -> None:
    counts = report.counts.setdefault(task, {})
    checked: dict[str, SplitReport] = {}
    for split, rows in splits.items():
        name = f"{task}/{split}"
        tell = None if progress is None else _named(progress, name)
        checked[split] = check_split(rows, split=split, name=name, images=images, progress=tell, workers=workers)
        counts[split] = checked[split].rows
        report.problems += checked[split].problems
    names = list(checked)
    for number, split in enumerate(names):
        for other in names[number + 1 :]:
            report.problems += _shared(task, split, other, checked, splits)


def _named(progress: Progress, name: str) -> Callable[[int, int], None]:
    return lambda done, total: progress(name, done, total)


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
