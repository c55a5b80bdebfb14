"""General benchmarks in miniature, in the schema of their Hub data sets: rows, prompts, scorers."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from mllm_cl.data.builders import BENCHMARKS
from mllm_cl.data.images import load_image
from mllm_cl.data.rows import message_text
from mllm_cl.errors import DataError, EvaluationError
from mllm_cl.evaluation.scorers.judge import JudgedBy, llava_bench, mm_vet
from mllm_cl.evaluation.scoring import score_answers
from mllm_cl.streams import load_benchmark

PUBLIC = [name for name in BENCHMARKS if name != "quickstart-general"]
SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = Path(__file__).parents[1] / "fixtures" / "benchmarks.py"
    spec = importlib.util.spec_from_file_location("benchmark_fixtures", path)
    module = sys.modules["benchmark_fixtures"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.write_benchmarks(tmp_path_factory.mktemp("benchmarks"))


@pytest.fixture
def rows_of(folder, monkeypatch):
    monkeypatch.setenv("MLLM_CL_DATA", str(folder))
    return load_benchmark


def questions(rows):
    return [message_text(row["messages"][0]) for row in rows]


@pytest.mark.parametrize("name", PUBLIC)
def test_rows_are_whole(rows_of, name):
    rows = rows_of(name)
    assert len({row["id"] for row in rows}) == len(rows) > 1
    for row in rows:
        assert row["answers"]
        assert all(load_image(image).size for image in row["images"])
        assert [block["type"] for block in row["messages"][0]["content"]].count("image") == len(row["images"])


@pytest.mark.parametrize("name", [name for name in PUBLIC if BENCHMARKS[name].metric])
def test_the_reference_is_right_and_nothing_is_wrong(rows_of, name):
    rows, metric = rows_of(name), BENCHMARKS[name].metric
    most = 100.0 if name != "vqav2" else pytest.approx(100.0)
    assert score_answers(metric, rows, [row["answers"][0] for row in rows]).value == most
    assert score_answers(metric, rows, [""] * len(rows)).value == 0.0


@pytest.mark.parametrize(
    ("name", "question"),
    [
        ("vqav2", f"What colour is it 0?\n{SHORT}"),
        ("gqa", f"Is it left?\n{SHORT}"),
        (
            "vizwiz",
            f"what is this?\nWhen the provided information is insufficient, respond with 'Unanswerable'.\n{SHORT}",
        ),
        ("textvqa", f"what does it say?\nReference OCR token: STOP, ALL WAY\n{SHORT}"),
        ("scienceqa-img", f"Context: Look at the map.\nWhich is colder?\nA. hot\nB. cold\nC. warm\n{LETTER}"),
        ("seed-bench", f"Which animal?\nA. cat\nB. dog\nC. cow\nD. fox\n{LETTER}"),
        ("mmbench", f"Which animal?\nA. cat\nB. dog\nC. cow\n{LETTER}"),
        ("pope-random", f"Is there a dog in the image?\n{SHORT}"),
        ("mme", f"Is it blue?\n{SHORT}"),
        ("mm-vet", "What is x?"),
        ("ocrbench", "what is written in the image?"),
        ("chartqa", f"How many?\n{SHORT}"),
        ("mathvista", "Hint: Please answer.\nQuestion: What fraction is blue?"),
        ("refcoco", "Please provide the bounding box coordinate of the region this sentence describes: left dog"),
    ],
)
def test_prompts_of_llava(rows_of, name, question):
    assert questions(rows_of(name))[0] == question


def test_plain_prompts(folder):
    from mllm_cl.evaluation.benchmarks.choices import mmbench
    from mllm_cl.evaluation.benchmarks.yes_no import mme

    assert (
        questions(mmbench(prompts="plain", root=folder / "mmbench"))[3]
        == "Look closely.\nWhich animal?\nA. cat\nB. dog\nC. cow"
    )
    assert questions(mme(prompts="plain", root=folder / "mme"))[0] == "Is it blue? Please answer yes or no."
    with pytest.raises(DataError, match="did you mean 'llava_v1'"):
        mme(prompts="llava_v2", root=folder / "mme")


def test_parts_that_belong(rows_of):
    assert len(rows_of("scienceqa-img")) == 2  # one row has no image
    assert len(rows_of("seed-bench")) == 2  # videos are left out
    assert len(rows_of("refcoco")) == 3  # a question for each phrase
    assert rows_of("refcoco")[0]["answers"] == ["[0.0000, 0.2500, 0.5000, 0.5000]"]
    assert rows_of("gqa")[2]["images"][0]["bytes"] != rows_of("gqa")[0]["images"][0]["bytes"]


def test_mmbench_is_circular(rows_of):
    rows = rows_of("mmbench")
    answers = [row["answers"][0] for row in rows]
    assert score_answers("mmbench", rows, [*answers[:5], "A"]).value == 50.0


def test_only_the_reported_split(rows_of, tmp_path, monkeypatch):
    with pytest.raises(DataError, match="pope-random: has no validation rows"):
        rows_of("pope-random", "validation")
    (tmp_path / "vqav2").mkdir()
    (tmp_path / "vqav2" / "validation.jsonl").write_text('{"question": "x", "answer": "y"}\n')
    monkeypatch.setenv("MLLM_CL_DATA", str(tmp_path))
    with pytest.raises(DataError, match="vqav2: the rows have no answers, image"):
        rows_of("vqav2")


def test_a_judge_is_brought_along(rows_of):
    rows = list(rows_of("mm-vet"))
    asked = []

    def judge(*, question, reference, answer, row):
        asked.append((question, reference, answer))
        return 0.5 if answer == "-1" else 0.0

    judged_by = JudgedBy(judge, "a-model", "Grade from 0 to 1.")
    found = mm_vet(rows, {rows[0]["id"]: "-1", rows[1]["id"]: "no"}, judged_by)
    assert found.score == 25.0
    assert found.groups == {"ocr": 25.0, "math": 25.0}
    assert found.by == judged_by.identity
    assert found.by.startswith("a-model/")
    assert asked[0] == ("What is x?", "-1<AND>-5", "-1")
    with pytest.raises(EvaluationError, match="has no answer to judge"):
        mm_vet(rows, {}, judged_by)
    with pytest.raises(EvaluationError, match=r"returned 7.*\n  expected: 1 number\(s\) from 0 to 1"):
        mm_vet(rows, {row["id"]: "" for row in rows}, JudgedBy(lambda **given: 7, "m", "p"))


def test_llava_bench_is_relative_to_the_reference(rows_of):
    rows = list(rows_of("llava-bench"))
    judged_by = JudgedBy(lambda *, question, reference, answer, row: (8.0, 4.0 if answer else 2.0), "m", "p")
    found = llava_bench(rows, {rows[0]["id"]: "blue", rows[1]["id"]: ""}, judged_by)
    assert found.score == 100 * 3.0 / 8.0
    assert found.groups == {"conv": 50.0, "detail": 25.0}
