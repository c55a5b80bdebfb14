"""Numeric answers: ChartQA's relaxed correctness and MathVista."""

from __future__ import annotations

import math
import re
import string
from collections.abc import Sequence

from mllm_cl.evaluation.scorers.choice import chosen_letter
from mllm_cl.evaluation.scorers.exact_match import normalise
from mllm_cl.evaluation.scorers.references import accepted, lettered, number
from mllm_cl.evaluation.scorers.text import edit_distance

TOLERANCE = 0.05  # ChartQA, arXiv 2203.10244, end of section 5.1


def _share(text: str) -> float | None:
    """Returns a number, percentages as shares."""
    if not text.endswith("%"):
        return number(text)
    value = number(text.rstrip("%"))
    return None if value is None else value / 100


def _close(value: float, target: float) -> bool:
    return abs(value - target) / abs(target) <= TOLERANCE


def chartqa_relaxed(prediction: str, references: Sequence[str], **row_fields: object) -> float:
    """lmms-eval: within 5 % of a reference that is a number other than 0, else equal in lower case.

    `5%` is 0.05; `1,000`, `$10` and `10 years` are no numbers.
    """

    def right(reference: str) -> bool:
        value, target = _share(prediction), _share(reference)
        if value is not None and target:
            return _close(value, target)
        return prediction.lower() == reference.lower()

    return float(any(map(right, accepted(references))))


def relaxed_accuracy(prediction: str, references: Sequence[str], **row_fields: object) -> float:
    """`chartqa_relaxed` on cleaned text; an empty answer is wrong.

    Ends, one final period, a currency sign in front and commas between groups of three digits are ignored; 5 % are met also
    by what only rounding puts beyond (1.05 for 1); a percentage is compared
    with a percentage as it stands, and as a share with a number that has no percent sign. 0 must be met exactly.
    """
    said = normalise(prediction)
    return float(any(bool(said) and _relaxed(said, normalise(reference)) for reference in accepted(references)))


def _relaxed(said: str, wanted: str) -> bool:
    if said == wanted:
        return True
    first, second = _readable(said), _readable(wanted)
    value, target = _share(first), _share(second)
    if value is None or target is None or not math.isfinite(value) or not math.isfinite(target):
        return False
    return abs(value - target) <= (0.05 + 1e-9) * abs(target)


def _readable(text: str) -> str:
    text = re.sub(r"^([-+]?)[$€£¥] ?", r"\1", text.replace("\u2212", "-")).replace(" %", "%")  # U+2212: the minus sign
    return text.replace(",", "") if re.fullmatch(r"[-+]?\d{1,3}(,\d{3})+(\.\d+)?%?", text) else text


def mathvista_normalise(
    prediction: str,
    references: Sequence[str],
    choices: object = None,
    question_type: object = None,
    answer_type: object = None,
    precision: object = None,
    **row_fields: object,
) -> float:
    """MathVista as lmms-eval compares an answer that has been extracted already.

    Multiple choice: the letter's option, or the option with the smallest edit distance, whatever was said. Integer:
    truncated. Float: rounded to `precision` digits, to a whole number where there is none. What cannot be read so is
    the text `None`.
    """
    answer = str(_mathvista_form(prediction, choices, question_type, answer_type, precision))
    return float(any(answer.strip() == reference.strip() for reference in accepted(references)))


def mathvista(
    prediction: str,
    references: Sequence[str],
    choices: object = None,
    question_type: object = None,
    answer_type: object = None,
    precision: object = None,
    **row_fields: object,
) -> float:
    """MathVista on a raw answer without a judge: the last number, or the chosen option; an empty answer is wrong.

    Multiple choice: the option that `chosen_letter` finds. Integer and float: the last number in the answer, equal to
    the reference after rounding to `precision` digits (0 for integers, none without it); nothing is truncated.
    """
    wanted = accepted(references)
    if question_type == "multi_choice":
        options = lettered(choices)
        chosen = options.get(chosen_letter(prediction, options), prediction)
        return float(
            any(normalise(chosen) == normalise(reference) for reference in wanted) and bool(prediction.strip())
        )
    if answer_type in ("integer", "float"):
        found = re.findall(r"[-+]?\d[\d,]*(?:\.\d+)?(?:[eE][-+]?\d+)?|[-+]?\.\d+", prediction)
        value = number(found[-1].replace(",", "")) if found else None
        digits = 0 if answer_type == "integer" else _digits(precision)
        targets = [number(reference.replace(",", "")) for reference in wanted]
        if value is None or not math.isfinite(value):
            return 0.0
        known = [target for target in targets if target is not None and math.isfinite(target)]
        if digits is None:
            return float(value in known)
        return float(any(round(value, digits) == round(target, digits) for target in known))
    return float(
        bool(prediction.strip()) and any(normalise(prediction) == normalise(reference) for reference in wanted)
    )


def _mathvista_form(
    extracted: str, choices: object, question_type: object, answer_type: object, precision: object
) -> str | None:
    if question_type == "multi_choice":
        options = list(lettered(choices).values())
        if not options:
            return None
        text = extracted.strip()
        bracketed = re.findall(r"\(([a-zA-Z])\)", text)
        letter = bracketed[0].upper() if bracketed else text
        if len(letter) == 1 and letter in string.ascii_uppercase[: len(options)]:
            return options[string.ascii_uppercase.index(letter)]
        return min(options, key=lambda option: edit_distance(letter, option))
    if answer_type == "integer":
        value = number(extracted)
        return str(int(value)) if value is not None and math.isfinite(value) else None
    if answer_type == "float":
        value, digits = number(extracted), _digits(precision)
        if value is None or (digits is None and (precision is not None or not math.isfinite(value))):
            return None
        return str(round(value, digits))
    return extracted


def _digits(precision: object) -> int | None:
    value = number(str(precision))
    return int(value) if value is not None and abs(value) < 100 else None
