"""Measures one checkpoint on some tasks, outside of a run: what `mllm-cl evaluate` calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mllm_cl.data.builders import BENCHMARKS
from mllm_cl.data.rows import Row
from mllm_cl.errors import EvaluationError, RunError, suggest
from mllm_cl.evaluation.cell import CellResult, cell_key, evaluate_cell
from mllm_cl.evaluation.engine import GenerationSettings
from mllm_cl.evaluation.scorers import get_scorer
from mllm_cl.recipe import Recipe
from mllm_cl.streams import Stream, arrange, load_benchmark, load_stream, stream_of_section
from mllm_cl.streams.fingerprint import digest_rows
from mllm_cl.training.checkpoint_loading import Checkpoint
from mllm_cl.training.progress import Progress, Silent

QUICKSTART = "quickstart"
DEFAULT_MAX_NEW_TOKENS = 16


@dataclass(frozen=True)
class Measured:
    """The rows of a task or benchmark, and how their answers are scored."""

    name: str
    rows: Sequence[Row]
    metric: str
    max_new_tokens: int
    learnt: bool


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
    limit: int | None = None,
    max_new_tokens: int | None = None,
    recipe: Recipe | None = None,
) -> list[Measured]:
    """Returns what is to be measured: tasks of the stream and general benchmarks, in the order of `names`.

    Args:
        limit: most rows of each; answers keep their shares.
        max_new_tokens: longest answer; the task's own, then the recipe's, when `None`.

    Raises:
        EvaluationError: an unknown name, or no rows in the split.
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
    limited = arrange(stream, limit=limit) if limit is not None else stream
    chosen = []
    for name in dict.fromkeys(names):
        if name in own:
            task = limited[name]
            get_scorer(task.metric)
            rows = task.test if split == "test" else task.validation
            longest = max_new_tokens or task.max_new_tokens or usual
            chosen.append(Measured(name, rows, task.metric, longest, True))
        else:
            rows = every(load_benchmark(name, split), limit)
            chosen.append(Measured(name, rows, "exact_match", max_new_tokens or usual, False))
        if not len(chosen[-1].rows):
            raise EvaluationError(f"{name}: has no {split} rows.", fix="measure another split.")
    return chosen


def every(rows: Sequence[Row], limit: int | None) -> Sequence[Row]:
    """Returns at most `limit` rows, every k-th, so that all kinds stay in."""
    if limit is None or limit >= len(rows):
        return rows
    return [rows[index * len(rows) // limit] for index in range(limit)]


def measure(
    checkpoint: Checkpoint,
    chosen: Sequence[Measured],
    output: Path,
    *,
    batch_size: int | Literal["auto"] = "auto",
    progress: Progress | None = None,
) -> list[CellResult]:
    """Writes `predictions.jsonl` and `result.json` of each into a folder of its name below `output`.

    What `output` already holds for the same weights, rows and settings is not generated again.
    """
    shown, results = progress or Silent(), []
    for item in chosen:
        settings = GenerationSettings(max_new_tokens=item.max_new_tokens, batch_size=batch_size)
        with shown.bar(f"{checkpoint.label}: evaluating {item.name}", len(item.rows)) as advance:
            result = evaluate_cell(
                checkpoint.model,
                checkpoint.processor,
                item.rows,
                folder=output / item.name,
                stage=checkpoint.label,
                task=item.name,
                metric=item.metric,
                settings=settings,
                key=cell_key(checkpoint.processor, digest_rows(item.rows), checkpoint.weights, item.metric, settings),
                route=checkpoint.route(item.name if item.learnt else None),
                advance=advance,
            )
        results.append(result)
    return results


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
