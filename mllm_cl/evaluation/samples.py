"""`samples.jsonl` beside `predictions.jsonl`, with the field names of lm-evaluation-harness, for tools that read those."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from mllm_cl.evaluation.rescoring import find_predictions, read_predictions
from mllm_cl.files import write_text


class Named(Protocol):
    """Something with the name of a task."""

    @property
    def name(self) -> str: ...


def write_samples(output: Path, tasks: Sequence[Named]) -> list[Path]:
    """Writes one `samples.jsonl` beside each predictions file of these tasks and returns their paths."""
    names, written = {task.name for task in tasks}, []
    for path in find_predictions(output):
        content = read_predictions(path)
        if path.parent.name not in names:
            continue
        lines = []
        for number, line in enumerate(content.lines):
            doc = {"id": line["id"], "question": line.get("question", ""), "images": line.get("images", [])}
            sample = {
                "doc_id": number,
                "doc": doc,
                "target": line["references"],
                "arguments": [[line.get("question", "")]],
                "resps": [[line["prediction"]]],
                "filtered_resps": [line["prediction"]],
                "doc_hash": hashlib.sha256(json.dumps(doc, sort_keys=True).encode()).hexdigest(),
                **({content.metric: line["score"]} if content.metric and "score" in line else {}),
            }
            lines.append(json.dumps(sample, ensure_ascii=False) + "\n")
        write_text(path.parent / "samples.jsonl", "".join(lines))
        written.append(path.parent / "samples.jsonl")
    return written
