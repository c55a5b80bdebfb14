"""The vLLM backend against a stand-in for vLLM that answers with transformers: vLLM itself is not here."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file

from mllm_cl.errors import EvaluationError
from mllm_cl.evaluation.engine import GenerationSettings
from mllm_cl.evaluation.vllm_engine import rank_for, sampling
from mllm_cl.models.adapters import add_adapter
from mllm_cl.models.load import load_model
from mllm_cl.models.parts import lora_targets
from mllm_cl.training.checkpoint_loading import find_checkpoint
from mllm_cl.training.vllm_checkpoints import check_vllm


@dataclass(frozen=True)
class Request:
    lora_name: str
    lora_int_id: int
    lora_path: str


class Sampling(SimpleNamespace):
    pass


class StandIn:
    """`vllm.LLM` as far as we use it: takes tokens with one placeholder per picture, and expands them itself."""

    made: ClassVar[list[StandIn]] = []
    fail_on: ClassVar[bytes | None] = None

    def __init__(self, model: str, **settings: Any) -> None:
        self.settings, self.requests = settings, []
        self.base, processor = load_model(model)
        self.processor: Any = processor
        self.answering: Any = self.base
        StandIn.made.append(self)

    def generate(self, prompts: Any, params: Any, lora_request: Request | None, use_tqdm: bool) -> list[Any]:
        self.requests.append((lora_request, params, prompts))
        if lora_request is not None and self.answering is self.base:
            assert self.settings["enable_lora"]
            self.answering = PeftModel.from_pretrained(self.base, lora_request.lora_path)
        return [SimpleNamespace(outputs=[SimpleNamespace(text=self._one(prompt, params))]) for prompt in prompts]

    def _one(self, prompt: Any, params: Any) -> str:
        images = prompt.get("multi_modal_data", {}).get("image")
        if images and images[0].tobytes() == StandIn.fail_on:
            raise RuntimeError("made to fail")
        text = self.processor.tokenizer.decode(prompt["prompt_token_ids"], skip_special_tokens=False)
        inputs = self.processor(text=text, images=images, add_special_tokens=False, return_tensors="pt")
        with torch.no_grad():
            tokens = self.answering.generate(**inputs, max_new_tokens=params.max_tokens, do_sample=False)
        return self.processor.tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> type[StandIn]:
    module, lora, request = ModuleType("vllm"), ModuleType("vllm.lora"), ModuleType("vllm.lora.request")
    module.__spec__ = SimpleNamespace(name="vllm")  # type: ignore[assignment]
    module.LLM, module.SamplingParams, request.LoRARequest = StandIn, Sampling, Request  # type: ignore[attr-defined]
    for name, one in (("vllm", module), ("vllm.lora", lora), ("vllm.lora.request", request)):
        monkeypatch.setitem(sys.modules, name, one)
    StandIn.made, StandIn.fail_on = [], None
    return StandIn


def answers(folder: Path) -> dict[str, str]:
    lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    return {line["id"]: line["prediction"] for line in lines}


def test_same_answers_and_scores_as_our_engine(call: Any, finished: Any, tmp_path: Path, vllm: type[StandIn]) -> None:
    run = finished()
    task = sorted(path.name for path in (run / "evaluation").glob("*/*"))[0]
    for model in ("hf", "vllm"):
        outcome = call("evaluate", run, "--model", model, "--tasks", task, "--output_path", tmp_path / model)
        assert outcome.code == 0, outcome.err + outcome.trace
    ours, theirs = (json.loads((tmp_path / model / task / "result.json").read_text()) for model in ("hf", "vllm"))
    assert answers(tmp_path / "vllm" / task) == answers(tmp_path / "hf" / task)
    assert theirs["score"] == ours["score"]
    assert theirs["key"] != ours["key"]
    (llm,) = vllm.made
    assert llm.settings["max_lora_rank"] == 8  # the adapter's 2, and the next that vLLM allows
    assert llm.settings["limit_mm_per_prompt"] == {"image": 1}
    request, params, prompts = llm.requests[0]
    assert Path(request.lora_path) == next(run.glob("stages/02-*")).resolve() / "adapter"
    assert params.temperature == 0.0
    image = llm.processor.tokenizer.convert_tokens_to_ids(llm.processor.image_token)
    assert [prompt["prompt_token_ids"].count(image) for prompt in prompts] == [1] * len(prompts)
    outcome = call("evaluate", run, "--model", "vllm", "--tasks", task, "--output_path", tmp_path / "vllm")
    assert outcome.code == 0
    assert len(vllm.made[-1].requests) == 0, "what is measured is not asked again"


def test_an_adapter_of_the_tiny_llava(call: Any, tmp_path: Path, vllm: type[StandIn]) -> None:
    """Answers that say something, from the base and from an adapter that changes them."""
    model, _ = load_model("tiny-llava")
    adapted = add_adapter(model, "default", LoraConfig(r=4, target_modules=lora_targets(model)), seed=1)
    generator = torch.Generator().manual_seed(0)
    for name, value in adapted.named_parameters():
        if ".lora_B." in name:
            value.data.normal_(0.0, 0.05, generator=generator)
    adapted.save_pretrained(str(tmp_path / "adapter"))
    given = {}
    for checkpoint in ("base", "adapter"):
        for engine in ("hf", "vllm"):
            place = tmp_path / checkpoint if checkpoint == "adapter" else "base"
            output = tmp_path / f"{checkpoint}-{engine}"
            command = (
                "evaluate",
                place,
                "--base_model",
                "tiny-llava",
                "--tasks",
                "quickstart-general",
                "--limit",
                "12",
            )
            outcome = call(*command, "--model", engine, "--output_path", output)
            assert outcome.code == 0, outcome.err + outcome.trace
            given[checkpoint, engine] = answers(output / "quickstart-general")
    assert given["base", "vllm"] == given["base", "hf"]
    assert given["adapter", "vllm"] == given["adapter", "hf"] != given["base", "hf"]
    assert len(set(given["base", "vllm"].values())) > 3
    assert "enable_lora" not in vllm.made[0].settings


def test_several_checkpoints_share_the_base(call: Any, finished: Any, tmp_path: Path, vllm: type[StandIn]) -> None:
    run = finished()
    stages = sorted(run.glob("stages/0*"))
    task = sorted(path.name for path in (run / "evaluation").glob("*/*"))[0]
    outcome = call("evaluate", *stages, "--model", "vllm", "--tasks", task, "--output_path", tmp_path / "out")
    assert outcome.code == 0, outcome.err + outcome.trace
    (llm,) = vllm.made
    assert [request.lora_int_id for request, _, _ in llm.requests] == [1, 2]


def test_a_row_that_fails_is_named(call: Any, finished: Any, tmp_path: Path, vllm: type[StandIn]) -> None:
    run = finished()
    task = sorted(path.name for path in (run / "evaluation").glob("*/*"))[0]
    command = ("evaluate", run, "--model", "vllm", "--tasks", task, "--output_path")
    assert call(*command, tmp_path / "whole").code == 0
    StandIn.fail_on = vllm.made[0].requests[0][2][0]["multi_modal_data"]["image"][0].tobytes()
    outcome = call(*command, tmp_path / "out")
    assert outcome.code == 1
    assert "made to fail" in outcome.err
    result = json.loads((tmp_path / "out" / task / "result.json").read_text())
    assert result["score"] is None
    assert 0 < result["n_failed"] < len(answers(tmp_path / "whole" / task))
    StandIn.fail_on = None
    assert call(*command, tmp_path / "out").code == 0
    assert answers(tmp_path / "out" / task) == answers(tmp_path / "whole" / task)


def test_without_vllm_it_says_so(call: Any, finished: Any, tmp_path: Path) -> None:
    outcome = call("evaluate", finished(), "--model", "vllm", "--tasks", "same", "--output_path", tmp_path / "out")
    assert outcome.code == 2
    assert "vLLM is not installed" in outcome.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--gen_kwargs", "num_beams=3"), "num_beams: vLLM has no such setting"),
        (("--metric", "choice_likelihood"), "needs --model hf"),
        (("--device", "cpu"), "vLLM chooses its devices"),
        (("--tasks", "lmms:mme"), "answered through transformers"),
    ],
)
def test_refused_flags(
    call: Any, finished: Any, tmp_path: Path, vllm: type[StandIn], flags: tuple[str, str], message: str
) -> None:
    command = ("evaluate", finished(), "--model", "vllm", "--tasks", "same", "--output_path", tmp_path / "out", *flags)
    outcome = call(*command)
    assert outcome.code == 2
    assert message in outcome.err.replace("\n", " ")
    assert not vllm.made


def edit(adapter: Path, **settings: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"use_dora": True}, "DoRA"),
        ({"bias": "lora_only"}, "bias: lora_only"),
    ],
)
def test_adapters_that_are_more_than_lora(
    own_run: Path, vllm: type[StandIn], settings: dict[str, Any], message: str
) -> None:
    stage = next(own_run.glob("stages/02-*"))
    edit(stage / "adapter", **settings)
    with pytest.raises(EvaluationError, match=message):
        check_vllm({"run": find_checkpoint(str(stage))})


def test_lora_outside_of_the_language_part(own_run: Path, vllm: type[StandIn]) -> None:
    stage = next(own_run.glob("stages/02-*"))
    check_vllm({"run": find_checkpoint(str(stage))})
    weights = stage / "adapter" / "adapter_model.safetensors"
    state = load_file(weights)
    key = "base_model.model.model.multi_modal_projector.linear_1.lora_A.weight"
    save_file({**state, key: torch.zeros(2, 8), key.replace("_A", "_B"): torch.zeros(8, 2)}, weights)
    with pytest.raises(EvaluationError, match="outside of the language part"):
        check_vllm({"run": find_checkpoint(str(stage))})


def test_routed_runs_are_refused(finished: Any, vllm: type[StandIn]) -> None:
    run = finished({"task_adapters": {"router": "oracle"}})
    with pytest.raises(EvaluationError, match="row by row"):
        check_vllm({"run": find_checkpoint(str(run))})


def test_ranks() -> None:
    assert [rank_for(rank) for rank in (1, 2, 8, 9, 129, 512)] == [1, 8, 8, 16, 256, 512]
    with pytest.raises(EvaluationError, match="rank 513"):
        rank_for(513)


def test_sampling_says_what_our_settings_say() -> None:
    assert sampling(GenerationSettings(max_new_tokens=5)) == {"max_tokens": 5, "temperature": 0.0}
    greedy = GenerationSettings(options=(("temperature", 0.7), ("stop_strings", ("###", "\n")), ("num_beams", 1)))
    assert sampling(greedy) == {"max_tokens": 16, "temperature": 0.0, "stop": ["###", "\n"]}
    drawn = GenerationSettings(options=(("do_sample", True), ("top_p", 0.9)), seed=3)
    assert sampling(drawn) == {"max_tokens": 16, "temperature": 1.0, "top_p": 0.9, "seed": 3}
