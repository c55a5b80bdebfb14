"""Near-duplicates that cross a line: between tasks, and between the training and test rows of a task.

Images are compared by a 64-bit difference hash (the sign of 8 x 8 horizontal differences of a small grey version) and by
their mean colour, so copies in another size, format or quality are found, rotated and cropped ones are not. Questions
are the same when their words are. A *row* is the same when both are: that is leakage, while a shared question text alone
(`What is this?`) is usual.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from mllm_cl.data.image_keys import image_key
from mllm_cl.data.images import load_image
from mllm_cl.data.inquiry import question_of
from mllm_cl.data.rows import Row
from mllm_cl.errors import DataError
from mllm_cl.streams.stream import Stream

Progress = Callable[[int], None]

DISTANCE = 3  # differing bits of 64; four bands of 16 bits find every such pair
COLOUR = 10.0  # levels of 255 by which mean colours may differ
_BATCH = 64


@dataclass(frozen=True)
class Shared:
    """What two splits have in common.

    Args:
        kind (`str`): `row` (same question about the same image, or the same question of two rows without image), `image`
            or `question`.
        first, second (`str`): `task/split`.
        count (`int`): rows of the second that have a counterpart in the first.
        rows (`int`): rows of the second that were looked at.
        example (`tuple`): ids of one pair.
    """

    kind: str
    first: str
    second: str
    count: int
    rows: int
    example: tuple[str, str]


@dataclass(frozen=True)
class _Seen:
    """What is compared of one split: per row its id, question and image number; per image hash and colour."""

    name: str
    ids: list[str]
    questions: list[str]
    images: list[int]
    hashes: np.ndarray
    colours: np.ndarray


def perceptual_hash(image: Image.Image) -> int:
    """Returns the 64-bit difference hash of an image."""
    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BILINEAR), dtype=np.int16)
    bits = (grey[:, 1:] > grey[:, :-1]).reshape(-1)  # (8, 8) -> (64,)
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def near_duplicates(
    stream: Stream, *, most: int = 2000, with_images: bool = True, progress: Progress | None = None, workers: int = 8
) -> list[Shared]:
    """Returns what splits share that should not: of different tasks, or of one task's train, validation and test.

    Args:
        stream (`Stream`): rows are read, and with images every one that is looked at is decoded.
        most (`int`, defaults to 2000): rows per split to look at, evenly spaced.
        with_images (`bool`, defaults to `True`): compare pictures, not only the paths that rows name.
        progress (`Callable`, *optional*): told the number of rows that have been read.
        workers (`int`, defaults to 8): threads that decode images.
    """
    seen = [
        _look(f"{task.name}/{split}", rows, most, with_images, progress, workers)
        for task in stream
        for split, rows in (("train", task.train), ("validation", task.validation), ("test", task.test))
        if len(rows)
    ]
    found = []
    for number, first in enumerate(seen):
        for second in seen[number + 1 :]:
            found += list(_compare(first, second))
    order = ("row", "image", "question")
    return sorted(found, key=lambda shared: (order.index(shared.kind), -shared.count))


def _look(
    name: str, rows: Sequence[Row], most: int, with_images: bool, progress: Progress | None, workers: int
) -> _Seen:
    step = max(1, -(-len(rows) // most))
    seen = _Seen(name, [], [], [], np.zeros(0, np.uint64), np.zeros((0, 3)))
    numbers: dict[str, int] = {}
    references: list[Any] = []
    for position in range(0, len(rows), step):
        row = rows[position]
        seen.ids.append(row["id"])
        seen.questions.append(" ".join(re.findall(r"\w+", question_of(row).casefold())))
        number = -1
        if row["images"]:
            number = numbers.setdefault(image_key(row["images"][0]), len(references))
            if number == len(references):
                references.append(row["images"][0])
        seen.images.append(number)
        if progress:
            progress(1)
    with ThreadPoolExecutor(max_workers=workers) as pool:
        looks = list(pool.map(_fingerprint if with_images else _by_name, references, chunksize=_BATCH))
    hashes = np.array([look[0] for look in looks], dtype=np.uint64)
    colours = np.array([look[1] for look in looks], dtype=float).reshape(-1, 3)
    return _Seen(name, seen.ids, seen.questions, seen.images, hashes, colours)


def _fingerprint(reference: Any) -> tuple[int, tuple[float, ...]]:
    """Hash and mean colour; an image that cannot be opened (validation names it) is like no other."""
    try:
        image = load_image(reference)
    except DataError:
        return _by_name(reference)
    return perceptual_hash(image), tuple(np.asarray(image.resize((8, 8)), dtype=float).mean(axis=(0, 1)))


def _by_name(reference: Any) -> tuple[int, tuple[float, ...]]:
    digest = int.from_bytes(np.random.default_rng(list(image_key(reference).encode())).bytes(8), "big")
    return digest, (-1e6, -1e6, -1e6)


def same_images(first: np.ndarray, second: np.ndarray, distance: int = DISTANCE) -> Iterator[tuple[int, int]]:
    """Yields the pairs of positions whose 64-bit hashes differ in at most `distance` (up to 3) bits."""
    buckets: dict[tuple[int, int], list[int]] = defaultdict(list)
    for position, value in enumerate(first.tolist()):
        for band in range(4):
            buckets[band, value >> 16 * band & 0xFFFF].append(position)
    for position, value in enumerate(second.tolist()):
        candidates = {other for band in range(4) for other in buckets.get((band, value >> 16 * band & 0xFFFF), ())}
        for other in sorted(candidates):
            if (int(first[other]) ^ value).bit_count() <= distance:
                yield other, position


def _compare(first: _Seen, second: _Seen) -> Iterator[Shared]:
    pairs: dict[int, set[int]] = defaultdict(set)  # image of the second -> images of the first
    for one, other in same_images(first.hashes, second.hashes):
        if np.abs(first.colours[one] - second.colours[other]).max() <= COLOUR:
            pairs[other].add(one)
    by_question: dict[str, list[int]] = defaultdict(list)
    by_image: dict[int, list[int]] = defaultdict(list)
    for row, (question, image) in enumerate(zip(first.questions, first.images)):
        if question:
            by_question[question].append(row)
        by_image[image].append(row)
    hits: dict[str, list[tuple[int, int]]] = {"row": [], "image": [], "question": []}
    for row, (question, image) in enumerate(zip(second.questions, second.images)):
        asked = by_question.get(question, [])
        shown = [other for found in sorted(pairs.get(image, ())) for other in by_image[found]] if image >= 0 else []
        both = sorted(set(asked) & (set(shown) if image >= 0 else set(by_image.get(-1, ()))))
        for kind, others in (("row", both), ("image", shown), ("question", asked)):
            if others:
                hits[kind].append((others[0], row))
    for kind, found in hits.items():
        if found:
            one, other = found[0]
            example = (first.ids[one], second.ids[other])
            yield Shared(kind, first.name, second.name, len(found), len(second.ids), example)
