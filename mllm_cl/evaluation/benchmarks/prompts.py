"""How a question is put. `llava_v1`: the words of LLaVA-1.5's evaluation files; `plain`: the question, options listed.

The chat template (system sentence, `USER:`, `ASSISTANT:`) belongs to the model's processor, not to the prompt profile.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."
CAPTION = "Provide a one-sentence caption for the provided image."
BOX = "Please provide the bounding box coordinate of the region this sentence describes: "

PROMPTS: Mapping[str, str] = {
    "llava_v1": "the instructions that LLaVA-1.5 was evaluated with",
    "plain": "the question as it is in the data set, options on lines of their own",
}


def lines(*parts: str | None) -> str:
    """Returns the parts that are not empty, each on a line of its own."""
    return "\n".join(part for part in parts if part)


def short(question: str, prompts: str, *before: str | None) -> str:
    """Returns a question that wants a word or phrase; `before` goes between question and instruction."""
    return lines(question, *before, SHORT if prompts == "llava_v1" else None)


def options(question: str, choices: Mapping[str, str], prompts: str, hint: str | None = None) -> str:
    """Returns a multiple-choice question: hint, question, `A. text` lines, instruction."""
    listed = [f"{letter}. {text}" for letter, text in choices.items()]
    return lines(hint, question, *listed, LETTER if prompts == "llava_v1" else None)


def lettered(texts: Sequence[object]) -> dict[str, str]:
    """Returns texts by letter, leaving out the empty ones at the end."""
    return {letter: str(text) for letter, text in zip("ABCDEFGHIJ", texts) if _is_text(text)}


def _is_text(value: object) -> bool:
    return value is not None and value == value and str(value).strip() not in ("", "nan")  # NaN is not itself
