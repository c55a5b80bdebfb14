"""Classification by words: macro-F1 over the classes, beside the accuracy.

F1 of a class = 2 TP / (2 TP + FP + FN); macro-F1 is the mean over the classes that occur among the labels of the test set. An
answer that names no class is wrong for its own class and counts for no other.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mllm_cl.evaluation.scorers.exact_match import normalise
from mllm_cl.evaluation.scorers.references import accepted, lettered
from mllm_cl.evaluation.scorers.tally import Array, Tally, ratio


def macro_f1(
    prediction: Sequence[str],
    references: Sequence[object],
    choices: Sequence[object] | None = None,
    label: Sequence[object] | None = None,
    **row_fields: object,
) -> Tally:
    """Returns `macro_f1` and `accuracy`; an answer is read as `exact_match` reads it.

    Args:
        choices: per row the classes in the order of their letters; needed where answers are letters.
        label: per row its class; the first reference where it is not given.
    """
    empty = [None] * len(prediction)
    rows = zip(prediction, references, choices or empty, label or empty)
    pairs = [_classes(answer, reference, options, truth) for answer, reference, options, truth in rows]
    names = sorted({truth for _, truth in pairs})
    place = {name: index for index, name in enumerate(names)}
    statistics = np.zeros((len(pairs), 3 * len(names) + 2))  # TP, FP and FN of each class, right answers, rows
    for row, (said, truth) in enumerate(pairs):
        counts = statistics[row, :-2].reshape(3, len(names))
        if said == truth:
            counts[0, place[truth]] = 1
        else:
            counts[2, place[truth]] = 1
            if said in place:
                counts[1, place[said]] = 1
        statistics[row, -2:] = said == truth, 1
    right = statistics[:, -2].tolist()
    return Tally(statistics, [[row] for row in range(len(pairs))], _measures, right)


def _classes(answer: str, references: object, choices: object, label: object) -> tuple[str, str]:
    """What an answer says and what is right, in comparable form; letters are replaced by the choices they stand for."""
    reference = next(iter(accepted(references)), "")
    options = {normalise(letter): normalise(text) for letter, text in lettered(choices).items()} if choices else {}
    said, truth = normalise(answer), normalise(reference)
    if truth in options:  # the answer asked for is a letter
        said, truth = options.get(said, said), options[truth]
    return said, truth if label is None else normalise(str(label))


def _measures(sums: Array) -> dict[str, Array]:
    counts = sums[..., :-2].reshape(*sums.shape[:-1], 3, -1)  # (..., 3, classes)
    right, wrong = 2 * counts[..., 0, :], counts[..., 1, :] + counts[..., 2, :]
    with np.errstate(invalid="ignore"):
        f1 = right / (right + wrong)  # NaN: the class is not in this draw of rows
        accuracy = ratio(sums[..., -2], sums[..., -1])
    present = np.isfinite(f1)
    return {"macro_f1": np.where(present, f1, 0).sum(-1) / np.maximum(present.sum(-1), 1), "accuracy": accuracy}
