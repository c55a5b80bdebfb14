"""PNG figures for `report.md` and papers. matplotlib is imported on use, by its object interface: no global state."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mllm_cl.evaluation.matrix import AccuracyMatrix
from mllm_cl.reporting.run import RunSummary

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_figures(run: RunSummary) -> list[Path]:
    """Writes `figures/*.png` into the run folder and returns their paths; nothing when nothing was measured."""
    matrix = run.matrix
    if matrix is None or all(value is None for row in matrix.values for value in row):
        return []
    found = [("accuracy_matrix", heat_map(matrix)), ("task_curves", curves(matrix))]
    if any(value is not None for row in matrix.general_values for value in row):
        found.append(("general_ability", curves(matrix, general=True)))
    folder = run.folder / "figures"
    folder.mkdir(exist_ok=True)
    paths = []
    for name, figure in found:
        path = folder / f"{name}.png"
        temporary = folder / f".{name}.tmp"
        # no version or date in the file: same numbers, same bytes
        figure.savefig(temporary, format="png", dpi=150, metadata={"Software": None})
        paths.append(temporary.replace(path))
    return paths


def heat_map(matrix: AccuracyMatrix) -> Figure:
    """Returns the accuracy matrix as a figure; empty fields were not measured."""
    import numpy as np

    rows, columns = len(matrix.stages), len(matrix.tasks)
    figure, axes = _blank(1.6 + 0.95 * columns, 1.2 + 0.5 * rows)
    shown = np.ma.masked_invalid(np.array(matrix.values, dtype=float))
    axes.imshow(shown, cmap="Blues", vmin=0, vmax=max(100.0, float(shown.max())), aspect="auto")
    for i, row in enumerate(matrix.values):
        for j, value in enumerate(row):
            if value is not None:
                axes.text(j, i, f"{value:.1f}", ha="center", va="center", color="white" if value > 60 else "#1b1f24")
    axes.set_xticks(range(columns), [_short(task) for task in matrix.tasks], rotation=30, ha="right")
    axes.set_yticks(range(rows), [_short(stage) for stage in matrix.stages])
    axes.set_xlabel("measured on")
    axes.set_ylabel("after stage")
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return figure


def curves(matrix: AccuracyMatrix, general: bool = False) -> Figure:
    """Returns one curve per task (or general benchmark) over the stages, with standard errors where known."""
    names = matrix.general_names if general else matrix.tasks
    values = matrix.general_values if general else matrix.values
    errors = matrix.general_stderr if general else matrix.stderr
    figure, axes = _blank(7.2, 3.8)
    start = 0 if matrix.has_base else 1
    for j, name in enumerate(names):
        # NaN breaks the line where a stage was not measured
        heights = [float("nan") if (value := row[j]) is None else value for row in values]
        bars = [errors[i][j] or 0.0 for i in range(len(values))]
        stages = range(start, start + len(values))
        style = ("-", "--", ":")[j // 10 % 3]
        axes.errorbar(stages, heights, yerr=bars, marker="o", ms=4, lw=1.6, ls=style, capsize=2, label=_short(name))
    axes.set_xticks(range(start, len(matrix.tasks) + 1))
    axes.set_xlabel("stage (0 is the untouched model)" if start == 0 else "stage")
    axes.set_ylabel("score in percent")
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", color="#d8dde3", lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _blank(width: float, height: float):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _short(name: str) -> str:
    """Names are data: `$` would start a formula."""
    return (name if len(name) <= 24 else name[:23] + "…").replace("$", r"\$")
