"""ms-swift's grounding rows: `<ref-object>` and `<bbox>` in the texts stand for the names and boxes of `objects`.

The boxes are written as the row gives them, `[x1, y1, x2, y2]` or `[x, y]`: pixels (`bbox_type` `real`) stay pixels, and
shares of the sides (`norm1`) stay shares. ms-swift itself rescales them to what each model was pre-trained with.

Source: "Custom Dataset" of ms-swift's documentation, section Grounding.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from mllm_cl.data.problems import RowError

_TOKENS = {"<ref-object>": "ref", "<bbox>": "bbox"}
_TOKEN = re.compile("|".join(map(re.escape, _TOKENS)))


def fill_objects(messages: Sequence[Mapping[str, Any]], objects: Any) -> None:
    """Replaces the tokens in the text blocks of a row, in the order of the conversation; no `objects`, no change.

    Raises:
        RowError: there are more or fewer tokens than names or boxes, or a name or box is none.
    """
    if not isinstance(objects, Mapping) or not {"ref", "bbox"} & set(objects):
        return
    blocks = [block for message in messages for block in message["content"] if block["type"] == "text"]
    found = [token for block in blocks for token in _TOKEN.findall(block["text"])]
    if not found:
        return  # annotations of a detection data set, which no text refers to
    texts: dict[str, list[str]] = {}
    for token, key in _TOKENS.items():
        values = objects.get(key)
        values = values if isinstance(values, (list, tuple)) else []
        if len(values) != found.count(token):
            raise RowError(
                f"{found.count(token)} `{token}` in the texts but {len(values)} in `objects.{key}`.",
                kind="placeholders",
                expected="one for each",
                fix=f"add or remove `{token}`, or correct `objects`.",
            )
        texts[token] = [_name(value) if key == "ref" else _box(value) for value in values]
    rest = {token: iter(values) for token, values in texts.items()}
    for block in blocks:
        block["text"] = _TOKEN.sub(lambda match: next(rest[match.group()]), block["text"])


def _name(value: Any) -> str:
    if not isinstance(value, str):
        raise RowError(f"`objects.ref` holds {value!r}.", kind="wrong_type", expected="texts", fix="correct `objects`.")
    return value


def _box(value: Any) -> str:
    is_box = isinstance(value, (list, tuple)) and len(value) >= 2 and len(value) % 2 == 0
    if not is_box or any(isinstance(number, bool) or not isinstance(number, (int, float)) for number in value):
        raise RowError(
            f"`objects.bbox` holds {str(value)[:80]}.",
            kind="wrong_type",
            expected="[x, y] or [x1, y1, x2, y2] of numbers",
            fix="correct `objects`.",
        )
    numbers = (str(number) if isinstance(number, int) else f"{number:.7g}" for number in value)  # float32's own digits
    return f"[{', '.join(numbers)}]"
