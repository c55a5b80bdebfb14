"""Two further streams for the LLaVA-c study (docs/llava_c.md), on other images and questions than the quickstart stream.

`study-letters`: letters of real fonts; the parts share no font.

| task | answers | format |
|---|---|---|
| `letter-case` | capital, lower | one word |
| `vowel-check` | vowel, consonant | one word |
| `letter-count` | I, II, III | a Roman numeral |
| `letter-side` | W, E | a letter of the compass |

`study-surfaces`: crops of photographed surfaces; the parts share no tile of a photograph.

| task | answers | format |
|---|---|---|
| `surface-name` | brick, grass, gravel, moon, handwriting | one word |
| `lighting` | dim, bright | one word |
| `mixed-halves` | moon | grass, ... | left and right surface, separated by a bar |
| `frame-check` | yes, no | yes/no |

Each task has 480 training, 60 validation and 120 test rows. They exist to see whether what was chosen on one stream holds
on another, not to be a benchmark.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from mllm_cl.data.builders.general import generator
from mllm_cl.data.builders.scenes import COLOURS, SIZE, background, choose, paint, place_at, sample, tinted
from mllm_cl.data.builders.sources import FONTS, STREAM_PHOTOS, glyph_mask, photo_crop
from mllm_cl.data.images import encode_png
from mllm_cl.data.rows import Rows, assistant_message, user_message

SPLIT_SIZES = {"train": 480, "validation": 60, "test": 120}
LETTERS = "ABDEFGHKLMNQRTY"  # capital and lower case differ in shape
SURFACES = tuple(STREAM_PHOTOS)

Example = tuple[Image.Image, str, str]  # picture, answer, source


def _letter_page(rng: np.random.Generator) -> Image.Image:
    return background(rng, choose(rng, ("black", "grey")))


def _write(
    rng: np.random.Generator, page: Image.Image, split: str, letter: str, size: int, place: tuple[float, float]
) -> str:
    font = choose(rng, FONTS[split])
    mask = glyph_mask(font, letter, size)
    paint(page, mask, tinted(rng, COLOURS[choose(rng, tuple(COLOURS))]), *place_at(rng, mask, place, 1.5))
    return f"glyph:{font}:{letter}"


def _letter_case(rng: np.random.Generator, split: str) -> Example:
    letter, page = choose(rng, LETTERS), _letter_page(rng)
    capital = rng.random() < 0.5
    source = _write(rng, page, split, letter if capital else letter.lower(), int(rng.integers(20, 26)), (0.5, 0.5))
    return page, "capital" if capital else "lower", source


def _vowel_check(rng: np.random.Generator, split: str) -> Example:
    vowel, page = rng.random() < 0.5, _letter_page(rng)
    letter = choose(rng, "AEIOU" if vowel else "BCDFGHKLMNPRST")
    source = _write(rng, page, split, letter, int(rng.integers(20, 26)), (0.5, 0.5))
    return page, "vowel" if vowel else "consonant", source


def _letter_count(rng: np.random.Generator, split: str) -> Example:
    page, count, height = _letter_page(rng), int(rng.integers(1, 4)), rng.uniform(0.2, 0.8)
    places = sample(rng, (0.0, 0.5, 1.0), count)
    sources = [
        _write(rng, page, split, choose(rng, LETTERS), int(rng.integers(8, 11)), (place, height)) for place in places
    ]
    return page, "I" * count, " ".join(sources)


def _letter_side(rng: np.random.Generator, split: str) -> Example:
    page, west = _letter_page(rng), rng.random() < 0.5
    place = (0.0 if west else 1.0, float(rng.uniform(0, 1)))
    source = _write(rng, page, split, choose(rng, LETTERS), int(rng.integers(9, 13)), place)
    return page, "W" if west else "E", source


def _crop(rng: np.random.Generator, split: str, name: str) -> tuple[Image.Image, str]:
    return photo_crop(name, f"stream-{split}", rng)


def _surface_name(rng: np.random.Generator, split: str) -> Example:
    name = choose(rng, SURFACES)
    crop, source = _crop(rng, split, name)
    return crop, name, source


def _lighting(rng: np.random.Generator, split: str) -> Example:
    crop, source = _crop(rng, split, choose(rng, SURFACES[:3]))
    dim = rng.random() < 0.5
    pixels = np.asarray(crop, dtype=float)
    level = rng.uniform(45, 70) if dim else rng.uniform(150, 185)
    pixels = np.clip(pixels * (level / max(pixels.mean(), 1.0)), 0, 255)
    return Image.fromarray(pixels.astype(np.uint8)), "dim" if dim else "bright", source


def _mixed_halves(rng: np.random.Generator, split: str) -> Example:
    names = sample(rng, ("brick", "grass", "moon", "handwriting"), 2)
    page, sources = Image.new("RGB", (SIZE, SIZE)), []
    for at, name in enumerate(names):
        crop, source = _crop(rng, split, name)
        page.paste(crop.crop((0, 0, SIZE // 2, SIZE)), (at * SIZE // 2, 0))
        sources.append(source)
    return page, " | ".join(names), " ".join(sources)


def _frame_check(rng: np.random.Generator, split: str) -> Example:
    crop, source = _crop(rng, split, choose(rng, SURFACES))
    framed = rng.random() < 0.5
    if framed:
        colour = tinted(rng, COLOURS[choose(rng, tuple(COLOURS))])
        ImageDraw.Draw(crop).rectangle((1, 1, SIZE - 2, SIZE - 2), outline=colour, width=2)
    return crop, "yes" if framed else "no", source


Task = tuple[Callable[[np.random.Generator, str], Example], tuple[str, ...], int]

STREAMS: dict[str, dict[str, Task]] = {
    "study-letters": {
        "letter-case": (_letter_case, ("Capital or lower case?", "Is this glyph a capital?"), 8),
        "vowel-check": (_vowel_check, ("Vowel or consonant?", "What sort of sound does the glyph stand for?"), 8),
        "letter-count": (_letter_count, ("How many glyphs are in the row?", "Give the number of glyphs in Roman."), 6),
        "letter-side": (_letter_side, ("West or east?", "Toward which edge is the glyph printed, W or E?"), 4),
    },
    "study-surfaces": {
        "surface-name": (_surface_name, ("Name the material.", "What material fills the frame?"), 8),
        "lighting": (_lighting, ("Is the lighting dim or bright?", "How is the scene lit?"), 6),
        "mixed-halves": (_mixed_halves, ("Which materials meet here?", "Name the left and the right material."), 16),
        "frame-check": (_frame_check, ("Has a border been painted?", "Is the picture bordered?"), 4),
    },
}


def _build(stream: str, seed: int) -> list[dict[str, Any]]:
    tasks = []
    for name, (draw, questions, longest) in STREAMS[stream].items():
        splits: dict[str, Rows] = {}
        for split, size in SPLIT_SIZES.items():
            rng, rows = generator(f"{stream}/{name}/{split}", seed), []
            for number in range(size):
                picture, answer, source = draw(rng, split)
                messages = [user_message(choose(rng, questions), images=1)]
                if split != "test":
                    messages.append(assistant_message(answer))
                row: dict[str, Any] = {"id": f"{name}/{split}/{number:05d}", "messages": messages, "source": source}
                rows.append(row | {"images": [encode_png(picture)], "answers": [answer]})
            splits[split] = Rows(rows)
        tasks.append({"name": name, **splits, "metric": "exact_match", "max_new_tokens": longest})
    return tasks


def build_letters(seed: int = 0) -> list[dict[str, Any]]:
    """Returns the tasks of `study-letters` as plain data; see `mllm_cl.data.builders.quickstart.build`."""
    return _build("study-letters", seed)


def build_surfaces(seed: int = 0) -> list[dict[str, Any]]:
    """Returns the tasks of `study-surfaces` as plain data."""
    return _build("study-surfaces", seed)
