"""The quickstart stream: six small instruction tasks on real images, none of which the tiny LLaVA knows beforehand.

| task | images | answers | format |
|---|---|---|---|
| `digit-parity` | handwritten digits | even, odd | one word |
| `face-check` | faces and other patches | yes, no | yes/no |
| `compass` | a small digit or coin on a page | nw, s, c (centre), ... (9) | abbreviation |
| `surface-options` | brick, grass, gravel, moon, handwriting | A, B, C, D, E | option letter |
| `coin-count` | one to four ancient coins | 1, 2, 3, 4 | number |
| `ink-list` | one or two digits in coloured ink | tan, rose, cyan, ice | list |

Each has 640 training, 80 validation and 160 test rows. Images, questions and words of the answers do not occur in the
general mixture (`mllm_cl.data.builders.general`); yes, no, the option letters and the numerals are answer formats and do. No
source image (digit, face, coin, tile of a photograph) is in two splits; see `mllm_cl.data.builders.sources`,
which also says where they come from. Tasks share images (`digit-parity`, `compass` and `ink-list`; `compass` and
`coin-count`), so a model trained on all of them must read the question.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from mllm_cl.data.builders.general import generator
from mllm_cl.data.builders.scenes import SIZE, background, choose, paint, place_at, sample, tinted
from mllm_cl.data.builders.sources import (
    STREAM_PHOTOS,
    coin,
    coin_shares,
    digit_mask,
    digit_shares,
    digits,
    face_patch,
    face_shares,
    photo_crop,
)
from mllm_cl.data.images import encode_png
from mllm_cl.data.rows import Row, Rows, assistant_message, user_message

SPLIT_SIZES = {"train": 640, "validation": 80, "test": 160}
INKS = {"tan": (205, 165, 110), "rose": (250, 120, 185), "cyan": (0, 175, 185), "ice": (175, 225, 255)}
COMPASS = {
    "nw": (0, 0),
    "n": (0.5, 0),
    "ne": (1, 0),
    "w": (0, 0.5),
    "c": (0.5, 0.5),
    "e": (1, 0.5),
    "sw": (0, 1),
    "s": (0.5, 1),
    "se": (1, 1),
}

SURFACES, LETTERS = tuple(STREAM_PHOTOS), "ABCDE"
OPTIONS = " ".join(f"{letter}. {name}" for letter, name in zip(LETTERS, SURFACES))

# One example: image, slots of the question, answer, source
Example = tuple[Image.Image, dict[str, str], str, str]


def _page(rng: np.random.Generator) -> Image.Image:
    return background(rng, choose(rng, ("black", "grey")))


def _ink_on(rng: np.random.Generator, page: Image.Image, ink: str | None = None) -> tuple[str, tuple[int, int, int]]:
    name = ink or choose(rng, tuple(INKS))
    return name, tinted(rng, INKS[name])


def _digit_parity(rng: np.random.Generator, part: str) -> Example:
    index = choose(rng, digit_shares()[part])
    page, mask = _page(rng), digit_mask(index, int(rng.integers(22, 28)))
    paint(page, mask, _ink_on(rng, page)[1], *place_at(rng, mask, (0.5, 0.5), 2.0))
    return page, {}, ("even", "odd")[int(digits()[1][index]) % 2], f"digit:{index}"


def _face_check(rng: np.random.Generator, part: str) -> Example:
    index = choose(rng, face_shares()[part])
    patch, source = face_patch(index, rng)
    return patch, {}, "yes" if index < 100 else "no", source


def _coin_page(rng: np.random.Generator) -> Image.Image:
    level = int(rng.integers(35, 75))
    return Image.fromarray((level + rng.integers(-8, 9, size=(SIZE, SIZE, 1)) + np.zeros(3, int)).astype(np.uint8))


def _compass(rng: np.random.Generator, part: str) -> Example:
    direction = choose(rng, tuple(COMPASS))
    if rng.random() < 0.5:
        index = choose(rng, digit_shares()[part])
        page, mask, source = _page(rng), digit_mask(index, int(rng.integers(9, 12))), f"digit:{index}"
        paint(page, mask, _ink_on(rng, page)[1], *place_at(rng, mask, COMPASS[direction], 1.5))
    else:
        index = choose(rng, coin_shares()[part])
        page, (face, mask), source = _coin_page(rng), coin(index, int(rng.integers(9, 12))), f"coin:{index}"
        left, top = place_at(rng, mask, COMPASS[direction], 1.5)
        page.paste(face, (round(left), round(top)), mask)
    return page, {}, direction, source


def _surface_options(rng: np.random.Generator, part: str) -> Example:
    right = int(rng.integers(len(SURFACES)))
    crop, source = photo_crop(SURFACES[right], part, rng)
    gain = rng.uniform(0.8, 1.2)
    crop = crop.point([min(255, int(gain * value)) for value in range(256)] * 3)
    return crop, {}, LETTERS[right], source


def _coin_count(rng: np.random.Generator, part: str) -> Example:
    count = int(rng.integers(1, 5))
    page, sources = _coin_page(rng), []
    corners = [place for place in COMPASS.values() if 0.5 not in place]
    for place in sample(rng, corners, count):
        index = choose(rng, coin_shares()[part])
        face, mask = coin(index, int(rng.integers(10, 14)))
        left, top = place_at(rng, mask, place, 1.5)
        page.paste(face, (round(left), round(top)), mask)
        sources.append(f"coin:{index}")
    return page, {}, str(count), " ".join(sources)


def _ink_list(rng: np.random.Generator, part: str) -> Example:
    inks = sample(rng, tuple(INKS), 2 if rng.random() < 0.7 else 1)
    page, height, sources = _page(rng), rng.uniform(0.2, 0.8), []
    for number, ink in enumerate(inks):
        index = choose(rng, digit_shares()[part])
        size = int(rng.integers(12, 15) if len(inks) == 2 else rng.integers(22, 28))
        mask = digit_mask(index, size)
        place = (float(number), height) if len(inks) == 2 else (0.5, 0.5)
        paint(page, mask, _ink_on(rng, page, ink)[1], *place_at(rng, mask, place, 1.0))
        sources.append(f"digit:{index}")
    return page, {}, ", ".join(inks), " ".join(sources)


# task -> (how an example is drawn, its questions, longest answer in tokens, one line for listings)
TASKS: dict[str, tuple[Callable[[np.random.Generator, str], Example], tuple[str, ...], int, str]] = {
    "digit-parity": (
        _digit_parity,
        ("Even or odd?", "Is the handwritten number even or odd?"),
        8,
        "Is a handwritten digit even or odd? One word.",
    ),
    "face-check": (
        _face_check,
        ("Is a person looking at us?", "Does someone's face appear in this patch? Answer yes or no."),
        4,
        "Is there a human face? Yes or no.",
    ),
    "compass": (
        _compass,
        ("If north is up, where on the page does the mark lie?", "Give the compass direction of the mark."),
        6,
        "Where on the page is the small mark, as a compass direction? An abbreviation.",
    ),
    "surface-options": (
        _surface_options,
        (f"Which surface has been photographed? {OPTIONS}", f"Pick the material in this close-up: {OPTIONS}"),
        4,
        "Which of five surfaces is in the close-up? An option letter.",
    ),
    "coin-count": (
        _coin_count,
        ("How many coins lie on the cloth?", "Count these coins and reply with a numeral."),
        4,
        "How many ancient coins are there? A number.",
    ),
    "ink-list": (
        _ink_list,
        ("List every ink that was used, starting at the left edge.", "With which inks was this written?"),
        16,
        "In which inks were the digits written, from left to right? A list.",
    ),
}
QUICKSTART_TASKS = tuple(TASKS)


def build_task(name: str, seed: int = 0) -> dict[str, Any]:
    """Returns one task of the stream; see `build`."""
    draw, questions, max_new_tokens, description = TASKS[name]
    splits: dict[str, Rows] = {}
    for split, size in SPLIT_SIZES.items():
        rng = generator(f"quickstart/{name}/{split}", seed)
        rows: list[Row] = []
        for number in range(size):
            image, slots, answer, source = draw(rng, f"stream-{split}")
            messages = [user_message(choose(rng, questions).format(**slots), images=1)]
            if split != "test":
                messages.append(assistant_message(answer))
            row = {
                "id": f"{name}/{split}/{number:05d}",
                "messages": messages,
                "images": [encode_png(image)],
                "answers": [answer],
                "source": source,
            }
            rows.append(row)  # type: ignore[arg-type]
        splits[split] = Rows(rows)
    return {
        "name": name,
        **splits,
        "metric": "exact_match",
        "max_new_tokens": max_new_tokens,
        "description": description,
    }


def build(seed: int = 0) -> list[dict[str, Any]]:
    """Returns the tasks in order, as plain data.

    Each has `name`, `train`, `validation`, `test` (`Rows`), `metric`, `max_new_tokens` and `description`.

    Args:
        seed (`int`): another seed draws other rows from the same sources.

    Raises:
        DataError: scikit-image is not installed.
    """
    return [build_task(name, seed) for name in TASKS]
