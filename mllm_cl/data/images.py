"""Image references and how they become pixels.

A reference is a path (`str` or `Path`), a `PIL.Image.Image`, or the mapping `{"bytes": ..., "path": ...}` that datasets
uses for encoded images. References are opened only at collation, so replay memories and shuffled streams stay small.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from PIL import Image, ImageOps, UnidentifiedImageError

from mllm_cl.errors import DataError

_ORIENTATION = 0x0112  # EXIF tag
# What the decoders of Pillow raise on damaged data.
_DECODING_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, struct.error, zlib.error)


def describe_image(reference: Any) -> str:
    """Returns a short name of a reference for messages."""
    if isinstance(reference, (str, Path)):
        return str(reference)
    if isinstance(reference, Mapping):
        return str(reference.get("path") or f"<{len(reference.get('bytes') or b'')} embedded bytes>")
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
            if reference.get("bytes") is not None:
                return Image.open(io.BytesIO(reference["bytes"]))
            if reference.get("path"):
                return Image.open(reference["path"])
    except FileNotFoundError as error:
        raise DataError(
            f"{describe_image(reference)}: the image file does not exist.",
            fix="correct the path in the row, or `image_folder` in the stream file.",
        ) from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
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


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Scales 16-bit grey to 8 bits, where Pillow's own conversion clips and gives a white image.

    Wider modes do not say their range: values up to 255 are taken as 8-bit grey, larger ones as 16-bit.
    """
    high = cast("tuple[float, float]", image.getextrema())[1]
    scale = 1.0 if not image.mode.startswith("I;16") and high <= 255 else 1.0 / 257.0
    return image.convert("F").point(lambda value: value * scale + 0.0).convert("L")


def encode_png(image: Image.Image) -> dict[str, Any]:
    """Returns the reference of an image held in memory as PNG bytes."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": None}
