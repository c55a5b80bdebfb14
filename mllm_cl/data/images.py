"""Image references and how they become pixels.

A reference is a path (`str` or `Path`), a `PIL.Image.Image`, or the mapping `{"bytes": ..., "path": ...}` that datasets
uses for encoded images. Two more mappings let a builder refer to parts and arrangements of files without writing new
ones: `{"path": ..., "crop": (left, top, right, bottom)}` and `{"tiles": [references], "columns": 2}`, which puts images
into cells of equal size, row by row. References are opened only at collation, so replay memories and shuffled streams
stay small.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from PIL import Image, ImageOps

from mllm_cl.errors import DataError
from mllm_cl.model_section import ImageMode

_ORIENTATION = 0x0112  # EXIF tag
# What the decoders of Pillow raise on damaged data.
_DECODING_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, struct.error, zlib.error)


def describe_image(reference: Any) -> str:
    """Returns a short name of a reference for messages."""
    if isinstance(reference, (str, Path)):
        return str(reference)
    if isinstance(reference, Mapping):
        if reference.get("tiles"):
            return " + ".join(map(describe_image, reference["tiles"]))
        crop = f" cropped to {tuple(reference['crop'])}" if reference.get("crop") else ""
        return str(reference.get("path") or f"<{len(reference.get('bytes') or b'')} embedded bytes>") + crop
    return f"<{type(reference).__name__}>"


def open_image(reference: Any) -> Image.Image:
    """Opens a reference without decoding it (size and format are known, pixels are not read yet).

    Raises:
        DataError: the file is missing, is not an image, or the reference has an unknown type.
    """
    try:
        if isinstance(reference, Image.Image):
            return reference
        if isinstance(reference, (str, Path)):
            return Image.open(reference)
        if isinstance(reference, Mapping):
            if reference.get("tiles"):
                return _tile(reference["tiles"], reference.get("columns", 1))
            if reference.get("crop"):
                return _crop(reference)
            if reference.get("bytes") is not None:
                return Image.open(io.BytesIO(reference["bytes"]))
            if reference.get("path"):
                return Image.open(reference["path"])
    except FileNotFoundError as error:
        raise DataError(
            f"{describe_image(reference)}: the image file does not exist.",
            fix="correct the path in the row, or `image_folder` in the stream file.",
        ) from error
    except (*_DECODING_ERRORS, AttributeError, Image.DecompressionBombError) as error:
        raise DataError(
            f"{describe_image(reference)}: not a readable image ({error}).",
            fix="replace the file or remove the row.",
        ) from error
    raise DataError(
        f"{describe_image(reference)}: not an image reference.",
        expected="a path, a PIL image, or a mapping with `bytes` or `path`",
    )


def load_image(reference: Any) -> Image.Image:
    """Returns the decoded RGB image of a reference, as a person sees it in a viewer.

    Transparency is composited on white, the EXIF orientation is applied (as datasets and transformers do), 16-bit grey
    is scaled to 8 bits, and of an animation the first frame is taken.

    Raises:
        DataError: as `open_image`, and for truncated files.
    """
    image = open_image(reference)
    try:
        image.load()
        if image.getexif().get(_ORIENTATION, 1) != 1:
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I") or image.mode == "F":
            image = _to_8_bits(image)
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            rgba = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba)
        return image.convert("RGB")
    except _DECODING_ERRORS as error:
        raise DataError(
            f"{describe_image(reference)}: the image cannot be decoded ({error}).",
            fix="replace the file or remove the row.",
        ) from error


def _crop(reference: Mapping[str, Any]) -> Image.Image:
    """The part of an image inside a box in pixels; what of the box lies outside the image is left away.

    Raises:
        DataError: nothing of the box lies inside the image.
    """
    image = load_image({key: value for key, value in reference.items() if key != "crop"})
    left, top, right, bottom = (round(value) for value in reference["crop"])
    box = (max(left, 0), max(top, 0), min(right, image.width), min(bottom, image.height))
    if box[0] >= box[2] or box[1] >= box[3]:
        raise DataError(
            f"{describe_image(reference)}: the box lies outside the {image.width} x {image.height} image.",
            expected="left < right and top < bottom, in pixels",
            fix="correct the box, or remove the row.",
        )
    return image.crop(box)


def _tile(references: Sequence[Any], columns: int) -> Image.Image:
    """Images side by side, each scaled to the size of the first; a last row that is not full stays black."""
    images = [load_image(reference) for reference in references]
    width, height = images[0].size
    sheet = Image.new("RGB", (width * min(columns, len(images)), height * -(-len(images) // columns)))
    for number, image in enumerate(images):
        sheet.paste(image.resize((width, height)), (number % columns * width, number // columns * height))
    return sheet


def image_files(reference: Any) -> list[str]:
    """Returns the paths that a reference reads; empty for images in memory."""
    if isinstance(reference, (str, Path)):
        return [str(reference)]
    if not isinstance(reference, Mapping):
        return []
    if reference.get("tiles"):
        return [path for tile in reference["tiles"] for path in image_files(tile)]
    path = reference.get("path")
    return [str(path)] if path and reference.get("bytes") is None else []


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Scales 16-bit grey to 8 bits, where Pillow's own conversion clips and gives a white image.

    Wider modes do not say their range: values up to 255 are taken as 8-bit grey, larger ones as 16-bit.
    """
    high = cast("tuple[float, float]", image.getextrema())[1]
    scale = 1.0 if not image.mode.startswith("I;16") and high <= 255 else 1.0 / 257.0
    return image.convert("F").point(lambda value: value * scale + 0.0).convert("L")


def fit_image(image: Image.Image, mode: ImageMode, fill: tuple[int, int, int]) -> Image.Image:
    """Makes an image square before the model's own processor sees it.

    Args:
        image: an RGB image, width x height.
        mode: `native` leaves it as it is; `pad` centres it on a square of the longer side, as LLaVA-1.5 does; `crop` keeps
            the centre square of the shorter side.
        fill: colour of the padding.
    """
    width, height = image.size
    if mode == "native" or width == height:
        return image
    if mode == "crop":
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        return image.crop((left, top, left + side, top + side))
    side = max(width, height)
    square = Image.new("RGB", (side, side), fill)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def fitted_size(size: tuple[int, int], mode: ImageMode) -> tuple[int, int]:
    """Returns the width and height that `fit_image` makes of an image of this width and height."""
    if mode == "native":
        return size
    side = min(size) if mode == "crop" else max(size)
    return side, side


def encode_png(image: Image.Image) -> dict[str, Any]:
    """Returns the reference of an image held in memory as PNG bytes."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": None}
