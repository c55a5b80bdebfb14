"""What a stream holds, in numbers: sizes, answer formats, and the score of always giving the most frequent answer."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from mllm_cl.data.image_keys import image_key
from mllm_cl.data.rows import Row, message_text, reference_answers
from mllm_cl.streams.stream import Stream, Task

ANSWER_FORMATS = ("yes/no", "letter", "number", "one word", "phrase", "list", "sentence")

_LETTER = re.compile(r"\(?[A-Ha-h]\)?[.:]?")
_NUMBER = re.compile(r"[-+]?[$€£]?\s?(\d[\d,]*)?\.?\d+\s?(%|percent)?")
_PHRASE_WORDS = 6


def describe(stream: Stream) -> list[dict[str, Any]]:
    """Returns one dict per task, for listings. Every row is converted once; no image is opened.

    Keys: `task`, `metric`, `description`; `train`, `validation`, `test` (rows); `images` (distinct, over all splits);
    of the training answers (of the test answers when there is no training row) `distinct_answers`,
    `question_lengths` and `answer_lengths` in characters (mean, median, 95 %, longest), `answer_formats` (name -> share);
    of the test rows `majority_answer` and `majority_share`, the share of rows that accept it: what a model without eyes
    can reach.
    """
    return [_describe_task(task) for task in stream]


def answer_format(answer: str) -> str:
    """Returns the entry of `ANSWER_FORMATS` that an answer belongs to.

    Example:

    ```python
    >>> from mllm_cl.streams.statistics import answer_format
    >>> [answer_format(answer) for answer in ("Yes", "B", "3.5", "red", "a red car", "[0.1, 0.2]", "It is red.")]
    ['yes/no', 'letter', 'number', 'one word', 'phrase', 'list', 'sentence']

    ```
    """
    text = answer.strip()
    if text.casefold().rstrip(".") in ("yes", "no"):
        return "yes/no"
    if _LETTER.fullmatch(text):
        return "letter"
    if _NUMBER.fullmatch(text.rstrip(".")):
        return "number"
    words = text.split()
    if len(words) <= 1 and "," not in text:
        return "one word"
    if _is_list(text):
        return "list"
    if text.endswith((".", "!", "?")) or len(words) > _PHRASE_WORDS:
        return "sentence"
    return "phrase"


def _is_list(text: str) -> bool:
    if text.startswith("[") and text.endswith("]"):
        return True
    parts = re.split(r"[,;\n]", text)
    return len(parts) > 1 and all(0 < len(part.split()) <= 3 for part in parts) and not text.endswith((".", "!", "?"))


def majority(rows: Sequence[Row]) -> tuple[str, float]:
    """Returns the answer (lower-cased) that most rows accept, and their share; `("", 0.0)` without rows."""
    counts: Counter[str] = Counter()
    for row in rows:
        counts.update({answer.strip().casefold() for answer in reference_answers(row)})
    if not counts:
        return "", 0.0
    answer, count = min(counts.items(), key=lambda item: (-item[1], item[0]))
    return answer, count / len(rows)


def _describe_task(task: Task) -> dict[str, Any]:
    images: set[str] = set()
    for rows in (task.train, task.validation, task.test):
        for row in rows:
            images.update(map(image_key, row["images"]))
    learned = task.train if len(task.train) else task.test
    questions: list[int] = []
    answers: list[str] = []
    for row in learned:
        questions.append(sum(len(message_text(turn)) for turn in row["messages"] if turn["role"] == "user"))
        answers += reference_answers(row)[:1]
    formats = Counter(map(answer_format, answers))
    answer, share = majority(task.test)
    return {
        "task": task.name,
        "metric": task.metric,
        "description": task.description,
        "train": len(task.train),
        "validation": len(task.validation),
        "test": len(task.test),
        "images": len(images),
        "distinct_answers": len({text.strip().casefold() for text in answers}),
        "question_lengths": _lengths(questions),
        "answer_lengths": _lengths([len(text) for text in answers]),
        "answer_formats": {name: formats[name] / len(answers) for name in ANSWER_FORMATS if formats[name]},
        "majority_answer": answer,
        "majority_share": share,
    }


def _lengths(values: Sequence[int]) -> dict[str, float]:
    """Mean, median, 95th percentile (nearest rank) and maximum; zeros without values."""
    if not values:
        return dict.fromkeys(("mean", "median", "95 %", "longest"), 0.0)
    ordered = sorted(values)
    rank = -(-95 * len(ordered) // 100) - 1
    middle = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
    return {"mean": sum(ordered) / len(ordered), "median": middle, "95 %": ordered[rank], "longest": ordered[-1]}
