"""Cells: keyed, resumable, merged over processes, and scored."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from mllm_cl.errors import EvaluationError
from mllm_cl.evaluation import cell
from mllm_cl.evaluation.cell import cell_key, evaluate_cell
from mllm_cl.evaluation.engine import Failed, GenerationSettings

SETTINGS = GenerationSettings(max_new_tokens=4, batch_size=2)


@pytest.fixture
def rows(make_row):
    return [make_row(f"r{i}", f"What is this{'?' * i}", "no", (i * 30, 4, 4)) for i in range(7)]


@pytest.fixture
def answered(monkeypatch):
    """Answers without a model (the reversed id), and the ids that were asked."""
    asked: list[str] = []

    def fake(model, processor, rows, batches, settings, route=None, engine_type=None, prepared=None):
        for batch in batches:
            asked.extend(rows[index]["id"] for index in batch)
            yield batch, [f"{rows[index]['id'][::-1]}\u2028\x85{model or ''}" for index in batch]

    monkeypatch.setattr(cell, "generate_batches", fake)
    return asked


@pytest.fixture
def measure(loaded, rows, tmp_path):
    def run(key="key", model=None, given=None, **settings):
        return evaluate_cell(
            model,
            loaded[1],
            rows if given is None else given,
            folder=tmp_path / "cell",
            stage="01-a",
            task="a",
            metric="exact_match",
            settings=SETTINGS,
            key=key,
            **settings,
        )

    return run


def lines(folder):
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text(encoding="utf-8").split("\n")[:-1]]


def test_a_cell_is_measured_with_a_real_model(loaded, rows, tmp_path):
    model, processor = loaded
    result = evaluate_cell(
        model, processor, rows, folder=tmp_path, stage="s", task="t", metric="exact_match", settings=SETTINGS, key="k"
    )
    assert result.n == 7
    assert 0 <= result.score <= 100
    assert [line["id"] for line in lines(tmp_path)] == [row["id"] for row in rows]
    assert json.loads((tmp_path / "result.json").read_text())["score"] == result.score
    assert not list(tmp_path.glob("predictions.part*"))


def test_answers_are_kept_by_id_and_scored(measure, answered, rows, tmp_path):
    rows[2]["answers"] = ["2r"]
    seen = []
    result = measure(advance=seen.append)
    assert sum(seen) == 7
    assert [line["prediction"][:2] for line in lines(tmp_path / "cell")] == [row["id"][::-1] for row in rows]
    assert sorted(answered) == [row["id"] for row in rows]
    assert result.n == 7
    assert lines(tmp_path / "cell")[2]["references"] == ["2r"]


def test_a_measured_cell_is_not_measured_again(measure, answered):
    first = measure()
    answered.clear()
    seen = []
    assert measure(advance=seen.append) == first
    assert answered == []
    assert seen == [7]


def test_another_key_starts_anew(measure, answered, tmp_path):
    measure("one")
    (tmp_path / "cell" / "left.over").write_text("x")
    measure("two", model="!")
    assert len(answered) == 14
    assert all(line["prediction"].endswith("!") for line in lines(tmp_path / "cell"))
    assert not (tmp_path / "cell" / "left.over").exists()


@pytest.mark.parametrize("batches", [0, 1, 2, 3])
@pytest.mark.parametrize("torn", [False, True])
def test_a_killed_cell_continues_where_it_stopped(measure, answered, monkeypatch, tmp_path, batches, torn):
    whole = cell.generate_batches

    def killed(*args, **kwargs):
        for number, part in enumerate(whole(*args, **kwargs)):
            if number == batches:
                raise KeyboardInterrupt
            yield part

    measure("other")
    expected = lines(tmp_path / "cell")
    answered.clear()
    monkeypatch.setattr(cell, "generate_batches", killed)
    with pytest.raises(KeyboardInterrupt):
        measure()
    part = tmp_path / "cell" / "predictions.part0.jsonl"
    lost = 0
    if torn and batches:
        content = part.read_bytes()
        part.write_bytes(content[:-3])  # the last line was not finished
        lost = 1
    monkeypatch.setattr(cell, "generate_batches", whole)
    answered.clear()
    seen = []
    measure(advance=seen.append)
    assert lines(tmp_path / "cell") == expected
    assert len(answered) == 7 - 2 * batches + (2 if lost else 0)
    assert sum(seen) == 7


def test_an_interrupted_cell_with_another_key_is_thrown_away(measure, answered, tmp_path):
    folder = tmp_path / "cell"
    folder.mkdir()
    (folder / "key.txt").write_text("old")
    (folder / "predictions.part0.jsonl").write_text('{"id": "r0", "prediction": "old"}\n')
    measure()
    assert "old" not in {line["prediction"] for line in lines(folder)}


def test_parts_of_several_processes_are_merged(measure, answered, monkeypatch, tmp_path):
    def process(index: int):
        state = SimpleNamespace(
            process_index=index, num_processes=2, is_main_process=index == 0, wait_for_everyone=lambda: None
        )
        monkeypatch.setattr(cell, "PartialState", lambda: state)

    process(1)
    (tmp_path / "cell").mkdir()
    (tmp_path / "cell" / "key.txt").write_text("key")
    with pytest.raises(EvaluationError, match="not visible to this process"):
        measure()
    second = list(answered)
    process(0)
    measure()
    assert sorted(answered) == [f"r{i}" for i in range(7)]
    assert set(second).isdisjoint(answered[len(second) :])
    assert [line["id"] for line in lines(tmp_path / "cell")] == [f"r{i}" for i in range(7)]


def test_cells_without_rows_or_with_repeated_ids_are_refused(measure, rows):
    with pytest.raises(EvaluationError, match="a: has no rows to evaluate"):
        measure(given=[])
    with pytest.raises(EvaluationError, match=r"several rows have the id 'r3'"):
        measure(given=[*rows, {**rows[3]}])


def test_the_key_changes_with_everything_that_can_change_an_answer(loaded):
    processor = loaded[1]
    keys = {
        cell_key(processor, "rows", "weights", "exact_match", SETTINGS),
        cell_key(processor, "other", "weights", "exact_match", SETTINGS),
        cell_key(processor, "rows", "other", "exact_match", SETTINGS),
        cell_key(processor, "rows", "weights", "exact_match_strict", SETTINGS),
        cell_key(processor, "rows", "weights", "exact_match", replace(SETTINGS, max_new_tokens=5)),
        cell_key(processor, "rows", "weights", "exact_match", replace(SETTINGS, batch_size=3)),
    }
    assert len(keys) == 6
    same = replace(SETTINGS, num_workers=2)
    assert cell_key(processor, "rows", "weights", "exact_match", same) in keys


@pytest.fixture
def failing(monkeypatch, answered):
    """Answers, but not to the ids in the set that is returned."""
    whole, wrong = cell.generate_batches, set()

    def some(model, processor, rows, batches, settings, route=None, engine_type=None, prepared=None):
        assert settings.keep_going
        for batch, texts in whole(model, processor, rows, batches, settings, route):
            ids = [rows[index]["id"] for index in batch]
            yield batch, [Failed("ValueError: no") if i in wrong else text for i, text in zip(ids, texts)]

    monkeypatch.setattr(cell, "generate_batches", some)
    return wrong


def test_a_cell_with_failed_rows_has_no_score(measure, failing, answered, tmp_path):
    failing |= {"r2", "r5"}
    with pytest.raises(
        EvaluationError, match=r"a: 2 rows could not be answered \(r2, r5\); the first error: ValueError: no"
    ):
        measure()
    result = json.loads((tmp_path / "cell" / "result.json").read_text())
    assert result["score"] is None
    assert result["n_failed"] == 2
    assert [entry["id"] for entry in result["failed"]] == ["r2", "r5"]
    assert not (tmp_path / "cell" / "predictions.jsonl").exists()
    failing.clear()
    answered.clear()
    assert measure().n == 7  # the failed rows are tried again, the others are not
    assert {"r2", "r5"} <= set(answered) < {f"r{i}" for i in range(7)}


def test_failures_can_be_left_out_when_asked(measure, failing, tmp_path):
    failing.add("r2")
    result = measure(allow_failures=True)
    assert (result.n, result.n_failed) == (6, 1)
    assert "r2" not in {line["id"] for line in lines(tmp_path / "cell")}
    assert measure(allow_failures=True) == result
    with pytest.raises(EvaluationError, match="1 rows could not be answered"):
        measure()
    failing |= {f"r{i}" for i in range(7)}
    with pytest.raises(EvaluationError, match="7 rows could not be answered"):
        measure("other", allow_failures=True)


def test_a_raising_model_is_counted_row_by_row(loaded, rows, tmp_path, monkeypatch):
    model, processor = loaded
    whole = model.generate

    def generate(**inputs):
        if len(inputs["input_ids"]) > 1 or (inputs["pixel_values"].mean() == 0).all():
            raise ValueError("broken")
        return whole(**inputs)

    monkeypatch.setattr(model, "generate", generate)
    expected = evaluate_cell(
        model, processor, rows, folder=tmp_path, stage="s", task="t", metric="exact_match", settings=SETTINGS, key="k"
    )
    assert expected.n == 7
    monkeypatch.setattr(model, "generate", lambda **inputs: (_ for _ in ()).throw(ValueError("broken")))
    with pytest.raises(
        EvaluationError, match=r"t: 7 rows .* \(r0, r1, r2, r3, r4, ...\); the first error: ValueError: broken"
    ):
        evaluate_cell(
            model,
            processor,
            rows,
            folder=tmp_path,
            stage="s",
            task="t",
            metric="exact_match",
            settings=SETTINGS,
            key="n",
        )


def test_the_result_names_its_scorer(measure, answered, tmp_path):
    result = measure()
    assert (result.scorer, result.profile, result.unit, result.clusters) == (
        "exact_match/strict/2",
        "strict",
        "percent",
        7,
    )
    assert json.loads((tmp_path / "cell" / "result.json").read_text())["metrics"]["exact_match"]["value"] == 0.0


def test_the_key_covers_scorer_profile_and_generation(loaded):
    def key(metric="gqa:llava", **changes):
        return cell_key(loaded[1], "rows", "weights", metric, replace(SETTINGS, **changes))

    assert key() == key("gqa_llava")  # two names of one scorer
    assert len({key(), key("gqa:lmms_eval"), key(options=(("num_beams", 2),)), key(seed=1)}) == 4
