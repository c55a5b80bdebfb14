"""Measures checkpoints on some tasks, outside of a run: what `mllm-cl evaluate` calls.

The task is the outer loop and the checkpoint the inner one: the rows of a task are read, decoded and tokenised once, and
checkpoints of one base model are adapters that are switched in place (`evaluation/prepared.py` has the bounds).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from mllm_cl.data.builders import BENCHMARKS
from mllm_cl.data.rows import Row
from mllm_cl.errors import EvaluationError, RunError, suggest
from mllm_cl.evaluation.cell import CellResult, cell_key, evaluate_cell
from mllm_cl.evaluation.engine import GenerationSettings, planned
from mllm_cl.evaluation.prepared import Prepared
from mllm_cl.evaluation.scorers import BENCHMARK_SCORERS, PROFILES, find_metric
from mllm_cl.recipe import Recipe
from mllm_cl.streams import Stream, arrange, load_benchmark, load_stream, stream_of_section
from mllm_cl.streams.fingerprint import digest_rows
from mllm_cl.training.checkpoint_loading import Checkpoint, Found, load_checkpoints, routes
from mllm_cl.training.progress import Progress, Silent

QUICKSTART = "quickstart"
DEFAULT_MAX_NEW_TOKENS = 16


@dataclass(frozen=True)
class Measured:
    """The rows of a task or benchmark, and how their answers are scored."""

    name: str
    rows: Sequence[Row]
    metric: str | None
    max_new_tokens: int
    learnt: bool


@dataclass(frozen=True)
class Failure:
    """A cell without a score, and why."""

    checkpoint: str
    task: str
    reason: str


@dataclass(frozen=True)
class Measurement:
    """What `measure` brought: results in the order of tasks, then checkpoints, and cells without a score."""

    results: Sequence[CellResult]
    failures: Sequence[Failure]


def choose_stream(name_or_path: str | None, recipe: Recipe | None) -> Stream:
    """Returns the stream that was asked for, else the one of the checkpoint's run, else the quickstart.

    Raises:
        StreamError: it cannot be used.
    """
    if name_or_path is not None:
        return load_stream(name_or_path)
    return load_stream(QUICKSTART) if recipe is None else stream_of_section(recipe.stream)


def choose_rows(
    stream: Stream,
    names: Sequence[str],
    *,
    split: Literal["test", "validation"] = "test",
    limit: int | float | None = None,
    offset: int = 0,
    max_new_tokens: int | None = None,
    recipe: Recipe | None = None,
    profile: str | None = None,
    predict_only: bool = False,
) -> list[Measured]:
    """Returns what is to be measured: tasks of the stream and general benchmarks, in the order of `names`.

    Args:
        limit: most rows of each (answers keep their shares), or the share of its rows when below 1.
        offset: rows to leave out at the start.
        max_new_tokens: longest answer; the task's own, then the recipe's, when `None`.
        profile: whose scorer to use for benchmarks that have several.
        predict_only: write predictions, score nothing.

    Raises:
        EvaluationError: an unknown name or profile, no rows in the split, or a benchmark that needs a judge.
    """
    if not names:
        raise EvaluationError("--tasks: no task is named.", expected=_known(stream))
    usual = recipe.evaluation.max_new_tokens if recipe else DEFAULT_MAX_NEW_TOKENS
    own = [task.name for task in stream]
    for name in names:
        if name not in own and name not in BENCHMARKS:
            raise EvaluationError(
                f"--tasks: {stream.name} has no task {name!r}.",
                expected=suggest(name, [*own, *BENCHMARKS]),
                fix=f"choose from {_known(stream)}; or name another stream with --stream.",
            )
    whole = isinstance(limit, int) and not offset
    limited = arrange(stream, limit=limit) if whole else stream  # type: ignore[arg-type]
    chosen = []
    for name in dict.fromkeys(names):
        if name in own:
            task = limited[name]
            rows = task.test if split == "test" else task.validation
            rows = rows if whole else part_of(rows, limit, offset)
            longest = max_new_tokens or task.max_new_tokens or usual
            metric = with_profile(task.metric, profile)
        else:
            entry = BENCHMARKS[name]
            rows = part_of(load_benchmark(name, split), limit, offset)
            longest = max_new_tokens or entry.max_new_tokens or usual
            metric = None if entry.metric is None else with_profile(entry.metric, profile)
            if metric is None and not predict_only:
                raise EvaluationError(
                    f"{name}: is scored by a judge, and none is built in.",
                    fix="add --predict_only, and score the predictions with `mllm_cl.evaluation.scorers.judge`.",
                )
        chosen.append(Measured(name, rows, None if predict_only else metric, longest, name in own))
        if not len(rows):
            fix = f"choose a smaller --offset than {offset}." if offset else "measure another split."
            raise EvaluationError(f"{name}: has no {split} rows{' left' if offset else ''}.", fix=fix)
    return chosen


def with_profile(metric: str, profile: str | None) -> str:
    """Returns the metric under another profile; one that belongs to no benchmark has none and stays.

    Raises:
        EvaluationError: no such metric, or the benchmark lacks the profile.
    """
    benchmark = metric.partition(":")[0]
    if profile not in (None, *PROFILES):
        raise EvaluationError(f"there is no profile {profile!r}.", expected=suggest(profile, PROFILES))
    if profile is not None and benchmark in BENCHMARK_SCORERS:
        metric = f"{benchmark}:{profile}"
    find_metric(metric)
    return metric


def part_of(rows: Sequence[Row], limit: int | float | None, offset: int) -> Sequence[Row]:
    """Returns the rows behind `offset`, and of those at most `limit` or that share of them."""
    rows = [rows[index] for index in range(min(offset, len(rows)), len(rows))] if offset else rows
    if limit is not None and limit < 1:
        limit = max(1, round(limit * len(rows)))
    return every(rows, None if limit is None else int(limit))


def every(rows: Sequence[Row], limit: int | None) -> Sequence[Row]:
    """Returns at most `limit` rows, every k-th, so that all kinds stay in."""
    if limit is None or limit >= len(rows):
        return rows
    return [rows[index * len(rows) // limit] for index in range(limit)]


def measure(
    checkpoints: Mapping[str, Found],
    chosen: Sequence[Measured],
    output: Path,
    *,
    settings: GenerationSettings | None = None,
    progress: Progress | None = None,
    allow_failures: bool = False,
    load: Callable[[Sequence[Found]], list[Checkpoint]] = load_checkpoints,
) -> Measurement:
    """Writes `predictions.jsonl` and `result.json` of every cell.

    A cell lies in `output/TASK`, with several checkpoints in `output/CHECKPOINT/TASK`. What is already there for the
    same weights, rows, scorer and settings is not generated again. A cell that fails does not stop the others.

    Args:
        checkpoints: name of the folder -> checkpoint.
        settings: how answers are generated; the longest answer is that of each task.
        load: loads checkpoints that share a base model.
    """
    shown, results, failures = progress or Silent(), [], []
    for group in _groups(checkpoints):
        with shown.waiting("loading the model"):
            loaded = load([checkpoints[name] for name in group])
        for item in chosen:
            digest = digest_rows(item.rows)
            own = replace(settings or GenerationSettings(), max_new_tokens=item.max_new_tokens)
            shared = _shared(loaded, item.rows, own)
            for name, checkpoint in zip(group, loaded):
                checkpoint.activate()
                place = output / item.name if len(checkpoints) == 1 else output / name / item.name
                with shown.bar(f"{name}: evaluating {item.name}", len(item.rows)) as advance:
                    try:
                        result = evaluate_cell(
                            checkpoint.model,
                            checkpoint.processor,
                            item.rows,
                            folder=place,
                            stage=checkpoint.label if len(checkpoints) == 1 else name,
                            task=item.name,
                            metric=item.metric,
                            settings=own,
                            key=cell_key(checkpoint.processor, digest, checkpoint.weights, item.metric, own),
                            route=checkpoint.route(item.name if item.learnt else None),
                            advance=advance,
                            allow_failures=allow_failures,
                            answers=checkpoint.answers,
                            prepared=shared,
                        )
                    except EvaluationError as error:
                        failures.append(Failure(name, item.name, str(error)))
                        continue
                results.append(result)
        del loaded
    return Measurement(results, failures)


def _shared(loaded: Sequence[Checkpoint], rows: Sequence[Row], settings: GenerationSettings) -> Prepared | None:
    """What checkpoints of one model that answer through it can share for these rows."""
    first = loaded[0]
    if len(loaded) == 1 or any(one.answers is not None or one.model is not first.model for one in loaded):
        return None
    return Prepared(first.model, planned(first.processor, rows, settings))


def _groups(checkpoints: Mapping[str, Found]) -> list[list[str]]:
    """Checkpoints that can share a loaded base model; one that routes stands alone."""
    groups: dict[object, list[str]] = {}
    for name, found in checkpoints.items():
        key = name if routes(found) else found.model.model_dump_json(exclude={"lora", "adapters", "max_rank"})
        groups.setdefault(key, []).append(name)
    return list(groups.values())


def folder_names(checkpoints: Sequence[str], found: Sequence[Found]) -> dict[str, Found]:
    """Returns a folder name for each checkpoint: its label, with that of its run when labels repeat."""
    labels = [one.label for one in found]
    named: dict[str, Found] = {}
    for given, one in zip(checkpoints, found):
        name = one.label
        if labels.count(one.label) > 1:
            parts = Path(given).resolve().parts
            run = parts[-3] if one.kind == "stage" and "stages" in parts[-2:-1] else parts[-1]
            name = f"{run}-{one.label}" if run != one.label else f"{parts[-2]}-{one.label}"
        number = 2
        while name in named:
            name, number = f"{name}-{number}", number + 1
        named[name] = one
    return named


def check_output(folder: Path) -> None:
    """Refuses an output path that is a file, before anything is loaded.

    Raises:
        RunError: it is.
    """
    for place in (folder, *folder.parents):
        if place.is_file():
            raise RunError(f"{place}: is a file.", expected="a folder for the results", fix="change --output_path.")


def _known(stream: Stream) -> str:
    return ", ".join([*(task.name for task in stream), *BENCHMARKS])
