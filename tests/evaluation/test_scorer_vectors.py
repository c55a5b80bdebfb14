"""Scorers against reference vectors, properties that hold for all of them, and input that nobody expects.

`scorer_vectors.json` holds half of the cases that were made by running the peers' own code (see its `source` fields).
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mllm_cl.errors import EvaluationError
from mllm_cl.evaluation import SCORERS, find_scorer, get_scorer
from mllm_cl.evaluation.scorers import BENCHMARK_SCORERS, PROFILES, find_metric, scorer_identity

CONTENT = json.loads((Path(__file__).parent / "scorer_vectors.json").read_text(encoding="utf-8"))
VECTORS = CONTENT["vectors"]
NO_FIELDS = (
    "id",
    "metric",
    "prediction",
    "references",
    "expected",
    "source",
    "note",
    "kind",
    "tokenised",
    "normalised",
)
ROWS = [name for name, entry in SCORERS.items() if entry.kind == "score"]
SETS = [name for name, entry in SCORERS.items() if entry.kind == "aggregate"]
TEXTS = [name for name, entry in SCORERS.items() if entry.kind not in ("score", "aggregate")]
OURS = [name for name in ROWS if SCORERS[name].profile == "strict"]

STRANGE = (
    *("", " ", ".", "%", "nan", "inf", "-inf", "1e999", "1" * 400, "[1e999, 0, 1, 1]", "[nan,nan,nan,nan]", "()", "A."),
    *(
        "[0.1, 0.2, 0.5, 0.6]",
        "0 0 0 0",
        "yes",
        "no",
        "None",
        "The answer is ",
        "(",
        "\\",
        "\u2028",
        "ＡＢ",
        "½",
        "\x00",
    ),
    *("[5,5,1,1]", "[0,0,0,0]", "1,000,000", "$5", "5 %", "--", "\ud83d", "İ", "ß" * 5),
)
ODD = st.one_of(st.text(max_size=30), st.sampled_from(STRANGE))
FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "choices": st.one_of(st.none(), st.lists(ODD, max_size=5), st.dictionaries(st.sampled_from("ABCD"), ODD), ODD),
        "question_type": st.sampled_from(["multi_choice", "free_form", None]),
        "answer_type": st.sampled_from(["integer", "float", "list", "text", None]),
        "precision": st.sampled_from([None, 0, 1, 2.0, -3, float("nan"), "x", 1e9]),
        "dataset": st.sampled_from(["HME100k", "IIIT5K", None]),
        "category": ODD,
        "image": ODD,
        "question": st.sampled_from(["Which states are red?", "", None]),
        "image_size": st.sampled_from([None, [640, 480], [], [0, 0], "640x480", ["a", None]]),
        "box_scale": st.sampled_from([1, 100, 1000, 0, "x", None, float("inf")]),
    },
)


def close(expected, got) -> bool:
    if isinstance(expected, dict):
        return all(got[key] is None or close(value, got[key]) for key, value in expected.items())
    if isinstance(expected, str):
        return got == expected
    return math.isclose(got, expected, abs_tol=CONTENT["tolerance"])


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["id"])
def test_vector(vector):
    fields = {key: value for key, value in vector.items() if key not in NO_FIELDS}
    got = get_scorer(vector["metric"])(vector["prediction"], vector["references"], **fields)
    assert close(vector["expected"], got), got


def test_every_metric_of_the_vectors_is_here():
    assert len({vector["metric"] for vector in VECTORS}) == 40
    assert {vector["metric"] for vector in VECTORS} <= set(SCORERS)


@pytest.mark.parametrize("name", ROWS)
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(prediction=ODD, references=st.lists(ODD, min_size=1, max_size=12), fields=FIELDS)
def test_no_input_makes_a_scorer_raise_or_leave_its_range(name, prediction, references, fields):
    score = get_scorer(name)(prediction, references, **fields)
    assert isinstance(score, float)
    assert 0.0 <= score <= 1.0


@pytest.mark.parametrize("name", TEXTS)
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(prediction=ODD, fields=FIELDS)
def test_reading_an_answer_never_raises(name, prediction, fields):
    assert isinstance(get_scorer(name)(prediction, None, **fields), str)


@pytest.mark.parametrize("name", SETS)
@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    rows=st.lists(
        st.tuples(ODD, st.lists(ODD, min_size=1, max_size=3), st.sampled_from(["color", "count", ""])), max_size=6
    ),
    choices=st.one_of(st.none(), st.lists(ODD, max_size=4)),
)
def test_no_set_makes_an_aggregate_raise_or_leave_its_range(name, rows, choices):
    predictions, references = [row[0] for row in rows], [row[1] for row in rows]
    images = [index // 2 for index in range(len(rows))]
    fields = {"question_id": images, "category": [row[2] for row in rows], "choices": choices, "index": images}
    found = get_scorer(name)(predictions, references, **fields)
    values = found.values() if isinstance(found, dict) else [found]
    assert all(value is None or (0 <= value <= 2800 and math.isfinite(value)) for value in values)


@pytest.mark.parametrize("name", OURS)
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(references=st.lists(ODD, min_size=1, max_size=12), fields=FIELDS, blanks=st.sampled_from(["", " ", "\n\t "]))
def test_an_empty_answer_is_never_right(name, references, fields, blanks):
    if name == "exact_match_strict" and blanks in references and blanks:
        return  # blanks are characters to it
    assert get_scorer(name)(blanks, references, **fields) == 0.0
    assert get_scorer(name)("", [*references, ""], **fields) == 0.0


@pytest.mark.parametrize("name", ["pope_strict", "mme_strict", "mmbench_strict", "captions", "cider"])
def test_a_set_of_empty_answers_scores_nothing(name):
    entry = SCORERS[name]
    fields = {"question_id": ["i", "i"], "category": ["color", "color"], "choices": ["a", "b"]}
    found = entry.scorer(["", ""], [["yes"], ["no"]], **fields)
    primary = found if isinstance(found, float) else found[entry.scorer.primary]
    assert primary == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("name", ["vqa_accuracy", "contains_words", "exact_match", "yes_no", "anls_strict"])
def test_ours_are_not_lenient(name):
    assert get_scorer(name)("yesterday", ["yes"]) < 1.0
    assert get_scorer(name)("yes", ["yes"]) == 1.0


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(
    st.text(alphabet="abc 12.,'s-", max_size=12),
    st.lists(st.text(alphabet="abc 12.,", max_size=6), min_size=10, max_size=10),
)
def test_order_of_annotators_does_not_matter(prediction, references):
    for name in ("vqa_accuracy", "vqav2_official", "vqav2_lmms_eval", "textvqa_m4c", "vqa_score_vlmevalkit"):
        scorer = get_scorer(name)
        assert scorer(prediction, references) == pytest.approx(scorer(prediction, references[::-1]))


@pytest.mark.parametrize(("matches", "score"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_vqa_accuracy_counts_the_other_annotators(matches, score):
    references = ["red"] * matches + ["blue"] * (10 - matches)
    for name in ("vqa_accuracy", "vqav2_official", "textvqa_m4c"):
        assert get_scorer(name)("red", references) == pytest.approx(score)


@pytest.mark.parametrize(
    ("prediction", "score"),
    [
        ("[0.1, 0.2, 0.5, 0.6]", 1),
        ("(0.1, 0.2, 0.5, 0.6)", 1),
        ("The box is <.1 .2 .5 .6>", 1),
        ("0.1 0.2 0.5", 0),
        ("[0.1, 0.2, 0.5, 0.6] or [0, 0, 1, 1]", 0),  # two boxes are no answer
        ("[0.5, 0.6, 0.1, 0.2]", 0),
        ("[10, 20, 50, 60]", 0),  # the scale is declared, never guessed
    ],
)
def test_boxes_in_any_bracket(prediction, score):
    assert get_scorer("box_iou")(prediction, [[0.1, 0.2, 0.5, 0.6]]) == pytest.approx(score)
    assert get_scorer("box_iou")("[10, 20, 50, 60]", ["0.1 0.2 0.5 0.6"], box_scale=100) == pytest.approx(1)


@pytest.mark.parametrize(
    ("scorer", "prediction", "reference", "score"),
    [
        ("relaxed_accuracy", "1,000", "1000", 1),
        ("relaxed_accuracy", "$10", "10", 1),
        ("relaxed_accuracy", "5%", "5 %", 1),
        ("relaxed_accuracy", "0.04", "0", 0),
        ("relaxed_accuracy", "105", "100", 1),
        ("relaxed_accuracy", "106", "100", 0),
        ("relaxed_accuracy", "10 years", "10", 0),
        ("contains_words", "It is on the left side.", "left", 1),
        ("contains_words", "left", "on the left", 0),
        ("ocr_contains", "the word is C E N T R E", "centre", 1),
        ("yes_no", "Yes, there is.", "yes", 1),
        ("yes_no", "There is a dog", "yes", 0),
        ("yes_no", "nope", "no", 0),
        ("anls_strict", "hello world", "Hello  World", 1),
        ("anls_strict", "abcd", "wxyz", 0),
        ("rouge_l", "the cat sat", "the cat sat", 1),
    ],
)
def test_ours(scorer, prediction, reference, score):
    assert get_scorer(scorer)(prediction, [reference]) == pytest.approx(score)


@pytest.mark.parametrize(
    ("prediction", "letter"),
    [
        *((text, 1) for text in ("B", "b", "(B)", "B.", "B. a blue bus", "a blue bus", "The answer is B.", "**B**")),
        *((text, 0) for text in ("B. a red car", "A or B", "A bird sits on a tree", "", "E", "blue", "because")),
    ],
)
def test_multiple_choice(prediction, letter):
    choices = ["a red car", "a blue bus", "a green tree"]
    assert get_scorer("multiple_choice")(prediction, ["B"], choices=choices) == letter
    assert get_scorer("multiple_choice")(prediction, ["a blue bus"], choices=choices) == letter


def test_mathvista_without_a_judge():
    scorer = get_scorer("mathvista")
    options = {"choices": ["3/11", "8/11"], "question_type": "multi_choice", "answer_type": "text"}
    assert scorer("(B)", ["8/11"], **options) == scorer("8/11", ["8/11"], **options) == 1.0
    assert scorer("8/12", ["8/11"], **options) == 0.0
    number = {"question_type": "free_form", "answer_type": "integer"}
    assert scorer("It is 14.", ["14"], **number) == scorer("10 + 4 = 14", ["14"], **number) == 1.0
    assert scorer("14.7", ["14"], **number) == 0.0
    assert scorer("1.449", ["1.45"], question_type="free_form", answer_type="float", precision=2.0) == 1.0


def test_a_caption_set_equals_what_coco_says_without_java(monkeypatch):
    monkeypatch.setattr("mllm_cl.evaluation.scorers.meteor.meteor_available", lambda: False)
    vector = next(vector for vector in VECTORS if vector["metric"] == "coco_caption")
    found = get_scorer("coco_caption")(vector["prediction"], vector["references"])
    assert found["METEOR"] is None  # missing, not 0
    assert found["average_percent"] is None
    assert found["CIDEr"] == pytest.approx(vector["expected"]["CIDEr"], abs=1e-6)


@pytest.mark.parametrize("vector", [v for v in VECTORS if "tokenised" in v], ids=lambda vector: vector["id"])
def test_captions_are_tokenised_as_by_stanford(vector):
    from mllm_cl.evaluation.scorers.caption_text import tokenise

    assert [" ".join(tokenise(text)) for text in vector["prediction"]] == vector["tokenised"]["predictions"]
    for texts, expected in zip(vector["references"], vector["tokenised"]["references"]):
        assert [" ".join(tokenise(text)) for text in texts] == expected


@pytest.mark.parametrize(
    ("caption", "words"),
    [  # what `PTBTokenizer -preserveLines -lowerCase` of CoreNLP 3.4.1 makes of them, punctuation dropped
        ("A man can't ride; they've gone.", "a man ca n't ride they 've gone"),
        ("A $5 bill and 50% off #1 item & more.", "a $ 5 bill and 50 % off # 1 item & more"),
        ("The U.S. flag at 10:30 a.m. in the park.", "the u.s. flag at 10:30 a.m. in the park"),
        ("I cannot, I'm gonna go.", "i can not i 'm gon na go"),
        ("A black-and-white photo (old) of [a] cat", "a black-and-white photo -lrb- old -rrb- of -lsb- a -rsb- cat"),
        ("1,000 people and 3.5 cars, 1/2 pizza.", "1,000 people and 3.5 cars 1/2 pizza"),
        ("and/or left/right", "and/or left/right"),
        ("A woman\u2019s hat \u2014 red.", "a woman 's hat red"),
        ('The man said, "Hello!"', "the man said hello"),
        ("Mr. Smith vs. Dr. Who, etc.", "mr. smith vs. dr. who etc."),
        ("Hello!!! What??", "hello !!! what ??"),
        ("rock 'n' roll band, AT&T", "rock 'n' roll band at&t"),
    ],
)
def test_tokeniser(caption, words):
    from mllm_cl.evaluation.scorers.caption_text import tokenise

    assert " ".join(tokenise(caption)) == words


def test_profiles():
    for benchmark, own in BENCHMARK_SCORERS.items():
        assert next(iter(own)) == "strict"
        for profile, name in own.items():
            assert profile in PROFILES
            assert find_scorer(f"{benchmark}:{profile}")[0] == find_scorer(benchmark, profile)[0] == name
    assert find_scorer("pope")[1].profile == "strict"
    assert {entry.profile for entry in SCORERS.values()} <= set(PROFILES)
    with pytest.raises(EvaluationError, match=r"pope has no profile 'lava'.\n  expected: did you mean 'llava'"):
        get_scorer("pope:lava")
    with pytest.raises(EvaluationError, match="has the profile 'llava', not 'coin'"):
        get_scorer("gqa_llava", profile="coin")


def test_a_metric_scores():
    assert find_metric("gqa:llava")[0] == "gqa_llava"
    with pytest.raises(EvaluationError, match="reads an answer but does not score it"):
        find_metric("evalai_processor")
    assert scorer_identity("gqa:llava") == "gqa_llava/llava/1"
    assert scorer_identity("caption") == "captions/strict/2/ptb-regex/2"
    assert scorer_identity("exact_match") != scorer_identity("exact_match_strict")


def test_a_profile_changes_the_verdict():
    empty = {name: get_scorer(f"imagenet:{name}")("", ["goldfish"]) for name in ("strict", "coin")}
    assert empty == {"strict": 0.0, "coin": 1.0}
    box = "[0.1, 0.2, 0.5, 0.6]"
    assert [get_scorer(f"grounding:{name}")(box, [box], image_size=[640, 480]) for name in ("strict", "coin")] == [
        1.0,
        0.0,
    ]
