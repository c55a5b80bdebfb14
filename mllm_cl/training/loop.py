"""The protocol: teach one task after another and measure what is kept. Read this file first.

`run_stream` is one visible loop. Everything it completes is written down in the ledger before the next thing starts, so the same
command after a kill continues: finished stages and cells are read from disk when they are needed, an unfinished stage resumes
from its last checkpoint, an unfinished cell after its last batch.
"""

from __future__ import annotations

import gc
import resource
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from transformers import PreTrainedModel, PrinterCallback

from mllm_cl.data.builders import BENCHMARKS
from mllm_cl.data.rows import Row
from mllm_cl.errors import RunError, StreamError
from mllm_cl.evaluation.cell import CellResult, cell_key, evaluate_cell, read_result
from mllm_cl.evaluation.drift import measure_drift, open_inquiries
from mllm_cl.evaluation.engine import GenerationSettings, Route
from mllm_cl.evaluation.matrix import AccuracyMatrix, stage_name
from mllm_cl.files import explained, folder_bytes, folder_sha256, new_folder, remove, remove_unfinished
from mllm_cl.methods import Method
from mllm_cl.model_section import AUTO
from mllm_cl.models.extra_parameters import attached
from mllm_cl.models.load import base_fingerprint, config_of_section, load_from_section
from mllm_cl.recipe import Recipe
from mllm_cl.streams import Stream, Task, load_benchmark, stream_of_section
from mllm_cl.streams.fingerprint import digest_rows
from mllm_cl.streams.validate import ensure_valid
from mllm_cl.training.arguments import runs_on_cpu, training_arguments
from mllm_cl.training.budget import check_stored, check_trainable, fitting_rank, fitting_steps
from mllm_cl.training.capabilities import PROBE_RANK, build_methods, check_stream
from mllm_cl.training.checkpoint import last_checkpoint
from mllm_cl.training.flops import Work
from mllm_cl.training.launchers import check_layers, hidden_from_accelerate, launcher
from mllm_cl.training.learner import Learner
from mllm_cl.training.ledger import Ledger
from mllm_cl.training.progress import Progress, Silent, StepProgress
from mllm_cl.training.run_folder import RunFolder, claimed, environment, start_run
from mllm_cl.training.seeds import derived_seed
from mllm_cl.training.trainer import ContinualTrainer
from mllm_cl.training.zero import STAGES, zero_section

COUNTED_ROWS = ("inquiry_rows", "memory_rows", "reference_rows")
"""Rows beside those of the task, as methods count them in `ctx.cost`."""
AfterStage = Callable[[Path, int], str | None]
"""Run folder and stage -> where the stage went, or `None` if it went nowhere and is to be offered again."""


def run_stream(recipe: Recipe, progress: Progress | None = None, after_stage: AfterStage | None = None) -> RunFolder:
    """Runs a recipe from its beginning, or from where an interrupted run of it stopped.

    Args:
        recipe: what to run; `recipe.output_dir` is where.
        progress: where progress is shown; nowhere by default.
        after_stage: called once with every trained stage after it has been measured; give it to the main process only.

    Returns:
        the folder with the matrix, the adapters of every stage and the ledger.

    Raises:
        MllmClError: the recipe, the stream, the model or the folder cannot be used.
    """
    progress = progress or Silent()
    methods = build_methods(recipe)
    with progress.waiting("reading the rows"):
        stream = stream_of_section(recipe.stream)
        check_stream(recipe, stream)
        ensure_valid(stream)
    started = launcher(recipe.training)
    with hidden_from_accelerate(), claimed(recipe) as folder:
        run = Run(recipe, folder, stream, methods, progress, started)

        run.measure(stage=0)
        for stage, task in enumerate(stream, start=1):
            run.learn(stage, task)
            run.measure(stage)
            run.hand_over(stage, after_stage)

        run.complete()
    return folder


class Run:
    """One execution of a recipe: what the loop above calls."""

    def __init__(
        self,
        recipe: Recipe,
        folder: RunFolder,
        stream: Stream,
        methods: Sequence[Method],
        progress: Progress,
        started: str,
    ) -> None:
        self.recipe, self.folder, self.stream, self.progress = recipe, folder, stream, progress
        self.state = PartialState(cpu=runs_on_cpu(recipe.training))
        self.tasks = [task.name for task in stream]
        general = {name: load_benchmark(name, recipe.evaluation.split) for name in recipe.evaluation.general}
        self.general = {name: _limited(rows, recipe) for name, rows in general.items()}
        self.ledger = Ledger(self.folder.ledger, writable=self.state.is_main_process)
        self._check_ledger("stream_fingerprint", stream.fingerprint, "the rows of the stream")
        check_layers(config_of_section(recipe.model), started)
        with progress.waiting("loading the model"):
            model, self.processor = load_from_section(recipe.model)
        self.base = base_fingerprint(model)
        self._check_ledger("base_fingerprint", self.base, "the weights of the base model")
        self._check_processes()
        ranked = recipe.model.with_rank(self._rank(model))
        self.learner = Learner.from_recipe(recipe.model_copy(update={"model": ranked}), model, self.processor, methods)
        self.learner.model.to(self.state.device)
        if started == "fsdp2":
            self.learner.shard()
        self.learner.zero = zero_section(recipe.training, started) if started in STAGES else None
        self.matrix = AccuracyMatrix(
            tasks=self.tasks,
            metric=[task.metric for task in stream],
            general_names=list(self.general),
            general_metric=[BENCHMARKS[name].metric or "" for name in self.general],
            run={"name": recipe.name, "methods": [method.name for method in methods], **environment(recipe)},
        )
        self._start()

    # one task --------------------------------------------------------------------------------------------------------

    def learn(self, stage: int, task: Task) -> None:
        """Trains a task and writes its stage, unless the ledger says that this has been done."""
        if self._trained(stage):
            return
        self._stand_at(stage - 1)
        name, started = self._name(stage), time.perf_counter()
        checkpoints = self.folder.stage(name) / "checkpoints"
        with explained(checkpoints):
            checkpoints.mkdir(parents=True, exist_ok=True)
        section = self.recipe.training if self.learner.zero is None else self.recipe.training | {"save_strategy": "no"}
        args = training_arguments(section, checkpoints, derived_seed(self.recipe.seed, "training", stage))
        with Work(self.learner.model.get_base_model()) as work:  # type: ignore[arg-type]
            with self.progress.waiting(f"{name}: preparing"):
                trainer = ContinualTrainer(args=args, task=task, stream=self.stream, learner=self.learner)
                work.move_to(trainer.ctx.cost)
                self._hold_to_budget(stage, trainer)
            trainer.remove_callback(PrinterCallback)  # prints dictionaries between the progress bars
            facts: dict[str, Any] = {
                "trained": trainer.rows > 0,
                "trainable_parameters": self.learner.parameters(),
                "train_rows": trainer.rows,
                **dict.fromkeys(COUNTED_ROWS, 0),
            }
            checkpoint = last_checkpoint(checkpoints)
            with self.progress.bar(f"{name}: training", trainer.rows) as advance:
                trainer.add_callback(StepProgress(advance, trainer.rows))
                trainer.add_callback(work)
                output = trainer.train(resume_from_checkpoint=checkpoint)
        facts |= {
            "steps": output.global_step,
            "resumed_at_step": int(checkpoint.rpartition("-")[2]) if checkpoint else 0,
            "train_loss": output.training_loss,
            "seconds": round(time.perf_counter() - started, 3),
            "peak_memory_mib": peak_memory_mib(),
            "truncation_error": self.learner.truncation_error,
            "tokens": trainer.state.num_input_tokens_seen,
            **work.facts(output.global_step * args.gradient_accumulation_steps),
        }
        del trainer
        gc.collect()  # a trainer is part of reference cycles; its optimizer and DDP wrapper must not outlive the task
        self._write_stage(stage, task, facts)

    def _hold_to_budget(self, stage: int, trainer: ContinualTrainer) -> None:
        """Checks the rank of the first task, or sets the steps of each; a resumed stage keeps those it was started with."""
        budget = self.recipe.budget
        if stage == 1:
            extra = sum(own.numel() for own in attached(self.learner.model).values())
            check_trainable(budget, self.learner.parameters(), self.learner.lora.r, extra)
        if budget is None or budget.kind != "flops" or not trainer.rows:
            return
        planned = self.ledger.find("budget", stage=stage)
        if planned is None:
            before = [entry for entry in map(self._trained, range(1, stage)) if entry is not None]
            steps, prepared = fitting_steps(budget, trainer, before)
            planned = {"steps": steps, "flops": prepared}
            self.ledger.append("budget", stage=stage, **planned)
        trainer.args.max_steps = planned["steps"]
        trainer.ctx.cost["flops"] = (
            planned["flops"] if self.state.is_main_process else 0
        )  # the ledger adds processes up

    def _write_stage(self, stage: int, task: Task, facts: dict[str, Any]) -> None:
        folder = self.folder.stage(self._name(stage))
        if self.state.is_main_process:
            with new_folder(folder / "adapter") as place:
                self.learner.save_adapters(place)
            with new_folder(folder / "method") as place:
                self.learner.save_states(place)
        self.state.wait_for_everyone()
        facts["stored_bytes"] = folder_bytes(folder / "adapter") + folder_bytes(folder / "method")
        check_stored(self.recipe.budget, facts["stored_bytes"], self._name(stage))
        hashes = {f"{part}_sha256": folder_sha256(folder / part) for part in ("adapter", "method")}
        self.ledger.append("stage_trained", stage=stage, task=task.name, **hashes, **facts)
        if self.state.is_main_process:
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)

    # one row of the matrix ---------------------------------------------------------------------------------------------

    def measure(self, stage: int) -> None:
        """Measures the tasks that this stage's row asks for, and the general benchmarks."""
        entry = self._trained(stage) if stage else {"adapter_sha256": "base", "trained": True}
        if entry is None or not entry["trained"] or (stage == 0 and not self.recipe.evaluation.stage_zero):
            return
        weights, split = entry["adapter_sha256"], self.recipe.evaluation.split
        for name in self._measured_tasks(stage):
            task = self.stream[name]
            rows = task.test if split == "test" else task.validation
            rows_key = f"{self.stream.fingerprint}/{split}/{name}"
            result = self._cell(stage, name, rows, rows_key, task.metric, task.max_new_tokens, weights, name)
            self.matrix.set(stage, name, result.score, result.stderr, result.n)
        for name, rows in self.general.items():
            rows_key = f"{digest_rows(rows)}/{name}"
            entry = BENCHMARKS[name]
            metric = entry.metric or ""  # those without one were refused
            result = self._cell(stage, name, rows, rows_key, metric, entry.max_new_tokens, weights, None)
            self.matrix.set_general(stage, name, result.score, result.stderr, result.n)
        self._measure_drift(stage)
        self._write_matrix()

    def _measure_drift(self, stage: int) -> None:
        count = self.recipe.evaluation.drift
        if not count or self.ledger.find("drift", stage=stage, n=count) is not None:
            return
        self._stand_at(stage)
        with self.progress.waiting(f"{self._name(stage)}: drift probes"):
            inquiries = open_inquiries(self.stream, count)
            found = measure_drift(self.learner.model, self.processor, inquiries, self._route(stage, None))
        self.ledger.append("drift", stage=stage, **asdict(found))

    def _measured_tasks(self, stage: int) -> list[str]:
        if stage == 0 or self.recipe.evaluation.tasks == "all":
            return self.tasks
        if any(method.measures == "current" for method in self.learner.methods):
            return [self.tasks[stage - 1]]
        return self.tasks[:stage]

    def _cell(
        self,
        stage: int,
        name: str,
        rows: Sequence[Row],
        rows_key: str,
        metric: str,
        max_new_tokens: int | None,
        weights: str,
        task: str | None,
    ) -> CellResult:
        section = self.recipe.evaluation
        settings = GenerationSettings(
            max_new_tokens=max_new_tokens or section.max_new_tokens,
            batch_size=section.batch_size,
            num_workers=section.num_workers,
        )
        key = cell_key(self.processor, rows_key, f"{self.base}/{weights}", metric, settings)
        folder = self.folder.cell(self._name(stage), name)
        route = None
        if read_result(folder, key) is None:
            self._stand_at(stage)
            route = self._route(stage, task)
        with self.progress.bar(f"{self._name(stage)}: evaluating {name}", len(rows)) as advance:
            result = evaluate_cell(
                self.learner.model,
                self.processor,
                rows,
                folder=folder,
                stage=self._name(stage),
                task=name,
                metric=metric,
                settings=settings,
                key=key,
                route=route,
                advance=advance,
            )
        if self.ledger.find("cell", stage=stage, task=name, key=key) is None:
            facts = {"score": result.score, "n": result.n, "seconds": result.seconds}
            self.ledger.append("cell", stage=stage, task=name, **facts, key=key)
        return result

    def _route(self, stage: int, task: str | None) -> Route | None:
        if not self.learner.routes():
            return None
        current = self.stream[max(stage, 1) - 1]
        return self.learner.router(self.learner.context(current, self.stream, Accelerator()), task)

    def hand_over(self, stage: int, after_stage: AfterStage | None) -> None:
        """Gives a stage to whoever publishes it, unless the ledger says where it went."""
        entry = self._trained(stage)
        if after_stage is None or entry is None or not entry["trained"] or self.ledger.find("published", stage=stage):
            return
        place = after_stage(self.folder.root, stage)
        if place is not None:
            self.ledger.append("published", stage=stage, place=place)

    def complete(self) -> None:
        """Writes the matrix a last time and marks the run as complete."""
        self._write_matrix()
        if self.ledger.find("run_complete") is None:
            self.ledger.append("run_complete", peak_memory_mib=peak_memory_mib())

    def _write_matrix(self) -> None:
        if self.state.is_main_process:
            self.matrix.write(self.folder.root)

    # continuing --------------------------------------------------------------------------------------------------------

    def _check_ledger(self, key: str, value: str, what: str) -> None:
        """A run belongs to one stream and one base model."""
        started = self.ledger.find("started")
        if started is not None and started[key] != value:
            raise StreamError(
                f"{self.folder.root}: {what} changed since this run was started.",
                fix="restore them, or start a new run in another output_dir.",
            )

    def _check_processes(self) -> None:
        """The global batch grows with the processes, so what is left to train must be trained by as many as before."""
        started, now = self.ledger.find("started"), self.state.num_processes
        if started is not None and started["processes"] != now and not self._trained(len(self.tasks)):
            raise RunError(
                f"{self.folder.root}: was started with {started['processes']} process(es), now there are {now}.",
                expected="the same number: the global batch, and with it the result, depends on it",
                fix="continue with as many processes, or start a new run in another output_dir.",
            )

    def _rank(self, model: PreTrainedModel) -> int:
        """The rank that `auto` stands for in this run."""
        if self.recipe.model.lora.get("r") != AUTO:
            return PROBE_RANK
        started = self.ledger.find("started")
        return started["rank"] if started else fitting_rank(self.recipe, self.stream, model, self.processor)

    def _start(self) -> None:
        """The first thing that writes: recipe, environment, ledger; what a killed process left half done is removed."""
        if self.state.is_main_process:
            start_run(self.folder, self.recipe)
            with explained(self.folder.root):
                remove_unfinished(self.folder.root)
                for stage in range(1, len(self.tasks) + 1):
                    if self._trained(stage):
                        remove(self.folder.stage(self._name(stage)) / "checkpoints")
        self.state.wait_for_everyone()
        if self.ledger.find("started") is None:
            facts = {"stream_fingerprint": self.stream.fingerprint, "base_fingerprint": self.base, "tasks": self.tasks}
            self.ledger.append("started", **facts, processes=self.state.num_processes, rank=self.learner.lora.r)

    def _trained(self, stage: int) -> dict[str, Any] | None:
        return self.ledger.find("stage_trained", stage=stage)

    def _stand_at(self, stage: int) -> None:
        """Makes the learner what it was at the end of a stage; stages are only ever gone through forwards."""
        if self.learner.stage == stage:
            return
        folder, entry = self.folder.stage(self._name(stage)), self._trained(stage)
        for part in ("adapter", "method"):
            key = f"{part}_sha256"  # not of methods in runs that an older version started
            if entry is None or (key in entry and folder_sha256(folder / part) != entry[key]):
                raise RunError(
                    f"{folder / part}: is not what the ledger says this stage has learnt.",
                    expected="the folder as it was saved",
                    fix="restore it, or start a new run in another output_dir.",
                )
        self.learner.load_stage(folder / "adapter", folder / "method", stage)

    def _name(self, stage: int) -> str:
        return stage_name(stage, self.tasks)


def _limited(rows: Sequence[Row], recipe: Recipe) -> Sequence[Row]:
    """A limit on test rows holds for general benchmarks too: every k-th row, so that all kinds stay in."""
    limit = recipe.stream.limit
    count = limit.get("test") if isinstance(limit, dict) else limit
    if count is None or count >= len(rows):
        return rows
    return [rows[index * len(rows) // count] for index in range(count)]


def peak_memory_mib() -> float:
    """Returns the peak memory of this process: of the device when there is one, else resident memory."""
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 2**20, 1)
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 1)


__all__ = ["Run", "run_stream"]
