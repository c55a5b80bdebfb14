"""Inquiries: user turns without an answer, and the pools they come from.

A pool is a sequence of unanswered rows. The built-in pool asks general questions about the general mixture's training
images; a user's pool is a file with one inquiry per line (plain text), or rows in any format that `read_rows` reads
(answers are dropped).
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mllm_cl.data.builders.general import general_inquiries
from mllm_cl.data.readers import read_rows
from mllm_cl.data.rows import Row, Rows, inquiry_of, message_text, user_message
from mllm_cl.errors import DataError

BUILT_IN = "general"

_COMMON = 0.9  # share of a task's questions that must end alike
_SENTENCE_END = re.compile(r"(?<=[.?!:])\s+|\s*\n+\s*")
_FORMAT = re.compile(
    r"(please )?(answer|respond|reply|give|provide|write)\b.*\b(word|phrase|letter|option|format|number)", re.I
)


def read_pool(name_or_path: str, size: int, seed: int) -> list[Row]:
    """Returns up to `size` inquiries of a pool, drawn with `seed`.

    Args:
        name_or_path: `general` (built in), a `.txt` file with one inquiry per line, or a file of rows.

    Raises:
        DataError: the file is missing, empty or not readable as rows.
    """
    if name_or_path == BUILT_IN:
        return list(general_inquiries(size, seed))
    path = Path(name_or_path)
    if path.suffix == ".txt":
        rows: Sequence[Row] = _read_text(path)
    else:
        rows = read_rows(path, image_folder=path.parent, task="inquiry", split="pool")
    if not len(rows):
        raise DataError(f"{path}: the inquiry pool is empty.", expected="one inquiry per line, or rows")
    chosen = random.Random(seed).sample(range(len(rows)), min(size, len(rows)))
    return [inquiry_of(rows[index]) for index in sorted(chosen)]


def _read_text(path: Path) -> list[Row]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: the inquiry pool cannot be read ({error}).", expected="a UTF-8 text file") from error
    return [
        {"id": f"inquiry/{number}", "messages": [user_message(line.strip())], "images": []}
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]


def questions_of(rows: Sequence[Row], size: int, seed: int) -> list[str]:
    """Returns up to `size` distinct question texts of a task: what an inquiry memory keeps of it."""
    texts: dict[str, None] = {}
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    for index in order:
        text = question_of(rows[index])
        if text:
            texts.setdefault(text)
        if len(texts) == size:
            break
    return list(texts)


def question_of(row: Row) -> str:
    """Returns the text of the last user turn, images left out; empty when there is none."""
    users = [message for message in row["messages"] if message["role"] == "user"]
    return message_text(users[-1]).strip() if users else ""


def without_format(texts: Sequence[str]) -> list[str]:
    """Returns the questions without the sentence that prescribes the answer's format.

    An anchor on "... Answer with one word." would hold the model to the very behaviour that the task is to change.
    Removed are what (nearly) all texts end with, if it is a sentence of its own, and the instructions that LLaVA's
    mixture appends.
    """
    endings = Counter(_last_sentence(text) for text in texts)
    common = {
        ending for ending, count in endings.items() if ending and len(set(texts)) > 1 and count >= _COMMON * len(texts)
    }
    stripped = []
    for text in texts:
        ending = _last_sentence(text)
        if ending and (ending in common or _FORMAT.match(ending)):
            text = text.rstrip().removesuffix(ending).rstrip()
        stripped.append(text)
    return stripped


def _last_sentence(text: str) -> str:
    """The last sentence if another comes before it, else nothing."""
    parts = _SENTENCE_END.split(text.strip())
    return parts[-1] if len(parts) > 1 else ""


def ask(text: str, images: Sequence[Any], row_id: str) -> Row:
    """Returns the inquiry that asks `text` about these images."""
    return {"id": row_id, "messages": [user_message(text, len(images))], "images": list(images)}


def attach(
    rows: Sequence[Row],
    inquiries: Sequence[Row],
    kind: str = "inquiry",
    epoch: Callable[[], int] = lambda: 0,
    epochs: int = 1,
) -> Rows:
    """Spreads inquiries evenly over rows as companions, a further share of them at each epoch.

    In epoch e, row i carries inquiries e·m + ⌊i·m/n⌋ … e·m + ⌊(i+1)·m/n⌋ − 1 of n rows and m = len(inquiries) / epochs
    inquiries per epoch. Which inquiry meets which row does not depend on batch size, process count or the moment of
    resuming.

    Args:
        epoch: returns the epoch that rows are asked for in, from 0; after `epochs` of them the inquiries start again.
    """
    count, total = len(rows), len(inquiries) // epochs

    def with_companions(index: int) -> Row:
        start = epoch() % epochs * total
        chosen = range(start + index * total // count, start + (index + 1) * total // count)
        row = rows[index]
        if not chosen:
            return row
        own = [inquiries[place] for place in chosen]
        return {**row, "companions": {**row.get("companions", {}), kind: own}}  # type: ignore[typeddict-item]

    return Rows(range(count), with_companions)
