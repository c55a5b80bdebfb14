"""Order, subsets, held-out rows and statistics of a stream."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mllm_cl.data.readers import read_rows
from mllm_cl.data.rows import Rows, assistant_message, reference_answers, user_message
from mllm_cl.errors import StreamError
from mllm_cl.streams import Stream, Task, arrange, describe, validate_stream
from mllm_cl.streams.fingerprint import fingerprint
from mllm_cl.streams.statistics import answer_format, majority


def rows(count: int, answers: list[str], images: int = 0, prefix: str = "") -> Rows:
    """Rows whose answers repeat; `images` pictures are shared by all of them in turn."""
    return Rows(
        [
            {
                "id": f"{prefix}{number}",
                "messages": [
                    user_message("What?", int(bool(images))),
                    assistant_message(answers[number % len(answers)]),
                ],
                "images": [f"/pictures/{number % images}.png"] if images else [],
            }
            for number in range(count)
        ]
    )


def stream(*names: str) -> Stream:
    tasks = tuple(Task(name, train=rows(20, ["a", "a", "a", "b"], 7, name), test=rows(8, ["a", "b"])) for name in names)
    return Stream("s", tasks, fingerprint(tasks))


def names(arranged: Stream) -> list[str]:
    return [task.name for task in arranged]


def ids(values: Any) -> list[str]:
    return [row["id"] for row in values]


def test_order() -> None:
    base = stream("a", "b", "c", "d")
    assert arrange(base) is base
    turned = arrange(base, order=["d", "a", "c", "b"])
    assert names(turned) == ["d", "a", "c", "b"]
    assert turned.fingerprint != base.fingerprint
    assert arrange(turned, order=["a", "b", "c", "d"]).fingerprint == base.fingerprint
    shuffles = [names(arrange(base, order="random", seed=seed)) for seed in range(6)]
    assert shuffles[0] == names(arrange(base, order="random", seed=0))
    assert all(sorted(shuffle) == ["a", "b", "c", "d"] for shuffle in shuffles)
    assert len({tuple(shuffle) for shuffle in shuffles}) > 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": ["a"]}, "order: missing: b"),
        ({"order": ["a", "b", "a"]}, "order: given twice: a"),
        ({"order": ["a", "platse"]}, "s has no task 'platse'"),
        ({"order": "reverse"}, "'random'"),
        ({"limit": 0}, "limit.train: 0 given"),
        ({"limit": {"train": 2.5}}, "at least 1"),
        ({"limit": {"trian": 2}}, "did you mean 'train'"),
        ({"validation_share": 1.0}, "between 0 and 1"),
    ],
)
def test_impossible_arrangements(options: dict, message: str) -> None:
    with pytest.raises(StreamError) as caught:
        arrange(stream("a", "b"), **options)
    assert message in str(caught.value)


def test_limit_keeps_the_share_of_each_answer_and_the_order_of_rows() -> None:
    base = stream("a", "b")
    small = arrange(base, limit=8, seed=3)
    for task in small:
        kept = [int(name.removeprefix(task.name)) for name in ids(task.train)]
        assert kept == sorted(kept)
        assert Counter(reference_answers(row)[0] for row in task.train) == {"a": 6, "b": 2}
        assert len(task.test) == 8
    assert ids(arrange(base, limit=8, seed=3)["a"].train) == ids(small["a"].train)
    assert ids(arrange(base, limit=8, seed=4)["a"].train) != ids(small["a"].train)
    assert ids(arrange(base, limit=8, seed=3, order=["b", "a"])["a"].train) == ids(small["a"].train)
    assert small.fingerprint not in ("", base.fingerprint)
    each = arrange(base, limit={"train": 5, "test": 3})["b"]
    assert (len(each.train), len(each.test)) == (5, 3)


@pytest.mark.parametrize("size", [1, 2, 7, 19])
def test_limit_is_exact_when_every_answer_is_different(size: int) -> None:
    task = Task("a", train=rows(20, [str(number) for number in range(20)]), test=list(rows(2, ["a"])))
    assert len(arrange(Stream("s", (task,)), limit=size)["a"].train) == size


def test_held_out_rows_share_no_image_with_training() -> None:
    base = stream("a")
    split = arrange(base, validation_share=0.3, seed=1)["a"]
    train, held = ({image for row in part for image in row["images"]} for part in (split.train, split.validation))
    assert not train & held
    assert sorted(ids(split.train) + ids(split.validation)) == sorted(ids(base["a"].train))
    assert 3 <= len(split.validation) <= 6
    assert ids(arrange(base, validation_share=0.3, seed=1)["a"].validation) == ids(split.validation)
    assert arrange(arrange(base, validation_share=0.3), validation_share=0.5)["a"].validation is not None


def test_validation_rows_that_exist_are_kept_and_chains_of_images_hold_together() -> None:
    mine = rows(2, ["a"])
    task = Task("a", train=rows(4, ["a"]), test=rows(1, ["a"]), validation=mine)
    assert arrange(Stream("s", (task,)), validation_share=0.5)["a"].validation is mine
    chain = [
        {"id": str(number), "messages": [], "images": [f"{number}.png", {"bytes": None, "path": f"{number + 1}.png"}]}
        for number in range(4)
    ]
    task = Task("a", train=chain, test=())  # type: ignore[arg-type]
    with pytest.raises(StreamError, match="no rows of 'a' can be held out"):
        arrange(Stream("s", (task,)), validation_share=0.5)


def test_broken_rows_are_left_to_validation(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"question": "Q", "answer": "A"}\n{"question":\n' * 4)
    base = Stream("s", (Task("a", train=read_rows(path), test=()),))
    arranged = arrange(base, limit=6, validation_share=0.25)
    assert (len(arranged["a"].train), len(arranged["a"].validation)) == (6, 2)
    assert len(validate_stream(base).errors) == 5


@pytest.mark.parametrize(
    ("answer", "format"),
    [
        ("Yes", "yes/no"),
        ("no.", "yes/no"),
        ("B", "letter"),
        ("(c)", "letter"),
        ("D.", "letter"),
        ("I", "one word"),
        ("17", "number"),
        ("-3.5", "number"),
        ("1,250", "number"),
        ("$4.20", "number"),
        ("50%", "number"),
        ("red", "one word"),
        ("", "one word"),
        ("a red car", "phrase"),
        ("[0.1, 0.2, 0.3, 0.4]", "list"),
        ("Texas, New Mexico, Utah", "list"),
        ("It is a car.", "sentence"),
        ("In the picture, there is a big dog on a bench", "sentence"),
    ],
)
def test_answer_formats(answer: str, format: str) -> None:
    assert answer_format(answer) == format


def test_describe() -> None:
    test = [
        {**row, "answers": answers} for row, answers in zip(rows(4, ["x"]), (["Yes"], ["yes ", "no"], ["no"], ["2"]))
    ]
    task = Task("a", train=rows(8, ["a red car", "red", "red", "B"], 3), test=test, metric="anls", description="d")
    assert describe(Stream("s", (task,))) == [
        {
            "task": "a",
            "metric": "anls",
            "description": "d",
            "train": 8,
            "validation": 0,
            "test": 4,
            "images": 3,
            "distinct_answers": 3,
            "question_lengths": {"mean": 5.0, "median": 5.0, "95 %": 5, "longest": 5},
            "answer_lengths": {"mean": 4.0, "median": 3.0, "95 %": 9, "longest": 9},
            "answer_formats": {"letter": 0.25, "one word": 0.5, "phrase": 0.25},
            "majority_answer": "no",
            "majority_share": 0.5,
        }
    ]
    assert majority([]) == ("", 0.0)


def test_fingerprint_sees_embedded_bytes_and_survives_odd_rows() -> None:
    def of(image: Any) -> str:
        row: Any = {"id": "1", "messages": [user_message("\ud83d", 1)], "images": [image]}
        return fingerprint([Task("a", train=[row], test=())])

    assert of({"bytes": b"x", "path": None}) == of({"bytes": b"x", "path": "elsewhere.png"})
    assert len({of({"bytes": b"x"}), of({"bytes": b"y"}), of("x.png"), of("y.png"), of("a\0b.png"), of(3)}) == 6
