"""Every kind of image file becomes the RGB picture that a person would see."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mllm_cl.data.images import describe_image, encode_png, load_image, open_image
from mllm_cl.errors import DataError


def saved(image: Image.Image, format: str = "PNG", **options: Any) -> dict[str, Any]:
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return {"bytes": buffer.getvalue(), "path": None}


def pixels(reference: Any) -> np.ndarray:
    image = load_image(reference)
    assert image.mode == "RGB"
    return np.asarray(image)


def test_grey_and_black_and_white() -> None:
    assert pixels(saved(Image.new("L", (2, 2), 77)))[0, 0].tolist() == [77, 77, 77]
    assert pixels(saved(Image.new("1", (2, 2), 1)))[0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_not_clipped(format: str) -> None:
    values = np.array([[0, 257 * 10], [257 * 128, 65535]], dtype=np.uint16)
    assert pixels(saved(Image.fromarray(values), format))[..., 0].tolist() == [[0, 10], [128, 255]]


def test_wide_grey_keeps_values_of_8_bits() -> None:
    assert pixels(Image.fromarray(np.array([[0, 200]], dtype=np.int32)))[0, :, 0].tolist() == [0, 200]
    assert pixels(Image.fromarray(np.array([[0, 65535]], dtype=np.int32)))[0, :, 0].tolist() == [0, 255]
    assert pixels(Image.fromarray(np.array([[0, 200]], dtype=np.float32)))[0, :, 0].tolist() == [0, 200]


def test_cmyk_jpeg() -> None:
    red = Image.new("RGB", (16, 16), (255, 0, 0)).convert("CMYK")
    found = pixels(saved(red, "JPEG", quality=95))[8, 8].astype(int)
    assert abs(found - [255, 0, 0]).max() < 12


def test_palette_with_and_without_transparency() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    assert pixels(saved(image))[0].tolist() == [[10, 20, 30], [40, 50, 60]]
    assert pixels(saved(image, transparency=0))[0].tolist() == [[255, 255, 255], [40, 50, 60]]


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_becomes_white(mode: str) -> None:
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 0, 255))
    assert pixels(saved(image.convert(mode)))[0].tolist() == [[255] * 3, [0] * 3]


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_exif_orientation_is_applied(format: str) -> None:
    image = Image.new("RGB", (16, 8), "white")
    exif = image.getexif()
    exif[0x0112] = 6  # the camera was held upright: turn by 90 degrees
    assert load_image(saved(image, format, exif=exif)).size == (8, 16)


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("blue", "red")]
    assert pixels(saved(frames[0], "GIF", save_all=True, append_images=frames[1:]))[0, 0].tolist() == [0, 0, 255]


def test_references(tmp_path: Path) -> None:
    image = Image.new("RGB", (3, 2), (1, 2, 3))
    path = tmp_path / "a.png"
    image.save(path)
    for reference in (path, str(path), image, encode_png(image), {"bytes": None, "path": str(path)}):
        assert pixels(reference)[0, 0].tolist() == [1, 2, 3]
    assert describe_image(path) == str(path)
    assert describe_image({"bytes": b"abc", "path": None}) == "<3 embedded bytes>"
    assert describe_image(image) == "<Image>"


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP"])
def test_truncated_files_are_a_data_error(tmp_path: Path, format: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    whole = saved(noise, format)["bytes"]
    path = tmp_path / "cut.img"
    for share in (0.3, 0.6, 0.9):
        path.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(DataError, match=r"cut\.img: .*(decoded|readable)(.|\n)*to fix: replace the file"):
            load_image(path)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("/nowhere/a.png", "the image file does not exist"),
        ({"bytes": b"no image", "path": None}, "<8 embedded bytes>: not a readable image"),
        ({"bytes": b"", "path": None}, "not a readable image"),
        ({"bytes": "text"}, "not a readable image"),
        ({"path": 5}, "not a readable image"),
        ({"bytes": None, "path": None}, "not an image reference"),
        (42, "<int>: not an image reference"),
        (None, "not an image reference"),
    ],
)
def test_references_that_are_no_image(reference: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_image(reference)


def test_a_folder_is_no_image(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a readable image"):
        load_image(tmp_path)
