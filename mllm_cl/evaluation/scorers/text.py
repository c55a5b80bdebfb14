"""Short answers by equality, by being contained, or by edit distance: GQA, DocVQA, OCRBench, CoIN, MLLM-DCL / -ACL.

Those named after a peer repeat its rule with all its quirks, for numbers that can be compared with published ones; a
peer's rule may call an empty answer right. `contains_words`, `anls_strict` and `ocr_contains` never do.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Sequence

from mllm_cl.evaluation.scorers.exact_match import normalise
from mllm_cl.evaluation.scorers.references import accepted

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: 0x20}
MATHEMATICAL = "Handwritten Mathematical Expression Recognition"

Rule = Callable[[str, str], bool]


def _any(prediction: str, references: object, rule: Rule) -> float:
    return float(any(rule(prediction, reference) for reference in accepted(references)))


# GQA ---------------------------------------------------------------------------------------------------------------------


def gqa_llava(prediction: str, references: Sequence[str], **row_fields: object) -> float:
    """LLaVA: periods at the end are cut, lower case, then equality."""
    return _any(prediction, references, lambda answer, reference: answer.rstrip(".").lower() == reference)


def gqa_lmms_eval(prediction: str, references: Sequence[str], **row_fields: object) -> float:
    """lmms-eval: stripped, lower case, every ASCII punctuation mark deleted on both sides, then equality."""

    def rule(answer: str, reference: str) -> bool:
        return answer.strip().lower().translate(_NO_PUNCTUATION) == reference.lower().translate(_NO_PUNCTUATION)

    return _any(prediction, references, rule)


# edit distance -----------------------------------------------------------------------------------------------------------


def edit_distance(first: str, second: str) -> int:
    """Returns the Levenshtein distance of two strings."""
    if len(first) > len(second):
        first, second = second, first
    distances = list(range(len(first) + 1))
    for row, letter in enumerate(second, start=1):
        previous, distances[0] = distances[0], row
        for column, other in enumerate(first, start=1):
            step = previous + (letter != other)
            previous = distances[column]
            distances[column] = min(step, previous + 1, distances[column - 1] + 1)
    return distances[-1]


def _squeezed(text: str) -> str:
    return " ".join(text.lower().split())


def anls(prediction: str, references: Sequence[str], **row_fields: object) -> float:
    """Average normalised Levenshtein similarity as lmms-eval computes it: 1 − d / length, 0 below 0.5; best reference.

    The distance is that of lower-cased text with single blanks, the length that of the texts as they were given.
    """
    best = 0.0
    for reference in accepted(references):
        length = max(len(reference.upper()), len(prediction.upper()))
        distance = edit_distance(_squeezed(reference), _squeezed(prediction))
        best = max(best, 1.0 - distance / length if length else 1.0)
    return best if best >= 0.5 else 0.0


def anls_strict(prediction: str, references: Sequence[str], **row_fields: object) -> float:
    """`anls` with the length of what is compared; an empty answer is wrong (ICDAR 2019, arXiv 1907.00490)."""
    answer, best = _squeezed(prediction), 0.0
    if not answer:
        return 0.0
    for reference in map(_squeezed, accepted(references)):
        best = max(best, 1.0 - edit_distance(reference, answer) / max(len(reference), len(answer)))
    return best if best >= 0.5 else 0.0


# contained answers -------------------------------------------------------------------------------------------------------


def contains_words(prediction: str, references: Sequence[str], **row_fields: object) -> float:
    """Right if the reference's words stand in the answer next to each other, case and marks left aside.

    `the left side` contains `left`; `yesterday` does not contain `yes`.
    """

    def words(text: str) -> list[str]:
        return re.findall(r"\w+(?:[.,'’-]\w+)*", normalise(text))

    def rule(answer: str, reference: str) -> bool:
        said, wanted = words(answer), words(reference)
        places = range(len(said) - len(wanted) + 1)
        return bool(wanted) and any(said[place : place + len(wanted)] == wanted for place in places)

    return _any(prediction, references, rule)


def ocr_contains(prediction: str, references: Sequence[str], **row_fields: object) -> float:
    """Right if the reference, blanks left aside and case folded, is part of the answer; an empty reference is not."""

    def rule(answer: str, reference: str) -> bool:
        wanted = "".join(reference.casefold().split())
        return bool(wanted) and wanted in "".join(answer.casefold().split())

    return _any(prediction, references, rule)


def ocrbench(prediction: str, references: Sequence[str], dataset: object = None, **row_fields: object) -> float:
    """OCRBench as lmms-eval 0.7.3 scores it.

    HME100k: contained once all blanks are gone, case counts. Else: contained in lower case, full-width letters as
    plain ones.
    """

    def formula(answer: str, reference: str) -> bool:
        return _no_blanks(reference) in _no_blanks(answer)

    def plain(text: str) -> str:
        return text.translate(_FULL_WIDTH).lower().strip().replace("\n", " ")

    if dataset == "HME100k":
        return _any(prediction, references, formula)
    return _any(prediction.strip(), references, lambda answer, reference: plain(reference) in plain(answer))


def ocrbench_mcitlib(
    prediction: str, references: Sequence[str], category: object = None, **row_fields: object
) -> float:
    """OCRBench as MCITlib scores it; its `category` stands for the data set, and newlines vanish."""

    def plain(text: str) -> str:
        return text.lower().strip().replace("\n", "")

    def formula(text: str) -> str:
        return text.strip().replace(" ", "").replace("\n", "")

    change = formula if category == MATHEMATICAL else plain
    return _any(prediction, references, lambda answer, reference: change(reference) in change(answer))


def _no_blanks(text: str) -> str:
    return text.strip().replace("\n", " ").replace(" ", "")


# CoIN and UCIT -----------------------------------------------------------------------------------------------------------


def coin_exact_match(prediction: str, references: Sequence[str], **row_fields: object) -> float:
    """Equality in upper case; nothing is stripped."""
    return _any(prediction, references, lambda answer, reference: answer.upper() == reference.upper())


def coin_ocrvqa(prediction: str, references: Sequence[str], **row_fields: object) -> float:
    """Equality in lower case; an answer with `Unanswerable` in it is wrong."""
    return _answerable(prediction, references, lambda answer, reference: answer == reference)


def coin_imagenet(prediction: str, references: Sequence[str], **row_fields: object) -> float:
    """Right if either string contains the other, case counts: an empty answer is right, and `fish` for `goldfish`."""
    return _any(prediction, references, lambda answer, reference: reference in answer or answer in reference)


# MLLM-DCL and MLLM-ACL ---------------------------------------------------------------------------------------------------


def _answerable(prediction: str, references: object, rule: Rule) -> float:
    """Applies a rule in lower case; these scripts skip answers with `Unanswerable` but keep them in the denominator."""
    if "Unanswerable" in prediction:
        return 0.0
    return _any(prediction.lower(), [reference.lower() for reference in accepted(references)], rule)


def mllmcl_contains_word(prediction: str, references: Sequence[str], **row_fields: object) -> float:
    """RS (RSVQA) and AD (DriveLM): a reference of several words is contained; a single word by four string tests."""

    def rule(answer: str, reference: str) -> bool:
        if " " in reference:
            return reference in answer
        word = reference.replace(".", "")
        if " " not in answer:
            return word in answer
        return any(form in answer for form in (f" {word}", f"{word} ", f"{word}.", f"{word},"))

    return _answerable(prediction, references, rule)


def mllmcl_pathvqa(prediction: str, references: Sequence[str], **row_fields: object) -> float:
    """Med (PathVQA): contained in lower case, so `yesterday` is right for `yes`."""
    return _answerable(prediction, references, lambda answer, reference: reference in answer)


def mllmcl_fin(prediction: str, references: Sequence[str], **row_fields: object) -> float:
    """Fin (StockQA / FinVis): equality in lower case once the answer has lost its blanks and periods."""

    def rule(answer: str, reference: str) -> bool:
        return answer.replace(" ", "").replace(".", "") == reference

    return _answerable(prediction, references, rule)


def mllmcl_sci(
    prediction: str, references: Sequence[str], image: object = "", question: object = "", **row_fields: object
) -> float:
    """Sci: equality, but for MapQA being contained, or the recall of a comma list when asked `Which states`.

    Which rule applies is read from the name of the image file, as the peer does.
    """
    if "Unanswerable" in prediction:
        return 0.0
    answer, source = prediction.lower(), str(image).split("/")[-1].split("_")[0]
    scores = [0.0]
    for reference in (reference.lower() for reference in accepted(references)):
        if source in ("AI2D", "TQA", "VQA", "SciVerse"):
            scores.append(float(reference == answer))
        elif "Which states" in str(question):
            wanted, said = reference.split(","), answer.split(",")
            scores.append(sum(state in said for state in wanted) / len(wanted))
        else:
            scores.append(float(reference in answer))
    return max(scores)


def mllmcl_vp(prediction: str, references: Sequence[str], **row_fields: object) -> float:
    """VP (CV-Bench): contained once blanks, newlines and periods are gone, so `14` is right for `4`."""

    def bare(text: str) -> str:
        return text.lower().strip().replace(" ", "").replace("\n", "").replace(".", "")

    return _any(prediction, references, lambda answer, reference: bare(reference) in bare(answer))
