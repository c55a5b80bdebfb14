"""Pictures with known contents: the raw material of the general mixture.

A `Picture` holds a 32x32 image, its source and the facts that questions are asked about. Families:
`digit`, `letter`, `shape` (one object, any colour, size, place and background), `several` (two to four shapes),
`photo` (a crop of a photograph, in colour or grey), `text` (no image, a question about words).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from mllm_cl.data.builders.sources import (
    FONTS,
    GENERAL_LETTERS,
    GENERAL_PHOTOS,
    digit_mask,
    digit_shares,
    digits,
    glyph_mask,
    photo_crop,
)

SIZE = 32
COLOURS = {
    "red": (215, 35, 40),
    "green": (35, 165, 60),
    "blue": (45, 75, 225),
    "yellow": (240, 215, 40),
    "purple": (140, 50, 175),
    "orange": (245, 135, 25),
    "white": (250, 250, 250),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring")
PLACES = {
    "top left": (0, 0),
    "top right": (1, 0),
    "bottom left": (0, 1),
    "bottom right": (1, 1),
    "middle": (0.5, 0.5),
}
NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass(frozen=True)
class Picture:
    """Images with known contents.

    Args:
        family (`str`): which facts there are.
        images (`tuple`): one RGB image, none for plain text questions.
        sources (`tuple[str, ...]`): the real images used; see `mllm_cl.data.builders.sources`.
        facts (`dict`): what can be asked.
    """

    family: str
    images: tuple[Image.Image, ...] = ()
    sources: tuple[str, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)


def choose(rng: np.random.Generator, items: Sequence[Any]) -> Any:
    """Returns one of the items."""
    return items[int(rng.integers(len(items)))]


def sample(rng: np.random.Generator, items: Sequence[Any], count: int) -> list[Any]:
    """Returns `count` different items in random order."""
    return [items[int(index)] for index in rng.permutation(len(items))[:count]]


@lru_cache(maxsize=256)
def shape_mask(shape: str, size: int) -> Image.Image:
    """Returns the filled mask of a shape, drawn four times larger and scaled down."""
    side = size * 4
    mask = Image.new("L", (side, side), 0)
    draw, last, third = ImageDraw.Draw(mask), side - 1, side // 3
    if shape == "circle":
        draw.ellipse((0, 0, last, last), fill=255)
    elif shape == "square":
        draw.rectangle((side // 12, side // 12, last - side // 12, last - side // 12), fill=255)
    elif shape == "triangle":
        draw.polygon(((0, last), (last, last), (side // 2, 0)), fill=255)
    elif shape == "cross":
        draw.rectangle((third, 0, last - third, last), fill=255)
        draw.rectangle((0, third, last, last - third), fill=255)
    else:
        draw.ellipse((0, 0, last, last), fill=255)
        draw.ellipse((side // 4, side // 4, last - side // 4, last - side // 4), fill=0)
    return mask.resize((size, size), Image.Resampling.LANCZOS)


def background(rng: np.random.Generator, tone: str) -> Image.Image:
    """Returns a noisy plain background, `black` or `grey`; both are darker than any ink."""
    level = rng.integers(40, 62) if tone == "grey" else rng.integers(0, 16)
    tint = rng.integers(-5, 6, size=3)
    noise = rng.integers(-6, 7, size=(SIZE, SIZE, 1))
    return Image.fromarray(np.clip(level + tint + noise, 0, 255).astype(np.uint8))


def tinted(rng: np.random.Generator, rgb: tuple[int, int, int]) -> tuple[int, int, int]:
    """Returns a colour near the given one."""
    red, green, blue = np.clip(np.array(rgb) + rng.integers(-14, 15, size=3), 0, 255).tolist()
    return red, green, blue


def paint(canvas: Image.Image, mask: Image.Image, rgb: tuple[int, int, int], left: float, top: float) -> None:
    """Paints ink through a mask onto the canvas."""
    canvas.paste(rgb, (round(left), round(top)), mask)


def place_at(
    rng: np.random.Generator, mask: Image.Image, place: tuple[float, float], jitter: float
) -> tuple[float, float]:
    """Returns the corner where a mask lands at a relative place (0 = left or top, 1 = right or bottom)."""
    free = (SIZE - mask.width - 2, SIZE - mask.height - 2)
    return tuple(  # type: ignore[return-value]
        min(space, max(0.0, where * space + rng.uniform(-jitter, jitter))) + 1 for where, space in zip(place, free)
    )


def _tone(rng: np.random.Generator) -> str:
    return "black" if rng.random() < 0.5 else "grey"


def _single(
    rng: np.random.Generator, thing: str, name: str, mask: Callable[[int], Image.Image]
) -> tuple[Image.Image, dict]:
    colour = choose(rng, tuple(COLOURS))
    tone = _tone(rng)
    size = "big" if rng.random() < (0.5 if thing == "shape" else 0.75) else "small"
    ink = mask(int(rng.integers(24, 27)) if size == "big" else int(rng.integers(9, 13)))
    place = "middle" if size == "big" else choose(rng, tuple(PLACES))
    canvas = background(rng, tone)
    paint(canvas, ink, tinted(rng, COLOURS[colour]), *place_at(rng, ink, PLACES[place], 1.5))
    return canvas, {"thing": thing, "name": name, "colour": colour, "size": size, "place": place, "background": tone}


def digit_picture(rng: np.random.Generator, part: str) -> Picture:
    """Returns one handwritten digit in coloured ink."""
    index = choose(rng, digit_shares()[part])
    number = int(digits()[1][index])
    image, facts = _single(rng, "digit", NUMBER_WORDS[number], lambda size: digit_mask(index, size))
    return Picture("digit", (image,), (f"digit:{index}",), {**facts, "number": number})


def letter_picture(rng: np.random.Generator, part: str) -> Picture:
    """Returns one capital letter in coloured ink."""
    font, letter = choose(rng, FONTS[part]), choose(rng, GENERAL_LETTERS)
    image, facts = _single(rng, "letter", letter, lambda size: glyph_mask(font, letter, size))
    return Picture("letter", (image,), (f"glyph:{font}:{letter}",), facts)


def shape_picture(rng: np.random.Generator, part: str) -> Picture:
    """Returns one drawn shape."""
    shape = choose(rng, SHAPES)
    image, facts = _single(rng, "shape", shape, lambda size: shape_mask(shape, size))
    return Picture("shape", (image,), (), facts)


def several_picture(rng: np.random.Generator, part: str) -> Picture:
    """Returns two shapes side by side (three in ten: three in a row), or two to four in the corners."""
    in_row = rng.random() < 0.6
    count = (2 if rng.random() < 0.7 else 3) if in_row else int(rng.integers(2, 5))
    pool = tuple(COLOURS) if rng.random() < 0.7 else tuple(sample(rng, tuple(COLOURS), 2))
    colours = sample(rng, pool, count) if in_row and len(pool) > 2 else [choose(rng, pool) for _ in range(count)]
    shapes = [choose(rng, SHAPES) for _ in range(count)]
    tone = _tone(rng)
    canvas = background(rng, tone)
    if in_row:
        height = rng.uniform(0.2, 0.8)
        places = [(index / (count - 1), height) for index in range(count)]
        sizes = [int(rng.integers(11, 14) if count == 2 else rng.integers(8, 10)) for _ in range(count)]
    else:
        places = sample(rng, [where for name, where in PLACES.items() if name != "middle"], count)
        sizes = [int(rng.integers(9, 13)) for _ in range(count)]
    for shape, colour, place, size in zip(shapes, colours, places, sizes):
        ink = shape_mask(shape, size)
        paint(canvas, ink, tinted(rng, COLOURS[colour]), *place_at(rng, ink, place, 1.0))
    facts = {"shapes": shapes, "colours": colours, "in_row": in_row, "count": count, "background": tone}
    return Picture("several", (canvas,), (), facts)


def photo_picture(rng: np.random.Generator, part: str) -> Picture:
    """Returns a crop of a photograph; four in ten are turned to grey."""
    name = choose(rng, tuple(GENERAL_PHOTOS))
    crop, source = photo_crop(name, part, rng)
    tone = "grey" if name == "print" or rng.random() < 0.4 else "colour"
    image = ImageOps.grayscale(crop).convert("RGB") if tone == "grey" else crop
    return Picture("photo", (image,), (source,), {"name": name, "tone": tone})


def text_picture(rng: np.random.Generator, part: str) -> Picture:
    """Returns no image at all: the question stands alone."""
    return Picture("text")


FAMILIES: dict[str, tuple[float, Callable[[np.random.Generator, str], Picture]]] = {
    "digit": (0.27, digit_picture),
    "letter": (0.21, letter_picture),
    "shape": (0.12, shape_picture),
    "several": (0.19, several_picture),
    "photo": (0.18, photo_picture),
    "text": (0.03, text_picture),
}


def draw_picture(rng: np.random.Generator, part: str, family: str | None = None) -> Picture:
    """Returns a picture of a family, or of a random one in the proportions of the mixture."""
    if family is None:
        names = tuple(FAMILIES)
        weights = np.array([FAMILIES[name][0] for name in names])
        family = names[int(rng.choice(len(names), p=weights / weights.sum()))]
    return FAMILIES[family][1](rng, part)
