"""Yes or no: POPE and MME, and how an answer is read as one of the two."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np

from mllm_cl.evaluation.scorers.references import accepted
from mllm_cl.evaluation.scorers.tally import Array, Tally, column, one_by_one, ratio
from mllm_cl.evaluation.scorers.vqa_text import VLMEVALKIT, strip_marks

PERCEPTION = (
    *("existence", "count", "position", "color", "posters"),
    *("celebrity", "scene", "landmark", "artwork", "OCR"),
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


# reading an answer -------------------------------------------------------------------------------------------------------


def read_yes_no(prediction: str) -> str:
    """Returns `yes` or `no` if that is the first word, alone or before a mark or blank; else `""`.

    A word that goes on (`no-one`) and both words as alternatives (`yes/no`, `yes or no`) are neither.

    Example:

    ```python
    >>> from mllm_cl.evaluation.scorers.yesno import read_yes_no
    >>> [read_yes_no(text) for text in ("Yes.", "no, there is none", "nope", "There is a dog", "")]
    ['yes', 'no', '', '', '']

    ```
    """
    match = re.match(r"[\s\"'*(]*(yes|no)(?!\w|[-/]\w|\s+or\s+(?:yes|no)\b)", prediction, re.IGNORECASE)
    return match.group(1).lower() if match else ""


def yes_no(prediction: str, references: Sequence[str], **row_fields: object) -> float:
    """Right if `read_yes_no` finds the same in the answer and in a reference; an answer without either is wrong."""
    said = read_yes_no(prediction)
    return float(bool(said) and any(said == read_yes_no(reference) for reference in accepted(references)))


def pope_parse_llava(prediction: str, references: object = None, **row_fields: object) -> str:
    """Returns what LLaVA reads in the first sentence: `no` if it has the word No, no or not, else `yes`, also for an
    empty answer."""
    words = prediction.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def yorn_extract_vlmevalkit(prediction: str, references: object = None, **row_fields: object) -> str:
    """Returns `Yes`, `No` or `Unknown`: which of the two words the answer has, if not both."""
    words = strip_marks(prediction.lower(), VLMEVALKIT).split()
    if ("yes" in words) == ("no" in words):
        return "Unknown"
    return "Yes" if "yes" in words else "No"


def mme_parse_lmms_eval(prediction: str, references: object = None, **row_fields: object) -> str:
    """Returns `yes`, `no` or `other`: a single y or n, else what occurs in the first four letters, yes first."""
    answer = prediction.lower().strip().replace(".", "")
    if len(answer) == 1:
        return {"y": "yes", "n": "no"}.get(answer, "other")
    return next((word for word in ("yes", "no") if word in answer[:4]), "other")


# POPE --------------------------------------------------------------------------------------------------------------------


def _counts(said: Sequence[str], labels: Sequence[str]) -> Array:
    """Returns rows of (tp, fp, tn, fn, right, said yes, label yes, 1); fn and tn need a spoken `no`. Shape (n, 8)."""
    rows = [
        (
            *(answer == "yes" and label == "yes", answer == "yes" and label == "no"),
            *(answer == "no" and label == "no", answer == "no" and label == "yes"),
            *(answer == label, answer == "yes", label == "yes", True),
        )
        for answer, label in zip(said, labels)
    ]
    return np.array(rows, dtype=np.float64).reshape(-1, 8)


def _measures(positives: str, yes_of: str) -> Callable[[Array], dict[str, Array]]:
    """Returns the five numbers of POPE.

    Args:
        positives: recall is over `all` images with the object, or over those `answered` with yes or no.
        yes_of: the yes-ratio is that of the `predictions`, or of the `labels`.
    """

    def measures(sums: Array) -> dict[str, Array]:
        tp, fp, _, fn, right, said_yes, label_yes, count = np.moveaxis(sums, -1, 0)
        precision = ratio(tp, tp + fp)
        recall = ratio(tp, label_yes if positives == "all" else tp + fn)
        return {
            "accuracy": ratio(right, count),
            "precision": precision,
            "recall": recall,
            "f1": ratio(2 * precision * recall, precision + recall),
            "yes_ratio": ratio(said_yes if yes_of == "predictions" else label_yes, count),
        }

    return measures


def _pope(said: Sequence[str], labels: Sequence[str], measures: Callable[[Array], dict[str, Array]]) -> Tally:
    counts = _counts(said, labels)
    return Tally(counts, one_by_one(len(counts)), measures, counts[:, 4].tolist())


def _labels(references: Sequence[object]) -> list[str]:
    return [next(iter(accepted(reference)), "").lower().strip() for reference in references]


def pope_llava(prediction: Sequence[str], references: Sequence[object], **row_fields: object) -> Tally:
    """LLaVA: answers by `pope_parse_llava`; every label but `no` is yes."""
    labels = ["no" if label == "no" else "yes" for label in _labels(references)]
    return _pope([pope_parse_llava(answer) for answer in prediction], labels, _measures("all", "predictions"))


def pope_lmms_eval(prediction: Sequence[str], references: Sequence[object], **row_fields: object) -> Tally:
    """lmms-eval: the bare word counts; recall leaves out other answers; the yes-ratio is that of the labels."""
    return _pope(
        [answer.lower().strip() for answer in prediction], _labels(references), _measures("answered", "labels")
    )


def pope(prediction: Sequence[str], references: Sequence[object], **row_fields: object) -> Tally:
    """Answers by `read_yes_no`; an answer with neither is wrong, and missed where the object is there."""
    said = [read_yes_no(answer) for answer in prediction]
    labels = [read_yes_no(label) for label in _labels(references)]
    return _pope(said, labels, _measures("all", "predictions"))


# MME ---------------------------------------------------------------------------------------------------------------------


def _mme(right: Sequence[bool], images: Sequence[object], categories: Sequence[object]) -> Tally:
    """Points of an image = % of its questions right + 100 if it has two and both are; a category is the mean over its
    images, the score the sum over categories."""
    members: dict[tuple[str, str], list[int]] = {}
    for index, key in enumerate(zip(map(str, categories), map(str, images))):
        members.setdefault(key, []).append(index)
    names = sorted({category for category, _ in members})
    statistics = np.zeros((len(members), 2 * len(names)))
    for row, ((category, _), questions) in enumerate(members.items()):
        share = sum(right[index] for index in questions) / len(questions)
        place = 2 * names.index(category)
        statistics[row, place : place + 2] = 100 * share + 100 * (share == 1 and len(questions) == 2), 1

    def measures(sums: Array) -> dict[str, Array]:
        means = {name: ratio(sums[..., 2 * i], sums[..., 2 * i + 1]) for i, name in enumerate(names)}
        zero = np.zeros(sums.shape[:-1])
        score = sum(means.values(), zero)
        found = {"score": score, "share": score / (200 * max(1, len(names)))}
        for group, of in (("perception", PERCEPTION), ("cognition", COGNITION)):
            if any(name in of for name in names):
                found[group] = sum((value for name, value in means.items() if name in of), zero)
        return found | means

    return Tally(statistics, list(members.values()), measures, [float(is_right) for is_right in right])


def _mme_columns(
    prediction: Sequence[str], references: Sequence[object], rows: object, question_id: object, category: object
) -> tuple[list[str], list[str], list[object], list[object]]:
    """Returns answers, labels, images and categories; `rows` holds (image, category, answer, label) and wins."""
    if isinstance(rows, Sequence) and not isinstance(rows, str):
        full = [row for row in rows if isinstance(row, Sequence) and not isinstance(row, str) and len(row) == 4]
        images, categories, answers, labels = (list(values) for values in zip(*full)) if full else ([], [], [], [])
        return [*map(str, answers)], [str(label).lower().strip() for label in labels], images, categories
    count = len(prediction)
    return list(prediction), _labels(references), column(question_id, count), column(category, count)


def mme_score(
    prediction: Sequence[str],
    references: Sequence[object],
    rows: object = None,
    question_id: object = None,
    category: object = None,
    **row_fields: object,
) -> Tally:
    """lmms-eval: answers by `mme_parse_lmms_eval`; `rows` are (image, category, answer, label)."""
    answers, labels, images, categories = _mme_columns(prediction, references, rows, question_id, category)
    right = [mme_parse_lmms_eval(answer) == label.replace(".", "") for answer, label in zip(answers, labels)]
    return _mme(right, images, categories)


def mme(
    prediction: Sequence[str],
    references: Sequence[object],
    rows: object = None,
    question_id: object = None,
    category: object = None,
    **row_fields: object,
) -> Tally:
    """Answers by `read_yes_no`, so that `nothing` is not no."""
    answers, labels, images, categories = _mme_columns(prediction, references, rows, question_id, category)
    right = [
        bool(read_yes_no(answer)) and read_yes_no(answer) == read_yes_no(label)
        for answer, label in zip(answers, labels)
    ]
    return _mme(right, images, categories)
