"""Checks of single rows, and the fields that scorers read: functions `(row, position) -> row` for the families.

They exist because the layouts were learnt from code and papers, not from the files: what is guessed wrong shall fail
with the row's place. All are plain data (they travel to loader workers).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllm_cl.data.builders.family import merged
from mllm_cl.data.inquiry import question_of
from mllm_cl.data.problems import RowError
from mllm_cl.data.rows import Row, reference_answers
from mllm_cl.errors import DataError
from mllm_cl.parse import parse_json

_OPTION = re.compile(r"^\s*\(?([A-H])[.):]\s*(.+?)\s*$", re.MULTILINE)
_NUMBERS = re.compile(r"-?\d+(?:\.\d+)?")


def surprise(found: str, expected: str) -> RowError:
    """Returns the error of a row that is not what the benchmark's rows should be."""
    return RowError(
        found,
        kind="unexpected_row",
        expected=expected,
        fix="check that this is the right file; if the official files look like this, please report it.",
    )


@dataclass(frozen=True)
class AnswerIn:
    """Every reference answer is one of a closed set (case ignored)."""

    answers: tuple[str, ...]

    def __call__(self, row: Row, position: int) -> Row:
        known = {answer.casefold() for answer in self.answers}
        for answer in reference_answers(row):
            if answer.strip().casefold() not in known:
                raise surprise(f"the answer is {answer[:80]!r}.", "one of: " + ", ".join(self.answers[:12]))
        return row


@dataclass(frozen=True)
class AnswerMatches:
    """Every reference answer matches a pattern."""

    pattern: str
    expected: str

    def __call__(self, row: Row, position: int) -> Row:
        for answer in reference_answers(row):
            if not re.fullmatch(self.pattern, answer.strip()):
                raise surprise(f"the answer is {answer[:80]!r}.", self.expected)
        return row


@dataclass(frozen=True)
class ImageCount:
    """The row has this many images."""

    least: int = 1
    most: int = 1

    def __call__(self, row: Row, position: int) -> Row:
        if not self.least <= len(row["images"]) <= self.most:
            wanted = f"{self.least}" if self.least == self.most else f"{self.least} to {self.most}"
            raise surprise(f"the row has {len(row['images'])} images.", wanted)
        return row


@dataclass(frozen=True)
class BoxAnswer:
    """The reference is a box [x1, y1, x2, y2] in shares of the image, left of right and above below."""

    def __call__(self, row: Row, position: int) -> Row:
        for answer in reference_answers(row):
            values = [float(number) for number in _NUMBERS.findall(answer)]
            is_box = len(values) == 4 and values[0] < values[2] and values[1] < values[3]
            if not is_box or not all(0 <= value <= 1 for value in values):
                raise surprise(f"the answer is {answer[:80]!r}.", "a box [x1, y1, x2, y2] in shares of the image")
        return row


@dataclass(frozen=True)
class Choices:
    """Adds `choices`, the options `A. x` of the question, which the multiple-choice scorers read."""

    def __call__(self, row: Row, position: int) -> Row:
        if row.get("choices"):
            return row
        options = _OPTION.findall(question_of(row))
        letters = [letter for letter, _ in options]
        if letters != list("ABCDEFGH"[: len(letters)]) or len(letters) < 2:
            raise surprise(
                f"the question has the options {', '.join(letters) or 'none'}.", "lines `A. ...`, `B. ...`, in order"
            )
        for answer in reference_answers(row):
            if answer.strip()[:1].upper() not in letters:
                raise surprise(f"the answer is {answer[:80]!r}.", "one of: " + ", ".join(letters))
        return merged(row, {"choices": [text for _, text in options]})


@dataclass(frozen=True)
class Question:
    """Adds `question` (the last user turn) and `image` (the first image's path), which some scorers read."""

    def __call__(self, row: Row, position: int) -> Row:
        image = row["images"][0] if row["images"] else None
        return merged(row, {"question": question_of(row), "image": image if isinstance(image, str) else None})


@dataclass(frozen=True)
class ImageSize:
    """Adds `image_size` (width, height), which the official grounding scorer scales by, from the row's `size`."""

    def __call__(self, row: Row, position: int) -> Row:
        size = row.get("size")
        if not isinstance(size, (list, tuple)) or len(size) != 2:
            raise surprise(f"`size` is {size!r}.", "width and height of the image, in pixels")
        return merged(row, {"image_size": list(size)})


@dataclass(frozen=True)
class AnnotatedAnswers:
    """Replaces the answers by those of an annotation file, found by the row's id."""

    answers: Mapping[str, Sequence[str]]
    file: str

    def __call__(self, row: Row, position: int) -> Row:
        found = self.answers.get(row["id"])
        if found is None:
            raise surprise(f"the id {row['id']!r} is not in {self.file}.", "the annotation file of the same questions")
        return merged(row, {"answers": list(found)})


@dataclass(frozen=True)
class CocoReferences:
    """Replaces the answers by the captions of a COCO file whose image ids count the rows from 1, as the official
    evaluation assumes. A row whose own caption is not among them shows that the two files are shifted."""

    captions: Mapping[int, Sequence[str]]
    file: str

    def __call__(self, row: Row, position: int) -> Row:
        own, found = reference_answers(row), self.captions.get(position + 1, ())
        if not found:
            if not own:
                raise surprise(f"{self.file} has no caption of image {position + 1}, nor has the row.", "a reference")
            return row
        if own and not {_plain(text) for text in own} & {_plain(text) for text in found}:
            raise surprise(
                f"the caption {own[0][:60]!r} is not among those of image {position + 1} in {self.file}.",
                "captions in the order of the test rows",
            )
        return merged(row, {"answers": list(found)})


def _plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))


@dataclass(frozen=True)
class ReadCoco:
    """Reads the caption file of a task; see `CocoReferences`."""

    name: str

    def __call__(self, root: Path) -> CocoReferences:
        content = read_json(root / self.name)
        captions: dict[int, list[str]] = defaultdict(list)
        try:
            for annotation in content["annotations"]:
                captions[int(annotation["image_id"])].append(annotation["caption"])
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{root / self.name}: not a COCO caption file ({type(error).__name__}: {error}).",
                expected='{"annotations": [{"image_id": 1, "caption": "..."}, ...]}',
            ) from error
        return CocoReferences(dict(captions), self.name)


@dataclass(frozen=True)
class ReadTextVqa:
    """Reads `TextVQA_0.5.1_val.json`, whose ten answers per question the soft accuracy needs."""

    name: str

    def __call__(self, root: Path) -> AnnotatedAnswers:
        content = read_json(root / self.name)
        try:
            answers = {str(entry["question_id"]): [str(text) for text in entry["answers"]] for entry in content["data"]}
        except (KeyError, TypeError) as error:
            raise DataError(
                f"{root / self.name}: not the annotations of TextVQA ({type(error).__name__}: {error}).",
                expected='{"data": [{"question_id": ..., "answers": [ten texts]}, ...]}',
            ) from error
        wrong = next((name for name, texts in answers.items() if len(texts) != 10), None)
        if wrong is not None:
            raise DataError(f"{root / self.name}: question {wrong} has {len(answers[wrong])} answers.", expected="ten")
        return AnnotatedAnswers(answers, self.name)


def read_json(path: Path) -> Any:
    """Returns the content of a JSON file.

    Raises:
        DataError: it does not exist or is not JSON.
    """
    try:
        return parse_json(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise DataError(
            f"{path}: the file does not exist.", fix="download the annotations of the benchmark too."
        ) from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a JSON file ({error}).", fix="download it again.") from error
