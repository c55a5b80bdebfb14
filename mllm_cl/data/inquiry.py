"""Inquiries: user turns without an answer, and the pools they come from.

A pool is a sequence of unanswered rows. The built-in pool asks general questions about the general mixture's training
images; a user's pool is a file with one inquiry per line (plain text), or rows in any format that `read_rows` reads
(answers are dropped).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mllm_cl.data.builders.general import general_inquiries
from mllm_cl.data.readers import read_rows
from mllm_cl.data.rows import Row, Rows, inquiry_of, message_text, user_message
from mllm_cl.errors import DataError

BUILT_IN = "general"


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


def ask(text: str, images: Sequence[Any], row_id: str) -> Row:
    """Returns the inquiry that asks `text` about these images."""
    return {"id": row_id, "messages": [user_message(text, len(images))], "images": list(images)}


def attach(rows: Sequence[Row], inquiries: Sequence[Row], kind: str = "inquiry") -> Rows:
    """Spreads inquiries evenly over rows as companions: row i carries inquiries ⌊i·m/n⌋ … ⌊(i+1)·m/n⌋ − 1.

    Which inquiry meets which row does not depend on batch size, process count or the moment of resuming.
    """
    count, total = len(rows), len(inquiries)

    def with_companions(index: int) -> Row:
        own = inquiries[index * total // count : (index + 1) * total // count]
        row = rows[index]
        return {**row, "companions": {**row.get("companions", {}), kind: list(own)}} if own else row  # type: ignore[typeddict-item]

    return Rows(range(count), with_companions)
