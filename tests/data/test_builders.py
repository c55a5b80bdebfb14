"""Every builder of a public benchmark on a small folder in the official layout."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mllm_cl.data.builders import STREAMS, find_family
from mllm_cl.data.builders.fcit import BETAS, STAGES, client_rows, partition
from mllm_cl.data.images import load_image
from mllm_cl.data.problems import RowError
from mllm_cl.data.rows import assistant_message, message_text, user_message
from mllm_cl.data.validate import Checks
from mllm_cl.errors import DataError, StreamError
from mllm_cl.evaluation.scorers import find_metric, get_scorer
from mllm_cl.streams import Stream, arrange, load_stream, validate_stream

FolderOf = Callable[[str], Path]
LETTER = "Answer with the option's letter from the given choices directly."

# name: (official order, metric of each task; `folder` stands for the fixture's folder)
OFFICIAL: dict[str, dict[str, str]] = {
    "coin": {
        "ScienceQA": "scienceqa_llava", "TextVQA": "textvqa_m4c", "ImageNet": "coin_imagenet", "GQA": "gqa_llava",
        "VizWiz": "coin_exact_match", "Grounding": "coin_grounding_acc@0.5", "VQAv2": "coin_exact_match",
        "OCR-VQA": "coin_ocrvqa",
    },
    "ucit": {
        "ImageNet-R": "coin_exact_match", "ArxivQA": "coin_exact_match", "VizWiz": "ucit_caption",
        "IconQA": "coin_exact_match", "CLEVR-Math": "coin_exact_match", "Flickr30k": "ucit_caption",
    },
    "mllm-dcl": {
        "RS": "mllmcl_contains_word", "Med": "mllmcl_pathvqa", "AD": "mllmcl_contains_word", "Sci": "mllmcl_sci",
        "Fin": "mllmcl_fin",
    },
    "mllm-acl": {
        "OCR": "ocrbench_mcitlib", "Math": "mathvista_answer", "VP": "mllmcl_vp", "APP": "mllmcl_contains_word",
    },
    "cvit": {
        "ScienceQA": "scienceqa_llava", "TextVQA": "textvqa_m4c", "Flickr30k": "cider",
        "ImageNet": "coin_imagenet", "GQA": "gqa_llava", "VQAv2": "coin_exact_match",
    },
    "fcit-task": {
        "ImageNet-R": "coin_exact_match", "ArxivQA": "coin_exact_match", "IconQA": "coin_exact_match",
        "CLEVR-Math": "coin_exact_match", "OCR-VQA": "coin_exact_match", "Flickr30k": "ucit_caption",
        "FigureQA": "fcit_contained", "super-CLEVR": "coin_exact_match",
    },
    "fcit-capability": {
        "AOKVQA": "coin_exact_match", "IconQA": "coin_exact_match", "Grounding": "coin_grounding_acc@0.5",
        "ImageNet-R": "coin_exact_match", "Flickr30k": "ucit_caption", "OCR-VQA": "coin_exact_match",
        "CLEVR-Math": "coin_exact_match", "super-CLEVR": "coin_exact_match", "TabMWP": "coin_exact_match",
        "ArxivQA": "coin_exact_match", "FigureQA": "fcit_contained", "DVQA": "fcit_contained",
    },
    "llava-665k": dict.fromkeys(("coco", "ocr_vqa", "textvqa", "gqa", "vg"), "rouge_l"),
    "llava-c": dict.fromkeys(("IconQA", "super-CLEVR", "CLEVR-Math"), "coin_exact_match"),
    "continual-next": {
        "ArxivQA": "exact_match", "GeoChat": "contains_words", "IconQA": "exact_match",
        "CLEVR-Math": "exact_match", "CodeQA": "rouge_l", "ImageNet": "contains_words",
        "Flickr30k": "cider", "DocVQA": "contains_words", "TextVQA": "contains_words",
        "MathQA": "exact_match", "ChartQA": "contains_words", "PathVQA": "contains_words",
        "Grounding": "box_accuracy@0.5", "ScienceQA": "exact_match", "WikiQA": "rouge_l",
    },
    "trace": {
        "C-STANCE": "exact_match_strict", "FOMC": "exact_match_strict", "MeetingBank": "rouge_l",
        "Py150": "edit_similarity", "ScienceQA": "first_letter", "NumGLUE-cm": "exact_match_strict",
        "NumGLUE-ds": "exact_match_strict", "20Minuten": "sari",
    },
    "aide": dict.fromkeys(("tcr", "vbr", "der", "dbr"), "macro_f1"),
    "mipd": dict.fromkeys(("count", "nearest", "side", "light", "road"), "exact_match"),
    "interhand": dict.fromkeys(("handedness", "gesture", "bend", "touch", "relation"), "exact_match"),
}  # fmt: skip

COUNTS = {  # task -> train, validation, test rows; 6, 0, 4 where nothing is said
    "llava-665k": {
        "coco": (10, 0, 2), "ocr_vqa": (10, 0, 2), "textvqa": (7, 0, 5), "gqa": (9, 0, 3), "vg": (10, 0, 2),
    },
    "aide": dict.fromkeys(("tcr", "vbr", "der", "dbr"), (5, 2, 2)),
    "mipd": {**dict.fromkeys(("count", "nearest", "side"), (3, 1, 2)), "light": (3, 1, 1), "road": (3, 1, 1)},
    "interhand": {
        "handedness": (8, 8, 8), "gesture": (4, 4, 4), "bend": (5, 5, 5), "touch": (3, 3, 3), "relation": (3, 3, 3),
    },
}  # fmt: skip


def asked(name: str, question: str, answers: list[str], *images: Any, raw: dict | None = None) -> dict[str, Any]:
    row = {"id": name, "messages": [user_message(question, len(images))], "images": list(images), "answers": answers}
    return {**(raw or {}), **row}


def raw(number: int, answer: Any, **fields: Any) -> dict[str, Any]:
    return {"question_id": number, "answer": answer, **fields}


OPTIONS = f"Number 1?\nA. wood\nB. iron\nC. paper\n{LETTER}"
# name: task, split, position, the row in full
ROWS: dict[str, tuple[str, str, int, dict[str, Any]]] = {
    "coin": (
        "ScienceQA", "test", 1,
        asked(
            "1", OPTIONS, ["B"], "folder/ScienceQA/images/test_1.png",
            raw=raw(1, "B", choices=["wood", "iron", "paper"]),
        ),
    ),
    "ucit": (
        "VizWiz", "test", 1,
        asked(
            "1", "What is it? (1)", ["A green square.", "another view of picture 1"],
            "folder/datasets/VizWiz/train/test_1.png", raw=raw(1, "A green square."),
        ),
    ),
    "mllm-dcl": (
        "Sci", "test", 1,
        asked(
            "1", "What is it? (1)", ["Ohio, Utah"], "folder/Sci/images/test_1.png",
            raw=raw(1, "Ohio, Utah", question="What is it? (1)", image="folder/Sci/images/test_1.png"),
        ),
    ),
    "mllm-acl": (
        "OCR", "test", 1,
        asked(
            "1", "What is it? (1)", ["Hotel"], "folder/OCR_test/images/test_1.png",
            raw=raw(1, "Hotel", category="Regular Text Recognition"),
        ),
    ),
    "cvit": (
        "Flickr30k", "test", 1,
        asked(
            "1", "What is it? (1)", ["A green square.", "a picture"], "folder/dataset/Flickr30k/images/test_1.png",
            raw=raw(1, ["A green square.", "a picture"], answer_form="caption"),
        ),
    ),
    "fcit-task": (
        "ArxivQA", "test", 1,
        asked("1", "What is it? (1)", ["D"], "folder/datasets/ArxivQA/images/test_1.png", raw=raw(1, "D")),
    ),
    "fcit-capability": (
        "AOKVQA", "train", 0,
        {
            "id": "train-0",
            "messages": [user_message("What is it? (0)", 1), assistant_message("A")],
            "images": ["folder/datasets/AOKVQA/images/train_0.png"],
        },
    ),
    "llava-665k": (
        "coco", "test", 1,
        {
            "id": "r30",
            "messages": [
                user_message("What is it?", 1), assistant_message("A square."), user_message("And?"),
                assistant_message("No 30."),
            ],
            "images": ["folder/coco/train2017/15.jpg"],
            "answers": ["No 30."],
        },
    ),
    "llava-c": (
        "super-CLEVR", "test", 0,
        asked("0", "What is it? (0)", ["truck"], "folder/datasets/super-CLEVR/images/test_0.png", raw=raw(0, "truck")),
    ),
    "continual-next": (
        "CodeQA", "train", 1,
        {
            "id": "CodeQA/train/1",
            "messages": [user_message("What is it? (1)"), assistant_message("It sorts.")],
            "images": [],
        },
    ),
    "trace": ("FOMC", "test", 1, asked("FOMC/test/1", "Question 1:", ["hawkish"], raw={"answer": "hawkish"})),
    "aide": (
        "der", "test", 1,
        asked(
            "0007/der",
            "Which emotion does the driver show?\n"
            "Answer with one of: Anxiety, Peace, Weariness, Happiness, Anger.",
            ["Peace"],
            "folder/AIDE_Dataset/0007/incarframes/23.jpg",
            {"path": "folder/AIDE_Dataset/0007/incarframes/23.jpg", "crop": (30.0, 4.0, 42.0, 16.0)},
            {"path": "folder/AIDE_Dataset/0007/incarframes/23.jpg", "crop": (10.0, 2.0, 50.0, 34.0)},
            raw={"choices": ["Anxiety", "Peace", "Weariness", "Happiness", "Anger"], "label": "Peace"},
        ),
    ),
    "mipd": (
        "road", "test", 0,
        asked(
            "000004/road",
            "Sensors: light 70000 lux; vibration um FL 3 FR 3 RL 100 RR 3.\n"
            "How is the road: smooth (vibration below 25 um), rough, or a speed bump (above 100 um)?",
            ["rough"],
            "folder/training/image_2/000004.png",
        ),
    ),
    "interhand": (
        "gesture", "test", 0,
        asked(
            "test/0/0007_thumbup_normal/400262/0/gesture",
            "Which gesture does the hand show? Answer with its name.",
            ["thumbup"],
            {
                "path": "folder/images/test/Capture0/0007_thumbup_normal/cam400262/image0000.jpg",
                "crop": (1.0, -1.0, 29.0, 41.0),
            },
        ),
    ),
}  # fmt: skip


def load(name: str, root: Path, **options: Any) -> Stream:
    return load_stream(name, root=root, options={"test_share": 0.2} if name == "llava-665k" else options)


def without(root: Path, value: Any) -> Any:
    return json.loads(json.dumps(value).replace(str(root), "folder"))


def test_every_metric_is_a_scorer() -> None:
    for name in OFFICIAL:
        family = find_family(name)
        assert family is not None
        corrected = {task.corrected for task in family.tasks if task.corrected}
        for metric in {*OFFICIAL[name].values(), *corrected}:
            get_scorer(metric)


def test_every_public_benchmark_is_tested() -> None:
    public = {name for name, entry in STREAMS.items() if entry.family}
    assert public == set(OFFICIAL) == set(ROWS)


@pytest.mark.parametrize("name", list(OFFICIAL))
def test_order_metrics_and_counts(name: str, public_folder: FolderOf) -> None:
    stream = load(name, public_folder(name))
    assert {task.name: task.metric for task in stream} == OFFICIAL[name]
    assert [task.name for task in stream] == list(OFFICIAL[name])
    counts = {task.name: (len(task.train), len(task.validation), len(task.test)) for task in stream}
    assert counts == {task: COUNTS.get(name, {}).get(task, (6, 0, 4)) for task in OFFICIAL[name]}


@pytest.mark.parametrize("name", list(OFFICIAL))
def test_one_row_in_full(name: str, public_folder: FolderOf) -> None:
    task, split, position, expected = ROWS[name]
    found = load(name, public_folder(name))[task]
    row = {"train": found.train, "test": found.test}[split][position]
    assert without(public_folder(name), row) == json.loads(json.dumps(expected))


@pytest.mark.parametrize("name", list(OFFICIAL))
def test_the_fixture_is_valid_and_every_image_opens(name: str, public_folder: FolderOf) -> None:
    report = validate_stream(load(name, public_folder(name)), checks=Checks(images="header", workers=1))
    assert report.errors == []
    assert {problem.kind for problem in report.warnings} <= {"row_count"}


@pytest.mark.parametrize("name", list(OFFICIAL))
def test_the_card_says_what_a_person_must_know(name: str) -> None:
    family = find_family(name)
    assert family is not None
    card = family.card()
    assert family.link.startswith("https://")
    for part in (family.link, family.licence, family.citation, family.script, "layout:", *family.gaps):
        assert part in card
    assert (Path(__file__).parents[2] / family.script.split()[0]).is_file(), family.script


@pytest.mark.parametrize("name", list(OFFICIAL))
def test_a_missing_folder_and_missing_files_are_named(name: str, public_folder: FolderOf, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist") as caught:
        load(name, tmp_path / "nowhere")
    assert "to fix: download it" in str(caught.value)
    with pytest.raises(DataError):
        load(name, tmp_path)


def test_other_measures_of_the_same_answers(public_folder: FolderOf) -> None:
    cvit = load("cvit", public_folder("cvit"), measure="format")
    assert {task.metric for task in cvit} == {"mif"}
    forms = {task.name: task.test[0]["answer_form"] for task in cvit}  # type: ignore[typeddict-item]
    assert forms == dict.fromkeys(forms, "short") | {"ScienceQA": "letter", "Flickr30k": "caption"}
    assert {task.metric for task in load("aide", public_folder("aide"), measure="accuracy")} == {"exact_match"}
    for name in ("cvit", "aide"):
        with pytest.raises(DataError, match="measure"):
            load(name, public_folder(name), measure="taste")


def test_all_missing_files_are_named_at_once(public_folder: FolderOf, tmp_path: Path) -> None:
    root = Path(shutil.copytree(public_folder("ucit"), tmp_path / "ucit"))
    (root / "IconQA/train.json").unlink()
    (root / "CLEVR-Math/test_3000.json").unlink()
    with pytest.raises(DataError) as caught:
        load("ucit", root)
    message = str(caught.value)
    assert "missing: IconQA/train.json, CLEVR-Math/test_3000.json or CLEVR-Math/test.json." in message
    assert "python data_scripts/ucit.py" in message


def change(root: Path, file: str, number: int, **fields: Any) -> None:
    rows = json.loads((root / file).read_text())
    rows[number] |= fields
    (root / file).write_text(json.dumps(rows))


WRONG = [  # benchmark, file, change of row 1, task, part of the message
    ("ucit", "ArxivQA/test_3000.json", {"answer": "the second"}, "ArxivQA", "the answer is 'the second'"),
    ("ucit", "CLEVR-Math/test_3000.json", {"answer": "three"}, "CLEVR-Math", "a whole number"),
    ("ucit", "VizWiz-caption/test_3000.json", {"answer": "Shifted."}, "VizWiz", "not among those of image 2"),
    ("ucit", "IconQA/test_3000.json", {"image": None}, "IconQA", "the row has 0 images"),
    ("ucit", "IconQA/test_3000.json", {"text": None}, "IconQA", "no `text`"),
    ("coin", "Instruction_Type1/Grounding/test.json", {"answer": "[0.5, 0.2, 0.1, 0.6]"}, "Grounding", "a box"),
    ("coin", "Instruction_Type1/Grounding/test.json", {"answer": "[64, 48, 320, 240]"}, "Grounding", "in shares"),
    ("coin", "Instruction_Type1/Grounding/test.json", {"size": None}, "Grounding", "width and height"),
    ("coin", "Instruction_Type1/ScienceQA/test.json", {"text": "Why?"}, "ScienceQA", "the options none"),
    ("coin", "Instruction_Type1/ScienceQA/test.json", {"answer": "E"}, "ScienceQA", "one of: A, B, C"),
    ("coin", "Instruction_Type1/TextVQA/val.json", {"question_id": 99}, "TextVQA", "'99' is not in TextVQA/"),
    ("trace", "FOMC/test.json", {"answer": "bullish"}, "FOMC", "one of: dovish"),
]


@pytest.mark.parametrize(("name", "file", "fields", "task", "part"), WRONG)
def test_what_contradicts_the_layout_fails_with_its_row(
    name: str, file: str, fields: dict, task: str, part: str, public_folder: FolderOf, tmp_path: Path
) -> None:
    root = tmp_path / "data"
    shutil.copytree(public_folder(name), root)
    change(root, file, 1, **fields)
    stream = load(name, root)
    with pytest.raises(RowError) as caught:
        list(stream[task].test)
    assert part in str(caught.value)
    assert f"{root / file}, row 2" in str(caught.value)
    assert [problem.row for problem in validate_stream(stream).errors if problem.position is not None] == [2]


def test_scoring_can_be_corrected(public_folder: FolderOf) -> None:
    stream = load("coin", public_folder("coin"), scoring="corrected")
    assert stream["Grounding"].metric == "box_accuracy@0.5"
    assert stream["ImageNet"].metric == "exact_match"
    assert stream["GQA"].metric == "gqa_llava"
    with pytest.raises(DataError, match=r"stream.options.scoring: 'right' given"):
        load("coin", public_folder("coin"), scoring="right")


def test_the_driver_of_pathvqa_appends_an_instruction_to_test_questions(public_folder: FolderOf) -> None:
    task = load("mllm-dcl", public_folder("mllm-dcl"))["Med"]
    asked = [message_text(rows[0]["messages"][0]) for rows in (task.train, task.test)]
    assert asked == ["What is it? (0)", "What is it? (0)\nAnswer the question with a single word (or phrase)."]


def test_options_and_roots_that_do_not_exist_are_refused(public_folder: FolderOf) -> None:
    with pytest.raises(StreamError, match=r"stream.options.instruction: unknown option of coin.") as caught:
        load("coin", public_folder("coin"), instruction=2)
    assert "did you mean 'instructions'?" in str(caught.value)
    with pytest.raises(StreamError, match=r"stream\.root: quickstart is made"):
        load_stream("quickstart", root="data")
    with pytest.raises(StreamError, match="`root` and `options` are for built-in streams"):
        load_stream("my.yaml", root="data")


def test_the_default_root_comes_from_the_environment(public_folder: FolderOf, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "trace").symlink_to(public_folder("trace"))
    monkeypatch.setenv("MLLM_CL_DATA", str(tmp_path))
    assert [task.name for task in load_stream("trace")] == list(OFFICIAL["trace"])
    seekr = load_stream("trace", options={"order": "seekr"})
    assert seekr[0].name == "NumGLUE-cm"


def test_published_row_counts_are_compared_and_forgotten_by_subsets(public_folder: FolderOf) -> None:
    stream = load("ucit", public_folder("ucit"))
    found = [problem for problem in validate_stream(stream).warnings if problem.kind == "row_count"]
    assert "6 train rows, but ArxivQA was published with 40000." in {problem.message for problem in found}
    assert not validate_stream(arrange(stream, limit=2)).warnings


def test_fcit_capabilities_can_be_learnt_group_by_group(public_folder: FolderOf) -> None:
    stream = load("fcit-capability", public_folder("fcit-capability"), captions="rouge_l")
    stages = arrange(stream, merge={group: list(tasks) for group, tasks in STAGES.items()})
    assert [(task.name, len(task.train), len(task.test)) for task in stages] == [
        ("General", 24, 16), ("Other", 12, 8), ("Math", 18, 12), ("Chart", 18, 12),
    ]  # fmt: skip
    for task in stages:
        find_metric(task.metric)
    assert not validate_stream(stages, checks=Checks(images="none")).errors


def test_fcit_clients(public_folder: FolderOf) -> None:
    root = public_folder("fcit-task")
    whole = load("fcit-task", root)["ImageNet-R"].train
    parts = [client_rows(root, "task", 1, client) for client in (0, 1)]
    assert [row["id"] for part in parts for row in part] == [row["id"] for row in whole]
    assert len(client_rows(root, "capability", 2, 0, beta=0.5)) == 3
    with pytest.raises(DataError, match="no published partition of stage 1, client 2"):
        client_rows(root, "task", 1, 2)
    with pytest.raises(DataError, match=r"0.5, 1.0, 5.0"):
        client_rows(root, "task", 1, 0, beta=2.0)


@pytest.mark.parametrize("beta", BETAS)
def test_a_partition_gives_every_row_to_one_client(beta: float) -> None:
    rows = [asked(str(number), "Q", ["A"]) for number in range(500)]
    parts = partition(rows, clients=6, beta=beta, least=50, seed=3)  # type: ignore[arg-type]
    assert sorted(row["id"] for part in parts for row in part) == sorted(row["id"] for row in rows)
    assert min(map(len, parts)) >= 50
    assert len({len(part) for part in parts}) > 1
    again = partition(rows, clients=6, beta=beta, least=50, seed=3)  # type: ignore[arg-type]
    assert [row["id"] for row in parts[2]] == [row["id"] for row in again[2]]
    with pytest.raises(DataError, match="500 rows for 20 clients"):
        partition(rows, clients=20)  # type: ignore[arg-type]


def test_llava_665k_holds_images_out_and_can_start_with_text(public_folder: FolderOf) -> None:
    root = public_folder("llava-665k")
    for task in load("llava-665k", root):
        train, test = ({image for row in rows for image in row["images"]} for rows in (task.train, task.test))
        assert not train & test
    first = load_stream("llava-665k", root=root, options={"test_share": 0.2, "text": "first"})[0]
    assert (first.name, len(first.train) + len(first.test)) == ("text", 8)
    with pytest.raises(DataError, match="no rows of"):
        load_stream("llava-665k", root=root, options={"test_share": 1e-9})


def test_a_class_that_is_not_there_keeps_its_place(public_folder: FolderOf) -> None:
    images = load("aide", public_folder("aide"))["der"].train[1]["images"]
    assert [load_image(image).size for image in images] == [(64, 36), (40, 32), (40, 32)]  # no face: the body again
