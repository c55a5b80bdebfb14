"""The parts of a row, normalised: content blocks, image references, answers, ids.

`<image>` in a text stands for the next image. What is done with the white space around it gives the text that LLaVA's
own preprocessing gives (placeholders removed, ends of the turn stripped); the position among several images is kept.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from mllm_cl.data.problems import RowError
from mllm_cl.data.rows import text_block

PLACEHOLDER = "<image>"
_IMAGE_TYPES = ("image", "image_url", "input_image")
_ID_KEYS = ("id", "question_id")
# Columns that hold the image in some data sets, and files that show that this one does.
_LOOKS_LIKE_IMAGE = re.compile(r"(image|img|picture|photo|pic)s?(_?(path|file|name|filename|file_name)s?)?|file_?name")
_IMAGE_FILE = re.compile(r".+\.(png|jpe?g|webp|bmp|gif|tiff?)", re.IGNORECASE)
_PATH_TAG = re.compile(r"<img>\s*([^<>]+?)\s*</img>")


def type_name(value: Any) -> str:
    """Returns what a person calls the type of a JSON value."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"{json.dumps(value)} (a truth value)"
    if isinstance(value, (int, float)):
        return "a number"
    names = {str: "a text", list: "a list", tuple: "a list", dict: "an object", bytes: "bytes"}
    return names.get(type(value), f"a {type(value).__name__}")


def is_missing(value: Any) -> bool:
    """True for null, the empty text, an empty list and NaN (what pandas writes for a missing cell)."""
    return value is None or (isinstance(value, float) and math.isnan(value)) or (not value and value in ("", [], ()))


def wrong_type(key: str, value: Any, expected: str) -> RowError:
    """Returns the error of a key whose value has the wrong type."""
    return RowError(
        f"`{key}` is {type_name(value)}.", kind="wrong_type", expected=expected, fix=f"correct `{key}` in this row."
    )


def split_placeholders(text: str) -> list[dict[str, Any]]:
    """Returns the content blocks of a text in which `<image>` stands for an image.

    Example:

    ```python
    >>> from mllm_cl.data.content import split_placeholders
    >>> split_placeholders("<image>\\nWhat is this?")
    [{'type': 'image'}, {'type': 'text', 'text': 'What is this?'}]

    ```
    """
    if PLACEHOLDER not in text:
        return [text_block(text)]
    pieces = text.split(PLACEHOLDER)
    filled = [number for number, piece in enumerate(pieces) if piece.strip()]
    blocks: list[dict[str, Any]] = []
    for number, piece in enumerate(pieces):
        if number:
            blocks.append({"type": "image"})
        if not filled or not filled[0] <= number <= filled[-1]:
            continue
        if number == filled[0]:
            piece = piece.lstrip()
        if number == filled[-1]:
            piece = piece.rstrip()
        if piece:
            blocks.append(text_block(piece))
    return blocks


def content_blocks(content: Any, role: str, key: str) -> tuple[list[dict[str, Any]], list[Any]]:
    """Returns the blocks of a turn and the image references that its own blocks carry.

    Args:
        content (`str` or list of blocks): the turn as it was read.
        role (`str`): `system`, `user` or `assistant`; only a user turn may hold images.
        key (`str`): where the turn stands, for messages.

    Raises:
        RowError: the content is neither a text nor a list of blocks, or an image stands outside a user turn.
    """
    if isinstance(content, str):
        _refuse_path_tag(content, key)
        blocks, inline = (split_placeholders(content) if role == "user" else [text_block(content)]), []
    elif isinstance(content, (list, tuple)):
        blocks, inline = _typed_blocks(content, key, role)
    else:
        raise wrong_type(key, content, "a text or a list of blocks with `type`")
    if role != "user" and any(block["type"] == "image" or PLACEHOLDER in block["text"] for block in blocks):
        raise RowError(
            f"`{key}`: an image in a turn of the {role}.",
            kind="placeholders",
            expected="images and `<image>` in user turns only",
            fix="move the image to a user turn, or spell the text without `<image>`.",
        )
    return blocks, inline


def _refuse_path_tag(text: str, key: str) -> None:
    found = _PATH_TAG.search(text)
    if found and _IMAGE_FILE.fullmatch(found.group(1)):
        raise RowError(
            f"`{key}` names an image in the text: {found.group()[:80]!r}.",
            kind="placeholders",
            expected="`<image>` in the text and the path in `images`",
            fix="replace the tag by `<image>`, and add the path to `images`.",
        )


def _typed_blocks(content: Sequence[Any], key: str, role: str) -> tuple[list[dict[str, Any]], list[Any]]:
    blocks: list[dict[str, Any]] = []
    inline: list[Any] = []
    for number, block in enumerate(content):
        kind = block.get("type") if isinstance(block, Mapping) else None
        if kind == "text" and isinstance(block.get("text"), str):
            blocks += split_placeholders(block["text"]) if role == "user" else [text_block(block["text"])]
        elif kind in _IMAGE_TYPES:
            blocks.append({"type": "image"})
            found = (block.get(name) for name in ("image", "image_url", "path", "url"))
            reference = next((value for value in found if not is_missing(value)), None)
            if isinstance(reference, Mapping) and "url" in reference:
                reference = reference["url"]
            if reference is not None:
                inline.append(reference)
        else:
            what = type_name(block) if not isinstance(block, Mapping) else f"a block of type {kind!r}"
            raise RowError(
                f"`{key}[{number}]` is {what} that cannot be read.",
                kind="wrong_type",
                expected='blocks {"type": "text", "text": ...} and {"type": "image"}',
                fix="rewrite the block, or remove the row; video and audio are not supported.",
            )
    return blocks, inline


def image_references(raw: Mapping[str, Any], root: str) -> list[Any]:
    """Returns the image references of `images` or `image`; relative paths are resolved against `root`.

    Raises:
        RowError: a value is not a path, bytes, a mapping with `bytes` or `path`, or a PIL image; or it is a URL.
    """
    for key in ("videos", "video", "audios", "audio"):
        if not is_missing(raw.get(key)):
            raise RowError(
                f"the row has `{key}`.", kind="wrong_type", expected="images only", fix="turn frames into `images`."
            )
    if not is_missing(raw.get("tools")) and raw["tools"] not in ("[]", "{}"):
        fix = "remove `tools` if the answers call none, else the row."
        raise RowError("the row has `tools`.", kind="wrong_type", expected="no tool calls", fix=fix)
    for key in ("images", "image"):
        value = raw.get(key)
        if not is_missing(value):
            values = value if isinstance(value, (list, tuple)) else [value]
            return [resolve_image(item, root, key) for item in values]
    return []


def check_no_image_left(raw: Mapping[str, Any]) -> None:
    """Refuses a row without images that has one under a name we do not read: it would silently become a text-only row.

    Raises:
        RowError: a column such as `image_path` or `img` holds an image file or embedded bytes.
    """
    for key, value in raw.items():
        if not isinstance(key, str) or not _LOOKS_LIKE_IMAGE.fullmatch(key.casefold()):
            continue
        first = value[0] if isinstance(value, (list, tuple)) and value else value
        is_embedded = isinstance(first, Mapping) and first.get("bytes") is not None
        if is_embedded or (isinstance(first, str) and _IMAGE_FILE.fullmatch(first)):
            raise RowError(
                f"the row has no `image` or `images`, but `{key}` looks like one.",
                kind="missing_key",
                expected="images under `image` or `images`",
                fix=f"rename `{key}`, or add `columns: {{{key}: image}}` to the task in the stream file.",
            )


def resolve_image(reference: Any, root: str, key: str) -> Any:
    """Returns one image reference in the form of `mllm_cl.data.images`; nothing is opened."""
    if isinstance(reference, Path):
        reference = str(reference)
    if isinstance(reference, str) and reference:
        if reference.startswith("data:"):
            return _decode_data_url(reference, key)
        if reference.startswith(("http://", "https://")):
            raise RowError(
                f"`{key}` is the URL {reference!r}.",
                kind="wrong_type",
                expected="a path; images are never downloaded while training",
                fix="download the image and write its path.",
            )
        return os.path.join(root, reference.removeprefix("file://"))
    if isinstance(reference, bytes):
        return {"bytes": reference, "path": None}
    if isinstance(reference, Image.Image):
        return reference
    if isinstance(reference, Mapping):
        if reference.get("bytes") is not None:
            return {"bytes": reference["bytes"], "path": reference.get("path")}
        if isinstance(reference.get("tiles"), (list, tuple)) and reference["tiles"]:
            tiles = [resolve_image(tile, root, key) for tile in reference["tiles"]]
            return {"tiles": tiles, "columns": int(reference.get("columns", 1))}
        if isinstance(reference.get("path"), str) and reference["path"]:
            path = os.path.join(root, reference["path"])
            return {"path": path, "crop": tuple(reference["crop"])} if reference.get("crop") else path
    raise wrong_type(key, reference, "a path, or an object with `bytes` or `path`, or a list of them")


def _decode_data_url(url: str, key: str) -> dict[str, Any]:
    header, _, payload = url.partition(",")
    try:
        if not header.endswith(";base64"):
            raise ValueError("no base64")
        return {"bytes": base64.b64decode(payload, validate=True), "path": None}
    except (ValueError, binascii.Error) as error:
        raise wrong_type(key, url[:40], "`data:image/...;base64,` followed by base64") from error


def answer_text(value: Any, key: str) -> str:
    """Returns one answer as text: numbers and boxes as JSON writes them.

    Raises:
        RowError: null, NaN, a list of texts, or an object without `answer`.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, float) and not math.isfinite(value):
        raise RowError(
            f"`{key}` is {value} (a missing cell?).", kind="wrong_type", expected="a text", fix="fill in the answer."
        )
    if isinstance(value, (bool, int, float)):
        return json.dumps(value)
    if isinstance(value, Mapping) and isinstance(value.get("answer"), (str, int, float)):
        return answer_text(value["answer"], key)
    if isinstance(value, (list, tuple)) and value and _is_numeric(value):
        return json.dumps(value)
    raise wrong_type(key, value, "a text, a number, a box (list of numbers), or a list of accepted answers")


def _is_numeric(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_numeric(item) for item in value)
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def answer_texts(raw: Mapping[str, Any]) -> list[str]:
    """Returns the accepted answers given by `answers` or `answer`; empty when there are none.

    A list of numbers in `answer` is one answer (a box); in `answers` it is one answer per number.
    """
    for key in ("answers", "answer"):
        value = raw.get(key)
        if value is None or (isinstance(value, (list, tuple)) and not value):
            continue
        one = not isinstance(value, (list, tuple)) or (key == "answer" and _is_numeric(value))
        return [answer_text(value, key)] if one else [answer_text(item, f"{key}[..]") for item in value]
    return []


def own_id(raw: Mapping[str, Any]) -> str | None:
    """Returns the id that a row brings along (`id`, else `question_id`) as text, or `None`.

    Raises:
        RowError: it is neither a text nor a number.
    """
    for key in _ID_KEYS:
        value = raw.get(key)
        if is_missing(value):
            continue
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            raise wrong_type(key, value, "a text or a number")
        return str(value)
    return None
