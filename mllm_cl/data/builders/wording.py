"""How the general mixture asks: the format and the paraphrases of every kind of instruction.

The `held_out` paraphrases never occur in training or validation; the benchmark `quickstart-general` uses nothing else.
Words in braces are filled by the kind (`{thing}` is digit, letter, shape or object).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Wording:
    """The paraphrases of one kind.

    Args:
        format (`str`): `number`, `word`, `letter`, `phrase`, `caption`, `yes_no`, `option` or `list`.
        train (`tuple[str, ...]`): paraphrases of training and validation.
        held_out (`tuple[str, ...]`): paraphrases of the benchmark only.
    """

    format: str
    train: tuple[str, ...]
    held_out: tuple[str, ...]


WORDINGS: dict[str, Wording] = {
    "digit": Wording(
        "number",
        (
            "Which digit is this?",
            "Read the digit.",
            "What digit is written here?",
            "Give the digit as a numeral.",
            "Which digit do you see? Answer with a numeral.",
        ),
        ("What digit do you see?", "Which digit is written here? Answer with a numeral."),
    ),
    "digit_word": Wording(
        "word",
        (
            "Write the digit as a word.",
            "Spell out the digit.",
            "Which digit is this? Answer with a word.",
            "What digit is written here, as a word?",
        ),
        ("Read the digit. Answer with a word.", "Which digit do you see, as a word?"),
    ),
    "letter": Wording(
        "letter",
        (
            "Which letter is this?",
            "Read the letter.",
            "What letter is shown?",
            "Which letter do you see?",
            "Tell me the letter.",
        ),
        ("What letter is this?", "Which letter is shown?"),
    ),
    "colour": Wording(
        "word",
        (
            "What colour is the {thing}?",
            "Which colour does the {thing} have?",
            "Name the colour of the {thing}.",
            "Tell me the colour of the {thing}.",
            "Colour of the {thing}?",
        ),
        ("What is the colour of the {thing}?", "Which colour is the {thing}?"),
    ),
    "shape": Wording(
        "word",
        (
            "What shape is this?",
            "Which shape do you see?",
            "Name the shape.",
            "Tell me the shape.",
            "What is the shape of the object?",
        ),
        ("Which shape is this?", "Tell me the shape of the object."),
    ),
    "place": Wording(
        "phrase",
        (
            "Where is the {thing}?",
            "Where in the picture is the {thing}?",
            "Name the place of the {thing}.",
            "In which part of the picture is the {thing}?",
            "Where do you see the {thing}?",
        ),
        ("Tell me where the {thing} is.", "Where is the {thing} in the picture?"),
    ),
    "size": Wording(
        "word",
        (
            "Is the {thing} big or small?",
            "How big is the {thing}?",
            "What size is the {thing}?",
            "Name the size of the {thing}.",
        ),
        ("What is the size of the {thing}?", "Is the {thing} small or big?"),
    ),
    "background": Wording(
        "word",
        (
            "Is the background black or grey?",
            "How is the background, black or grey?",
            "Describe the background in one word.",
            "What kind of background is it, grey or black?",
        ),
        ("Is the background grey or black?", "Describe the background, black or grey?"),
    ),
    "count": Wording(
        "number",
        (
            "How many shapes are there?",
            "Count the shapes.",
            "What is the number of shapes?",
            "How many shapes do you see?",
        ),
        ("Tell me how many shapes there are.", "How many shapes are in the picture?"),
    ),
    "count_colour": Wording(
        "number",
        (
            "How many shapes are {colour}?",
            "Count the {colour} shapes.",
            "How many {colour} shapes are there?",
            "What is the number of {colour} shapes?",
        ),
        ("How many {colour} shapes do you see?", "Tell me how many shapes are {colour}."),
    ),
    "colour_yes_no": Wording(
        "yes_no",
        (
            "Is the {thing} {colour}?",
            "Does the {thing} have the colour {colour}?",
            "Do you see a {colour} {thing}?",
            "Is there a {colour} {thing} in the picture?",
        ),
        ("Is there a {colour} {thing}?", "Is the colour of the {thing} {colour}?"),
    ),
    "photo": Wording(
        "word",
        (
            "What does the photo show?",
            "What is in this photo?",
            "Name the subject of the photo.",
            "What is this a photo of?",
        ),
        ("What is the subject of the photo?", "What do you see in this photo?"),
    ),
    "photo_yes_no": Wording(
        "yes_no",
        (
            "Is this a photo of a {name}?",
            "Does the photo show a {name}?",
            "Is there a {name} in this photo?",
            "Does this look like a {name}?",
        ),
        ("Do you see a {name} in the photo?", "Is a {name} in this photo?"),
    ),
    "tone": Wording(
        "word",
        (
            "Is the photo in colour or in grey?",
            "Is this a colour photo or a grey photo?",
            "Colour or grey?",
            "What kind of photo is it, grey or colour?",
        ),
        ("Is the photo grey or in colour?", "Is it a grey photo or a colour photo?"),
    ),
    "options": Wording(
        "option",
        (
            "Which one fits? {options}",
            "Choose the right option. {options}",
            "What do you see? {options} Answer with the letter of the option.",
            "Which option is right? {options}",
        ),
        ("Which option fits? {options}", "Choose the right one. {options} Answer with the letter."),
    ),
    "photo_options": Wording(
        "option",
        (
            "What does the photo show? {options}",
            "Choose the subject of the photo. {options}",
            "What is in this photo? {options} Answer with the letter of the option.",
            "Which option names the photo? {options}",
        ),
        ("Which option is in the photo? {options}", "Choose what the photo shows. {options} Answer with the letter."),
    ),
    "list_colours": Wording(
        "list",
        (
            "List the colours from left to right.",
            "Name the colours from left to right.",
            "Which colours do you see from left to right?",
            "Give the list of colours, left to right.",
        ),
        ("Tell me the colours from left to right.", "List the colours, left to right."),
    ),
    "side": Wording(
        "word",
        (
            "What {what} is on the {side}?",
            "Which {what} is on the {side} side?",
            "Name the {what} on the {side}.",
            "Look at the {side}. Which {what} is there?",
        ),
        ("Which {what} is on the {side}?", "Look at the {side} side. What {what} is there?"),
    ),
    "caption": Wording(
        "caption",
        (
            "Describe the picture.",
            "Write a caption for this picture.",
            "Give a short caption.",
            "Caption this.",
            "What is in the picture? Describe it.",
        ),
        ("Describe this picture.", "Write a short caption for the picture."),
    ),
    "next_number": Wording(
        "word",
        (
            "Which number comes after {number}?",
            "What comes after {number}?",
            "Name the number after {number}.",
            "Count on: {number},",
        ),
        ("What number comes after {number}?", "Tell me the number after {number}."),
    ),
    "opposite": Wording(
        "word",
        (
            "What is the opposite of {word}?",
            "Name the opposite of {word}.",
            "Opposite of {word}?",
            "Give me the opposite of {word}.",
        ),
        ("Which word is the opposite of {word}?", "Tell me the opposite of {word}."),
    ),
}
