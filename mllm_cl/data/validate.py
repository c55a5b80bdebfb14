"""Checks every row and every image of a split and lists everything that is wrong, in one pass.

Nothing here raises on bad rows: a line that is no JSON is one problem among the others. A row is checked for what
training and evaluation rely on; keys that nobody knows are no problem.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from mllm_cl.data.content import type_name
from mllm_cl.data.image_keys import image_key
from mllm_cl.data.images import image_files, load_image, open_image
from mllm_cl.data.problems import Problem, RowError, problem_of
from mllm_cl.data.readers import read_rows
from mllm_cl.data.rows import Row, Rows, message_text
from mllm_cl.errors import DataError

ImageCheck = Literal["decode", "header", "exists", "none"]
Progress = Callable[[str, int, int], None]
Finding = tuple[str, str, str]  # kind, message, fix
_Use = tuple[int, str | None, Any]  # position and id of a row, and an image of it
_UnderWay = tuple[int, list[_Use], list[Future[list[Finding | None]]]]  # rows done after it, images, their findings

_BATCH = 64  # rows whose images are handed over together
_CHUNK = 8  # images that a thread takes at a time
_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Checks:
    """How a validation looks at rows.

    Args:
        images (`str`, defaults to `"decode"`): `"decode"` finds truncated files, `"header"` files that are no images,
            `"exists"` only missing ones, `"none"` leaves images alone.
        progress (`Callable`, *optional*): called with (name of the split, rows done, rows).
        workers (`int`, defaults to 8): threads that open images while rows are read; Pillow's decoders run side by side.
    """

    images: ImageCheck = "decode"
    progress: Progress | None = None
    workers: int = 8


FULL = Checks()


@dataclass
class SplitReport:
    """What the check of one split found.

    Args:
        rows (`int`): number of rows, broken ones included.
        problems (`list[Problem]`): everything that is wrong.
        ids (`set[str]`): ids of the readable rows.
        images (`dict[str, int]`): identity of each image -> position of the first row that uses it.
    """

    rows: int = 0
    problems: list[Problem] = field(default_factory=list)
    ids: set[str] = field(default_factory=set)
    images: dict[str, int] = field(default_factory=dict)


def validate_rows(
    rows: Sequence[Row],
    *,
    split: str = "train",
    name: str = "rows",
    checks: Checks = FULL,
) -> list[Problem]:
    """Returns everything that is wrong with some rows.

    Args:
        rows (`Sequence[Row]`): from `read_rows`, or any sequence of rows.
        split (`str`, defaults to `"train"`): training rows need a final answer, others need `answers`.
        name (`str`): stands for the file of rows that were made in memory.
        checks (`Checks`, *optional*): what to do with images, and whom to tell about progress.

    Example:

    ```python
    >>> from mllm_cl.data.validate import validate_rows
    >>> row = {"id": "1", "messages": [{"role": "user", "content": "What?"}], "images": []}
    >>> [problem.kind for problem in validate_rows([row], split="test")]
    ['no_answers']

    ```
    """
    return check_split(rows, split=split, name=name, checks=checks).problems


def validate_file(
    path: str | Path,
    *,
    format: str = "auto",
    image_folder: str | Path | None = None,
    split: str = "train",
    checks: Checks = FULL,
) -> list[Problem]:
    """Returns everything that is wrong with a file (arguments as in `read_rows` and `validate_rows`)."""
    try:
        rows = read_rows(path, format=format, image_folder=image_folder, split=split)
    except DataError as error:
        return [problem_of(error, str(path))]
    return validate_rows(rows, split=split, name=str(path), checks=checks)


def check_split(
    rows: Sequence[Row],
    *,
    split: str = "train",
    name: str = "rows",
    checks: Checks = FULL,
) -> SplitReport:
    """Returns the problems of a split with its ids and images, for checks across splits; see `validate_rows`."""
    report = SplitReport(rows=len(rows))
    if not len(rows):
        report.problems.append(Problem(name, None, None, "empty_split", f"the {split} split has no rows.", "add rows."))
        return report
    first_use: dict[str, int] = {}
    under_way: deque[_UnderWay] = deque()

    def finish() -> None:
        stop, images, futures = under_way.popleft()
        findings = (found for future in futures for found in future.result())
        for (index, row_id, _), found in zip(images, findings):
            if found:
                report.problems.append(_located(rows, index, row_id, name, found))
        if checks.progress:
            checks.progress(name, stop, len(rows))

    with ThreadPoolExecutor(max_workers=checks.workers) as pool:
        for start in range(0, len(rows), _BATCH):
            stop = min(start + _BATCH, len(rows))
            images: list[_Use] = []
            for index in range(start, stop):
                row = _check_one(rows, index, split, name, report, first_use)
                for reference in _images_of(row):
                    key = image_key(reference)
                    if key not in report.images:
                        report.images[key] = index
                        images.append((index, _id_of(row), reference))
            wanted = [image[2] for image in images] if checks.images != "none" else []
            chunks = (wanted[place : place + _CHUNK] for place in range(0, len(wanted), _CHUNK))
            under_way.append((stop, images, [pool.submit(_check_images, chunk, checks.images) for chunk in chunks]))
            while len(under_way) > 1 + checks.workers // _CHUNK:  # few, because embedded images are held in memory
                finish()
        while under_way:
            finish()
    report.problems.sort(key=lambda problem: problem.row or 0)
    return report


def _check_one(
    rows: Sequence[Row], index: int, split: str, name: str, report: SplitReport, first_use: dict[str, int]
) -> Mapping[str, Any] | None:
    """Adds the problems of one row; returns the row, as far as it could be read."""
    known = None
    try:
        row: Any = rows[index]
    except RowError as error:
        report.problems.append(replace(problem_of(error, name), position=index))
        if error.partial is None:
            return None
        row, known = error.partial, error.kind
    except DataError as error:
        report.problems.append(_located(rows, index, None, name, ("row", error.given, error.fix or "correct the row.")))
        return None
    for found in check_row(row, split):
        if found[0] != known:
            report.problems.append(_located(rows, index, _id_of(row), name, found))
    row_id = _id_of(row)
    if row_id is not None:
        first = first_use.setdefault(row_id, index)
        if first != index:
            message = f"the id is also that of {_unit(rows)} {_number(rows, first)}."
            fix = "give every row its own id."
            report.problems.append(_located(rows, index, row_id, name, ("duplicate_id", message, fix)))
        elif isinstance(rows, Rows) and rows.is_renamed(index):
            message = f"an earlier row has the same id, so this one is called {row_id!r}."
            found = ("duplicate_id", message, "give every row its own id, if the row is no copy.")
            report.problems.append(_located(rows, index, row_id, name, found, severity="warning"))
        report.ids.add(row_id)
    return row if isinstance(row, Mapping) else None


def _located(
    rows: Sequence[Row], index: int, row_id: str | None, name: str, found: Finding, severity: str = "error"
) -> Problem:
    kind, message, fix = found
    origin = rows.origin if isinstance(rows, Rows) else None
    number, unit = _number(rows, index), _unit(rows)
    return Problem(origin or name, number, row_id, kind, message, fix, severity=severity, unit=unit, position=index)


def _number(rows: Sequence[Row], index: int) -> int:
    return rows.number(index) if isinstance(rows, Rows) else index + 1


def _unit(rows: Sequence[Row]) -> str:
    return rows.unit if isinstance(rows, Rows) else "row"


def _id_of(row: Any) -> str | None:
    row_id = row.get("id") if isinstance(row, Mapping) else None
    return row_id if isinstance(row_id, str) and row_id else None


def _images_of(row: Any) -> Sequence[Any]:
    images = row.get("images") if isinstance(row, Mapping) else None
    return images if isinstance(images, (list, tuple)) else ()


def check_row(row: Any, split: str) -> Iterator[Finding]:
    """Yields (kind, message, fix) for everything wrong with one row, images aside."""
    if not isinstance(row, Mapping):
        yield "not_an_object", f"the row is {type_name(row)}, not an object.", "correct or remove it."
        return
    if _id_of(row) is None:
        yield "wrong_type", f"`id` is {type_name(row.get('id'))}, not a text.", "give the row an id."
    messages = row.get("messages")
    if not isinstance(messages, (list, tuple)):
        yield "wrong_type", f"`messages` is {type_name(messages)}, not a list.", "write the turns as a list."
        return
    broken = [number for number, message in enumerate(messages) if not _is_message(message)]
    for number in broken:
        fix = 'write {"role": "user" or "assistant", "content": [blocks]}.'
        yield "wrong_type", f"`messages[{number}]` is no message with role and content.", fix
    if broken:
        return
    images = row.get("images")
    if not isinstance(images, (list, tuple)):
        yield "wrong_type", f"`images` is {type_name(images)}, not a list.", "write a list, empty for a text-only row."
    else:
        contents = [message["content"] for message in messages if not isinstance(message["content"], str)]
        blocks = sum(block.get("type") == "image" for content in contents for block in content)
        if blocks != len(images):
            message = f"{blocks} image blocks but {len(images)} images."
            yield "placeholders", message, "make them as many as each other."
    yield from _check_turns(messages)
    yield from _check_answers(row, messages, split)


def _is_message(message: Any) -> bool:
    if not isinstance(message, Mapping) or message.get("role") not in _ROLES:
        return False
    content = message.get("content")
    if isinstance(content, str):
        return True
    return isinstance(content, (list, tuple)) and all(
        isinstance(block, Mapping)
        and (block.get("type") == "image" or (block.get("type") == "text" and isinstance(block.get("text"), str)))
        for block in content
    )


def _check_turns(messages: Sequence[Mapping[str, Any]]) -> Iterator[Finding]:
    roles = [message["role"] for message in messages]
    if "user" not in roles:
        yield "no_user_turn", "the row has no user turn.", "add the question, or remove the row."
        return
    turns = roles[1:] if roles[0] == "system" else roles
    if any(role != ("user", "assistant")[number % 2] for number, role in enumerate(turns)):
        message = f"the turns do not alternate: {', '.join(roles)}."
        yield "roles", message, "write user, assistant, user, ... (a system turn only in front)."
    for message in messages:
        if not _is_encodable(message_text(message)):
            yield "not_utf8", "a text holds half a surrogate pair (cut-off emoji?).", "repair the text."
            return


def _is_encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _check_answers(row: Mapping[str, Any], messages: Sequence[Mapping[str, Any]], split: str) -> Iterator[Finding]:
    answers = row.get("answers")
    if answers is not None and not (
        isinstance(answers, (list, tuple)) and all(isinstance(answer, str) for answer in answers)
    ):
        yield "wrong_type", "`answers` is not a list of texts.", "write every accepted answer as a text."
        return
    final = message_text(messages[-1]) if messages and messages[-1]["role"] == "assistant" else None
    if split == "train":
        if final is None:
            yield "no_final_answer", "the row does not end with an answer.", "add the answer, or remove the row."
        elif not final.strip():
            yield "empty_answer", "the final answer is empty.", "fill in the answer, or remove the row."
    elif not answers and final is None:
        yield "no_answers", f"the {split} row has no answers.", "add `answer` or `answers`."
    elif not any(answer.strip() for answer in answers or [final or ""]):
        yield "empty_answer", "the answer is empty.", "fill in the answer, or remove the row."


def _check_images(references: Sequence[Any], check: ImageCheck) -> list[Finding | None]:
    """Returns what is wrong with each of some images; runs in a thread."""
    return [_check_image(reference, check) for reference in references]


def _check_image(reference: Any, check: ImageCheck) -> Finding | None:
    for path in image_files(reference):
        if not os.path.isfile(path):
            message = f"the image {path!r} does not exist."
            return "image_missing", message, "correct the path in the row, or `image_folder`."
        if not os.path.getsize(path):
            return "image_unreadable", f"the image {path!r} is empty (0 bytes).", "replace the file or remove the row."
    if check == "exists" or isinstance(reference, Image.Image):
        return None
    try:
        if isinstance(reference, Mapping) and (reference.get("tiles") or reference.get("crop")):
            load_image(reference)
            return None
        with open_image(reference) as image:
            if check == "decode":
                image.draft("RGB", (64, 64))  # JPEG only: decodes a reduced size, but reads the whole file
                image.load()
    except DataError as error:
        return "image_unreadable", error.given, error.fix or "replace the image or remove the row."
    except Exception as error:  # decoders of damaged files raise almost anything
        message = f"the image {str(reference)[:200]!r} cannot be decoded ({type(error).__name__}: {error})."
        return "image_unreadable", message, "replace the file or remove the row."
    return None
