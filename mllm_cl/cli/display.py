"""What a person sees: results on stdout, progress and notes on stderr; bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator, Sequence

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress
from rich.progress import Task as RichTask
from rich.table import Table
from rich.text import Text

from mllm_cl.evaluation.matrix import AccuracyMatrix
from mllm_cl.reporting.formatting import NOT_MEASURED, duration, score
from mllm_cl.training.progress import Progress

WIDE = 200
"""Columns of what is not a terminal: a file or a pipe has no edge to wrap at."""
WORTH_A_LINE = 2.0
"""Seconds from which a finished bar leaves a line behind."""
HEARTBEAT = 30.0
"""Seconds between the lines of a plain log."""


def console(stderr: bool = False) -> Console:
    """Returns a console that prints text as it is."""
    made = Console(stderr=stderr, highlight=False, markup=False, emoji=False, soft_wrap=False)
    if not made.is_terminal:
        made.width = max(made.width, WIDE)
    return made


def say(text: str) -> None:
    """Prints a line of the result."""
    console().print(text, soft_wrap=True)


def show_table(rows: Sequence[Sequence[str]], title: str | None = None) -> None:
    """Prints a title, header and rows; columns of numbers are set right."""
    header, *body = rows
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for number, name in enumerate(header):
        cells = [row[number] for row in body]
        numeric = number > 0 and all(re.match(rf"[−+-]?\d|{NOT_MEASURED}|$", cell) for cell in cells)
        table.add_column(Text(name), justify="right" if numeric else "left", overflow="fold")
    for row in body:
        table.add_row(*(Text(cell) for cell in row))
    if title:
        console().print(title, style="bold", soft_wrap=True)
    console().print(table)


def show_matrix(matrix: AccuracyMatrix, title: str) -> None:
    """Prints the accuracy matrix, in percent with standard errors; general benchmarks are its last columns."""
    rows = [["stage", *matrix.tasks, *matrix.general_names]]
    for index, stage in enumerate(matrix.stages):
        values = [*matrix.values[index], *matrix.general_values[index]]
        errors = [*matrix.stderr[index], *matrix.general_stderr[index]]
        rows.append([stage, *("" if v is None else score(v, e) for v, e in zip(values, errors))])
    show_table(rows, title)


def make_progress(prefix: str = "") -> contextlib.AbstractContextManager[Progress]:
    """Returns a display for the time of a `with` block; `prefix` goes in front of every line."""
    target = console(stderr=True)
    return _bars(target, prefix) if target.is_terminal else contextlib.nullcontext(PlainLog(target, prefix))


class _Count(ProgressColumn):
    """Rows done of all rows; nothing while the length is unknown."""

    def render(self, task: RichTask) -> Text:
        return Text("" if task.total is None else f"{task.completed:.0f}/{task.total:.0f}")


def live_bars(target: Console) -> RichProgress:
    """Returns the bars of a terminal, to be used in a `with` block; they vanish at its end."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        _Count(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return RichProgress(*columns, console=target, transient=True)


@contextlib.contextmanager
def _bars(target: Console, prefix: str) -> Iterator[Progress]:
    with live_bars(target) as progress:
        yield Bars(progress, prefix)


class Bars:
    """Live bars. A finished bar vanishes; one that took a while leaves a line."""

    def __init__(self, progress: RichProgress, prefix: str = "") -> None:
        self.progress, self.prefix = progress, prefix

    @contextlib.contextmanager
    def bar(self, description: str, total: int) -> Iterator[Callable[[int], None]]:
        task = self.progress.add_task(self.prefix + description, total=total)
        started = time.monotonic()
        try:
            yield lambda rows: self.progress.advance(task, rows)
        finally:
            self.progress.remove_task(task)
        self._leave(description, total, time.monotonic() - started)

    @contextlib.contextmanager
    def waiting(self, description: str) -> Iterator[None]:
        task = self.progress.add_task(self.prefix + description, total=None)
        try:
            yield
        finally:
            self.progress.remove_task(task)

    def _leave(self, description: str, total: int, seconds: float) -> None:
        if seconds >= WORTH_A_LINE:
            self.progress.console.print(f"{self.prefix}{description}: {total} rows in {duration(seconds)}")


class PlainLog:
    """One line when something is finished, and one every half minute while it is not."""

    def __init__(self, target: Console, prefix: str = "") -> None:
        self.target, self.prefix = target, prefix

    def _print(self, text: str) -> None:
        self.target.print(self.prefix + text, soft_wrap=True)

    @contextlib.contextmanager
    def bar(self, description: str, total: int) -> Iterator[Callable[[int], None]]:
        started = told = time.monotonic()
        done = 0

        def advance(rows: int) -> None:
            nonlocal done, told
            done += rows
            if time.monotonic() - told >= HEARTBEAT and done < total:
                told = time.monotonic()
                self._print(f"{description}: {done}/{total} rows")

        yield advance
        self._print(f"{description}: {total} rows in {duration(time.monotonic() - started)}")

    @contextlib.contextmanager
    def waiting(self, description: str) -> Iterator[None]:
        self._print(f"{description} ...")
        yield
