"""Referring expressions: RefCOCO, one question for each phrase; the answer is a box.

Boxes are four numbers from 0 to 1 relative to the image padded to a square, as LLaVA-1.5 sees and writes them; for a
model that sees the image otherwise, they must be converted first. Hub id and columns as in lmms-eval 0.7.3.
"""

from __future__ import annotations

from collections.abc import Sequence

from mllm_cl.data.images import open_image
from mllm_cl.evaluation.benchmarks import prompts as words
from mllm_cl.evaluation.benchmarks.benchmark import Benchmark, Question, Raw, as_list


def square_box(box: Sequence[float], size: tuple[int, int]) -> list[float]:
    """Returns (left, top, width, height) in pixels as (left, top, right, bottom) in shares of the padded square.

    Example:

    ```python
    >>> from mllm_cl.evaluation.benchmarks.grounding import square_box
    >>> square_box((0, 0, 200, 100), (200, 100))
    [0.0, 0.25, 1.0, 0.75]

    ```
    """
    left, top, width, height = box
    side = max(size)
    across, down = (side - size[0]) // 2, (side - size[1]) // 2
    return [
        *((left + across) / side, (top + down) / side),
        *((left + width + across) / side, (top + height + down) / side),
    ]


def _refcoco(raw: Raw, prompts: str) -> list[Question]:
    images = as_list(raw["image"])
    size = open_image(images[0]).size
    answer = "[" + ", ".join(f"{value:.4f}" for value in square_box(raw["bbox"], size)) + "]"
    phrases = as_list(raw["answer"])
    fields = {"image_size": list(size), "box_scale": 1}
    return [Question(words.BOX + str(phrase), [answer], images, fields) for phrase in phrases]


def _part(name: str, split: str, owner: str = "RefCOCO") -> Benchmark:
    return Benchmark(
        name,
        f"lmms-lab-encoder/{owner}@{split}",
        ("answer", "bbox", "image"),
        _refcoco,
        parts=lambda raw: len(as_list(raw["answer"])),
        scan=("answer",),
    )


refcoco = _part("refcoco", "val")
refcoco_test_a = _part("refcoco-testA", "testA")
refcoco_test_b = _part("refcoco-testB", "testB")
