"""One cell of the matrix: the model of a stage answers the rows of a task, and the answers are scored.

Answers are appended batch by batch, so an interrupted cell continues where it stopped; each process writes its own
part, and the parts are merged by row id. A cell is keyed by everything that can change its answers: another key starts
it anew.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import ProcessorMixin

from mllm_cl.data.images import describe_image
from mllm_cl.data.rows import Row, message_text, reference_answers
from mllm_cl.errors import EvaluationError
from mllm_cl.evaluation.engine import GenerationSettings, Route, generate_batches, plan_batches, token_counts
from mllm_cl.evaluation.scorers import get_scorer
from mllm_cl.evaluation.statistics import standard_error
from mllm_cl.files import explained, write_json, write_text

CELL_VERSION = 1


@dataclass(frozen=True)
class CellResult:
    """Score of a cell, in percent, with its standard error in percentage points."""

    stage: str
    task: str
    metric: str
    score: float
    stderr: float | None
    n: int
    seconds: float
    key: str


def cell_key(processor: ProcessorMixin, rows_key: str, weights: str, metric: str, settings: GenerationSettings) -> str:
    """Returns a hash of what the answers and the score of a cell depend on."""
    parts = {
        "version": CELL_VERSION,
        "weights": weights,
        "rows": rows_key,
        "metric": metric,
        "template": processor.chat_template,
        "image_processor": str(getattr(processor, "image_processor", None)),
        "settings": [settings.max_new_tokens, settings.rows_per_batch],
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
    metric: str,
    settings: GenerationSettings,
    key: str,
    route: Route | None = None,
    advance: Callable[[int], None] = lambda rows: None,
) -> CellResult:
    """Measures one cell, or returns what is already on disk under the same key.

    Args:
        folder: where `predictions.jsonl` and `result.json` go.
        key: see `cell_key`.
        advance: called with the number of rows after each batch.

    Raises:
        EvaluationError: there are no rows, two have the same id, or a row does not fit into memory.
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
    state = PartialState()
    finished = read_result(folder, key)
    state.wait_for_everyone()
    if finished is not None:
        advance(len(rows))
        return finished
    started = time.perf_counter()
    if state.is_main_process:
        _prepare(folder, key)
    state.wait_for_everyone()
    answers = _answered(folder)
    state.wait_for_everyone()  # nobody writes while another still reads
    advance(len(answers))
    batches = plan_batches(token_counts(processor, rows), settings.rows_per_batch)
    mine = batches[state.process_index :: state.num_processes]
    open_batches = [batch for batch in mine if any(ids[index] not in answers for index in batch)]
    part = folder / f"predictions.part{state.process_index}.jsonl"
    with explained(part), part.open("a", encoding="utf-8") as file:
        for batch, texts in generate_batches(model, processor, rows, open_batches, settings, route):
            for index, text in zip(batch, texts):
                line = {"id": ids[index], "prediction": text}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            advance(sum(ids[index] not in answers for index in batch))
    state.wait_for_everyone()
    if state.is_main_process:
        _finish(folder, rows, stage, task, metric, key, time.perf_counter() - started)
    state.wait_for_everyone()
    result = read_result(folder, key)
    if result is None:
        raise EvaluationError(f"{folder}: the result is not visible to this process.", fix="use a shared file system.")
    return result


def read_result(folder: Path, key: str) -> CellResult | None:
    """Returns the result of a cell that was completed under this key, or `None`."""
    try:
        content = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        result = CellResult(**{name: content[name] for name in CellResult.__dataclass_fields__})
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
                yield json.loads(line)


def _answered(folder: Path) -> dict[str, str]:
    return {line["id"]: line["prediction"] for line in _lines(folder)}


def _finish(folder: Path, rows: Sequence[Row], stage: str, task: str, metric: str, key: str, seconds: float) -> None:
    answers, scorer = _answered(folder), get_scorer(metric)
    lines, scores = [], []
    for row in rows:
        references = reference_answers(row)
        fields = {name: value for name, value in row.items() if name not in ("messages", "images", "answers", "id")}
        score = scorer(answers[row["id"]], references, **fields)
        scores.append(score)
        lines.append(
            {
                "id": row["id"],
                "prediction": answers[row["id"]],
                "score": score,
                "references": references,
                "question": " ".join(message_text(m) for m in row["messages"] if m["role"] == "user"),
                "images": [describe_image(image) for image in row["images"]],
            }
        )
    write_text(folder / "predictions.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    estimate = standard_error(scores)
    stderr = None if estimate.stderr is None else 100 * estimate.stderr
    result = CellResult(stage, task, metric, 100 * estimate.mean, stderr, len(scores), round(seconds, 3), key)
    write_json(folder / "result.json", asdict(result))
    for part in folder.glob("predictions.part*.jsonl"):
        part.unlink()
