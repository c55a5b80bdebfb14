"""The HTML sheet of a stream: numbers, near-duplicates, and sample rows with their prompts as the model sees them."""

from __future__ import annotations

import base64
import io
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import ProcessorMixin

    from mllm_cl.data.rows import Row
    from mllm_cl.streams import Stream
    from mllm_cl.streams.duplicates import Shared

SIDE = 256  # longest side of a thumbnail in pixels


def write_sheet(
    path: Path,
    stream: Stream,
    described: Sequence[dict[str, Any]],
    duplicates: Sequence[Shared] | None,
    *,
    model: str,
    samples: int,
) -> None:
    """Writes the sheet.

    Args:
        path (`Path`): the HTML file.
        described: from `mllm_cl.streams.describe`.
        duplicates: from `near_duplicates`; `None` when not looked for.
        model (`str`): whose processor renders the prompts.
        samples (`int`): rows per split, evenly spaced.
    """
    from mllm_cl.files import write_text
    from mllm_cl.models.load import resolve_model
    from mllm_cl.models.processors import load_processor
    from mllm_cl.reporting.report import render

    processor = load_processor(resolve_model(model))
    tasks = [
        {
            "name": task.name,
            "facts": f"{task.description + '; ' if task.description else ''}scored by {task.metric}",
            "lengths": length_table(entry),
            "rows": [
                sheet_row(row, split, processor)
                for split, rows in (("train", task.train), ("test", task.test))
                for row in (rows[index] for index in spaced(len(rows), samples))
            ],
        }
        for task, entry in zip(stream, described)
    ]
    content = {
        "name": stream.name,
        "facts": f"{len(stream)} tasks, fingerprint {stream.fingerprint[:12]}",
        "summary": summary_table(described),
        "duplicates": duplicate_table(duplicates or ()),
        "no_duplicates": "Not looked for." if duplicates is None else "None found.",
        "tasks": tasks,
        "model": model,
        "not_measured": "",
    }
    write_text(path, render("stream.html.jinja", content))


def spaced(length: int, count: int) -> list[int]:
    """Returns up to `count` positions, evenly spaced."""
    return sorted({length * number // count for number in range(min(count, length))}) if length else []


def summary_table(described: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Returns header and one line per task."""
    rows = [["task", "metric", "train", "validation", "test", "images", "answers", "formats", "majority baseline"]]
    for task in described:
        formats = ", ".join(f"{name} {share:.0%}" for name, share in task["answer_formats"].items())
        majority = f"{100 * task['majority_share']:.1f} % ({task['majority_answer']!r})"
        counts = [str(task[key]) for key in ("train", "validation", "test", "images", "distinct_answers")]
        rows.append([task["task"], task["metric"], *counts, formats, majority])
    return rows


def length_table(task: dict[str, Any]) -> list[list[str]]:
    """Returns the lengths of questions and answers of one task."""
    header = ["characters", "mean", "median", "95 %", "longest"]
    return [
        header,
        *([name, *(f"{value:.0f}" for value in task[f"{name}_lengths"].values())] for name in ("question", "answer")),
    ]


def duplicate_table(duplicates: Sequence[Shared]) -> list[list[str]]:
    """Returns header and one line per pair of splits that share something."""
    rows = [["shared", "first", "second", "rows of the second", "share", "for example"]]
    for shared in duplicates:
        share = f"{100 * shared.count / shared.rows:.1f} %"
        example = " = ".join(map(repr, shared.example))  # an id may hold what steers a terminal
        rows.append([shared.kind, shared.first, shared.second, f"{shared.count} of {shared.rows}", share, example])
    return rows


def sheet_row(row: Row, split: str, processor: ProcessorMixin) -> dict[str, Any]:
    """Returns what the template shows of one row.

    Raises:
        DataError: the row has a mistake that a validation would name.
    """
    from mllm_cl.data.rows import reference_answers
    from mllm_cl.data.validate import check_row
    from mllm_cl.errors import DataError

    for _, message, fix in check_row(row, split):
        raise DataError(
            f"{split} row {row['id']!r}: {message}", fix=f"{fix} `mllm-cl data validate` lists all mistakes."
        )
    return {
        "id": row["id"],
        "split": split,
        "images": [thumbnail(reference) for reference in row["images"]],
        "answers": ", ".join(reference_answers(row)),
        "prompt": prompt_parts(row, split, processor),
    }


def prompt_parts(row: Row, split: str, processor: ProcessorMixin) -> list[dict[str, Any]]:
    """Returns the text of the model's input tokens, in runs of learnt and not learnt ones.

    Runs of one image token are written once with their number.
    """
    from mllm_cl.data.collate import IGNORED, Collator

    batch = Collator(processor, for_generation=split != "train").inputs([row])
    tokens = batch["input_ids"][0].tolist()
    labels = batch["labels"][0].tolist() if "labels" in batch else [IGNORED] * len(tokens)
    decode = processor.tokenizer.decode  # type: ignore[attr-defined]
    parts = []
    for learnt, run in itertools.groupby(zip(tokens, labels), key=lambda pair: pair[1] != IGNORED):
        text = ""
        same = [(token, sum(1 for _ in group)) for token, group in itertools.groupby(token for token, _ in run)]
        pending: list[int] = []
        for token, count in same:
            if count < 4:
                pending += [token] * count
                continue
            text += decode(pending) + f"[{decode([token])} x {count}]"
            pending = []
        parts.append({"text": text + decode(pending), "learnt": learnt})
    return parts


def thumbnail(reference: Any) -> str:
    """Returns a small version of an image as a data URL."""
    from mllm_cl.data.images import load_image

    image = load_image(reference)
    image.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
