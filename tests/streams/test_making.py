"""Streams made of other streams: merged, repeated, blurred, without boundaries, excluded rows, written and read back."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mllm_cl.data.rows import Rows, assistant_message, user_message
from mllm_cl.data.validate import Checks
from mllm_cl.errors import EvaluationError, StreamError
from mllm_cl.evaluation.scorers import find_metric
from mllm_cl.recipe import load_recipe
from mllm_cl.streams import Stream, Task, arrange, load_stream, read_stream, stream_of_section, validate_stream
from mllm_cl.streams.exclude import write_exclusions
from mllm_cl.streams.export import write_stream
from mllm_cl.streams.fingerprint import fingerprint


def rows(name: str, count: int, question: str = "What?", answers: tuple[str, ...] = ("red", "blue")) -> Rows:
    return Rows(
        [
            {
                "id": f"{name}{number}",
                "messages": [user_message(question), assistant_message(answers[number % len(answers)])],
                "images": [],
            }
            for number in range(count)
        ]
    )


def stream(questions: dict[str, str] | None = None, count: int = 40, metric: str = "exact_match") -> Stream:
    asked = questions or dict.fromkeys("abc", "What?")
    tasks = tuple(
        Task(name, train=rows(name, count, question), test=rows(f"{name}-test-", 5), metric=metric)
        for name, question in asked.items()
    )
    return Stream("s", tasks, fingerprint(tasks))


def ids(values: Any) -> list[str]:
    return [row["id"] for row in values]


def own(name: str) -> set[str]:
    return {f"{name}{number}" for number in range(40)}


def origin(row: Any, task: str) -> str:
    return row.get("task", task)


def test_similarity_chains_the_tasks_whose_questions_are_alike() -> None:
    base = stream(
        {
            "plates": "What does the number plate say?",
            "song": "Which instrument plays this melody?",
            "signs": "What does the road sign say?",
            "chords": "Which chord does this instrument play?",
        }
    )
    assert [task.name for task in arrange(base, order="similar")] == ["plates", "signs", "chords", "song"]
    far = [task.name for task in arrange(base, order="dissimilar")]
    assert (far[0], far[1] in ("song", "chords")) == ("plates", True)
    empty = Stream("s", (Task("a", train=(), test=()), Task("b", train=(), test=())))
    with pytest.raises(StreamError, match="no questions to compare"):
        arrange(empty, order="similar")


def test_merged_tasks_are_learnt_as_one() -> None:
    merged = arrange(stream(), merge={"ab": ["a", "b"]})
    assert [task.name for task in merged] == ["ab", "c"]
    found = ids(merged["ab"].train)
    assert set(found) == {f"a/{name}" for name in own("a")} | {f"b/{name}" for name in own("b")}
    assert len({name[0] for name in found[:20]}) == 2  # mixed
    assert ids(merged["ab"].test) == [f"{name}/{name}-test-{n}" for name in "ab" for n in range(5)]
    assert merged["ab"].train[0]["task"] in ("a", "b")
    assert found == ids(arrange(stream(), merge={"ab": ["a", "b"]})["ab"].train)
    half = arrange(stream(), merge={"ab": {"a": 1.0, "b": 0.25}})["ab"]
    assert Counter(row["task"] for row in half.train) == {"a": 40, "b": 10}
    assert len(half.test) == 10


@pytest.mark.parametrize(
    ("groups", "part"),
    [
        ({"x": ["a", "d"]}, "merge.x: s has no task 'd'"),
        ({"x": ["a"], "y": ["a"]}, "merge.y: 'a' is also in 'x'"),
        ({"x": {"a": 0}}, "merge.x.a: 0 given"),
        ({"x": []}, "merge.x: no tasks given"),
    ],
)
def test_impossible_merges(groups: dict, part: str) -> None:
    with pytest.raises(StreamError) as caught:
        arrange(stream(), merge=groups)
    assert part in str(caught.value)


def test_rows_of_merged_tasks_keep_their_scorers() -> None:
    base = stream()
    tasks = (base["a"], Task("z", train=rows("z", 3), test=rows("y", 3), metric="contains_words"))
    merged = arrange(Stream("s", tasks), merge={"x": ["a", "z"]})["x"]
    assert merged.metric == "each:contains_words,exact_match"
    assert Counter(row["scorer"] for row in merged.test) == {"exact_match": 5, "contains_words": 3}  # type: ignore[typeddict-item]
    scorer = find_metric(merged.metric)[1].scorer
    assert scorer("it is red", ["red"], scorer="contains_words") == 1.0
    assert scorer("it is red", ["red"], scorer="exact_match") == 0.0
    with pytest.raises(EvaluationError, match="'cider' scores whole test sets"):
        find_metric("each:cider,exact_match")
    with pytest.raises(EvaluationError, match="scored by 'anls'"):
        scorer("red", ["red"], scorer="anls")


def test_a_task_that_comes_back_brings_its_other_rows() -> None:
    repeated = arrange(stream(), repeat={"a": 3})
    assert [task.name for task in repeated] == ["a", "b", "c", "a-2", "a-3"]
    parts = [set(ids(repeated[name].train)) for name in ("a", "a-2", "a-3")]
    assert set.union(*parts) == own("a")
    assert sum(map(len, parts)) == 40
    assert ids(repeated["a-2"].test) == ids(repeated["a"].test)
    assert [task.name for task in arrange(stream(), repeat=2)] == ["a", "b", "c", "a-2", "b-2", "c-2"]
    for times, part in (({"d": 2}, "repeat.d"), (0, "0 appearances of 'a'"), ({"a": 41}, "41 appearances")):
        with pytest.raises(StreamError, match=part):
            arrange(stream(), repeat=times)


def test_blurred_boundaries_move_rows_to_the_neighbours() -> None:
    blurred = arrange(stream(), blur=0.25)
    shares = {task.name: Counter(origin(row, task.name) for row in task.train) for task in blurred}
    assert shares == {"a": {"a": 30, "b": 5}, "b": {"b": 30, "a": 10, "c": 10}, "c": {"c": 30, "b": 5}}
    everything = [row["id"].split("/")[-1] for task in blurred for row in task.train]
    assert sorted(everything) == sorted(own("a") | own("b") | own("c"))
    assert all(len(set(ids(task.train))) == len(task.train) for task in blurred)
    assert [ids(task.test) for task in blurred] == [ids(task.test) for task in stream()]
    for share in (0, 1, True):
        with pytest.raises(StreamError, match="blur"):
            arrange(stream(), blur=share)
    with pytest.raises(StreamError, match="one task"):
        arrange(stream({"a": "Q"}), blur=0.5)


def test_task_free_segments_end_where_no_task_ends() -> None:
    tasks = tuple(Task(name, train=rows(name, count), test=rows("t", 2)) for name, count in (("a", 10), ("b", 50)))
    free = arrange(Stream("s", tasks), task_free=True)
    assert [len(task.train) for task in free] == [30, 30]
    assert Counter(origin(row, "a") for row in free["a"].train) == {"a": 10, "b": 20}
    assert {origin(row, "b") for row in free["b"].train} == {"b"}
    assert ids(free["b"].test) == ids(tasks[1].test)


def test_the_same_seed_makes_the_same_stream_and_another_seed_another() -> None:
    options: dict[str, Any] = {"blur": 0.3, "repeat": {"b": 2}, "task_free": True}
    first, again = arrange(stream(), seed=1, **options), arrange(stream(), seed=1, **options)
    assert first.fingerprint == again.fingerprint != arrange(stream(), seed=2, **options).fingerprint
    assert first.fingerprint != stream().fingerprint


FILE = """\
name: s
tasks:
  - {name: vqa, train: train.jsonl, test: test.jsonl, split_by: kind%s}
"""


def split_folder(folder: Path, more: str = "", kinds: str = "cccdde") -> Path:
    def line(number: int, kind: Any) -> str:
        return json.dumps({"id": f"r{number}", "kind": kind, "query": "What?", "response": f"{number}"})

    (folder / "train.jsonl").write_text("\n".join(line(n, f"how {kind}") for n, kind in enumerate(kinds * 2)))
    (folder / "test.jsonl").write_text("\n".join(line(n, f"how {kind}") for n, kind in enumerate(kinds)))
    (folder / "stream.yaml").write_text(FILE % more)
    return folder


def test_one_data_set_becomes_tasks_by_a_column(tmp_path: Path) -> None:
    found = read_stream(split_folder(tmp_path))
    assert [(task.name, len(task.train), len(task.test)) for task in found] == [
        ("vqa-how-c", 6, 3),
        ("vqa-how-d", 4, 2),
        ("vqa-how-e", 2, 1),
    ]
    assert ids(found["vqa-how-d"].test) == ["r3", "r4"]
    assert found["vqa-how-d"].test[0]["answers"] == ["3"]
    report = validate_stream(tmp_path)
    assert not report.errors
    assert report.counts["vqa-how-c"] == {"train": 6, "test": 3}
    chosen = read_stream(split_folder(tmp_path, ", values: [how e, how c]"))
    assert [task.name for task in chosen] == ["vqa-how-e", "vqa-how-c"]
    for more, part in ((", values: [how z]", "no rows with kind = how z"), (", values: []", "values")):
        with pytest.raises(StreamError, match=part):
            read_stream(split_folder(tmp_path, more))
    (tmp_path / "test.jsonl").write_text((tmp_path / "test.jsonl").read_text().split("\n")[0])
    (tmp_path / "stream.yaml").write_text(FILE % "")
    with pytest.raises(StreamError, match=r"tasks\[0\].test: no rows of 'vqa-how-d'"):
        read_stream(tmp_path)


def test_bad_rows_are_listed_and_left_out(tmp_path: Path) -> None:
    good = {"query": "What?", "response": "A"}
    lines = [json.dumps(good), "{broken", json.dumps(good | {"response": ""}), json.dumps(good | {"image": "no.png"})]
    (tmp_path / "train.jsonl").write_text("\n".join([*lines, json.dumps(good | {"id": "last"})]))
    (tmp_path / "test.jsonl").write_text(json.dumps(good))
    (tmp_path / "stream.yaml").write_text("name: s\ntasks: [{name: a, train: train.jsonl, test: test.jsonl}]")
    report = validate_stream(tmp_path)
    listed = tmp_path / "bad-rows.jsonl"
    assert write_exclusions(listed, report.located) == 3
    entries = [json.loads(line) for line in listed.read_text().splitlines()]
    assert [(entry["position"], entry["kind"]) for entry in entries] == [
        (1, "broken_json"),
        (2, "no_final_answer"),
        (3, "image_missing"),
    ]
    kept = arrange(read_stream(tmp_path), exclude=listed)
    assert ids(kept["a"].train) == ["a/train/0", "last"]
    assert validate_stream(kept, checks=Checks(workers=1)).errors == []
    assert kept.fingerprint != read_stream(tmp_path, fingerprint=True).fingerprint
    (tmp_path / "train.jsonl").write_text("\n".join([json.dumps(good)] * 5))
    arrange(read_stream(tmp_path), exclude=listed)  # the ids are still those of the list
    entries[0]["id"] = "other"
    listed.write_text(json.dumps(entries[0]))
    with pytest.raises(StreamError, match="a/train has no row 'other' at position 1"):
        arrange(read_stream(tmp_path), exclude=listed)
    listed.write_text("[]")
    with pytest.raises(StreamError, match="not a list of rows to exclude"):
        arrange(read_stream(tmp_path), exclude=listed)
    with pytest.raises(StreamError, match="does not exist"):
        arrange(read_stream(tmp_path), exclude=tmp_path / "none")


@pytest.mark.parametrize("name", ["coin", "ucit", "mllm-dcl", "mllm-acl", "cvit", "fcit-task", "llava-665k",
                                  "continual-next", "trace", "mipd", "interhand"])  # fmt: skip
def test_a_benchmark_survives_the_round_trip_to_a_stream_file(
    name: str, public_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    options = {"test_share": 0.2} if name == "llava-665k" else {}
    original = load_stream(name, root=public_folder(name), options=options)
    back = read_stream(write_stream(original, tmp_path / "out"))
    assert [(task.name, task.metric, task.max_new_tokens) for task in back] == [
        (task.name, task.metric, task.max_new_tokens) for task in original
    ]
    for task, other in zip(original, back):
        for rows_of, rows_back in ((task.train, other.train), (task.test, other.test)):
            assert [essentials(row) for row in rows_of] == [essentials(row) for row in rows_back]
    assert back.fingerprint == original.fingerprint
    with pytest.raises(StreamError, match="there is a stream already"):
        write_stream(original, tmp_path / "out")


def essentials(row: Any) -> Any:
    return json.loads(json.dumps([row["id"], row["messages"], row["images"], row.get("answers"), row.get("choices")]))


def test_a_recipe_asks_for_all_of_it(public_folder: Callable[[str], Path]) -> None:
    recipe = load_recipe(
        {
            "name": "r",
            "output_dir": "runs/r",
            "stream": {
                "name": "ucit",
                "root": str(public_folder("ucit")),
                "options": {"scoring": "corrected"},
                "order": "similar",
                "merge": {"charts": ["ArxivQA", "IconQA"]},
                "repeat": {"charts": 2},
                "blur": 0.34,
                "transforms": [{"answer_styles": {"share": 0.5}}],
            },
        }
    )
    made = stream_of_section(recipe.stream)
    assert {task.name for task in made} == {"ImageNet-R", "charts", "VizWiz", "CLEVR-Math", "Flickr30k", "charts-2"}
    assert made["charts"].metric == "exact_match"
    assert sum(len(task.train) for task in made) == 36
    assert not validate_stream(made, checks=Checks(images="none")).errors
    elsewhere = recipe.model_copy(update={"stream": recipe.stream.model_copy(update={"root": "/elsewhere"})})
    assert elsewhere.sha256 == recipe.sha256
