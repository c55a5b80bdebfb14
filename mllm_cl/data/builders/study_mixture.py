"""The general mixture source by source: continual pre-training in miniature, for the LLaVA-c study (docs/llava_c.md).

A task is one family of pictures with every kind of question about it except captions: `digit`, `letter`, `shape`,
`several`, `photo`, 960 training, 60 validation and 120 test rows each. It is meant for a model that can only describe
pictures so far (`data_scripts/build_tiny_llava.py --kinds caption`); tiny-llava itself has learnt all of it at once.
The benchmark `study-captions` asks for descriptions of all five families: what such a model can do beforehand.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from mllm_cl.data.builders.general import KINDS, Question, ask, generator, to_row
from mllm_cl.data.builders.scenes import Picture, choose, draw_picture
from mllm_cl.data.rows import Row, Rows

SOURCES = ("digit", "letter", "shape", "several", "photo")
SPLIT_SIZES = {"train": 960, "validation": 60, "test": 120}
CAPTIONS_PER_SOURCE = 32


def _asked(
    rng: np.random.Generator, split: str, source: str, kinds: Sequence[str], held_out: bool
) -> tuple[Picture, Question]:
    """A picture of a source with a question of one of the kinds; drawn again until one fits."""
    while True:
        picture = draw_picture(rng, split, source)
        question = ask(picture, choose(rng, kinds), rng, held_out)
        if question is not None:
            return picture, question


def build(seed: int = 0) -> list[dict[str, Any]]:
    """Returns the tasks of `study-mixture` as plain data; see `mllm_cl.data.builders.quickstart.build`."""
    tasks = []
    for source in SOURCES:
        kinds = [kind for kind, (families, _) in KINDS.items() if source in families and kind != "caption"]
        splits: dict[str, Rows] = {}
        for split, size in SPLIT_SIZES.items():
            rng, rows = generator(f"study-mixture/{source}/{split}", seed), []
            for number in range(size):
                picture, question = _asked(rng, split, source, kinds, held_out=split == "test")
                rows.append(to_row(f"{source}/{split}/{number:05d}", picture, question, with_answer=split != "test"))
            splits[split] = Rows(rows)
        tasks.append({"name": source, **splits, "metric": "exact_match", "max_new_tokens": 16})
    return tasks


def captions(split: Literal["validation", "test"] = "test") -> Rows:
    """Returns the benchmark `study-captions`: held-out ways of asking for a description of new pictures."""
    rng, rows = generator(f"study-captions/{split}", 0), list[Row]()
    for number in range(CAPTIONS_PER_SOURCE):
        for source in SOURCES:
            picture, question = _asked(rng, split, source, ["caption"], held_out=split == "test")
            rows.append(to_row(f"study-captions/{source}/{number:02d}", picture, question, with_answer=False))
    return Rows(rows)
