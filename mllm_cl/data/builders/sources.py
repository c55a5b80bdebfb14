"""The real images behind the built-in data: files that ship inside ordinary packages, read without any download.

| source | package | what it is |
|---|---|---|
| `digit:N` | scikit-learn | UCI optical recognition of handwritten digits, 8x8 grey (`datasets/data/digits.csv.gz`) |
| `photo:NAME:x,y,w,h` | scikit-image, scikit-learn | a crop of a photograph (`skimage/data`, `sklearn/.../images`) |
| `glyph:FONT:LETTER` | matplotlib | a letter of a bundled DejaVu, STIX or Computer Modern font |
| `face:N` | scikit-image | 25x25 patches of Labeled Faces in the Wild, 100 faces and 100 others (`lfw_subset.npy`) |
| `coin:N` | scikit-image | one of the 24 ancient coins of `coins.png` |

Everything is divided into *parts* that share no image: `train`, `validation`, `test` of the general mixture and
`stream-train`, `stream-validation`, `stream-test` of the quickstart stream. Digits and coins are divided one by one,
photographs and fonts belong to the mixture or to the stream as a whole, and a photograph is cut into 4x4 tiles of
which every part owns some.
"""

from __future__ import annotations

import gzip
import importlib.util
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from mllm_cl.errors import DataError

PARTS = ("train", "validation", "test", "stream-train", "stream-validation", "stream-test")

# Photograph -> (file, the region worth cropping as left, top, right, bottom); the names are the words of the answers.
GENERAL_PHOTOS = {
    "coffee": ("skimage", "coffee.png", (120, 20, 480, 400)),
    "cat": ("skimage", "chelsea.png", (60, 0, 360, 300)),
    "galaxy": ("skimage", "hubble_deep_field.jpg", (0, 0, 1000, 872)),
    "tissue": ("skimage", "ihc.png", (0, 0, 512, 512)),
    "retina": ("skimage", "retina.jpg", (250, 250, 1160, 1160)),
    "motorcycle": ("skimage", "motorcycle_left.png", (100, 80, 660, 500)),
    "rocket": ("skimage", "rocket.jpg", (120, 60, 560, 427)),
    "print": ("skimage", "page.png", (0, 0, 384, 191)),
    "temple": ("sklearn", "china.jpg", (60, 40, 600, 420)),
    "flower": ("sklearn", "flower.jpg", (160, 40, 480, 360)),
}
STREAM_PHOTOS = {
    "brick": ("skimage", "brick.png", (0, 0, 512, 512)),
    "grass": ("skimage", "grass.png", (0, 0, 512, 512)),
    "gravel": ("skimage", "gravel.png", (0, 0, 512, 512)),
    "moon": ("skimage", "moon.png", (0, 0, 512, 512)),
    "handwriting": ("skimage", "text.png", (0, 0, 448, 172)),
}
# Tiles (row * 4 + column) of a photograph that belong to each part; no row or column of tiles is missing from training.
TILES = {"test": (1, 7, 8, 14), "validation": (4, 11)}
TILES["train"] = tuple(tile for tile in range(16) if tile not in TILES["test"] + TILES["validation"])

FONTS = {
    "train": (
        *("DejaVuSans", "DejaVuSansMono-Bold", "DejaVuSerif-Bold", "DejaVuSerif", "STIXGeneral", "cmr10"),
        *("DejaVuSans-BoldOblique", "DejaVuSansMono-Oblique", "STIXGeneralItalic", "cmti10"),
    ),
    "validation": ("DejaVuSansMono",),
    "test": ("DejaVuSans-Bold", "cmss10", "DejaVuSerif-Italic"),
}
GENERAL_LETTERS = "ABCDEFGHJKLMPRST"

DIGIT_COUNTS = {  # 1,797 in all
    "train": 1000, "validation": 60, "test": 140, "stream-train": 380, "stream-validation": 67, "stream-test": 150,
}  # fmt: skip
FACE_COUNTS = {"stream-train": 60, "stream-validation": 10, "stream-test": 30}  # of each class
# Centres (x, y) of the coins, found once by watershed segmentation of the gradient image.
COIN_CENTRES = (
    *((334, 43), (155, 50), (215, 51), (276, 52), (44, 54), (100, 56), (270, 118), (44, 124), (205, 123), (336, 124)),
    *((102, 125), (153, 127), (347, 186), (212, 193), (273, 193), (101, 195), (43, 197), (154, 197), (45, 259)),
    *((172, 261), (300, 263), (243, 263), (113, 265), (352, 267)),
)
COIN_COUNTS = {"stream-train": 13, "stream-validation": 4, "stream-test": 7}


def _package_folder(package: str) -> Path:
    """Returns the folder of an installed package without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            f"The built-in images need the package {package!r}, which is not installed.",
            expected="scikit-image, scikit-learn and matplotlib beside mllm_cl",
            fix='pip install "mllm_cl[demo]"',
        )
    return Path(spec.submodule_search_locations[0])


def _package_file(package: str, *parts: str) -> Path:
    """Returns a file that ships inside a package."""
    path = _package_folder(package).joinpath(*parts)
    if not path.is_file():
        raise DataError(
            f"{path}: the file is missing from the installed package {package!r}.",
            expected="a complete wheel of the package",
            fix='pip install --force-reinstall "mllm_cl[demo]"',
        )
    return path


def _shares(count: int, sizes: dict[str, int], seed: int) -> dict[str, tuple[int, ...]]:
    """Divides `range(count)` at random, but always in the same way, into parts of the given sizes."""
    order = np.random.default_rng(seed).permutation(count).tolist()
    shares, start = {}, 0
    for part, size in sizes.items():
        shares[part] = tuple(order[start : start + size])
        start += size
    return shares


@lru_cache(maxsize=1)
def digits() -> tuple[np.ndarray, np.ndarray]:
    """Returns the handwritten digits as `(1797, 8, 8)` with values 0..255, and their labels `(1797,)`."""
    with gzip.open(_package_file("sklearn", "datasets", "data", "digits.csv.gz"), "rt") as file:
        table = np.loadtxt(file, delimiter=",")
    # (1797, 64) with values 0..16 -> (1797, 8, 8) with values 0..255
    pixels = np.minimum(table[:, :64].reshape(-1, 8, 8) * (255 / 16), 255).astype(np.uint8)
    return pixels, table[:, 64].astype(int)


@lru_cache(maxsize=1)
def digit_shares() -> dict[str, tuple[int, ...]]:
    """Returns the indices of the digits of each part."""
    return _shares(len(digits()[1]), DIGIT_COUNTS, seed=11)


@lru_cache(maxsize=8192)
def digit_mask(index: int, size: int) -> Image.Image:
    """Returns the ink of a handwritten digit, `size` pixels high."""
    return Image.fromarray(digits()[0][index]).resize((size, size), Image.Resampling.BICUBIC)


@lru_cache(maxsize=64)
def photograph(name: str) -> Image.Image:
    """Returns the useful region of a photograph in RGB."""
    package, file, box = {**GENERAL_PHOTOS, **STREAM_PHOTOS}[name]
    folder = ("data",) if package == "skimage" else ("datasets", "images")
    with Image.open(_package_file(package, *folder, file)) as image:
        return image.convert("RGB").crop(box)


def photo_crop(name: str, part: str, rng: np.random.Generator, size: int = 32) -> tuple[Image.Image, str]:
    """Returns a random crop of a photograph inside a tile of this part (flipped half of the time) and its source."""
    image = photograph(name)
    tiles = TILES[part.removeprefix("stream-")]
    tile = tiles[rng.integers(len(tiles))]
    width, height = image.width / 4, image.height / 4
    side = min(width, height) * rng.uniform(0.75, 1.0)
    left = int((tile % 4) * width + rng.uniform(0, width - side))
    top = int((tile // 4) * height + rng.uniform(0, height - side))
    side = int(side)
    crop = image.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
    if rng.random() < 0.5:
        crop = ImageOps.mirror(crop)
    return crop, f"photo:{name}:{left},{top},{side},{side}"


@lru_cache(maxsize=4096)
def glyph_mask(font: str, letter: str, size: int) -> Image.Image:
    """Returns the ink of a letter, `size` pixels high (its longer side), drawn large and scaled down."""
    path = _package_file("matplotlib", "mpl-data", "fonts", "ttf", f"{font}.ttf")
    canvas = Image.new("L", (160, 160), 0)
    ImageDraw.Draw(canvas).text((40, 20), letter, font=ImageFont.truetype(str(path), 80), fill=255)
    ink = canvas.crop(canvas.getbbox())
    scale = size / max(ink.size)
    return ink.resize((max(1, round(ink.width * scale)), max(1, round(ink.height * scale))), Image.Resampling.LANCZOS)


@lru_cache(maxsize=1)
def _faces() -> np.ndarray:
    return np.load(_package_file("skimage", "data", "lfw_subset.npy"), allow_pickle=False)


def face_shares() -> dict[str, tuple[int, ...]]:
    """Returns the indices of the patches of each part: patches 0..99 are faces, 100..199 are not."""
    faces, others = (_shares(100, FACE_COUNTS, seed=seed) for seed in (12, 13))
    return {part: (*faces[part], *(100 + index for index in others[part])) for part in FACE_COUNTS}


def face_patch(index: int, rng: np.random.Generator, size: int = 32) -> tuple[Image.Image, str]:
    """Returns a patch, slightly cropped, flipped half of the time and with changed contrast, and its source."""
    patch = Image.fromarray((_faces()[index] * 255).astype(np.uint8))
    left, top, right, bottom = rng.uniform(0, 2.5, size=4)
    patch = patch.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, 25 - right, 25 - bottom))
    if rng.random() < 0.5:
        patch = ImageOps.mirror(patch)
    gain, shift = rng.uniform(0.8, 1.15), rng.uniform(-20, 20)
    return patch.point([min(255, max(0, int(gain * value + shift))) for value in range(256)]).convert(
        "RGB"
    ), f"face:{index}"


def coin_shares() -> dict[str, tuple[int, ...]]:
    """Returns the indices of the coins of each part."""
    return _shares(len(COIN_CENTRES), COIN_COUNTS, seed=14)


@lru_cache(maxsize=256)
def coin(index: int, size: int) -> tuple[Image.Image, Image.Image]:
    """Returns a coin in RGB and its round mask, `size` pixels high."""
    x, y = COIN_CENTRES[index]
    with Image.open(_package_file("skimage", "data", "coins.png")) as image:
        box = (max(0, x - 24), max(0, y - 24), min(image.width, x + 24), min(image.height, y + 24))
        patch = image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR, box=box)
    mask = Image.new("L", (size * 4, size * 4), 0)
    ImageDraw.Draw(mask).ellipse((0, 0, size * 4 - 1, size * 4 - 1), fill=255)
    return patch, mask.resize((size, size), Image.Resampling.LANCZOS)
