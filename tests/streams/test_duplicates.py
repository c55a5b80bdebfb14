"""Near-duplicates: found in other sizes and formats, not where pictures only resemble each other."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mllm_cl.data.rows import Rows, assistant_message, user_message
from mllm_cl.streams import Stream, Task
from mllm_cl.streams.duplicates import near_duplicates, perceptual_hash, same_images


def picture(seed: int, size: int = 64) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((size, size), Image.Resampling.BICUBIC)


def embedded(image: Image.Image, format: str = "PNG", **options: Any) -> dict[str, Any]:
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return {"bytes": buffer.getvalue(), "path": None}


def rows(name: str, *asked: tuple[str, Any]) -> Rows:
    return Rows(
        [
            {
                "id": f"{name}{number}",
                "messages": [user_message(question, int(image is not None)), assistant_message("A")],
                "images": [] if image is None else [image],
            }
            for number, (question, image) in enumerate(asked)
        ]
    )


def test_the_hash_survives_size_format_and_quality() -> None:
    original = perceptual_hash(picture(1))
    buffer = io.BytesIO()
    picture(1, 200).save(buffer, format="JPEG", quality=60)
    copy = perceptual_hash(Image.open(buffer))
    assert (original ^ copy).bit_count() <= 3
    assert (original ^ perceptual_hash(picture(2))).bit_count() > 12


def test_all_pairs_up_to_three_bits_are_found_and_no_others() -> None:
    rng = np.random.default_rng(0)
    first = rng.integers(0, 2**63, 40, dtype=np.uint64)
    second = []
    for value in first.tolist()[:20]:
        for _ in range(int(rng.integers(0, 6))):
            value ^= 1 << int(rng.integers(0, 64))
        second.append(value)
    found = set(same_images(first, np.array(second, dtype=np.uint64)))
    wanted = {
        (i, j) for i, a in enumerate(first.tolist()) for j, b in enumerate(second) if (a ^ b).bit_count() <= 3
    }  # fmt: skip
    assert found == wanted
    assert len(found) >= 5


def test_what_splits_and_tasks_share() -> None:
    a = Task(
        "a",
        train=rows("a", ("What is it?", embedded(picture(1))), ("Where?", embedded(picture(2))), ("Hm?", None)),
        test=rows("t", ("what is it", embedded(picture(1, 90), "JPEG", quality=70)), ("Else?", embedded(picture(3)))),
    )
    b = Task("b", train=rows("b", ("Why?", embedded(picture(2, 40))), ("HM", None)), test=rows("u", ("No?", None)))
    found = {(shared.kind, shared.first, shared.second): shared for shared in near_duplicates(Stream("s", (a, b)))}
    assert set(found) == {
        ("row", "a/train", "a/test"),
        ("row", "a/train", "b/train"),
        ("image", "a/train", "a/test"),
        ("image", "a/train", "b/train"),
        ("question", "a/train", "a/test"),
        ("question", "a/train", "b/train"),
    }
    assert found["row", "a/train", "a/test"].example == ("a0", "t0")
    assert found["row", "a/train", "b/train"].example == ("a2", "b1")
    assert (found["image", "a/train", "a/test"].count, found["image", "a/train", "a/test"].rows) == (1, 2)
    by_name = near_duplicates(Stream("s", (a, b)), with_images=False)
    assert {shared.kind for shared in by_name} == {"row", "question"}


def test_flat_pictures_of_other_colours_and_broken_files_are_not_alike(tmp_path: Path) -> None:
    flat = [embedded(Image.new("RGB", (8, 8), colour)) for colour in ("red", "blue", "white")]
    (tmp_path / "broken.png").write_bytes(b"no image")
    broken = str(tmp_path / "broken.png")
    task = Task("a", train=rows("a", ("1", flat[0]), ("2", broken)), test=rows("t", ("3", flat[1]), ("4", flat[2])))
    assert near_duplicates(Stream("s", (task,))) == []
    same = Task("a", train=rows("a", ("1", broken)), test=rows("t", ("2", broken)))
    assert [shared.kind for shared in near_duplicates(Stream("s", (same,)))] == ["image"]


@pytest.mark.parametrize("most", [10, 50])
def test_large_splits_are_sampled_evenly(most: int) -> None:
    told: list[int] = []
    task = Task("a", train=rows("a", *((f"q {n}", None) for n in range(95))), test=rows("t", ("q 0", None)))
    found = near_duplicates(Stream("s", (task,)), most=most, progress=told.append)
    assert sum(told) == len(range(0, 95, -(-95 // most))) + 1
    assert [shared.kind for shared in found] == ["row", "question"]
