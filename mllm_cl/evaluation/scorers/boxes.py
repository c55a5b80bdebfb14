"""Bounding boxes in text: intersection over union with the reference box, and the share of boxes above a threshold."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from mllm_cl.evaluation.scorers.references import number

Box = tuple[float, float, float, float]

_NUMBER = r"(-?\d+(?:\.\d+)?)"
_BRACKETED = re.compile(r"\[\s*" + r",\s*".join([_NUMBER] * 4) + r"\s*\]")
_ANY_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")


def iou(first: Sequence[float], second: Sequence[float]) -> float:
    """Returns intersection over union of two boxes (left, top, right, bottom); 0 where it is not defined.

    Example:

    ```python
    >>> from mllm_cl.evaluation.scorers.boxes import iou
    >>> iou((0, 0, 1, 1), (0, 0, 0.5, 1))
    0.5

    ```
    """
    width = max(0.0, min(first[2], second[2]) - max(first[0], second[0]))
    height = max(0.0, min(first[3], second[3]) - max(first[1], second[1]))
    shared = width * height
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    union = areas[0] + areas[1] - shared
    if not math.isfinite(union) or union <= 0 or shared <= 0:
        return 0.0
    return min(1.0, shared / union)


def reference_box(reference: object) -> Box | None:
    """Returns the four numbers of a reference, given as a list or as text in any brackets."""
    if isinstance(reference, str):
        values = [number(text) for text in _ANY_NUMBER.findall(reference)]
    elif isinstance(reference, Sequence):
        values = [number(str(value)) for value in reference]
    else:
        return None
    if len(values) != 4 or any(value is None or not math.isfinite(value) for value in values):
        return None
    return tuple(values)  # type: ignore[return-value]


def _boxes(references: object) -> list[Box]:
    """Returns the reference boxes; four bare numbers are one box."""
    alone = isinstance(references, str) or not isinstance(references, Sequence)
    if alone or (references and not isinstance(references[0], (str, Sequence))):  # type: ignore[index]
        references = [references]
    return [box for box in map(reference_box, references) if box is not None]  # type: ignore[arg-type]


# lmms-eval ---------------------------------------------------------------------------------------------------------------


def refcoco_iou_lmms_eval(prediction: str, references: object, **row_fields: object) -> float:
    """lmms-eval on RefCOCO: the first four numbers in square brackets; anything else is the box of zeros."""
    match = _BRACKETED.search(prediction)
    if match is None:
        return 0.0
    box = [float(group) for group in match.groups()]
    return max((iou(reference, box) for reference in _boxes(references)), default=0.0)


def refcoco_acc_lmms_eval(prediction: str, references: object, **row_fields: object) -> float:
    """Right if `refcoco_iou_lmms_eval` is at least 0.5 in floating point."""
    return float(refcoco_iou_lmms_eval(prediction, references) >= 0.5)


# CoIN --------------------------------------------------------------------------------------------------------------------


def coin_grounding(prediction: str, references: object, image_size: object = None, **row_fields: object) -> float:
    """CoIN: square brackets are removed, **then one more character is cut off both ends**; right above 0.5.

    `[0.1, 0.2, 0.5, 0.6]` is wrong for itself. Coordinates are scaled by the longer side of the image.
    """
    parts = prediction.replace("[", "").replace("]", "")[1:-1].split(",")
    values = [number(part) for part in parts]
    if len(values) != 4 or any(value is None for value in values):
        return 0.0
    sides = [number(str(side)) or 0.0 for side in image_size] if isinstance(image_size, Sequence) else []
    scale = max(sides, default=1.0)
    box = [value * scale for value in values if value is not None]
    scaled = ([value * scale for value in reference] for reference in _boxes(references))
    return float(any(iou(box, reference) > 0.5 for reference in scaled))


# strict ------------------------------------------------------------------------------------------------------------------


def box_iou(prediction: str, references: object, box_scale: object = 1, **row_fields: object) -> float:
    """Intersection over union of the only box in the answer, in any brackets or none.

    Args:
        box_scale: what 1.0 of the reference is in the answer: 1, 100, 1000 or 999. Declared by the task, never
            guessed. An answer with other than four numbers, or with left > right, is 0.
    """
    scale = number(str(box_scale))
    values = [float(text) for text in _ANY_NUMBER.findall(prediction)]
    if len(values) != 4 or not scale or not math.isfinite(scale):
        return 0.0
    box = [value / scale for value in values]
    if box[0] > box[2] or box[1] > box[3]:
        return 0.0
    return max((iou(reference, box) for reference in _boxes(references)), default=0.0)


def box_accuracy(prediction: str, references: object, box_scale: object = 1, **row_fields: object) -> float:
    """Right if `box_iou` is at least 0.5, rounding errors of floating point forgiven."""
    return float(box_iou(prediction, references, box_scale) >= 0.5 - 1e-9)
