"""Reads a run folder, finished or not, into a `RunSummary`. What is not on disk is `None`, never guessed."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllm_cl.errors import RunError
from mllm_cl.evaluation.matrix import BASE_STAGE, AccuracyMatrix, stage_name
from mllm_cl.parse import parse_json, parse_yaml

Json = dict[str, Any]

SECTIONS = ("training", "evaluation", "hub")
"""What reports read of a recipe as mappings."""


@dataclass(frozen=True)
class StageRecord:
    """What the ledger says about one stage; `None` where it says nothing.

    Args:
        index, name, task: 1, `01-plates`, `plates`.
        trained (`bool`): the ledger has a `stage_trained` event.
        unmeasured (`tuple[str, ...]`): tasks seen so far whose score is missing from the matrix.
        seconds (`float`, *optional*): training time.
        evaluation_seconds (`float`, *optional*): sum over the cells of this stage.
        stored_bytes (`float`, *optional*): bytes kept after this stage (adapter and state of the methods).
        extra_forward_passes (`float`, *optional*): passes of the model beyond one per micro-batch, on one process.
        flops (`float`, *optional*): training FLOPs by the formula of `training/flops.py`, of all processes.
    """

    index: int
    name: str
    task: str
    trained: bool = False
    unmeasured: tuple[str, ...] = ()
    seconds: float | None = None
    evaluation_seconds: float | None = None
    train_rows: float | None = None
    inquiry_rows: float | None = None
    steps: float | None = None
    tokens: float | None = None
    trainable_parameters: float | None = None
    stored_bytes: float | None = None
    peak_memory_mib: float | None = None
    train_loss: float | None = None
    extra_forward_passes: float | None = None
    reference_rows: float | None = None
    memory_rows: float | None = None
    flops: float | None = None


COSTS = (
    *("seconds", "train_rows", "inquiry_rows", "steps", "tokens", "trainable_parameters", "stored_bytes"),
    *("peak_memory_mib", "train_loss", "extra_forward_passes", "reference_rows", "memory_rows", "flops"),
)


@dataclass(frozen=True)
class RunSummary:
    """A run as reports see it.

    Args:
        folder (`Path`): where it lies.
        recipe, environment (`dict`): as read.
        recipe_text (`str`): `recipe.yaml`, verbatim.
        ledger (`list[dict]`): its events, in order.
        matrix (`AccuracyMatrix`, *optional*): `None` before anything was evaluated.
        stages (`tuple[StageRecord, ...]`): one per task, trained or not.
        problems (`tuple[str, ...]`): what could not be read; shown on top of the report.
    """

    folder: Path
    recipe: Json
    recipe_text: str
    environment: Json
    ledger: tuple[Json, ...]
    matrix: AccuracyMatrix | None
    stages: tuple[StageRecord, ...]
    problems: tuple[str, ...]

    @property
    def name(self) -> str:
        return str(self.recipe.get("name") or self.folder.name)

    @property
    def methods(self) -> list[tuple[str, Json]]:
        """Names and options, in the order of the recipe; empty for plain fine-tuning."""
        return [_method(entry) for entry in self.recipe.get("methods") or []]

    @property
    def method(self) -> str:
        """`spectral_consolidation + inquiry_regularization`, or `finetune`."""
        return " + ".join(name for name, _ in self.methods) or "finetune"

    @property
    def seed(self) -> int | None:
        return self.recipe.get("seed", self.environment.get("seed"))

    @property
    def model(self) -> str | None:
        section = self.recipe.get("model")
        return section.get("name_or_path") if isinstance(section, Mapping) else section

    @property
    def stream(self) -> str | None:
        section = self.recipe.get("stream")
        return (section.get("name") or section.get("path")) if isinstance(section, Mapping) else section

    @property
    def stream_fingerprint(self) -> str | None:
        """From the environment, the `started` event or the matrix, whichever has it."""
        started = [event for event in self.ledger if event.get("event") == "started"]
        for place in (self.environment, *reversed(started), self.matrix.run if self.matrix else {}):
            for key in ("stream_fingerprint", "fingerprint"):
                if place.get(key):
                    return str(place[key])
        return None

    @property
    def complete(self) -> bool:
        """True if every stage is trained and measured as its recipe asks for."""
        return bool(self.stages) and not self.missing

    @property
    def missing(self) -> tuple[str, ...]:
        """One sentence per stage that is not finished. A run that says it is complete lacks nothing: what it did not
        measure, its methods do not measure (`joint` has one stage, `single` looks at the task just learnt)."""
        if any(event.get("event") == "run_complete" for event in self.ledger) and self.matrix is not None:
            return ()
        found = []
        for stage in self.stages:
            if not stage.trained and len(stage.unmeasured) == stage.index:
                found.append(f"{stage.name}: not trained.")
            elif stage.unmeasured:
                found.append(f"{stage.name}: not measured on {', '.join(stage.unmeasured)}.")
        return (
            tuple(found) if self.stages else ("no task is known yet: there is neither a matrix nor a trained stage.",)
        )

    def total(self, field: str) -> float | None:
        """Returns the sum of a cost over the trained stages; `None` if one of them lacks it."""
        values = [getattr(stage, field) for stage in self.stages if stage.trained]
        return sum(values) if values and None not in values else None

    def per_train_row(self, field: str) -> float | None:
        """Returns the sum of a number of rows divided by that of the train rows; `None` if a stage lacks one."""
        rows, own = self.total("train_rows"), self.total(field)
        return own / rows if own is not None and rows else None

    def stored_per_task(self) -> float | None:
        """Returns the bytes kept after the last stage divided by the number of tasks learnt until then."""
        stored, learnt = self.final("stored_bytes"), sum(stage.trained for stage in self.stages)
        return stored / learnt if stored is not None else None

    def largest(self, field: str) -> float | None:
        """Returns the largest value over the trained stages; `None` if one of them lacks it."""
        values = [getattr(stage, field) for stage in self.stages if stage.trained]
        return max(values) if values and None not in values else None

    def final(self, field: str) -> float | None:
        """Returns the value after the last trained stage."""
        values = [getattr(stage, field) for stage in self.stages if stage.trained]
        return values[-1] if values else None


def read_run(folder: str | os.PathLike[str]) -> RunSummary:
    """Returns what a run folder says so far.

    Args:
        folder (`str`): a folder with a `recipe.yaml`; everything else may be missing.

    Raises:
        RunError: the folder is not that of a run.
        EvaluationError: its `matrix.json` is not one of ours, or was cut off.
    """
    folder = Path(folder)
    path = folder / "recipe.yaml"
    if not path.is_file():
        raise RunError(
            f"{folder}: " + ("no recipe.yaml in it." if folder.is_dir() else "there is no such folder."),
            expected="the folder of a run (recipe.yaml, ledger.jsonl, matrix.json, ...)",
            fix="give the output_dir of a recipe that `mllm-cl run` has executed.",
        )
    try:
        text = path.read_text(encoding="utf-8")
        recipe = parse_yaml(text)
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: cannot be read ({error}).", expected="the recipe of a run") from error
    sections = [recipe.get(name) or {} for name in SECTIONS] if isinstance(recipe, dict) and recipe else []
    if not sections or not all(isinstance(section, dict) for section in sections):
        raise RunError(f"{path}: holds no recipe.", expected="keys such as name, model, stream, methods, training")
    problems: list[str] = []
    environment = _read_environment(folder / "environment.json", problems)
    ledger = read_json_lines(folder / "ledger.jsonl", problems)
    matrix = AccuracyMatrix.read(folder) if (folder / "matrix.json").exists() else None
    stages = _stages(matrix, ledger)
    return RunSummary(folder, recipe, text, environment, tuple(ledger), matrix, stages, tuple(problems))


def read_json_lines(path: Path, problems: list[str]) -> list[Json]:
    """Returns the objects of a JSON-lines file; lines that are none are skipped and said so in `problems`.

    The last line of a run that was killed may be cut off; that is no reason to refuse the rest.
    """
    if not path.is_file():
        return []
    found: list[Json] = []
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                entry = parse_json(line)
            except ValueError:
                entry = None
            if isinstance(entry, dict):
                found.append(entry)
            else:
                problems.append(f"{path.name}, line {number}: not a JSON object; left out.")
    return found


def predictions_path(run: RunSummary, stage: str, task: str) -> Path:
    """Returns where the predictions of a cell lie."""
    return run.folder / "evaluation" / stage / task / "predictions.jsonl"


def run_labels(runs: Sequence[RunSummary]) -> list[str]:
    """Returns the names of the runs, or their folders where names are not unique."""
    for labels in ([run.name for run in runs], [run.folder.name for run in runs]):
        if len(set(labels)) == len(labels):
            return labels
    return [str(run.folder) for run in runs]


def _read_environment(path: Path, problems: list[str]) -> Json:
    if not path.is_file():
        return {}
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict):
        problems.append(f"{path.name}: not a JSON object; left out.")
        return {}
    return content


def _stages(matrix: AccuracyMatrix | None, ledger: list[Json]) -> tuple[StageRecord, ...]:
    trained = {as_index(event.get("stage")): event for event in ledger if event.get("event") == "stage_trained"}
    if matrix is not None:
        tasks = matrix.tasks
    else:
        started = next((event["tasks"] for event in ledger if isinstance(event.get("tasks"), list)), None)
        tasks = [str(name) for name in started] if started else []
        for index in sorted(index for index in trained if index is not None and index > len(tasks)):
            tasks.append(str(trained[index].get("task", index)))
    cells: dict[tuple[int | None, str], float | None] = {
        (as_index(event.get("stage")), str(event.get("task"))): as_number(event.get("seconds"))
        for event in ledger
        if event.get("event") == "cell"
    }
    records = []
    for index, task in enumerate(tasks, start=1):
        name, seen = stage_name(index, tasks), tasks[:index]
        if matrix is not None:
            name = matrix.stages[matrix.has_base :][index - 1]
            seen = [other for other in seen if matrix.row(index)[other] is None]
        event = trained.get(index, {})
        times = [seconds for (stage, _), seconds in cells.items() if stage == index]
        records.append(
            StageRecord(
                index,
                name,
                task,
                trained=index in trained,
                unmeasured=tuple(seen),
                evaluation_seconds=sum(t for t in times if t is not None) if times and None not in times else None,
                **{field: as_number(event.get(field)) for field in COSTS},
            )
        )
    return tuple(records)


def as_index(stage: object) -> int | None:
    """A stage is written as its number or as the name of its folder."""
    if isinstance(stage, str):
        head = stage.split("-", 1)[0]
        return 0 if stage == BASE_STAGE else int(head) if head.isdigit() else None
    return stage if isinstance(stage, int) else None


def as_number(value: object) -> float | None:
    usable = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e100
    return float(value) if usable else None  # type: ignore[arg-type]


def _method(entry: object) -> tuple[str, Json]:
    if isinstance(entry, Mapping) and "name" in entry:
        return str(entry["name"]), dict(entry.get("options") or {})
    if isinstance(entry, Mapping) and entry:
        name, options = next(iter(entry.items()))
        return str(name), dict(options) if isinstance(options, Mapping) else {}
    return str(entry), {}
