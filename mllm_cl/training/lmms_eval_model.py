"""Our checkpoints as a model of lmms-eval: `lmms-eval --model mllm_cl --model_args run=RUN,stage=3 --tasks mme`.

Found through the entry point `lmms_eval.models`. `python -m mllm_cl.training.lmms_eval_model ARGUMENTS` is the command line
of lmms-eval with the model registered and with an exit code that tells a failed run. Only an environment with lmms-eval can
import this file.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from lmms_eval.api.model import lmms  # type: ignore[import-not-found]
from lmms_eval.models.registry_v2 import ModelManifest  # type: ignore[import-not-found]

from mllm_cl.data.rows import Row, user_message
from mllm_cl.errors import EvaluationError, RunError
from mllm_cl.evaluation.engine import GenerationSettings, generate
from mllm_cl.files import write_json
from mllm_cl.training.checkpoint_loading import Found, find_checkpoint, load_checkpoint

DEFAULT_MAX_NEW_TOKENS = 128
OPTIONS = ("do_sample", "temperature", "top_p", "top_k", "num_beams", "repetition_penalty")


def manifest() -> ModelManifest:
    """What the entry point gives to lmms-eval."""
    return ModelManifest("mllm_cl", simple_class_path=f"{MllmCl.__module__}.{MllmCl.__qualname__}")


class MllmCl(lmms):
    """A run, a stage (also one whose methods route), a PEFT adapter or a base model.

    Args:
        run: what `mllm-cl evaluate` takes as CHECKPOINT.
        stage: number of a stage of the run; 0 is the model before the first task, the last one when not given.
        base_model: instead of the one that the checkpoint names.
        provenance: a file that is told which weights were measured.

    Raises:
        MllmClError: the checkpoint cannot be loaded.
    """

    is_simple = True

    def __init__(
        self,
        run: str,
        stage: int | None = None,
        base_model: str | None = None,
        batch_size: str | int = "auto",
        max_batch_size: int | None = None,
        device: str | None = None,
        provenance: str | None = None,
    ) -> None:
        super().__init__()
        state = PartialState(cpu=True) if device == "cpu" else PartialState()
        if state.num_processes > 1:
            raise EvaluationError("lmms-eval was started on several processes.", expected="one process per checkpoint")
        self.found = choose_stage(str(run), stage, base_model)
        self.checkpoint = load_checkpoint(self.found)
        self.checkpoint.activate()
        first = max_batch_size or "auto" if str(batch_size) == "auto" else int(batch_size)
        self.rows_per_batch = first
        if provenance:
            write_json(Path(provenance), {"checkpoint": self.found.label, "weights": self.checkpoint.weights})

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Returns an answer to every request; an error ends the run, no answer is made up."""
        answers = [""] * len(requests)
        rows = [self._row(number, request.args) for number, request in enumerate(requests)]
        groups: dict[GenerationSettings, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(settings_of(request.args[1], self.rows_per_batch), []).append(number)
        model, processor = self.checkpoint.model, self.checkpoint.processor
        for settings, members in groups.items():
            texts = generate(model, processor, [rows[n] for n in members], settings, self.checkpoint.route(None))
            for number, text in zip(members, texts):
                answers[number] = text
        return answers

    def _row(self, number: int, arguments: tuple[Any, ...]) -> Row:
        context, _, doc_to_visual, doc_id, task, split = arguments
        visuals = doc_to_visual(self.task_dict[task][split][doc_id]) or []
        if any(not hasattr(visual, "convert") for visual in visuals):
            raise EvaluationError(f"{task}: row {doc_id} holds something that is no image.", expected="images only")
        images = [visual.convert("RGB") for visual in visuals]
        return {  # type: ignore[return-value]
            "id": f"{task}/{split}/{doc_id}/{number}",
            "messages": [user_message(context, len(images))],
            "images": images,
        }

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        raise NotImplementedError(
            "mllm_cl answers by generation only; choose a task with `output_type: generate_until`"
        )

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        raise NotImplementedError("mllm_cl answers single questions only; choose a task without rounds")

    def clean(self) -> None:
        """Keeps the model: lmms-eval would delete it after each evaluation."""


def choose_stage(run: str, stage: int | None, base_model: str | None) -> Found:
    """Returns the checkpoint of `run=RUN,stage=N`.

    Raises:
        MllmClError: there is no such run or stage.
    """
    if stage is None:
        return find_checkpoint(run, base_model)
    if stage == 0:
        whole = find_checkpoint(run, base_model)
        return Found("base", "base", whole.model, base=whole.base)
    folders = [path for path in Path(run, "stages").glob(f"{stage:02d}-*") if path.is_dir()]
    if len(folders) != 1:
        raise RunError(f"{run}: has no stage {stage}.", expected="a number of its stages", fix="see RUN/stages.")
    return find_checkpoint(str(folders[0]), base_model)


def settings_of(given: dict[str, Any], rows_per_batch: int | str) -> GenerationSettings:
    """Returns the settings of a request; greedy unless it asks for sampling."""
    options = {name: given[name] for name in OPTIONS if given.get(name) is not None}
    if not options.get("do_sample") or options.get("temperature") == 0:
        options = {name: value for name, value in options.items() if name in ("num_beams", "repetition_penalty")}
    stops = given.get("until") or ()
    stops = tuple(stop for stop in ([stops] if isinstance(stops, str) else stops) if stop)
    if stops:
        options["stop_strings"] = stops
    longest = int(given.get("max_new_tokens") or DEFAULT_MAX_NEW_TOKENS)
    return GenerationSettings(longest, rows_per_batch, options=tuple(sorted(options.items())))


def main() -> None:
    """lmms-eval's command line with our model; a failed run ends with exit code 1."""
    from lmms_eval.__main__ import cli_evaluate  # type: ignore[import-not-found]
    from lmms_eval.models import MODEL_REGISTRY_V2  # type: ignore[import-not-found]

    path = "mllm_cl.training.lmms_eval_model.MllmCl"
    MODEL_REGISTRY_V2.register_manifest(ModelManifest("mllm_cl", simple_class_path=path), overwrite=True)
    if "--verbosity" not in sys.argv:
        sys.argv += ["--verbosity", "DEBUG"]  # with any other, errors are printed and swallowed
    cli_evaluate()


if __name__ == "__main__":
    main()
