"""`mllm-cl evaluate`: several checkpoints, cells that stay valid, failures, flags, scoring again, listings."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mllm_cl.evaluation import engine

Call = Callable[..., Any]


def result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))


def answers(folder: Path) -> list[str]:
    lines = (folder / "predictions.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line)["prediction"] for line in lines]


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows that were generated."""
    generated: list[int] = []
    whole = engine.Engine._generated

    def greedy(self: Any, rows: Any, inputs: dict[str, Any]) -> list[str]:
        generated.append(len(inputs["input_ids"]))
        return whole(self, rows, inputs)

    monkeypatch.setattr(engine.Engine, "_generated", greedy)
    return generated


@pytest.fixture
def evaluate(call: Call, tmp_path: Path, stream_file: Path) -> Call:
    def run(*args: str | Path, tasks: str = "colour,same", code: int = 0) -> Any:
        given = ("--tasks", tasks, "--output_path", tmp_path / "out", "--stream", stream_file)
        outcome = call("evaluate", *args, *given, "--max_new_tokens", "2")
        assert outcome.code == code, outcome.err + outcome.trace
        return outcome

    return run


def test_checkpoints_of_one_base_swap_in_place(
    evaluate: Call, finished: Callable[..., Path], fixture_folder: Path, tmp_path: Path, count: list[int]
) -> None:
    stages = [finished() / "stages" / name for name in ("01-colour", "02-same")]
    several = [*stages, fixture_folder]
    evaluate(*several)
    names = ("01-colour", "02-same", fixture_folder.name)
    together = {name: [answers(tmp_path / "out" / name / task) for task in ("colour", "same")] for name in names}
    keys = {result(tmp_path / "out" / name / "same")["key"] for name in names}
    assert len(keys) == 3
    assert together["01-colour"] != together[fixture_folder.name]  # the second one is not given the first one's answers
    for checkpoint, name in zip(several, names):
        shutil.rmtree(tmp_path / "out")
        evaluate(checkpoint)  # alone, as a process of its own would
        assert [answers(tmp_path / "out" / task) for task in ("colour", "same")] == together[name]


def test_only_what_changed_is_measured_again(
    evaluate: Call, finished: Callable[..., Path], tmp_path: Path, count: list[int]
) -> None:
    from safetensors.torch import load_file, save_file

    adapters = []
    for name in ("01-colour", "02-same"):
        adapters.append(tmp_path / "adapters" / name)
        shutil.copytree(finished() / "stages" / name / "adapter", adapters[-1])
    evaluate(*adapters)
    assert sum(count) == 2 * 2 * 4
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("result.json")}
    evaluate(*adapters)
    assert sum(count) == 2 * 2 * 4  # nothing is generated twice
    weights = adapters[1] / "adapter_model.safetensors"
    save_file({key: value * 2 for key, value in load_file(weights).items()}, weights)
    evaluate(*adapters)
    assert sum(count) == 2 * 2 * 4 + 2 * 4
    changed = {path.parent.parent.name for path, stamp in before.items() if path.stat().st_mtime_ns != stamp}
    assert changed == {"02-same"}
    evaluate(*adapters, "--gen_kwargs", "num_beams=2")
    assert sum(count) == 2 * (2 * 2 * 4) + 2 * 4


def test_a_raising_model_ends_with_another_exit_code(
    evaluate: Call, fixture_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = engine.Engine._generated

    def greedy(self: Any, rows: Any, inputs: dict[str, Any]) -> list[str]:
        if inputs["pixel_values"][:, 0].mean() > inputs["pixel_values"][:, 2].mean():
            raise RuntimeError("red is too much")
        return whole(self, rows, inputs)

    monkeypatch.setattr(engine.Engine, "_generated", greedy)
    outcome = evaluate(fixture_folder, "--batch_size", "1", tasks="colour", code=1)
    assert "failed: " in outcome.err
    assert "colour: 2 rows could not be answered (colour-test-0, colour-test-2)" in outcome.err
    assert "red is too much" in outcome.err
    content = result(tmp_path / "out" / "colour")
    assert (content["score"], content["n_failed"]) == (None, 2)
    evaluate(fixture_folder, "--batch_size", "1", "--allow_failures", tasks="colour")
    assert result(tmp_path / "out" / "colour")["n"] == 2
    monkeypatch.setattr(engine.Engine, "_generated", whole)
    evaluate(fixture_folder, "--batch_size", "1", tasks="colour")
    assert result(tmp_path / "out" / "colour")["n"] == 4


def test_limit_offset_and_samples(evaluate: Call, fixture_folder: Path, tmp_path: Path) -> None:
    evaluate(fixture_folder, "--limit", "0.5", "--offset", "1", "--log_samples", tasks="same")
    lines = [json.loads(line) for line in (tmp_path / "out" / "same" / "samples.jsonl").read_text().split("\n")[:-1]]
    assert [line["doc"]["id"] for line in lines] == ["same-test-1", "same-test-2"]
    assert lines[0]["target"] == ["no"]


def test_predictions_now_scores_later(evaluate: Call, call: Call, fixture_folder: Path, tmp_path: Path) -> None:
    outcome = evaluate(fixture_folder, "--predict_only", tasks="same")
    assert "predictions only" in outcome.out
    scored = call("evaluate", "score", tmp_path / "out", "--metric", "pope:llava", "--output_path", tmp_path / "scores")
    assert scored.code == 0, scored.err
    assert "llava" in scored.out
    assert json.loads((tmp_path / "scores" / "same" / "pope_llava-llava-1.json").read_text())["n"] == 4


def test_model_args_name_the_checkpoint(
    evaluate: Call, finished: Callable[..., Path], fixture_folder: Path, tmp_path: Path
) -> None:
    adapter = finished() / "stages" / "02-same" / "adapter"
    evaluate("--model", "hf", "--model_args", f"pretrained={fixture_folder},peft={adapter}", tasks="same")
    by_args = answers(tmp_path / "out" / "same")
    evaluate(adapter, tasks="same")
    assert answers(tmp_path / "out" / "same") == by_args


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--gen_kwargs", "num_beam=2"), "did you mean 'num_beams'?"),
        (("--gen_kwargs", "num_beams=two"), "is no int"),
        (("--gen_kwargs", "num_beams=0"), "num_beams=0 has to be at least 1"),
        (("--gen_kwargs", "max_new_tokens=0"), "max_new_tokens=0 has to be at least 1"),
        (("--gen_kwargs", "do_sample=true,top_p=2"), "top_p=2 has to be between 0 and 1"),
        (("--profile", "lava"), "there is no profile 'lava'"),
        (("--offset", "100"), "choose a smaller --offset than 100"),
        (("--gen_kwargs", "length_penalty=nan"), "length_penalty=nan is no finite number"),
        (("--gen_kwargs", "repetition_penalty=0"), "repetition_penalty=0 has to be above 0"),
        (("--gen_kwargs", "until=###|"), "until has an empty stop string"),
        (("--limit", "1.5"), "neither a number of rows nor a share"),
        (("--limit", "inf"), "neither a number of rows nor a share"),
        (("--limit", "nan"), "neither a number of rows nor a share"),
        (("--batch_size", "²"), "neither `auto` nor a number of rows"),
        (("--seed", str(2**64)), "does not fit into 64 bits"),
        (("--model", "sglang"), "'sglang' is not known; `hf` and `vllm` are"),
        (("--num_fewshot", "3"), "only 0 is possible"),
        (("--model_args", "dtype=float16"), "put other settings into a recipe"),
        (("--device", "tpu"), "only `cpu` and `cuda`"),
        (("--use_cache", "x"), "answers are kept in --output_path"),
        (("--include_path=x",), "name your own tasks with --stream"),
        (("--metric", "exact_matches"), "did you mean 'exact_match'?"),
        (("--metric", "exact_match", "--predict_only"), "cannot be given with --predict_only"),
        (("--verbosity", "loud"), "is none of DEBUG"),
    ],
)
def test_flags_that_cannot_be(evaluate: Call, fixture_folder: Path, more: tuple[str, ...], message: str) -> None:
    outcome = evaluate(fixture_folder, *more, tasks="same", code=2)
    assert message in " ".join(outcome.err.replace("│", " ").split())


def test_scores_are_written_when_all_could_be_computed(call: Call, tmp_path: Path) -> None:
    line = {"id": "a", "prediction": "x", "references": ["x"]}
    for name, content in (("good", line), ("bad", {**line, "prediction": None})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "predictions.jsonl").write_text(json.dumps(content) + "\n", encoding="utf-8")
    flags = ("--metric", "exact_match", "--output_path", tmp_path / "out")
    outcome = call("evaluate", "score", tmp_path / "good", tmp_path / "bad", *flags)
    assert outcome.code == 2
    assert "line 1: prediction is None" in outcome.err
    assert not (tmp_path / "out").exists()
    assert call("evaluate", "score", tmp_path / "good", *flags).code == 0
    assert [path.name for path in (tmp_path / "out").rglob("*.json")] == ["exact_match-strict-2.json"]


def test_the_likeliest_choice_has_its_own_name(evaluate: Call, fixture_folder: Path, tmp_path: Path) -> None:
    more = ("--apply_chat_template", "--verbosity", "ERROR")
    evaluate(fixture_folder, "--metric", "choice_likelihood", *more, tasks="same")
    content = result(tmp_path / "out" / "same")
    assert (content["metric"], content["scorer"]) == ("choice_likelihood", "choice_likelihood/strict/1")
    assert set(answers(tmp_path / "out" / "same")) <= {"Yes", "No"}
    outcome = evaluate(fixture_folder, "--metric", "choice_likelihood", tasks="colour", code=1)
    assert "choice_likelihood has nothing to choose from" in outcome.err


def test_a_system_instruction_is_part_of_the_key(evaluate: Call, fixture_folder: Path, tmp_path: Path) -> None:
    keys = set()
    for more in ((), ("--system_instruction", "Be short."), ("--system_instruction", "Be long.")):
        evaluate(fixture_folder, *more, tasks="same")
        keys.add(result(tmp_path / "out" / "same")["key"])
    assert len(keys) == 3


def test_a_benchmark_for_a_judge(evaluate: Call, fixture_folder: Path, tmp_path: Path) -> None:
    outcome = evaluate(fixture_folder, tasks="colours", code=2)
    assert "did you mean 'colour'?" in outcome.err


@pytest.mark.parametrize("what", ["tasks", "scorers", "profiles"])
def test_ls(call: Call, what: str) -> None:
    outcome = call("evaluate", "ls", what)
    assert outcome.code == 0
    assert {"tasks": "pope-random", "scorers": "vqav2_official", "profiles": "mllm_cl"}[what] in outcome.out
