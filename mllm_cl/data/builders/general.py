"""The general mixture: what the tiny LLaVA has learnt, and the benchmark that shows whether it still knows it.

Real images (handwritten digits, photographs, letters of real fonts) and drawn scenes with about twenty kinds of
instruction in all answer formats of the field. The same picture is asked different questions, so a model must read
them.

* `general_rows("train" | "validation")`: rows with answers, training paraphrases.
* `general_rows("test")`: the benchmark `quickstart-general`, 28 rows of each kind: images whose source (digit, font,
  tile of a photograph) is in no training row, asked in held-out paraphrases. Drawn scenes have no source; theirs are
  simply new.
* `general_inquiries(size)`: user turns without answers.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mllm_cl.data.builders.scenes import COLOURS, FAMILIES, NUMBER_WORDS, SHAPES, Picture, choose, draw_picture, sample
from mllm_cl.data.builders.sources import GENERAL_PHOTOS
from mllm_cl.data.builders.wording import WORDINGS
from mllm_cl.data.images import encode_png
from mllm_cl.data.rows import Row, Rows, assistant_message, user_message

Split = Literal["train", "validation", "test"]
ROWS_PER_KIND = 28  # of the benchmark
SIZES = {"train": 8192, "validation": 480}

OPPOSITES = {
    "left": "right",
    "top": "bottom",
    "big": "small",
    "light": "dark",
    "first": "last",
    "yes": "no",
    "in": "out",
}
OPPOSITES |= {right: left for left, right in OPPOSITES.items()}
# How much more often than once a kind is asked; the others are asked once in this many chances.
WEIGHTS = {
    "digit": 2.5,
    "digit_word": 2.0,
    "letter": 3.0,
    "shape": 2.0,
    "photo": 2.0,
    "side": 2.0,
    **dict.fromkeys(("colour_yes_no", "photo_yes_no", "options", "photo_options"), 3.0),
}

Filled = tuple[dict[str, str], str]  # what goes into the braces, and the answer


@dataclass(frozen=True)
class Question:
    """One question about a picture."""

    kind: str
    text: str
    answer: str


def _thing(picture: Picture, rng: np.random.Generator) -> str:
    return "object" if rng.random() < 0.25 else picture.facts["thing"]


def _options(rng: np.random.Generator, right: str, others: list[str]) -> Filled:
    """Two options in random order; the answer is the letter of the right one."""
    options = sample(rng, [right, choose(rng, others)], 2)
    text = " ".join(f"{letter}. {option}" for letter, option in zip("AB", options))
    return {"options": text}, "AB"[options.index(right)]


def _yes_no(rng: np.random.Generator, present: list[str], pool: list[str], slot: str) -> Filled:
    absent = [item for item in pool if item not in present]
    yes = rng.random() < 0.5
    return {slot: choose(rng, present if yes else absent)}, "yes" if yes else "no"


def _caption(picture: Picture, rng: np.random.Generator) -> Filled | None:
    facts = picture.facts
    if picture.family == "photo":
        grey = "grey " if facts["tone"] == "grey" else ""
        return {}, f"a {grey}photo of {facts['name']}"
    if picture.family == "several":
        if facts["count"] > 2 or not facts["in_row"]:
            return None
        (left, right), (one, other) = facts["shapes"], facts["colours"]
        return {}, f"a {one} {left} and a {other} {right}"
    if facts["size"] == "small":
        return {}, f"a small {facts['colour']} {facts['thing']} at the {facts['place']}"
    name = f"letter {facts['name']}" if picture.family == "letter" else facts["name"]
    return {}, f"a big {facts['colour']} {name}"


def _side(picture: Picture, rng: np.random.Generator) -> Filled | None:
    facts = picture.facts
    if not facts["in_row"] or facts["count"] != 2:
        return None
    side, what = int(rng.integers(2)), choose(rng, ("shape", "colour"))
    return {"side": ("left", "right")[side], "what": what}, facts[f"{what}s"][side]


def _count_colour(picture: Picture, rng: np.random.Generator) -> Filled:
    colours = picture.facts["colours"]
    colour = choose(rng, colours) if rng.random() < 0.8 else choose(rng, [*COLOURS])
    return {"colour": colour}, str(colours.count(colour))


def _next_number(picture: Picture, rng: np.random.Generator) -> Filled:
    number = int(rng.integers(9))
    return {"number": NUMBER_WORDS[number]}, NUMBER_WORDS[number + 1]


def _opposite(picture: Picture, rng: np.random.Generator) -> Filled:
    word = choose(rng, tuple(OPPOSITES))
    return {"word": word}, OPPOSITES[word]


def _big(picture: Picture, answer: str) -> Filled | None:
    return ({}, answer) if picture.facts["size"] == "big" else None


def _in_row(picture: Picture, names: str) -> Filled | None:
    return ({}, ", ".join(picture.facts[names])) if picture.facts["in_row"] else None


def _options_single(picture: Picture, rng: np.random.Generator) -> Filled:
    if picture.family == "shape" and rng.random() < 0.5:
        return _options(rng, picture.facts["name"], [shape for shape in SHAPES if shape != picture.facts["name"]])
    return _options(rng, picture.facts["colour"], [colour for colour in COLOURS if colour != picture.facts["colour"]])


SINGLE = ("digit", "letter", "shape")
Ask = Callable[[Picture, np.random.Generator], Filled | None]
# kind -> the families it can be asked about, and how it is filled and answered (None: not for this picture)
KINDS: dict[str, tuple[tuple[str, ...], Ask]] = {
    "digit": (("digit",), lambda p, rng: _big(p, str(p.facts["number"]))),
    "digit_word": (("digit",), lambda p, rng: _big(p, p.facts["name"])),
    "letter": (("letter",), lambda p, rng: _big(p, p.facts["name"])),
    "colour": (SINGLE, lambda p, rng: ({"thing": _thing(p, rng)}, p.facts["colour"])),
    "shape": (("shape",), lambda p, rng: ({}, p.facts["name"])),
    "place": (
        SINGLE,
        lambda p, rng: ({"thing": _thing(p, rng)}, p.facts["place"]) if p.facts["size"] == "small" else None,
    ),
    "size": (SINGLE, lambda p, rng: ({"thing": _thing(p, rng)}, p.facts["size"])),
    "background": ((*SINGLE, "several"), lambda p, rng: ({}, p.facts["background"])),
    "count": (("shape", "several"), lambda p, rng: ({}, str(p.facts.get("count", 1)))),
    "count_colour": (("several",), _count_colour),
    "colour_yes_no": (
        SINGLE,
        lambda p, rng: (
            (filled := _yes_no(rng, [p.facts["colour"]], [*COLOURS], "colour"))[0] | {"thing": _thing(p, rng)},
            filled[1],
        ),
    ),
    "photo": (("photo",), lambda p, rng: ({}, p.facts["name"])),
    "photo_yes_no": (("photo",), lambda p, rng: _yes_no(rng, [p.facts["name"]], [*GENERAL_PHOTOS], "name")),
    "tone": (("photo",), lambda p, rng: ({}, p.facts["tone"])),
    "options": (SINGLE, _options_single),
    "photo_options": (
        ("photo",),
        lambda p, rng: _options(rng, p.facts["name"], [name for name in GENERAL_PHOTOS if name != p.facts["name"]]),
    ),
    "list_colours": (("several",), lambda p, rng: _in_row(p, "colours")),
    "side": (("several",), _side),
    "caption": ((*SINGLE, "photo", "several"), _caption),
    "next_number": (("text",), _next_number),
    "opposite": (("text",), _opposite),
}


def ask(picture: Picture, kind: str, rng: np.random.Generator, held_out: bool = False) -> Question | None:
    """Returns a question of this kind about the picture, or `None` where the kind does not apply."""
    families, fill = KINDS[kind]
    filled = fill(picture, rng) if picture.family in families else None
    if filled is None:
        return None
    wording = WORDINGS[kind]
    text = choose(rng, wording.held_out if held_out else wording.train).format(**filled[0])
    return Question(kind, text, filled[1])


def ask_several(
    picture: Picture, count: int, rng: np.random.Generator, among: Collection[str] | None = None
) -> list[Question]:
    """Returns up to `count` different questions about one picture, in training paraphrases.

    They are of different kinds, `among` those given, unless the family has fewer kinds than that.
    """
    kinds = [kind for kind, (families, _) in KINDS.items() if picture.family in families]
    kinds *= -(-count // len(kinds)) if len(kinds) < 3 else 1
    kinds = [kind for kind in kinds if among is None or kind in among]
    weights = np.array([WEIGHTS.get(kind, 1.0) for kind in kinds])
    # weighted order without replacement (Efraimidis and Spirakis, 2006)
    order = np.argsort(rng.exponential(size=len(kinds)) / weights)
    questions: list[Question] = []
    for index in order.tolist():
        question = ask(picture, kinds[index], rng)
        if question is not None and question not in questions:
            questions.append(question)
        if len(questions) == count:
            break
    return questions


def to_row(name: str, picture: Picture, question: Question, with_answer: bool) -> Row:
    """Returns the row of a question about a picture."""
    messages = [user_message(question.text, len(picture.images))]
    if with_answer:
        messages.append(assistant_message(question.answer))
    return {
        "id": name,
        "messages": messages,
        "images": [encode_png(image) for image in picture.images],
        "answers": [question.answer],
        "kind": question.kind,
        "format": WORDINGS[question.kind].format,
        "source": " ".join(picture.sources),
    }  # type: ignore[return-value]


def generator(name: str, seed: int) -> np.random.Generator:
    """Returns the random numbers of a named split: the same on every machine and in every process."""
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


def general_pictures(
    split: Split, count: int, questions: int, seed: int = 0, kinds: Collection[str] | None = None
) -> Iterator[tuple[Picture, list[Question]]]:
    """Yields pictures, each with several questions (of some `kinds` only): what pre-training learns from.

    A picture that none of the kinds can be asked about is left out.
    """
    rng = generator(f"general-pictures/{split}", seed)
    for _ in range(count):
        picture = draw_picture(rng, split)
        asked = ask_several(picture, questions, rng, kinds)
        if asked:
            yield picture, asked


def general_rows(split: Split, *, size: int | None = None, seed: int = 0) -> Rows:
    """Returns rows of the general mixture.

    Args:
        split (`str`): `train`, `validation` or `test`; the last is the benchmark `quickstart-general`.
        size (`int`, *optional*): number of rows (8,192 and 480; the benchmark has 28 of each kind and `size` takes its
        first
            rows, in which the kinds alternate).
        seed (`int`): another seed gives other rows of the same kind. The benchmark's published numbers are of seed 0.

    Raises:
        DataError: scikit-image is not installed.
    """
    rng = generator(f"general/{split}", seed)
    rows: list[Row] = []
    if split != "test":
        while len(rows) < (SIZES[split] if size is None else size):
            picture = draw_picture(rng, split)
            question = ask_several(picture, 1, rng)[0]
            rows.append(to_row(f"general/{split}/{len(rows):05d}", picture, question, with_answer=True))
        return Rows(rows)
    for index in range(ROWS_PER_KIND):
        for kind, (families, _) in KINDS.items():
            question = None
            while question is None:
                picture = draw_picture(rng, split, families[index % len(families)])
                question = ask(picture, kind, rng, held_out=True)
            rows.append(to_row(f"quickstart-general/{kind}/{index:02d}", picture, question, with_answer=False))
    return Rows(rows if size is None else rows[:size])


def general_inquiries(size: int = 512, seed: int = 0) -> Rows:
    """Returns user turns without answers over training images; one in sixteen is a plain text question.

    They share no row with the benchmark and carry neither an assistant turn nor `answers`.
    """
    rng = generator("general-inquiries", seed)
    families = [family for family in FAMILIES if family != "text"]
    rows: list[Row] = []
    for index in range(size):
        picture = draw_picture(rng, "train", "text" if index % 16 == 15 else choose(rng, families))
        row = to_row(f"general/inquiry/{index:05d}", picture, ask_several(picture, 1, rng)[0], with_answer=False)
        del row["answers"]  # type: ignore[typeddict-item]
        rows.append(row)
    return Rows(rows)


def benchmark(split: Split = "test") -> Rows:
    """Returns the general benchmark `quickstart-general`: new images and held-out paraphrases of every kind."""
    return general_rows(split)
