"""Damaged files and unusual pictures, each with the message that a person gets."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mllm_cl.data.images import load_image
from mllm_cl.data.readers import read_rows
from mllm_cl.data.rows import user_message
from mllm_cl.data.validate import Checks, validate_file, validate_rows
from mllm_cl.errors import DataError

ROW = {"id": "1", "query": "What?", "response": "A"}


def rows(*changes: dict[str, Any]) -> str:
    return "\n".join(json.dumps(ROW | change) for change in changes)


FILES: dict[str, tuple[str, bytes, str]] = {  # name: file, content, message
    "truncated list": ("a.json", b'[{"id": 1, "query": "What', "not JSON (row 1: Unterminated string"),
    "list without an end": ("a.json", b"[" + rows({}).encode(), "the end of the file found"),
    "truncated line": ("a.jsonl", rows({}).encode() + b'\n{"id": "2", "que', "not JSON (Unterminated string"),
    "nothing": ("a.json", b"", "the file is empty"),
    "blank": ("a.jsonl", b" \n\n", "the file is empty"),
    "an object": ("a.json", b'{"data": [{"id": 1}]}', "keep only the list under `data`"),
    "a list of lists": ("a.json", b"[[1], [2]]", "rows that are no objects"),
    "a number as text": ("a.jsonl", rows({"query": 3}).encode(), "`query` is a number"),
    "a list as id": ("a.jsonl", rows({"id": [1]}).encode(), "`id` is a list"),
    "the same id": ("a.jsonl", rows({}, {}).encode(), "so this one is called '1#2'"),
    "latin-1 in one line": ("a.jsonl", rows({}).encode() + b'\n{"query": "caf\xe9", "response": "A"}', "not UTF-8"),
    "latin-1 in a list": ("a.json", b'[{"query": "caf\xe9", "response": "A"}]', "not UTF-8 near byte 15"),
    "UTF-16": ("a.jsonl", rows({}).encode("utf-16"), "the file is UTF-16"),
    "UTF-16 without a mark": ("a.json", "[]".encode("utf-16-le"), "the file is UTF-16"),
    "UTF-32": ("a.jsonl", rows({}).encode("utf-32-le"), "the file is UTF-32"),
    "UTF-32 with a mark": ("a.jsonl", rows({}).encode("utf-32"), "the file is UTF-32"),
    "a pointer": ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a pointer of Git LFS"),
    "a web page": ("a.json", b"\n<!DOCTYPE html><html>404</html>", "a web page"),
    "gzip": ("a.jsonl", gzip.compress(rows({}).encode()), "compressed with gzip"),
    "a parquet file": ("a.json", b"PAR1....", "give it the ending .parquet"),
    "a table cut off": ("a.parquet", b"PAR1" + bytes(100), "datasets cannot read it"),
    "no number as number": ("a.jsonl", b'{"query": "Q", "response": NaN}', "does not end with an answer"),
    "a list as query": ("a.jsonl", rows({"query": [1]}).encode(), "`query[0]` is a number"),
    "an object as answer": ("a.jsonl", rows({"response": {"a": 1}}).encode(), "`response` is an object"),
    "a null query": ("a.jsonl", rows({"query": None}).encode(), "no known format"),
    "images as a number": ("a.jsonl", rows({"images": 3}).encode(), "`images` is a number"),
    "a URL": ("a.jsonl", rows({"images": ["https://example.org/a.png"]}).encode(), "is the URL"),
    "broken base64": ("a.jsonl", rows({"images": ["data:image/png;base64,???"]}).encode(), "followed by base64"),
    "deep nesting": ("a.jsonl", rows({}).encode() + b"\n" + b"[" * 100_000, "not JSON"),
    "half an emoji": (
        "a.jsonl",
        rows({"query": "\\ud83d"}).encode().replace(b"\\\\u", b"\\u"),
        "half a surrogate pair",
    ),
    "another table": ("a.parquet", b"PAR1 no parquet", "datasets cannot read it"),
    "more images than places": ("a.jsonl", rows({"query": "<image>", "images": ["a", "b"]}).encode(), "1 `<image>` in"),
}


@pytest.mark.parametrize("name", list(FILES))
def test_damaged_files(name: str, tmp_path: Path) -> None:
    file, content, message = FILES[name]
    (tmp_path / file).write_bytes(content)
    problems = validate_file(tmp_path / file, checks=Checks(images="none"))
    assert any(message in str(problem) for problem in problems), [str(problem) for problem in problems]
    assert all(str(tmp_path / file) == problem.file and problem.fix for problem in problems)


def test_a_byte_order_mark_is_no_mistake(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + rows({}).encode())
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf[" + rows({}).encode() + b"]")
    for name in ("a.jsonl", "a.json"):
        assert [row["id"] for row in read_rows(tmp_path / name)] == ["1"]


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def rotated() -> bytes:
    image = Image.new("RGB", (4, 2), "red")
    exif = image.getexif()
    exif[0x0112] = 6
    return encoded(image, "JPEG", exif=exif)


def noise(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (40, 40, 3), dtype=np.uint8))


USABLE: dict[str, tuple[Callable[[], bytes], tuple[int, int]]] = {
    "cmyk.jpg": (lambda: encoded(Image.new("CMYK", (4, 2), (0, 255, 255, 0)), "JPEG"), (4, 2)),
    "16-bit.png": (lambda: encoded(Image.fromarray(np.full((2, 4), 257 * 200, np.uint16)), "PNG"), (4, 2)),
    "animated.gif": (
        lambda: encoded(noise(), "GIF", save_all=True, append_images=[noise(1), noise(2)]),
        (40, 40),
    ),
    "rotated.jpg": (rotated, (2, 4)),
    "palette.png": (lambda: encoded(noise().quantize(8), "PNG", transparency=0), (40, 40)),
    "animated.webp": (lambda: encoded(noise(), "WEBP", save_all=True, append_images=[noise(1)]), (40, 40)),
    "named.png": (lambda: encoded(noise(), "JPEG"), (40, 40)),
}
BROKEN: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty.png": (lambda: b"", "is empty (0 bytes)"),
    "text.png": (lambda: b"no image at all", "not a readable image"),
    "cut.png": (lambda: encoded(noise(), "PNG")[:1500], "cannot be decoded"),
    "cut.jpg": (lambda: encoded(noise(), "JPEG")[:1000], "cannot be decoded"),
    "page.png": (lambda: b"<!DOCTYPE html><html>404</html>", "not a readable image"),
}


def one_row(image: Path) -> list[Any]:
    return [{"id": "1", "messages": [user_message("What?", 1)], "images": [str(image)], "answers": ["A"]}]


@pytest.mark.parametrize("name", list(USABLE))
def test_unusual_pictures_are_usable(name: str, tmp_path: Path) -> None:
    make, size = USABLE[name]
    (tmp_path / name).write_bytes(make())
    assert validate_rows(one_row(tmp_path / name), split="test", checks=Checks(workers=1)) == []
    image = load_image(str(tmp_path / name))
    assert (image.mode, image.size) == ("RGB", size)


@pytest.mark.parametrize("name", list(BROKEN))
def test_broken_pictures_are_named(name: str, tmp_path: Path) -> None:
    make, message = BROKEN[name]
    (tmp_path / name).write_bytes(make())
    problems = validate_rows(one_row(tmp_path / name), split="test", checks=Checks(workers=1))
    assert [problem.kind for problem in problems] == ["image_unreadable"]
    assert message in problems[0].message
    assert str(tmp_path / name) in problems[0].message
    assert problems[0].fix
    with pytest.raises(DataError):
        load_image(str(tmp_path / name))


def test_tiles_and_crops_are_checked_too(tmp_path: Path) -> None:
    noise().save(tmp_path / "a.png")
    good = {"tiles": [str(tmp_path / "a.png"), {"path": str(tmp_path / "a.png"), "crop": (5, 5, 60, 25)}], "columns": 2}
    assert load_image(good).size == (80, 40)
    assert load_image(good["tiles"][1]).size == (35, 20)  # type: ignore[index]
    row = one_row(tmp_path / "a.png")
    row[0]["images"] = [good]
    assert validate_rows(row, split="test", checks=Checks(workers=1)) == []
    outside = {"path": str(tmp_path / "a.png"), "crop": (50, 0, 60, 10)}
    row[0]["images"] = [outside]
    problems = validate_rows(row, split="test", checks=Checks(workers=1))
    assert "the box lies outside the 40 x 40 image" in problems[0].message
    row[0]["images"] = [{"tiles": [str(tmp_path / "none.png")], "columns": 1}]
    assert [problem.kind for problem in validate_rows(row, split="test")] == ["image_missing"]
