"""Multiple choice: which option an answer chooses, and whether it is the right one.

Extraction returns a letter, or `""` when no single option can be read off; scoring compares it with the reference.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Mapping, Sequence

from mllm_cl.evaluation.scorers.exact_match import normalise
from mllm_cl.evaluation.scorers.references import accepted, lettered

REFUSALS = (  # VLMEvalKit reads these as option Z
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
NO_ANSWER = "Failed to obtain answer via API"
_PHRASE_AND_LETTER = r"\b(?:answer|option|choice)(?: is)?:?\s*[(\[]?([A-Za-z])[)\]]?[.:]?"


# strict ------------------------------------------------------------------------------------------------------------------


def chosen_letter(prediction: str, choices: object) -> str:
    """Returns the option that an answer names beyond doubt, else `""`.

    A letter alone, also lower-case, in brackets, bold or with `.`, `:` or `)` behind it; such a letter in front of the
    text of its own option; `the answer is B`, also with that text behind it; or exactly the text of one option.

    Example:

    ```python
    >>> from mllm_cl.evaluation.scorers.choice import chosen_letter
    >>> [chosen_letter(text, ["a cat", "a dog"]) for text in ("B.", "(a)", "b) a dog", "A dog", "A or B", "a bird")]
    ['B', 'A', 'B', 'B', '', '']

    ```
    """
    options = lettered(choices)
    text = unicodedata.normalize("NFKC", prediction).strip().strip("*_`\"' ")
    named = [letter for letter, option in options.items() if option.strip() and normalise(option) == normalise(text)]
    if len(named) == 1:
        return named[0]
    found = (
        re.search(_PHRASE_AND_LETTER + r"()\s*$", text, re.IGNORECASE)
        or re.fullmatch(r"[(\[]?([A-Za-z])[)\]]?[.:,)]?(?:\s+(.*))?", text, re.DOTALL)
        or re.search(_PHRASE_AND_LETTER + r"\s+(\S.*)$", text, re.IGNORECASE)
    )
    letter = found.group(1).upper() if found else ""
    if found is None or letter not in options:
        return ""
    rest = found.group(2) or ""
    return letter if not rest or normalise(rest) == normalise(options[letter]) else ""


def multiple_choice(prediction: str, references: Sequence[str], choices: object = None, **row_fields: object) -> float:
    """Right if `chosen_letter` is a reference, given as a letter or as the text of an option; no letter is wrong."""
    options = lettered(choices) or dict.fromkeys(string.ascii_uppercase, "")
    letter = chosen_letter(prediction, options)
    return float(bool(letter) and any(_letter_of(reference, options) == letter for reference in accepted(references)))


def choice_likelihood(prediction: str, references: Sequence[str], **row_fields: object) -> float:
    """Right if the likeliest choice is a reference; see `mllm_cl.evaluation.likelihood`, which finds it."""
    answer = normalise(prediction)
    return float(bool(answer) and any(answer == normalise(reference) for reference in accepted(references)))


def _letter_of(reference: str, options: Mapping[str, str]) -> str:
    bare = reference.strip().strip("().").upper()
    if bare in options:
        return bare
    return next((letter for letter, option in options.items() if normalise(option) == normalise(reference)), "")


# peers -------------------------------------------------------------------------------------------------------------------


def scienceqa_llava(prediction: str, references: Sequence[str], choices: object = None, **row_fields: object) -> float:
    """LLaVA and CoIN: the bare letter, a letter with `. ` behind it, or exactly one `The answer is X.`; else failed."""
    letters = "ABCDE"
    if prediction in tuple(letters):
        letter = prediction
    elif len(prediction) >= 3 and prediction[0] in letters and prediction[1:3] == ". ":
        letter = prediction[0]
    else:
        said = re.findall(r"The answer is ([A-Z]).", prediction)
        letter = said[0] if len(said) == 1 else ""
    options = lettered(choices)
    count = len(options) if options else len(letters)
    return float(bool(letter) and letter in letters[:count] and letter in accepted(references))


def scienceqa_lmms_eval(prediction: str, references: Sequence[str], **row_fields: object) -> float:
    """lmms-eval 0.7.3: the letter in either case, or an upper-case letter with `.` behind it."""
    answer = prediction.strip()
    if len(answer) >= 2 and answer[0].isupper() and answer[1] == ".":
        answer = answer[0]
    return float(any(answer.lower() == reference.strip().lower() for reference in accepted(references)))


def seed_llava(prediction: str, references: Sequence[str], **row_fields: object) -> float:
    """LLaVA on SEED-Bench: the whole output equals the letter."""
    return float(prediction in accepted(references))


def seed_lmms_eval(prediction: str, references: Sequence[str], **row_fields: object) -> float:
    """lmms-eval on SEED-Bench: the first character equals the letter, case aside."""
    first = prediction.strip()[:1].lower()
    return float(any(first == reference.lower().strip() for reference in accepted(references)))


def cvbench_letter(prediction: str, references: Sequence[str], **row_fields: object) -> float:
    """lmms-eval on CV-Bench: the first letter of the reply, brackets and blanks left aside."""
    match = re.match(r"[(\s]*([A-Z])", prediction.strip(), re.IGNORECASE)
    letter = match.group(1).upper() if match else ""
    return float(any(letter == reference.strip("()") for reference in accepted(references)))


# extraction --------------------------------------------------------------------------------------------------------------

_STARTS = ("", "the ", "correct ", "the correct ", "best ", "the best ")
_PHRASES = (
    *(f"{start}answer is" for start in (*_STARTS, "my ")),
    *(f"{start}option is" for start in _STARTS[2:]),
    *(f"{start}choice is" for start in (*_STARTS[:4], "my ")),
    *("i choose", "i select", "i pick"),
    *("옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは"),
)
_START, _END, _PHRASE, _FALLBACK = 10, 9, 7, 0
_FORMATS = ((6, "({})"), (5, "{}."), (4, "{}:"), (3, "{})"), (2, "{} "))  # how sure, and what it looks like


def mcq_extract_lmms_eval(
    prediction: str, references: object = None, choices: object = None, **row_fields: object
) -> str:
    """Returns the letter that lmms-eval 0.7.3 extracts: the surest format wins, then the last place.

    From sure to unsure: letter at the start, letter at the end, anywhere behind a phrase such as `the answer is`,
    `(A)`, `A.`, `A:`, `A)`, `A `; if nothing of that is found, the letter anywhere. `A bird` is A.
    """
    letters = list(lettered(choices)) or list("ABCDEFGH")
    text = prediction.strip()
    for mark in ",.!?;:'\"":
        text = text.strip(mark)
    bare, text = text.strip(), f" {text} "
    found: list[tuple[int, int, str]] = []  # how sure, where, letter
    if not prediction.strip():
        return ""
    for sure, form in _FORMATS:
        found += [(sure, text.rfind(form.format(x)), x) for x in letters if form.format(x) in text]
    for phrase in _PHRASES:
        place = text.lower().find(phrase)
        if place >= 0:
            places = ((text.find(x, place + len(phrase)), x) for x in letters)
            found += [(_PHRASE, where, x) for where, x in places if where >= 0]
    for x in letters:
        if bare.startswith(x) and (len(bare) == 1 or not bare[1].isalpha()):
            found.append((_START, 0, x))
        if bare.endswith(x) and (len(bare) == 1 or not bare[-2].isalpha()):
            found.append((_END, len(text) - 1, x))
    found = found or [(_FALLBACK, text.rfind(x), x) for x in letters if x in text]
    return max(found, key=lambda entry: entry[:2])[2] if found else ""


def _by_text(answer: str, options: Mapping[str, str]) -> str:
    """Returns the only option whose text is part of the answer."""
    named = [letter for letter, option in options.items() if option.lower() in answer.lower()]
    return named[0] if len(named) == 1 else ""


def mcq_can_infer_vlmevalkit(
    prediction: str, references: object = None, choices: object = None, **row_fields: object
) -> str:
    """Returns the letter that VLMEvalKit infers: the only option letter among the last five words, else the only
    option whose text occurs; `Z` for a refusal."""
    options = lettered(choices)
    if NO_ANSWER not in prediction:
        if any(refusal in prediction for refusal in REFUSALS):
            return "Z"
        words = prediction.translate(str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))).split()
        present = [letter for letter in options if letter in words]
        if len(present) == 1 and words.index(present[0]) > len(words) - 5:
            return present[0]
        if not present and "Z" in words:
            return "Z"
    if len(prediction) > 2 * sum(map(len, options.values())):
        return ""
    return _by_text(prediction, options)


def mmbench_letter(prediction: str, choices: object) -> str:
    """Returns the letter that lmms-eval's MMBench reads without a judge, else `""`.

    A word that is a letter (not `A` in more than three words), or a letter with usual marks around it; the only option
    whose text occurs; what `mcq_extract_lmms_eval` finds.
    """
    words, options = prediction.split(), lettered(choices)
    letters = "ABCDE"
    present = [letter for letter in letters if letter in words]
    if NO_ANSWER not in prediction:
        if len(present) == 1 and not ("A" in words and len(words) > 3):
            return present[0]
        for form in ("{}.", "{},", "{}:", "{})", "{}).", "({})", "({}).", ":{}", ":{},", ":{}.", ":{})", ":{})."):
            marked = [letter for letter in letters if form.format(letter) in words]
            if len(marked) == 1:
                return marked[0]
    return _by_text(prediction, options) or mcq_extract_lmms_eval(prediction, choices=dict(sorted(options.items())))
