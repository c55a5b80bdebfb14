"""One cell of the matrix: the model of a stage answers the rows of a task, and the answers are scored.

Answers are appended batch by batch, so an interrupted cell continues where it stopped; each process writes its own
part, and the parts are merged by row id. A cell is keyed by everything that can change its answers: another key starts
it anew.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import ProcessorMixin

from mllm_cl.data.images import describe_image
from mllm_cl.data.rows import Row, message_text, reference_answers
from mllm_cl.errors import EvaluationError
from mllm_cl.evaluation.engine import Failed, GenerationSettings, Route, generate_batches, planned
from mllm_cl.evaluation.likelihood import Ranker
from mllm_cl.evaluation.prepared import Prepared
from mllm_cl.evaluation.scorers import CHOICE_LIKELIHOOD, scorer_identity
from mllm_cl.evaluation.scoring import check_fields, cluster_numbers, score_answers, scorer_fields
from mllm_cl.files import explained, write_json, write_text
from mllm_cl.model_section import InputSettings
from mllm_cl.parse import parse_json

Answers = Callable[
    [Sequence[Row], Sequence[list[int]], GenerationSettings], Iterator[tuple[list[int], Sequence[str | Failed]]]
]
"""(rows, batches of row indices, settings) -> the answers of each batch."""

CELL_VERSION = 3
_NAMED = 5  # failed rows in a message


@dataclass(frozen=True)
class CellResult:
    """Score of a cell with its standard error, clustered by image.

    Args:
        score, stderr: in `unit`, which is percent for all but a few metrics (MME counts points); NaN here and `null` on
            disk where only predictions were written.
        n: rows that were scored; `n_failed` others could not be answered and were left out because it was asked for.
        scorer, profile: name, profile and version of the scorer; whose rule it is.
        metrics: every named score as the scorer gives it, with its standard error.
    """

    stage: str
    task: str
    metric: str
    score: float
    stderr: float | None
    n: int
    seconds: float
    key: str
    n_failed: int = 0
    unit: str = "percent"
    profile: str = "strict"
    scorer: str = ""
    clusters: int | None = None
    metrics: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)


def cell_key(
    processor: ProcessorMixin, rows_key: str, weights: str, metric: str | None, settings: GenerationSettings
) -> str:
    """Returns a hash of what the answers and the score of a cell depend on."""
    parts = {
        "version": CELL_VERSION,
        "weights": weights,
        "rows": rows_key,
        "metric": None if metric is None else scorer_identity(metric),
        "template": processor.chat_template,
        "image_processor": str(getattr(processor, "image_processor", None)),
        "image_mode": InputSettings.of(processor).image_mode,
        "settings": [settings.max_new_tokens, settings.rows_per_batch, sorted(settings.options), settings.seed],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def evaluate_cell(
    model: Any,
    processor: ProcessorMixin,
    rows: Sequence[Row],
    *,
    folder: Path,
    stage: str,
    task: str,
    metric: str | None,
    settings: GenerationSettings,
    key: str,
    route: Route | None = None,
    advance: Callable[[int], None] = lambda rows: None,
    allow_failures: bool = False,
    answers: Answers | None = None,
    prepared: Prepared | None = None,
) -> CellResult:
    """Measures one cell, or returns what is already on disk under the same key.

    A row that cannot be answered is written down with its error. A cell with such rows has no score: `result.json`
    names them, the answers of the others are kept, and the next call tries the failed ones again.

    Args:
        folder: where `predictions.jsonl` and `result.json` go.
        metric: name of a scorer; under `choice_likelihood` nothing is generated; `None` writes predictions without scores,
            for a judge or a later `evaluate score`.
        key: see `cell_key`.
        advance: called with the number of rows after each batch.
        allow_failures: score the rows that were answered, and say in the result how many were not.
        answers: what answers instead of `model`, which may be `None` then.
        prepared: what checkpoints of the same model share for these rows, under the same settings.

    Raises:
        EvaluationError: there are no rows, two have the same id, or rows could not be answered.
        RunError: the folder cannot be written.
    """
    if not len(rows):
        raise EvaluationError(f"{task}: has no rows to evaluate.", fix="give it a test split.")
    ids = [row["id"] for row in rows]
    repeated = next((row_id for row_id, count in Counter(ids).items() if count > 1), None)
    if repeated is not None:
        raise EvaluationError(
            f"{task}: several rows have the id {repeated!r}.",
            expected="ids that are unique within a task, since answers are kept by id",
            fix="give every row its own id.",
        )
    if metric is not None:
        check_fields(metric, rows)
    state = PartialState()
    finished = read_result(folder, key)
    if finished is not None and finished.n_failed and not allow_failures:
        finished = None
    state.wait_for_everyone()
    if finished is not None:
        advance(len(rows))
        return finished
    started = time.perf_counter()
    if state.is_main_process:
        _prepare(folder, key)
    state.wait_for_everyone()
    known = _answered(folder)
    state.wait_for_everyone()  # nobody writes while another still reads
    advance(len(known))
    batches = planned(processor, rows, settings) if prepared is None else prepared.batches
    engine = Ranker.over(rows) if metric == CHOICE_LIKELIHOOD else None
    mine = batches[state.process_index :: state.num_processes]
    open_batches = [batch for batch in mine if any(ids[index] not in known for index in batch)]
    part = folder / f"predictions.part{state.process_index}.jsonl"
    with explained(part), part.open("a", encoding="utf-8") as file:
        settings = replace(settings, keep_going=True)
        ask = answers or partial(generate_batches, model, processor, route=route, engine_type=engine, prepared=prepared)
        for batch, texts in ask(rows, open_batches, settings):
            for index, text in zip(batch, texts):
                given = {"error": text.error} if isinstance(text, Failed) else {"prediction": text}
                line = {"id": ids[index], **given}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            advance(sum(ids[index] not in known for index in batch))
    state.wait_for_everyone()
    if state.is_main_process:
        names = CellResult(stage, task, metric or "", 0.0, None, 0, round(time.perf_counter() - started, 3), key)
        _finish(folder, rows, names, allow_failures)
    state.wait_for_everyone()
    result = read_result(folder, key)
    if result is None:
        _raise_failures(folder, task, key)
        raise EvaluationError(f"{folder}: the result is not visible to this process.", fix="use a shared file system.")
    return result


def read_result(folder: Path, key: str) -> CellResult | None:
    """Returns the result of a cell that was completed under this key, or `None`."""
    try:
        content = parse_json((folder / "result.json").read_text(encoding="utf-8"))
        fields = CellResult.__dataclass_fields__
        needed = [name for name, own in fields.items() if own.default is MISSING and own.default_factory is MISSING]
        result = CellResult(
            **{name: content[name] for name in fields if name in needed or name in content},
        )
        if content.get("failed") and content["score"] is None:
            return None
        if content["score"] is None:
            result = replace(result, score=math.nan)
    except (OSError, ValueError, KeyError, TypeError):  # not measured yet, or left by something else
        return None
    return result if result.key == key else None


def _prepare(folder: Path, key: str) -> None:
    """Keeps the parts of an interrupted cell with the same key, and removes everything else."""
    with explained(folder):
        marker = folder / "key.txt"
        if not marker.exists() or marker.read_text(encoding="utf-8") != key:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            write_text(marker, key)
        for part in folder.glob("predictions.part*.jsonl"):
            content = part.read_bytes()
            complete = content[: content.rfind(b"\n") + 1]
            if len(complete) < len(content):  # a line that a killed process did not finish
                part.write_bytes(complete)


def _lines(folder: Path) -> Iterator[Mapping[str, Any]]:
    for part in sorted(folder.glob("predictions.part*.jsonl")):
        with part.open(encoding="utf-8", newline="\n") as file:  # answers may hold other separators, such as U+2028
            for line in file:
                yield parse_json(line)


def _answered(folder: Path) -> dict[str, str]:
    return {line["id"]: line["prediction"] for line in _lines(folder) if "prediction" in line}


def _finish(folder: Path, rows: Sequence[Row], names: CellResult, allow_failures: bool) -> None:
    """Scores what was answered and writes both files, or only the failures when nothing may be missing."""
    answers = _answered(folder)
    errors = {line["id"]: line["error"] for line in _lines(folder) if "error" in line}
    failed = [{"id": row["id"], "error": errors.get(row["id"], "")} for row in rows if row["id"] not in answers]
    if failed and (not allow_failures or len(failed) == len(rows)):
        empty = {**asdict(names), "score": None, "n_failed": len(failed), "failed": failed}
        write_json(folder / "result.json", empty)
        return
    kept = [row for row in rows if row["id"] in answers]
    result, scores = replace(names, n=len(kept), n_failed=len(failed)), [None] * len(kept)
    if names.metric:
        scored = score_answers(names.metric, kept, [answers[row["id"]] for row in kept])
        scores = scored.rows
        result = replace(
            result,
            score=scored.value,
            stderr=scored.stderr,
            unit=scored.unit,
            profile=scored.profile,
            scorer=scored.identity,
            clusters=scored.clusters,
            metrics=scored.metrics,
        )
    lines = [prediction_line(row, answers[row["id"]], score) for row, score in zip(kept, scores)]
    for line, number in zip(lines, cluster_numbers(kept)):
        line["cluster"] = number
    write_text(folder / "predictions.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    content = asdict(result) | ({"failed": failed} if failed else {})
    write_json(folder / "result.json", content if names.metric else content | {"score": None})
    if not failed:
        for part in folder.glob("predictions.part*.jsonl"):
            part.unlink()


def prediction_line(row: Row, answer: str, score: float | None) -> dict[str, Any]:
    """Returns a line of `predictions.jsonl`; the row's own fields are kept where they can be, for scoring again."""
    line: dict[str, Any] = {
        "id": row["id"],
        "prediction": answer,
        "score": score,
        "references": reference_answers(row),
        "question": " ".join(message_text(m) for m in row["messages"] if m["role"] == "user"),
        "images": [describe_image(image) for image in row["images"]],
    }
    if score is None:
        del line["score"]
    fields = {name: value for name, value in scorer_fields(row).items() if _is_plain(value)}
    return {**line, "fields": fields} if fields else line


def _is_plain(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True


def _raise_failures(folder: Path, task: str, key: str) -> None:
    """Says which rows could not be answered, if that is why there is no score."""
    try:
        content = parse_json((folder / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    failed = content.get("failed") or []
    if content.get("key") != key or not failed:
        return
    named = ", ".join(str(entry["id"]) for entry in failed[:_NAMED]) + (", ..." if len(failed) > _NAMED else "")
    raise EvaluationError(
        f"{task}: {len(failed)} rows could not be answered ({named}); the first error: {failed[0]['error']}",
        expected="an answer to every row; without it there is no score",
        fix=f"see `failed` in {folder / 'result.json'}; the same command tries those rows again.",
    )
