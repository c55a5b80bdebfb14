"""The instruction-following checks, case by case."""

import pytest

from mllm_cl.evaluation.benchmarks.prompts import LETTER, SHORT
from mllm_cl.evaluation.instructions import Obedience, asked_form, has_form, obedience


@pytest.mark.parametrize(
    ("question", "form"),
    [
        (f"Which one?\nA. a cat\nB. a dog\n{LETTER}", "letter"),
        ("Reply with only the letter.", "letter"),
        (f"What is it?\n{SHORT}", "phrase"),
        (f"Is it a dog? Please answer yes or no.\n{SHORT}", "yes_no"),
        ("Is it red? (Yes/No)", "yes_no"),
        ("Answer in one word.", "one_word"),
        ("Give a one-word answer.", "one_word"),
        ("Name the animals, separated by commas.", "list"),
        ("What do you see? Answer with bullet points.", "list"),
        ("Describe this picture.", None),
        ("What does the letter on the table say?", None),
        ("Which word is written there?", None),
        ("What is the first letter of the sign?", None),
        ("", None),
    ],
)
def test_form_asked_for(question, form):
    assert asked_form(question) == form


@pytest.mark.parametrize(
    ("form", "answer", "right"),
    [
        ("letter", "B", True),
        ("letter", " (b). ", True),
        ("letter", "B. a dog", False),
        ("letter", "The answer is B", False),
        ("letter", "1", False),
        ("yes_no", "Yes.", True),
        ("yes_no", "NO", True),
        ("yes_no", "Yes, a dog", False),
        ("yes_no", "maybe", False),
        ("one_word", "dog.", True),
        ("one_word", "a dog", False),
        ("phrase", "a small brown dog", True),
        ("phrase", "one two three four five", True),
        ("phrase", "one two three four five six", False),
        ("phrase", "a dog\na cat", False),
        ("list", "- a dog\n- a cat", True),
        ("list", "1. a dog\n\n2) a cat", True),
        ("list", "a dog, a cat", True),
        ("list", "- a dog\nand a cat", False),
        ("list", "a dog", False),
        ("list", "a dog,,", False),
    ],
)
def test_form_of_an_answer(form, answer, right):
    assert has_form(answer, form) is right


@pytest.mark.parametrize("form", ["letter", "yes_no", "one_word", "phrase", "list"])
@pytest.mark.parametrize("answer", ["", " ", "\n\t", "\u2028"])
def test_an_empty_answer_has_no_form(form, answer):
    assert not has_form(answer, form)


def test_only_questions_that_ask_are_counted():
    pairs = [("Answer in one word.", "dog"), ("Answer in one word.", "a dog"), ("Describe it.", "dog")]
    assert obedience(pairs) == Obedience(2, 1)
    assert obedience(pairs).percent == 50
    assert obedience(pairs[2:]).percent is None
    with pytest.raises(KeyError):
        has_form("x", "sonnet")
