"""Boxes in the numbers that a model was pre-trained to write: a transform that is asked for, never a default.

```yaml
stream:
  transforms:
    - boxes: {tasks: [Grounding], given: square, wanted: thousand}
```

CoIN's and LLaVA's boxes are shares of the image padded to a square; a model that sees the image as it is, or writes
0..1000, would have to unlearn its own convention first. Questions, answers **and references** of the named tasks are
converted, in training, validation and test rows alike: intersection over union is the same in all conventions, up to
rounding, as long as prediction and reference use one. An official scorer that reads the benchmark's own numbers is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

from mllm_cl.data.images import open_image
from mllm_cl.data.problems import RowError
from mllm_cl.data.rows import Row
from mllm_cl.errors import DataError, StreamError, suggest
from mllm_cl.streams.making import view
from mllm_cl.streams.stream import Task

METRICS = ("box_iou", "box_accuracy@0.5")


class Convention(NamedTuple):
    """What a coordinate means.

    Args:
        is_square: relative to the image padded to a square of its longer side, else to the image itself.
        scale: what the far side is; `None`: its length in pixels.
        digits: decimals that are written.
    """

    is_square: bool
    scale: float | None
    digits: int


CONVENTIONS = {
    "square": Convention(True, 1, 3),  # LLaVA-1.5, CoIN, RefCOCO of this package
    "shares": Convention(False, 1, 3),
    "thousand": Convention(False, 1000, 0),
    "thousand_999": Convention(False, 999, 0),
    "pixels": Convention(False, None, 0),  # of the file: a model that resizes the image sees others
}
FORMS: dict[str, Callable[[Sequence[str]], str]] = {
    "list": lambda box: f"[{', '.join(box)}]",
    "box_list": lambda box: f"<box>[[{', '.join(box)}]]</box>",
    "box_pairs": lambda box: f"<box>({box[0]},{box[1]}),({box[2]},{box[3]})</box>",
}
_NUMBER = r"\s*(-?\d+(?:\.\d+)?)\s*"
_LIST = r"\[" + ",".join([_NUMBER] * 4) + r"\]"
_PAIRS = rf"\({_NUMBER},{_NUMBER}\)\s*,\s*\({_NUMBER},{_NUMBER}\)"
_BOX = re.compile(rf"<box>\s*\[\s*{_LIST}\s*\]\s*</box>|<box>\s*{_PAIRS}\s*</box>|{_LIST}")
_UNREAD = re.compile(
    rf"<box>[\s\[(]*-?\d|\[{_NUMBER}(?:,{_NUMBER})+\]"
)  # what is left of a text once its boxes are taken out
_ANY_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_ROUND = re.compile(r"-\d+$")  # `a-2`: the second appearance of `a`
_ORIENTATION, _TURNED = 0x0112, (5, 6, 7, 8)  # EXIF: width and height change places
_SLACK = 0.01  # of the far side, for boxes that were rounded outwards


def convert_boxes(
    stream: Sequence[Task],
    place: str,
    tasks: Sequence[str] = (),
    given: str = "",
    wanted: str = "",
    form: str = "list",
) -> list[Task]:
    """Returns the tasks with the boxes of some written in another convention.

    Args:
        tasks: names of the tasks whose boxes are converted; their further appearances (`a-2`) are meant too, and so are
            their rows that are learnt with another task.
        given, wanted: keys of `CONVENTIONS`.
        form: key of `FORMS`: how a box is written. All of them are read.

    Raises:
        StreamError: an unknown task, convention or form, or a task whose scorer does not compare boxes.
    """
    names = {name for task in stream for name in (task.name, _base(task.name))}
    if isinstance(tasks, str) or not tasks:
        raise StreamError(f"{place}.tasks: {tasks!r} given.", expected="a list of task names")
    for name in tasks:
        if name not in names:
            raise StreamError(f"{place}.tasks: there is no task {name!r}.", expected=suggest(str(name), names))
    for key, value, known in (("given", given, CONVENTIONS), ("wanted", wanted, CONVENTIONS), ("form", form, FORMS)):
        if value not in known:
            what = f"{value!r} given" if value else "the option is missing"
            raise StreamError(f"{place}.{key}: {what}.", expected=suggest(str(value), known))
    converted = []
    for task in stream:
        is_meant = task.name in tasks or _base(task.name) in tasks
        if is_meant and task.metric not in METRICS:
            raise StreamError(
                f"{place}: {task.name!r} is scored by {task.metric!r}, which reads the numbers of the benchmark.",
                expected=" or ".join(METRICS),
                fix="use `options: {scoring: corrected}` of the benchmark, or another `metric`.",
            )
        function = _Convert(
            frozenset(tasks), frozenset(names), task.name, CONVENTIONS[given], CONVENTIONS[wanted], form
        )
        changed = {"train": view(task.train).map(function)}
        if is_meant:
            changed |= {"validation": view(task.validation).map(function)} if len(task.validation) else {}
            changed |= {"test": view(task.test).map(function)}
        converted.append(replace(task, **changed))
    return converted


def _base(name: str) -> str:
    return _ROUND.sub("", name)


@dataclass(frozen=True)
class _Convert:
    tasks: frozenset[str]
    known: frozenset[str]
    own: str
    given: Convention
    wanted: Convention
    form: str

    def __call__(self, row: Row, position: int) -> Row:
        origin = str(row.get("task", self.own))  # rows that are learnt with another task name their own
        origin = origin if origin in self.known else self.own
        if origin not in self.tasks and _base(origin) not in self.tasks:
            return row
        scale = cast("Mapping[str, Any]", row).get("box_scale", 1)
        if scale != 1:
            raise _refused(f"the row has `box_scale` {scale!r}", "boxes and references in one convention")
        messages = [{**message, "content": self._content(row, message)} for message in row["messages"]]
        changed: dict[str, Any] = {**row, "messages": messages}
        answers = row.get("answers")
        if answers:
            changed["answers"] = [self._text(row, answer, True) for answer in answers]
        return changed  # type: ignore[return-value]

    def _content(self, row: Row, message: Any) -> Any:
        content, is_answer = message["content"], message["role"] == "assistant"
        if isinstance(content, str):
            return self._text(row, content, is_answer)
        return [
            {**block, "text": self._text(row, block["text"], is_answer)} if block["type"] == "text" else block
            for block in content
        ]

    def _text(self, row: Row, text: str, is_answer: bool) -> str:
        others = _BOX.sub("", text)
        is_unread = is_answer and others == text and len(_ANY_NUMBER.findall(text)) == 4
        if is_unread or _UNREAD.search(others):
            raise _refused(f"no box can be read from {text[:80]!r}", "a box as one of " + ", ".join(_examples()))
        return _BOX.sub(lambda match: self._box(row, match), text)

    def _box(self, row: Row, match: re.Match[str]) -> str:
        values = [float(group) for group in match.groups() if group is not None]
        across, down = _sides(row) if self._needs_size() else (1, 1)
        x1, x2 = self._line(values[0::2], across, down, match.group())
        y1, y2 = self._line(values[1::2], down, across, match.group())
        return FORMS[self.form]([f"{value:.{self.wanted.digits}f}" for value in (x1, y1, x2, y2)])

    def _needs_size(self) -> bool:
        return self.given.is_square != self.wanted.is_square or None in (self.given.scale, self.wanted.scale)

    def _line(self, ends: Sequence[float], side: int, other: int, text: str) -> list[float]:
        """Two coordinates along one side of the image, converted."""
        far = side if self.given.scale is None else self.given.scale
        if not -_SLACK * far <= ends[0] <= ends[1] <= (1 + _SLACK) * far:
            raise _refused(f"the box {text} does not fit the convention `given`", f"two points from 0 to {far:g}")
        shares = [end / far for end in ends]
        if self.given.is_square and not self.wanted.is_square:
            longer = max(side, other)
            shares = [(share * longer - (longer - side) // 2) / side for share in shares]
            if shares[1] <= 0 or shares[0] >= 1:
                raise _refused(f"the box {text} lies in the padding", "a box that meets the image")
        elif self.wanted.is_square and not self.given.is_square:
            longer = max(side, other)
            shares = [(share * side + (longer - side) // 2) / longer for share in shares]
        scale = side if self.wanted.scale is None else self.wanted.scale
        return [min(max(share, 0.0), 1.0) * scale for share in shares]


def _sides(row: Row) -> tuple[int, int]:
    """Width and height of the row's only image as it is shown."""
    if len(row["images"]) != 1:
        raise _refused(f"the row has {len(row['images'])} images", "one image, whose size the boxes need")
    reference = row["images"][0]
    try:
        image = open_image(reference)
    except DataError as error:
        raise RowError(error.given, kind="image_unreadable", fix=error.fix or "replace the file.") from error
    width, height = image.size
    is_turned = image.getexif().get(_ORIENTATION) in _TURNED
    if image is not reference:
        image.close()
    return (height, width) if is_turned else (width, height)


def _examples() -> list[str]:
    return [write(("x1", "y1", "x2", "y2")) for write in FORMS.values()]


def _refused(what: str, expected: str) -> RowError:
    return RowError(
        f"{what}.", kind="wrong_type", expected=expected, fix="correct `given` of the transform `boxes`, or the row."
    )
