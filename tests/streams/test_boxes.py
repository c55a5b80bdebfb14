"""Box conventions: hand-computed numbers, and intersection over union that does not change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mllm_cl.data.problems import RowError
from mllm_cl.data.rows import Rows, assistant_message, message_text, user_message
from mllm_cl.errors import StreamError
from mllm_cl.evaluation.scorers.boxes import box_iou
from mllm_cl.streams import Stream, Task, arrange


def row(name: str, answer: str, image: Any, question: str = "Where?", **extra: Any) -> Any:
    return {"id": name, "messages": [user_message(question, 1), assistant_message(answer)], "images": [image]} | extra


def task(name: str, rows: list[Any], metric: str = "box_accuracy@0.5") -> Task:
    test = [{**found, "answers": [message_text(found["messages"][-1])]} for found in rows]
    return Task(name, train=Rows(rows), test=Rows(test), metric=metric)  # type: ignore[arg-type]


def converted(answer: str, size: tuple[int, int] = (200, 100), **options: Any) -> str:
    stream = Stream("s", (task("a", [row("1", answer, Image.new("RGB", size))]),))
    made = arrange(stream, transforms=[{"boxes": {"tasks": ["a"], "given": "square", "wanted": "shares", **options}}])
    found = message_text(made["a"].train[0]["messages"][-1])
    assert made["a"].test[0].get("answers") == [found]
    return found


@pytest.mark.parametrize(
    ("answer", "options", "expected"),
    [
        # 200 x 100, padded by 50 above and below: 0.25..0.75 of the square is all of the height
        ("[0.1, 0.25, 0.5, 0.5]", {}, "[0.100, 0.000, 0.500, 0.500]"),
        ("[0.1, 0.25, 0.5, 0.5]", {"wanted": "thousand"}, "[100, 0, 500, 500]"),
        ("[0.1, 0.25, 1.0, 0.75]", {"wanted": "thousand_999"}, "[100, 0, 999, 999]"),
        ("[0.1, 0.25, 0.5, 0.5]", {"wanted": "pixels"}, "[20, 0, 100, 50]"),
        ("[20, 0, 100, 50]", {"given": "pixels", "wanted": "square"}, "[0.100, 0.250, 0.500, 0.500]"),
        ("[100, 0, 500, 500]", {"given": "thousand"}, "[0.100, 0.000, 0.500, 0.500]"),
        ("[0.1, 0.2, 0.5, 0.5]", {}, "[0.100, 0.000, 0.500, 0.500]"),  # reaches into the padding
        ("It is at [0.1, 0.25, 0.5, 0.5].", {"wanted": "thousand"}, "It is at [100, 0, 500, 500]."),
        ("no box, 3 dogs", {}, "no box, 3 dogs"),
        ("[0.1,0.25,0.5,0.5]", {"wanted": "thousand", "form": "box_list"}, "<box>[[100, 0, 500, 500]]</box>"),
        ("[0.1,0.25,0.5,0.5]", {"wanted": "thousand", "form": "box_pairs"}, "<box>(100,0),(500,500)</box>"),
        ("<box>(100,0),(500,500)</box>", {"given": "thousand", "wanted": "pixels"}, "[20, 0, 100, 50]"),
        ("<box>[[100, 0, 500, 500]]</box>", {"given": "thousand", "wanted": "pixels"}, "[20, 0, 100, 50]"),
    ],
)
def test_conventions(answer: str, options: dict[str, Any], expected: str) -> None:
    assert converted(answer, **options) == expected


def test_a_tall_picture_is_padded_at_the_sides() -> None:
    assert converted("[0.25, 0.1, 0.5, 0.5]", (100, 200), wanted="pixels") == "[0, 20, 50, 100]"


def test_a_turned_picture_counts_as_it_is_shown(tmp_path: Path) -> None:
    image = Image.new("RGB", (100, 200))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    options = {"tasks": ["a"], "given": "shares", "wanted": "pixels"}
    stream = Stream("s", (task("a", [row("1", "[0.1, 0.0, 0.5, 0.5]", str(tmp_path / "turned.jpg"))]),))
    made = arrange(stream, transforms=[{"boxes": options}])
    assert message_text(made["a"].train[0]["messages"][-1]) == "[20, 0, 100, 50]"


def test_the_score_of_an_answer_does_not_change() -> None:
    truth, guess = "[0.1, 0.3, 0.5, 0.6]", "[0.2, 0.3, 0.6, 0.7]"
    before = box_iou(guess, [truth])
    for wanted in ("shares", "thousand", "thousand_999"):
        after = box_iou(converted(guess, wanted=wanted), [converted(truth, wanted=wanted)])
        assert after == pytest.approx(before, abs=0.01)
    assert box_iou(converted(guess, wanted="thousand"), [truth]) == 0


def test_questions_change_and_other_tasks_do_not() -> None:
    image = Image.new("RGB", (200, 100))
    first = task("a", [row(f"{n}", "a dog", image, "What is at [0.1, 0.25, 0.5, 0.5]?") for n in range(4)])
    other = task("b", [row(f"{n}", "[1, 2, 3, 4]", image) for n in range(4)], metric="exact_match")
    options = {"boxes": {"tasks": ["a"], "given": "square", "wanted": "thousand"}}
    made = arrange(Stream("s", (first, other)), transforms=[options], blur=0.5, repeat={"a": 2})
    assert [found.name for found in made] == ["a", "b", "a-2"]
    texts = [message_text(message) for found in made for rows in (found.train, found.test) for one in rows
             for message in one["messages"]]  # fmt: skip
    assert "[100, 0, 500, 500]" in " ".join(texts)
    assert "0.25" not in " ".join(texts)  # also where rows of `a` are learnt with `b`
    assert texts.count("[1, 2, 3, 4]") == 4 + 4


@pytest.mark.parametrize(
    ("answer", "options", "part"),
    [
        ("[100, 0, 500, 500]", {}, "does not fit the convention `given`"),
        ("[0.5, 0.3, 0.1, 0.6]", {}, "does not fit the convention `given`"),
        ("[0.1, 0.0, 0.5, 0.2]", {}, "lies in the padding"),
        ("0.1, 0.2, 0.5, 0.6", {}, "a box as one of [x1, y1, x2, y2], <box>[[x1"),
        ("[0.1, 0.3, 0.5]", {}, "no box can be read"),
        ("[0.1, 0.3, 0.5, 0.6, 0.7]", {}, "no box can be read"),
        ("[0.1, 0.3, 0.5, 0.6] and <box>0.1 0.3</box>", {}, "no box can be read"),
    ],
)
def test_boxes_that_cannot_be_meant(answer: str, options: dict[str, Any], part: str) -> None:
    with pytest.raises(RowError) as caught:
        converted(answer, **options)
    assert part in str(caught.value)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"tasks": []}, "a list of task names"),
        ({"tasks": ["aa"]}, "there is no task 'aa'"),
        ({"given": "squares"}, "did you mean 'square'?"),
        ({"wanted": ""}, "transforms[0].boxes.wanted: the option is missing"),
        ({"form": "pairs"}, "did you mean 'box_pairs'?"),
        ({"wnted": "x"}, "did you mean 'wanted'?"),
    ],
)
def test_mistakes_in_a_recipe(options: dict[str, Any], part: str) -> None:
    with pytest.raises(StreamError) as caught:
        converted("[0.1, 0.25, 0.5, 0.5]", **options)
    assert part in str(caught.value)


def test_a_name_that_ends_in_a_number_is_one_task() -> None:
    image = Image.new("RGB", (200, 100))
    tasks = tuple(task(f"v-{number}", [row("1", "[0.1, 0.25, 0.5, 0.5]", image)]) for number in (1, 2))
    made = arrange(
        Stream("s", tasks), transforms=[{"boxes": {"tasks": ["v-2"], "given": "square", "wanted": "thousand"}}]
    )
    assert [found.test[0].get("answers") for found in made] == [["[0.1, 0.25, 0.5, 0.5]"], ["[100, 0, 500, 500]"]]


def test_words_about_boxes_are_left_alone() -> None:
    text = "Write <box>(x1,y1),(x2,y2)</box>; see figure [2]."
    options = {"boxes": {"tasks": ["a"], "given": "square", "wanted": "thousand"}}
    made = arrange(Stream("s", (task("a", [row("1", "a dog", Image.new("RGB", (9, 9)), text)]),)), transforms=[options])
    assert message_text(made["a"].train[0]["messages"][0]).endswith(text)


def test_an_official_scorer_is_refused() -> None:
    stream = Stream("s", (task("a", [row("1", "x", "a.png")], metric="coin_grounding_acc@0.5"),))
    with pytest.raises(StreamError, match="scoring: corrected"):
        arrange(stream, transforms=[{"boxes": {"tasks": ["a"], "given": "square", "wanted": "shares"}}])
