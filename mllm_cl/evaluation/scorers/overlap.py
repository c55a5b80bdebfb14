"""Scorers of TRACE and FCIT that no other benchmark needs: edit similarity, SARI, the first letter, being contained."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher

from mllm_cl.evaluation.scorers.references import accepted

_LETTER = re.compile(r"\s*(?:Answer:\s*)?\(?([A-Z])\b")
_ORDERS = (1, 2, 3, 4)


def edit_similarity(prediction: str, references: Sequence[str], **row_fields: object) -> float:
    """Py150: 2 M / T, M the characters in matching blocks, T those of both texts; the best reference counts.

    The ratio of Python's difflib, as TRACE's fuzz.ratio without Levenshtein, but not rounded to whole percent.
    """
    if not prediction:
        return 0.0
    return max((SequenceMatcher(None, prediction, text).ratio() for text in accepted(references) if text), default=0.0)


def first_letter(prediction: str, references: Sequence[str], **row_fields: object) -> float:
    """TRACE's ScienceQA: the option letter in front, with or without `Answer:`; the rationale behind it is not looked at."""
    said = _LETTER.match(prediction)
    wanted = {found.group(1) for found in map(_LETTER.match, accepted(references)) if found}
    return float(bool(said) and said.group(1) in wanted)  # type: ignore[union-attr]


def fcit_contained(prediction: str, references: Sequence[str], **row_fields: object) -> float:
    """FCIT's FigureQA and DVQA: right if the answer is part of the reference, case aside. An empty answer is right."""
    return float(any(prediction.lower() in reference.lower() for reference in accepted(references)))


def contained(prediction: str, references: Sequence[str], **row_fields: object) -> float:
    """The same, but an empty answer is wrong."""
    return fcit_contained(prediction.strip(), references) if prediction.strip() else 0.0


def sari(prediction: str, references: Sequence[str], question: object = "", **row_fields: object) -> float:
    """SARI of a simplification: mean over 1- to 4-grams of (F1 of what is added, F1 of what is kept, precision of what
    is deleted) / 3, against all references.

    Args:
        question: the text that was simplified, in lower case and split at blanks like everything else.

    References: Xu et al., TACL 2016. Where a denominator is zero, a share is 1 if there was nothing to do, else 0.
    """
    source, answer = str(question).lower().split(), prediction.lower().split()
    targets = [text.lower().split() for text in accepted(references)]
    if not answer or not targets:
        return 0.0
    return sum(_sari(source, answer, targets, order) for order in _ORDERS) / len(_ORDERS)


def _sari(source: list[str], answer: list[str], targets: list[list[str]], order: int) -> float:
    copies = len(targets)
    before, after = (_grams(words, order, copies) for words in (source, answer))
    wanted: Counter[tuple[str, ...]] = Counter()
    for target in targets:
        wanted += _grams(target, order)
    kept, keep = before & after, before & wanted
    keep_right = kept & wanted
    keep_precision = _share(sum(keep_right[gram] / kept[gram] for gram in keep_right), len(kept), len(keep))
    keep_recall = _share(sum(keep_right[gram] / keep[gram] for gram in keep_right), len(keep), len(kept))
    deleted, delete = before - after, before - wanted
    delete_right = deleted & delete
    precision = _share(sum(delete_right[gram] / deleted[gram] for gram in delete_right), len(deleted), len(delete))
    added, add = set(after) - set(before), set(wanted) - set(before)
    right = len(added & add)
    return (_f1(_share(right, len(added), len(add)), _share(right, len(add), len(added)))
            + _f1(keep_precision, keep_recall) + precision) / 3  # fmt: skip


def _grams(words: list[str], order: int, copies: int = 1) -> Counter[tuple[str, ...]]:
    grams: Iterable[tuple[str, ...]] = zip(*(words[start:] for start in range(order)))
    return Counter({gram: count * copies for gram, count in Counter(grams).items()})


def _share(part: float, whole: int, other: int) -> float:
    """part / whole; of nothing it is right to have done nothing, and only that."""
    return part / whole if whole else float(other == 0)


def _f1(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0
