"""The accuracy matrix: the score on every task at every stage, on disk as `matrix.json` and `matrix.csv`.

Row i is a stage (`0-base`, the untouched model, comes first when it was measured; then `01-plates`, `02-menus`, ...),
column j a task. A cell that was not measured is `None`, in JSON `null`, in CSV an empty field; it never becomes 0.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mllm_cl.errors import EvaluationError, suggest
from mllm_cl.evaluation.metrics import Array, Metric, average_accuracies, derive, general_ability_deltas
from mllm_cl.evaluation.statistics import derived_standard_errors
from mllm_cl.files import write_text
from mllm_cl.parse import parse_json

SCHEMA_VERSION = 1
BASE_STAGE = "0-base"

Cells = list[list[float | None]]


def stage_name(index: int, tasks: Sequence[str]) -> str:
    """Returns the name of stage `index`, which is also its folder: `0-base`, `01-plates`, `02-menus`, ...

    >>> stage_name(0, ["plates", "menus"]), stage_name(2, ["plates", "menus"])
    ('0-base', '02-menus')
    """
    return BASE_STAGE if index == 0 else f"{index:02d}-{tasks[index - 1]}"


@dataclass
class AccuracyMatrix:
    """Scores in percent, a[i][j] = score on task j at stage i, with what derives from them.

    Args:
        tasks (`list[str]`): in the order of learning.
        metric (`list[str]`): name of the scorer of each task.
        general_names (`list[str]`): benchmarks that no task trains.
        general_metric (`list[str]`): their scorers; `exact_match` when left out.
        stages (`list[str]`): rows; one per task, and `0-base` in front once something is set at stage 0.
        values, stderr (`list[list[float | None]]`): one row per stage, one column per task.
        n (`list[int | None]`): test rows of each task.
        general_values, general_stderr, general_n: the same for the benchmarks.
        single, joint (`list[float | None]`, *optional*): scores of single-task and of joint training, from other runs.
        run (`dict`): seed, recipe_sha256, versions and whatever else identifies the run; written as it is.

    Example:

    ```python
    >>> from mllm_cl.evaluation.matrix import AccuracyMatrix
    >>> matrix = AccuracyMatrix(["plates", "menus"], ["exact_match", "exact_match"])
    >>> for stage, task, value in [(1, "plates", 80.0), (2, "plates", 60.0), (2, "menus", 90.0)]:
    ...     matrix.set(stage, task, value)
    >>> matrix.derived()["backward_transfer"].value
    -20.0
    >>> matrix.row(1)
    {'plates': 80.0, 'menus': None}

    ```
    """

    tasks: list[str]
    metric: list[str]
    general_names: list[str] = field(default_factory=list)
    general_metric: list[str] = field(default_factory=list)
    stages: list[str] = field(default_factory=list)
    values: Cells = field(default_factory=list)
    stderr: Cells = field(default_factory=list)
    n: list[int | None] = field(default_factory=list)
    general_values: Cells = field(default_factory=list)
    general_stderr: Cells = field(default_factory=list)
    general_n: list[int | None] = field(default_factory=list)
    single: list[float | None] | None = None
    joint: list[float | None] | None = None
    run: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.tasks, self.metric, self.general_names = list(self.tasks), list(self.metric), list(self.general_names)
        tasks, benchmarks = len(self.tasks), len(self.general_names)
        self.stages = self.stages or [stage_name(i, self.tasks) for i in range(1, tasks + 1)]
        rows = len(self.stages)
        self.values, self.stderr = self.values or _blank(rows, tasks), self.stderr or _blank(rows, tasks)
        self.general_values = self.general_values or _blank(rows, benchmarks)
        self.general_stderr = self.general_stderr or _blank(rows, benchmarks)
        self.n, self.general_n = self.n or [None] * tasks, self.general_n or [None] * benchmarks
        self.general_metric = self.general_metric or ["exact_match"] * benchmarks
        self._check()

    @property
    def has_base(self) -> bool:
        """True if something was measured on the untouched model."""
        return self.stages[0] == BASE_STAGE

    def set(self, stage: int | str, task: str, value: float, stderr: float | None = None, n: int | None = None) -> None:
        """Writes one cell.

        Args:
            stage (`int` or `str`): 0 for the untouched model, i after the i-th task; or the name of the stage.
            task (`str`): name of the task.
            value (`float`): score in percent.
            stderr (`float`, *optional*): its standard error, in percentage points.
            n (`int`, *optional*): test rows; must be the same at every stage, or the cells could not be compared.
        """
        column, row = _index(task, self.tasks, "task"), self._row_index(stage, create=True)
        _write((self.values, self.stderr, self.n), row, column, value, stderr, n, f"{self.stages[row]}, {task}")

    def set_general(
        self, stage: int | str, name: str, value: float, stderr: float | None = None, n: int | None = None
    ) -> None:
        """Writes the score on a general benchmark at a stage, like `set`."""
        column, row = _index(name, self.general_names, "general benchmark"), self._row_index(stage, create=True)
        block = (self.general_values, self.general_stderr, self.general_n)
        _write(block, row, column, value, stderr, n, f"{self.stages[row]}, {name}")

    def row(self, stage: int | str) -> dict[str, float | None]:
        """Returns the scores of one stage by task; all `None` for a base that was not measured."""
        if stage in (0, BASE_STAGE) and not self.has_base:
            return dict.fromkeys(self.tasks)
        return dict(zip(self.tasks, self.values[self._row_index(stage)]))

    def column(self, task: str) -> dict[str, float | None]:
        """Returns the scores of one task by stage."""
        column = _index(task, self.tasks, "task")
        return {stage: row[column] for stage, row in zip(self.stages, self.values)}

    def missing_stages(self) -> list[str]:
        """Returns the names of the stages that lack a score on a task seen so far."""
        rows = enumerate(zip(self.stages[self.has_base :], self._trained(self.values)), start=1)
        return [stage for index, (stage, row) in rows if None in row[:index]]

    def complete_stages(self) -> int:
        """Returns how many of the first stages have a score on every task seen so far."""
        missing = self.missing_stages()
        return self.stages[self.has_base :].index(missing[0]) if missing else len(self.tasks)

    def derived(self, through: int | None = None) -> dict[str, Metric]:
        """Returns every metric of `mllm_cl.evaluation.metrics`, over all tasks or over the first `through` of them."""
        return derive(**self._arguments(through))

    def derived_stderr(self, through: int | None = None) -> dict[str, float | None]:
        """Returns the standard errors of `derived`, cells taken as independent (see `derived_standard_errors`)."""
        given, tasks = self._arguments(through), through or len(self.tasks)
        base, trained = self._base(self.stderr, len(self.tasks)), _array(self._trained(self.stderr))
        return derived_standard_errors(
            stderr=trained[:tasks, :tasks],
            zero_shot_stderr=base[:tasks] if "zero_shot" in given else None,
            general_stderr=self._general(self.general_stderr)[: tasks + 1] if "general" in given else None,
            **given,
        )

    def average_accuracies(self) -> list[Metric]:
        """Returns AA_t for t = 1..T."""
        return average_accuracies(_array(self._trained(self.values)))

    def general_deltas(self) -> list[Metric]:
        """Returns the change of general ability against the untouched model, for t = 1..T."""
        general = self._general(self.general_values) if self.general_names else None
        return general_ability_deltas(general, len(self.tasks))

    def to_json(self) -> dict[str, Any]:
        """Returns what `matrix.json` holds, as plain dicts and lists; derived metrics are computed on the way."""
        metrics, errors = self.derived(), self.derived_stderr()
        return {
            "schema_version": SCHEMA_VERSION,
            "tasks": self.tasks,
            "stages": self.stages,
            "metric": self.metric,
            "unit": "percent",
            "values": self.values,
            "n": self.n,
            "stderr": self.stderr,
            "average_accuracy": [metric.value for metric in self.average_accuracies()],
            "derived": {name: metric.value for name, metric in metrics.items()},
            "derived_details": {name: {**vars(metric), "stderr": errors[name]} for name, metric in metrics.items()},
            "references": {"single": self.single, "joint": self.joint},
            "general": {
                "names": self.general_names,
                "metric": self.general_metric,
                "values": self.general_values,
                "n": self.general_n,
                "stderr": self.general_stderr,
                "delta": [metric.value for metric in self.general_deltas()],
            },
            "run": self.run,
        }

    @classmethod
    def from_json(cls, payload: Mapping[str, Any], place: str = "matrix.json") -> AccuracyMatrix:
        """Returns the matrix that `to_json` wrote; derived numbers are computed anew, not read.

        Raises:
            EvaluationError: the payload is no accuracy matrix of this schema version, or its parts do not fit.
        """
        version = payload.get("schema_version") if isinstance(payload, Mapping) else None
        if version != SCHEMA_VERSION:
            given = "not an accuracy matrix (no schema_version)" if version is None else f"schema_version {version!r}"
            fix = "name the folder of a run." if version is None else "read it with the version that wrote it."
            raise EvaluationError(f"{place}: {given}.", expected=f"schema_version {SCHEMA_VERSION}", fix=fix)
        missing = [key for key in ("tasks", "stages", "metric", "unit", "values", "n", "stderr") if key not in payload]
        if missing or payload["unit"] != "percent":
            given = f"no {', '.join(missing)}" if missing else f"unit {payload['unit']!r}"
            raise EvaluationError(f"{place}: {given}.", expected="tasks, stages, metric, values, n, stderr in percent")
        general, references = payload.get("general") or {}, payload.get("references") or {}
        try:
            return cls(
                **{key: payload[key] for key in ("tasks", "metric", "stages", "values", "stderr", "n")},
                general_names=general.get("names", []),
                general_metric=general.get("metric", []),
                general_values=general.get("values", []),
                general_stderr=general.get("stderr", []),
                general_n=general.get("n", []),
                single=references.get("single"),
                joint=references.get("joint"),
                run=dict(payload.get("run") or {}),
            )
        except EvaluationError as error:
            raise EvaluationError(f"{place}: {error.given}", expected=error.expected) from error
        except (TypeError, ValueError, AttributeError) as error:
            raise EvaluationError(f"{place}: a part has the wrong type ({error}).") from error

    def to_csv(self) -> str:
        """Returns the table of `matrix.csv`: one line per stage, one column per task, then `general/NAME` columns."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["stage", *self.tasks, *(f"general/{name}" for name in self.general_names)])
        for stage, values, general in zip(self.stages, self.values, self.general_values):
            writer.writerow([stage, *("" if value is None else repr(value) for value in [*values, *general])])
        return text.getvalue()

    def write(self, folder: str | os.PathLike[str]) -> Path:
        """Writes `matrix.json` and `matrix.csv` into `folder`, each atomically, and returns the path of the first."""
        folder = Path(folder)
        write_text(folder / "matrix.csv", self.to_csv())
        text = json.dumps(self.to_json(), indent=2, ensure_ascii=False, allow_nan=False)
        write_text(folder / "matrix.json", text + "\n")
        return folder / "matrix.json"

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> AccuracyMatrix:
        """Returns the matrix of a run folder (or of a `matrix.json` named directly).

        Raises:
            EvaluationError: there is none, it was cut off while written, or it is not one of ours.
        """
        path = Path(folder)
        path = path / "matrix.json" if path.is_dir() or path.suffix != ".json" else path
        try:
            payload = parse_json(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
        except OSError as error:
            raise EvaluationError(
                f"{path}: cannot be read ({error.strerror}).", expected="the folder of a run with a matrix.json"
            ) from error
        except ValueError as error:
            raise EvaluationError(
                f"{path}: not valid JSON ({error}).",
                expected="a complete matrix.json",
                fix="evaluate again; the file was cut off or edited.",
            ) from error
        return cls.from_json(payload, place=str(path))

    def _arguments(self, through: int | None) -> dict[str, Any]:
        tasks = len(self.tasks) if through is None else through
        if not 1 <= tasks <= len(self.tasks):
            raise EvaluationError(f"through={through}.", expected=f"a number of tasks from 1 to {len(self.tasks)}")
        given: dict[str, Any] = {"values": _array(self._trained(self.values))[:tasks, :tasks]}
        if self.has_base:
            given["zero_shot"] = self._base(self.values, len(self.tasks))[:tasks]
        if self.single is not None:
            given["single"] = _array([self.single])[0, :tasks]
        if self.joint is not None and tasks == len(self.tasks):
            given["joint"] = _array([self.joint])[0]
        if self.general_names:
            given["general"] = self._general(self.general_values)[: tasks + 1]
        return given

    def _trained(self, cells: Cells) -> Cells:
        return cells[self.has_base :]

    def _base(self, cells: Cells, columns: int) -> Array:
        return _array(cells)[0] if self.has_base else np.full(columns, np.nan)

    def _general(self, cells: Cells) -> Array:
        # (stages, M) -> (T + 1, M)
        columns = len(self.general_names)
        return np.vstack([self._base(cells, columns), _array(self._trained(cells)).reshape(-1, columns)])

    def _row_index(self, stage: int | str, create: bool = False) -> int:
        name = stage
        if isinstance(stage, int):
            if not 0 <= stage <= len(self.tasks):
                raise EvaluationError(f"stage {stage}.", expected=f"0 (the untouched model) to {len(self.tasks)}")
            name = stage_name(stage, self.tasks) if stage == 0 else self.stages[self.has_base :][stage - 1]
        if name == BASE_STAGE and not self.has_base and create:
            self.stages.insert(0, BASE_STAGE)
            for cells, columns in self._tables():
                cells.insert(0, [None] * columns)
        return _index(str(name), self.stages, "stage")

    def _tables(self) -> list[tuple[Cells, int]]:
        own, general = (self.values, self.stderr), (self.general_values, self.general_stderr)
        return [(cells, len(self.tasks)) for cells in own] + [(cells, len(self.general_names)) for cells in general]

    def _check(self) -> None:
        """Raises if the parts do not fit together."""
        names = [*self.tasks, *self.stages, *self.general_names]
        names += [metric for metric in (*self.metric, *self.general_metric) if metric is not None]
        odd = [name for name in names if not isinstance(name, str)]
        if odd:
            raise EvaluationError(f"{odd[0]!r} as a name.", expected="names of tasks, stages and metrics")
        if not self.tasks or len(set(self.tasks)) != len(self.tasks):
            raise EvaluationError(f"tasks {self.tasks}.", expected="one or more different names")
        if len(self.stages) != len(self.tasks) + self.has_base:
            raise EvaluationError(
                f"{len(self.stages)} stages for {len(self.tasks)} tasks.",
                expected=f"one stage per task, and {BASE_STAGE!r} in front of them when it was measured",
            )
        lists = {"metric": self.metric, "n": self.n, "single": self.single, "joint": self.joint}
        general = {"general.metric": self.general_metric, "general.n": self.general_n}
        for name, entries in {**lists, **general}.items():
            columns = len(self.general_names if name in general else self.tasks)
            if entries is not None and len(entries) != columns:
                raise EvaluationError(f"{len(entries)} entries in {name}.", expected=f"{columns}, one per column")
        for cells, columns in self._tables():
            if len(cells) != len(self.stages) or any(len(row) != columns for row in cells):
                raise EvaluationError(
                    f"a table of {len(cells)} rows of {sorted({len(row) for row in cells})} cells.",
                    expected=f"{len(self.stages)} stages of {columns} cells",
                )
            odd = [cell for row in cells for cell in row if cell is not None and not _is_number(cell)]
            if cells is self.stderr or cells is self.general_stderr:
                odd += [cell for row in cells for cell in row if cell is not None and _is_number(cell) and cell < 0]
            if odd:
                raise EvaluationError(
                    f"a cell holds {odd[0]!r}.", expected="a number in percent (an error: not below 0), or null"
                )


def _write(
    block: tuple[Cells, Cells, list[int | None]],
    row: int,
    column: int,
    value: float,
    stderr: float | None,
    n: int | None,
    place: str,
) -> None:
    values, errors, counts = block
    if not _is_number(value) or not (stderr is None or (_is_number(stderr) and stderr >= 0)):
        raise EvaluationError(
            f"{place}: score {value!r} with standard error {stderr!r}.",
            expected="finite numbers in percent",
            fix="leave a cell that could not be measured out.",
        )
    if n is not None and counts[column] not in (None, n):
        raise EvaluationError(
            f"{place}: {n} test rows, {counts[column]} at an earlier stage.",
            expected="the same test rows at every stage",
            fix="evaluate all stages with the same limit.",
        )
    values[row][column], errors[row][column] = float(value), None if stderr is None else float(stderr)
    counts[column] = counts[column] if n is None else int(n)


def _index(name: str, names: Sequence[str], kind: str) -> int:
    if name not in names:
        raise EvaluationError(f"no {kind} is called {name!r}.", expected=suggest(name, names) if names else None)
    return list(names).index(name)


def _blank(rows: int, columns: int) -> Cells:
    return [[None] * columns for _ in range(rows)]


def _array(cells: Cells) -> Array:
    return np.array(cells, dtype=np.float64)


def _is_number(value: object) -> bool:
    """True for numbers that can be calculated with: neither infinite nor so large that their squares are."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e100


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON; a cell that was not measured is null")
