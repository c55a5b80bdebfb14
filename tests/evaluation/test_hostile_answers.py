"""Answers that scorers of our own are easily wrong about, with verdicts from the definitions."""

from __future__ import annotations

import pytest

from mllm_cl.evaluation.scorers import get_scorer
from mllm_cl.evaluation.scorers.caption_text import tokenise

CHOICES = ["a cat", "a dog", "a bird"]
BOX = [[0.1, 0.2, 0.5, 0.6]]


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        *[(text, 1) for text in ("The answer is (B).", "b", "**B**", "[B]", "Option B", "B) a dog", "A dog.", "B\n")],
        *[
            (text, 1)
            for text in ("The answer is: B", "Answer: (B)", "The correct answer is (B) a dog", "B, a dog", "Ｂ")
        ],
        *[(text, 0) for text in ("The answer is (B) a cat", "The answer is B because A is a cat", "A, B")],
        *[
            (text, 0)
            for text in ("A and B", "Both", "not B", "I think it is B", "The answer is not B", "B. a cat", "BB", "")
        ],
        *[(text, 0) for text in ("The answer is B or C", "A bird sits", "D", " ")],
    ],
)
def test_letters(answer: str, right: float) -> None:
    assert get_scorer("multiple_choice")(answer, ["B"], choices=CHOICES) == right


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        *[
            ("5%", "5", 0),
            ("5%", "0.05", 1),
            ("5 %", "5%", 1),
            ("-5", "5", 0),
            ("\u22125", "-5", 1),
            ("1e3", "1000", 1),
        ],
        *[("1.05", "1", 1), ("0.95", "1", 1), ("1.0500001", "1", 0), ("0.01", "0", 0), ("0", "0", 1), ("", "0", 0)],
        *[("$1,000.50", "1000.5", 1), ("-$5", "-5", 1), ("€12", "12", 1), ("1,00", "100", 0), ("10 apples", "10", 0)],
    ],
)
def test_relaxed_numbers(answer: str, reference: str, right: float) -> None:
    assert get_scorer("relaxed_accuracy")(answer, [reference]) == right


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        *[("Yes, there is", "yes", 1), ("**Yes**", "yes", 1), ("NO", "no", 1), ("yes or maybe", "yes", 1)],
        *[
            ("yesterday", "yes", 0),
            ("none", "no", 0),
            ("no-one", "no", 0),
            ("yes/no", "yes", 0),
            ("Yes or no", "yes", 0),
        ],
    ],
)
def test_yes_no(answer: str, reference: str, right: float) -> None:
    assert get_scorer("yes_no")(answer, [reference]) == right


@pytest.mark.parametrize(
    ("answer", "scale", "right"),
    [
        *[
            ("(0.1,0.2,0.5,0.6)", 1, 1),
            ("{.1;.2;.5;.6}", 1, 1),
            ("[100,200,500,600]", 1000, 1),
            ("[10 20 50 60]", 100, 1),
        ],
        *[("[100,200,500,600]", 1, 0), ("[0.5,0.6,0.1,0.2]", 1, 0), ("[0.1,0.2,0.5,0.6] or [0,0,1,1]", 1, 0)],
        *[("[1e400,0,1,1]", 1, 0), ("x1=0.1 y1=0.2 x2=0.5 y2=0.6", 1, 0), ("", 1, 0)],
    ],
)
def test_boxes(answer: str, scale: float, right: float) -> None:
    assert get_scorer("box_accuracy@0.5")(answer, BOX, box_scale=scale) == right


@pytest.mark.parametrize(
    ("answer", "references", "value"),
    [
        *[
            ("cat", ["cat"] * count + ["dog"] * (10 - count), value)
            for count, value in enumerate((0, 0.3, 0.6, 0.9, 1))
        ],
        *[("the", ["the"] * 10, 0), ("isnt", ["isn't"] * 10, 1), ("5.0", ["5"] * 10, 0), ("eleven", ["11"] * 10, 0)],
        *[("1,000", ["1000"] * 10, 1), ("blue-green", ["blue green"] * 10, 1), ("", [""] * 10, 0)],
    ],
)
def test_vqa(answer: str, references: list[str], value: float) -> None:
    assert get_scorer("vqa_accuracy")(answer, references) == pytest.approx(value)


def test_halves_and_repetitions() -> None:
    mme, row = get_scorer("mme_strict"), {"question_id": ["a", "a", "b"], "category": ["count"] * 3}
    assert mme(["yes", "no", "yes"], [["yes"], ["no"], ["yes"]], **row)["count"] == 150.0  # b lacks its second question
    captions = get_scorer("captions")(["a dog runs"] * 2, [["a dog runs"] * 5] * 2)
    assert captions["CIDEr"] == 0.0  # in every image's references: no word says anything about an image
    assert captions["ROUGE_L"] == 1.0


@pytest.mark.parametrize(
    ("answer", "reference", "precision", "right"),
    [
        *[("1e2", "100", None, 1), ("1.6", "2", None, 1), ("1.449", "1.45", 2, 1), ("1.449", "1.45", None, 0)],
        *[("inf", "inf", None, 0), ("x", "None", 1, 1), ("x", "0", 1, 0)],
    ],
)
def test_mathvista_as_lmms_eval(answer: str, reference: str, precision: object, right: float) -> None:
    fields = {"question_type": "free_form", "answer_type": "float", "precision": precision}
    assert get_scorer("mathvista_normalise")(answer, [reference], **fields) == right


@pytest.mark.parametrize(
    ("caption", "words"),
    [  # from CoreNLP 3.4.1 with `-lowerCase`, as pycocoevalcap 1.2 calls it, punctuation dropped
        ("It is vitamin C.", "it is vitamin c."),
        ("Plan b. The dog", "plan b the dog"),
        ("Plan b. Dogs run", "plan b. dogs run"),
        ("J. Smith and I.", "j. smith and i."),
        ("a type-a.", "a type-a"),
        ("a cat..", "a cat"),
        ("a cat .....", "a cat"),
        ("Mr.. 3..5", "mr. 3 .5"),
        ("a 5'10\" man, 5¢, ½ cup", "a 5 10 man 5 cents 1/2 cup"),
        ("@user C++ <tag> 'cause", "@user c++ <tag> 'cause"),
        ("a cat \U0001f600 here", "a cat here"),
    ],
)
def test_captions_with_odd_marks(caption: str, words: str) -> None:
    assert " ".join(tokenise(caption)) == words


def test_an_empty_caption_equals_an_empty_reference_for_coco_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mllm_cl.evaluation.scorers.meteor.meteor_available", lambda: False)
    given = (["", "a dog"], [[".", "a cat"], ["a dog"]])
    assert get_scorer("coco_caption")(*given)["ROUGE_L"] == 1.0
    assert get_scorer("captions")(*given)["ROUGE_L"] == 0.5


@pytest.mark.parametrize(
    ("answer", "right"),
    [("(B)", 1), ("B. 8/11", 1), ("The answer is B", 1), ("8/11", 1), ("B. 3/11", 0), ("C", 0), ("", 0)],
)
def test_mathvista_options(answer: str, right: float) -> None:
    fields = {"question_type": "multi_choice", "choices": ["3/11", "8/11"]}
    assert get_scorer("mathvista_answer")(answer, ["8/11"], **fields) == right


def test_mathvista_without_a_precision_compares_what_was_said() -> None:
    fields = {"question_type": "free_form", "answer_type": "float", "precision": None}
    verdicts = [get_scorer("mathvista_answer")(said, ["0.5"], **fields) for said in ("It is 0.50.", "0.51", "half")]
    assert verdicts == [1.0, 0.0, 0.0]


def test_boxes_may_have_exponents() -> None:
    """Python writes 0.00001 as 1e-05, in references that are text too."""
    assert get_scorer("box_iou")("[0, 1e-05, 5e-1, 1]", [[0, 0.00001, 0.5, 1]]) == pytest.approx(1)
    reference = str([0.0, 0.00001, 0.5, 1.0])
    assert get_scorer("coin_grounding_acc@0.5")("[[ 0.0, 0.0, 0.5, 1.0 ]]", [reference], image_size=[9, 9]) == 1.0
