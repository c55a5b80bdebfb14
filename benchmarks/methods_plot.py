"""The Pareto plot of the table of methods: final average x general ability x stored bytes, one panel per stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

SMALLEST, LARGEST = 30.0, 400.0  # areas of the marks in points²


@dataclass(frozen=True)
class Point:
    """A method: its final average and its change of general ability in percent, and the bytes it keeps at the end."""

    name: str
    final: float
    general: float
    stored: float


def front(points: Sequence[Point]) -> set[str]:
    """Returns the methods that no other one beats: at least as good in all three numbers and better in one."""

    def beaten(own: Point, other: Point) -> bool:
        pairs = ((other.final, own.final), (other.general, own.general), (-other.stored, -own.stored))
        return all(a >= b for a, b in pairs) and any(a > b for a, b in pairs)

    return {own.name for own in points if not any(beaten(own, other) for other in points)}


def write_pareto(panels: Mapping[str, Sequence[Point]], path: Path) -> None:
    """Writes the figure. Methods on the front are filled and named, the others are hollow; area = stored bytes."""
    shown = {stream: points for stream, points in panels.items() if points}
    figure = Figure(figsize=(5.6 * len(shown), 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    largest = max(point.stored for points in shown.values() for point in points) or 1.0
    for axes, (stream, points) in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown.items()):
        best = front(points)
        for point in points:
            area = SMALLEST + (LARGEST - SMALLEST) * point.stored / largest
            colour = "#1f6feb" if point.name in best else "#8b949e"
            face = colour if point.name in best else "none"
            axes.scatter(point.general, point.final, s=area, facecolors=face, edgecolors=colour, alpha=0.75)
            if point.name in best:
                axes.annotate(point.name, (point.general, point.final), (5, 5), textcoords="offset points", fontsize=7)
        axes.set_title(stream, fontsize=10)
        axes.set_xlabel("change of general ability in points")
        axes.set_ylabel("final average in percent")
        axes.grid(color="#d8dde3", lw=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(
        f"area: bytes kept after the last stage (largest: {largest / 1e6:.2f} MB); filled: on the front", fontsize=8
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=150, metadata={"Software": None})
