"""MMBench: a question counts only if it is answered right under every rotation of its options."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from mllm_cl.evaluation.scorers.choice import mmbench_letter, multiple_choice
from mllm_cl.evaluation.scorers.references import accepted, lettered
from mllm_cl.evaluation.scorers.tally import Array, Tally, column, ratio

ROTATIONS = 1_000_000
"""MMBench numbers the rotations of question q as q, q + 1000000, q + 2000000, ..."""


def _options(choices: object, count: int) -> list[dict[str, str]]:
    """Returns the options of each row; one list of options stands for its rotations, each a step to the left."""
    several = choices if isinstance(choices, Sequence) and not isinstance(choices, str) else ()
    if any(isinstance(entry, (Mapping, list, tuple)) for entry in several):
        return [lettered(entry) for entry in column(choices, count)]
    options = list(lettered(choices).values())
    steps = [step % len(options) if options else 0 for step in range(count)]
    return [lettered(options[step:] + options[:step]) for step in steps]


def _groups(index: object, count: int) -> list[list[int]]:
    """Returns the rows of each question; without numbers all rows are rotations of one."""
    members: dict[object, list[int]] = {}
    for row, value in enumerate(column(index, count)):
        number = str(value).removesuffix(".0")  # files of tables hold 1000005 also as "1000005" or 1000005.0
        key = int(number) % ROTATIONS if number.isdecimal() else str(value)
        members.setdefault(key, []).append(row)
    return list(members.values())


def _circular(right: Sequence[bool], index: object) -> Tally:
    groups = _groups(index, len(right))
    hits = [all(right[row] for row in group) for group in groups]
    statistics = np.array(
        [(hit, 1.0, sum(right[row] for row in group), len(group)) for hit, group in zip(hits, groups)]
    )

    def measures(sums: Array) -> dict[str, Array]:
        return {"circular": ratio(sums[..., 0], sums[..., 1]), "vanilla": ratio(sums[..., 2], sums[..., 3])}

    return Tally(statistics.reshape(-1, 4), groups, measures, [float(is_right) for is_right in right])


def _tally(read: Callable[[str, object, object], bool]) -> Callable[..., Tally]:
    def tally(
        prediction: Sequence[str],
        references: Sequence[object],
        choices: object = None,
        index: object = None,
        **row_fields: object,
    ) -> Tally:
        options = _options(choices, len(prediction))
        right = [read(answer, label, own) for answer, label, own in zip(prediction, references, options)]
        return _circular(right, index)

    return tally


mmbench_circular = _tally(lambda answer, label, options: mmbench_letter(answer, options) in accepted(label))
mmbench_strict = _tally(lambda answer, label, options: multiple_choice(answer, accepted(label), options) == 1.0)
