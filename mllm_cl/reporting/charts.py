"""Geometry of the small line charts in `report.html`: numbers in, coordinates out; the template draws them as SVG.

One panel per task instead of one crowded chart: readable for any number of tasks, on a phone, and without telling
colours apart. All panels share one scale.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from mllm_cl.reporting.formatting import score
from mllm_cl.reporting.run import RunSummary

WIDTH, HEIGHT = 260, 150
LEFT, RIGHT_EDGE, TOP, BOTTOM = 30, 250, 10, 126


@dataclass(frozen=True)
class Line:
    """One run in one panel: `segments` are the points of polylines (broken where a stage was not measured)."""

    name: str
    style: int
    segments: tuple[str, ...]
    points: tuple[tuple[float, float, str], ...]
    bars: tuple[tuple[float, float, float], ...]


@dataclass(frozen=True)
class Panel:
    """One chart; coordinates are those of a viewBox of `WIDTH` by `HEIGHT`."""

    title: str
    note: str
    lines: tuple[Line, ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    learnt: float | None = None
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = RIGHT_EDGE
    top: int = TOP
    bottom: int = BOTTOM


@dataclass
class Curve:
    """Values over stages 0..T, `None` where not measured."""

    name: str
    values: list[float | None]
    stderr: list[float | None] = field(default_factory=list)


def task_panels(run: RunSummary, others: Sequence[tuple[str, RunSummary]] = ()) -> list[Panel]:
    """Returns one panel per task, and one in front for the mean over the tasks seen so far.

    Args:
        run (`RunSummary`): drawn as a full line.
        others (`Sequence`): labels and runs drawn behind it, dashed, where they know the same task.
    """
    if run.matrix is None:
        return []
    runs = [(run.name, run), *others]
    panels = []
    means = [
        Curve(label, [None, *(metric.value for metric in other.matrix.average_accuracies())])
        for label, other in runs
        if other.matrix is not None
    ]
    scale = _scale(run.matrix.values)
    stages = len(run.stages)
    panels.append(_panel("All tasks seen so far", "mean", means, stages, scale))
    for index, task in enumerate(run.matrix.tasks, start=1):
        curves = [
            Curve(label, *_column(other, task))
            for label, other in runs
            if other.matrix is not None and task in other.matrix.tasks
        ]
        panels.append(_panel(task, f"learnt at stage {index}", curves, stages, scale, learnt=index))
    return panels


def general_panels(run: RunSummary, others: Sequence[tuple[str, RunSummary]] = ()) -> list[Panel]:
    """Returns one panel per general benchmark."""
    if run.matrix is None:
        return []
    scale = _scale(run.matrix.general_values)
    panels = []
    for name in run.matrix.general_names:
        curves = [
            Curve(label, *_column(other, name, general=True))
            for label, other in [(run.name, run), *others]
            if other.matrix is not None and name in other.matrix.general_names
        ]
        panels.append(_panel(name, "not trained by any task", curves, len(run.stages), scale))
    return panels


def _column(run: RunSummary, name: str, general: bool = False) -> tuple[list[float | None], list[float | None]]:
    matrix = run.matrix
    assert matrix is not None, "callers draw only runs with a matrix"
    names = matrix.general_names if general else matrix.tasks
    tables = (matrix.general_values, matrix.general_stderr) if general else (matrix.values, matrix.stderr)
    column = names.index(name)
    values, errors = ([row[column] for row in table] for table in tables)
    return (values, errors) if matrix.has_base else ([None, *values], [None, *errors])


def _scale(cells: Sequence[Sequence[float | None]]) -> float:
    """Percent scores share the scale 0..100; larger ones (captions can exceed 100) stretch it."""
    largest = max((value for row in cells for value in row if value is not None), default=0.0)
    return 100.0 if largest <= 100 else 50.0 * math.ceil(largest / 50)


def _panel(
    title: str, note: str, curves: Sequence[Curve], stages: int, scale: float, learnt: int | None = None
) -> Panel:
    def x(stage: int) -> float:
        return round(LEFT + 6 + (RIGHT_EDGE - LEFT - 12) * stage / max(stages, 1), 1)

    def y(value: float) -> float:
        return round(BOTTOM - (BOTTOM - TOP) * min(max(value, 0.0), scale) / scale, 1)

    lines = []
    for style, curve in enumerate(curves):
        errors = curve.stderr or [None] * len(curve.values)
        known = [(i, v, e) for i, (v, e) in enumerate(zip(curve.values, errors)) if v is not None and i <= stages]
        segments: list[list[str]] = []
        for position, (stage, value, _) in enumerate(known):
            if position == 0 or known[position - 1][0] != stage - 1:
                segments.append([])
            segments[-1].append(f"{x(stage)},{y(value)}")
        points = tuple((x(i), y(v), f"{curve.name}, stage {i}: {score(v, e)}") for i, v, e in known)
        bars = tuple((x(i), y(v + e), y(v - e)) for i, v, e in known if e and style == 0)
        lines.append(Line(curve.name, style, tuple(" ".join(s) for s in segments if len(s) > 1), points, bars))
    every = max(1, math.ceil((stages + 1) / 8))
    x_ticks = tuple((x(stage), str(stage)) for stage in range(0, stages + 1, every))
    y_ticks = tuple((y(value), f"{value:g}") for value in (0.0, scale / 2, scale))
    return Panel(title, note, tuple(lines), x_ticks, y_ticks, None if learnt is None else x(learnt))
