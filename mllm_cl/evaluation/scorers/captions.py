"""Captions: corpus BLEU-1..4, ROUGE-L and CIDEr as pycocoevalcap 1.2 computes them, in pure Python.

Definitions: BLEU (Papineni et al. 2002) with the closest reference length; ROUGE-L (Lin 2004) with beta 1.2 and best
precision and recall over references; CIDEr-D (arXiv 1411.5726) with document frequencies of the whole set. METEOR
needs Java and the extra `[caption]` and is `None` without them, never 0.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from mllm_cl.evaluation.scorers.caption_text import tokenise
from mllm_cl.evaluation.scorers.meteor import meteor
from mllm_cl.evaluation.scorers.references import accepted
from mllm_cl.evaluation.scorers.tally import Array, Tally, one_by_one, ratio

LONGEST = 4  # n-grams of one to four words
BETA = 1.2
SIGMA = 6.0  # of the penalty on length in CIDEr-D

Words = Sequence[str]
Counts = Counter[tuple[str, ...]]


def n_grams(words: Words) -> Counts:
    """Returns how often each n-gram of one to four words occurs."""
    return Counter(
        tuple(words[start : start + size]) for size in range(1, LONGEST + 1) for start in range(len(words) - size + 1)
    )


def bleu_statistics(words: Words, references: Sequence[Words]) -> list[float]:
    """Returns (matches of 1..4-grams, n-grams of 1..4, length, closest reference length) of one caption. Length 10."""
    said, most = n_grams(words), Counter()
    for reference in references:
        most |= n_grams(reference)
    matches = [0.0] * LONGEST
    for gram, count in said.items():
        matches[len(gram) - 1] += min(count, most[gram])
    possible = [float(max(0, len(words) - size + 1)) for size in range(1, LONGEST + 1)]
    closest = min(((abs(len(reference) - len(words)), len(reference)) for reference in references), default=(0, 0))
    return [*matches, *possible, float(len(words)), float(closest[1])]


def bleu(sums: Array) -> dict[str, Array]:
    """Returns BLEU-1..4 of summed statistics, with the tiny constants of pycocoevalcap. Shape (..., 10) -> (...)."""
    tiny, small = 1e-15, 1e-9
    matches, possible = sums[..., :LONGEST], sums[..., LONGEST : 2 * LONGEST]
    precision = (matches + tiny) / (possible + small)
    length = (sums[..., 8] + tiny) / (sums[..., 9] + small)
    penalty = np.where(length < 1, np.exp(1 - 1 / np.maximum(length, tiny)), 1.0)
    products = np.cumprod(precision, axis=-1)
    return {
        f"Bleu_{size}": np.minimum(products[..., size - 1] ** (1 / size) * penalty, 1.0)
        for size in range(1, LONGEST + 1)
    }


def rouge_l(words: Words, references: Sequence[Words]) -> float:
    """Returns ROUGE-L of one caption; best precision and best recall may come from different references."""
    precision = recall = 0.0
    for reference in references:
        common = _common_subsequence(words, reference)
        precision = max(precision, common / len(words) if words else 0.0)
        recall = max(recall, common / len(reference) if reference else 0.0)
    if precision == 0 or recall == 0:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def _common_subsequence(first: Words, second: Words) -> int:
    lengths = [0] * (len(second) + 1)
    for word in first:
        diagonal = 0
        for column, other in enumerate(second, start=1):
            above = lengths[column]
            lengths[column] = diagonal + 1 if word == other else max(above, lengths[column - 1])
            diagonal = above
    return lengths[-1]


def cider(captions: Sequence[Words], references: Sequence[Sequence[Words]]) -> list[float]:
    """Returns CIDEr-D of each caption, between 0 and 10; the corpus score is their mean.

    Rare n-grams weigh more: idf = log(images) − log(images whose references have the n-gram, at least 1).
    """
    counted = [[n_grams(reference) for reference in group] for group in references]
    frequency = Counter(gram for group in counted for gram in set().union(*group))
    images = math.log(len(captions)) if captions else 0.0

    def weigh(counts: Counts) -> list[dict[tuple[str, ...], float]]:
        weights: list[dict[tuple[str, ...], float]] = [{} for _ in range(LONGEST)]
        for gram, count in counts.items():
            weights[len(gram) - 1][gram] = count * (images - math.log(max(1, frequency[gram])))
        return weights

    scores = []
    for words, group in zip(captions, counted):
        said, total = weigh(n_grams(words)), 0.0
        for reference in group:
            total += sum(map(_similarity, said, weigh(reference))) * _length_penalty(words, reference)
        scores.append(10 * total / LONGEST / len(group) if group else 0.0)
    return scores


def _similarity(first: dict[tuple[str, ...], float], second: dict[tuple[str, ...], float]) -> float:
    """Cosine of two weighted counts, the first clipped to the second."""
    norms = [math.sqrt(sum(weight**2 for weight in weights.values())) for weights in (first, second)]
    product = sum(min(weight, second.get(gram, 0.0)) * second.get(gram, 0.0) for gram, weight in first.items())
    return product / (norms[0] * norms[1]) if norms[0] and norms[1] else product


def _length_penalty(words: Words, reference: Counts) -> float:
    pairs = sum(count for gram, count in reference.items() if len(gram) == 2)
    return math.exp(-((max(0, len(words) - 1) - pairs) ** 2) / (2 * SIGMA**2))


def _caption_tally(with_meteor: bool) -> Callable[..., Tally]:
    def tally(prediction: Sequence[str], references: Sequence[object], **row_fields: object) -> Tally:
        captions = [tokenise(caption) for caption in prediction]
        groups = [[tokenise(reference) for reference in accepted(group)] for group in references]
        per_row = cider(captions, groups)
        blank = [""] if with_meteor else []  # pycocoevalcap's ROUGE-L finds a word in nothing: it splits at blanks
        lines = [
            [*bleu_statistics(words, group), rouge_l(words or blank, [own or blank for own in group]), score, 1.0]
            for words, group, score in zip(captions, groups, per_row)
        ]
        found = meteor(captions, groups) if with_meteor else None

        def measures(sums: Array) -> dict[str, Array]:
            scores = bleu(sums) | {
                name: ratio(sums[..., i], sums[..., 12]) for i, name in ((10, "ROUGE_L"), (11, "CIDEr"))
            }
            if found is not None:
                scores["average_percent"] = 100 * (sum(scores.values(), np.asarray(found))) / 7
            return scores

        fixed: dict[str, float | None] = {"METEOR": found} if with_meteor else {}
        if with_meteor and found is None:
            fixed["average_percent"] = None
        return Tally(np.array(lines).reshape(-1, 13), one_by_one(len(lines)), measures, per_row, fixed)

    return tally


def rouge_l_score(prediction: str, references: Sequence[str], **row_fields: object) -> float:
    """Returns ROUGE-L of one answer, between 0 and 1; an empty answer is 0."""
    return rouge_l(tokenise(prediction), [tokenise(reference) for reference in accepted(references)])


coco_caption = _caption_tally(with_meteor=True)
"""All seven numbers of pycocoevalcap, and `average_percent`, their mean × 100, as UCIT reports it."""

captions = _caption_tally(with_meteor=False)
"""BLEU-1..4, ROUGE-L and CIDEr; needs nothing but Python."""
