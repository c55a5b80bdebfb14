"""The protocol: teach one task after another and measure what is kept. Read this file first.

`run_stream` is one visible loop. Everything it completes is written down in the ledger before the next thing starts, so the same
command after a kill continues: finished stages are loaded, an unfinished one resumes from its last checkpoint, finished cells
are read from disk.
"""

from __future__ import annotations

import resource
import shutil
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator, PartialState


from mllm_cl.data.rows import Row
from mllm_cl.errors import StreamError
from mllm_cl.evaluation.cell import CellResult, cell_key, evaluate_cell
from mllm_cl.evaluation.engine import GenerationSettings
from mllm_cl.evaluation.matrix import AccuracyMatrix, stage_name
from mllm_cl.files import folder_bytes, folder_sha256, new_folder
from mllm_cl.methods import Method
from mllm_cl.models.load import base_fingerprint, load_from_section
from mllm_cl.recipe import Recipe
from mllm_cl.streams import Stream, Task, load_benchmark, stream_of_section
from mllm_cl.streams.validate import ensure_valid
from mllm_cl.training.arguments import training_arguments
from mllm_cl.training.capabilities import build_methods, check_lora
from mllm_cl.training.checkpoint import last_checkpoint
from mllm_cl.training.learner import Learner
from mllm_cl.training.ledger import Ledger
from mllm_cl.training.progress import Progress, Silent, StepProgress
from mllm_cl.training.run_folder import RunFolder, environment, open_run
from mllm_cl.training.trainer import ContinualTrainer


def run_stream(recipe: Recipe, progress: Progress | None = None) -> RunFolder:
    """Runs a recipe from its beginning, or from where an interrupted run of it stopped.

    Args:
        recipe: what to run; `recipe.output_dir` is where.
        progress: where progress is shown; nowhere by default.

    Returns:
        the folder with the matrix, the adapters of every stage and the ledger.

    Raises:
        MllmClError: the recipe, the stream, the model or the folder cannot be used.
    """
    methods = build_methods(recipe)
    stream = stream_of_section(recipe.stream)
    ensure_valid(stream)
    run = Run(recipe, stream, methods, progress or Silent())

    run.measure(stage=0)
    for stage, task in enumerate(stream, start=1):
        run.learn(stage, task)
        run.measure(stage)

    run.complete()
    return run.folder


class Run:
    """One execution of a recipe: what the loop above calls."""

    def __init__(self, recipe: Recipe, stream: Stream, methods: Sequence[Method], progress: Progress) -> None:
        self.recipe, self.stream, self.progress = recipe, stream, progress
        self.state = PartialState(cpu=not torch.cuda.is_available())
        general = {name: load_benchmark(name) for name in recipe.evaluation.general}
        self.general = {name: _limited(rows, recipe) for name, rows in general.items()}
        self.tasks = [task.name for task in stream]
        self.folder = open_run(recipe, writable=self.state.is_main_process)
        self.state.wait_for_everyone()
        self.ledger = Ledger(self.folder.ledger, writable=self.state.is_main_process)
        self.state.wait_for_everyone()
        with progress.waiting("loading the model"):
            model, self.processor = load_from_section(recipe.model)
        self.base = base_fingerprint(model)
        self._check_ledger()
        section = recipe.model
        self.learner = Learner(
            model,
            self.processor,
            methods,
            check_lora(section.lora),
            seed=recipe.seed,
            policy=section.adapters,
            max_rank=section.max_rank,
            bridge=section.train_bridge,
            vision=section.train_vision,
        )
        self.learner.model.to(self.state.device)
        self.matrix = AccuracyMatrix(
            tasks=self.tasks,
            metric=[task.metric for task in stream],
            general_names=list(self.general),
            run={"name": recipe.name, "methods": [method.name for method in methods], **environment(recipe)},
        )
        self._restore()

    # one task --------------------------------------------------------------------------------------------------------

    def learn(self, stage: int, task: Task) -> None:
        """Trains a task and writes its stage, unless the ledger says that this has been done."""
        if stage <= self.learner.stage:
            return
        folder = self.folder.stage(self._name(stage))
        seed = (self.recipe.seed * 1_000_003 + stage) % 2**32
        args = training_arguments(self.recipe.training, folder / "checkpoints", seed)
        trainer = ContinualTrainer(args=args, task=task, stream=self.stream, learner=self.learner)
        trained = trainer.rows > 0
        facts: dict[str, Any] = {"trainable_parameters": self.learner.parameters(), "train_rows": trainer.rows}
        started = time.perf_counter()
        if trained:
            with self.progress.bar(f"{self._name(stage)}: training", trainer.rows) as advance:
                trainer.add_callback(StepProgress(advance, args, trainer.rows))
                checkpoint = last_checkpoint(folder / "checkpoints")
                self.state.wait_for_everyone()
                output = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            facts |= {"steps": output.global_step, "train_loss": output.training_loss}
        else:
            self.learner.end_task(trainer.ctx)
        facts |= {
            "trained": trained,
            "seconds": round(time.perf_counter() - started, 3),
            "peak_memory_mib": peak_memory_mib(),
            "truncation_error": self.learner.truncation_error,
            "tokens": trainer.state.num_input_tokens_seen,
            **trainer.ctx.cost,
        }
        del trainer
        if self.state.is_main_process:
            with new_folder(folder / "adapter") as place:
                self.learner.save_adapters(place)
            with new_folder(folder / "method") as place:
                self.learner.save_states(place)
            facts["stored_bytes"] = folder_bytes(folder / "adapter") + folder_bytes(folder / "method")
        self.state.wait_for_everyone()
        sha256 = folder_sha256(folder / "adapter")
        self.ledger.append("stage_trained", stage=stage, task=task.name, adapter_sha256=sha256, **facts)
        if self.state.is_main_process:
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)

    # one row of the matrix ---------------------------------------------------------------------------------------------

    def measure(self, stage: int) -> None:
        """Measures the tasks that this stage's row asks for, and the general benchmarks."""
        entry = self.ledger.find("stage_trained", stage=stage) if stage else {"adapter_sha256": "base", "trained": True}
        if entry is None or not entry["trained"] or (stage == 0 and not self.recipe.evaluation.stage_zero):
            return
        for name in self._measured_tasks(stage):
            task = self.stream[name]
            rows = task.test if self.recipe.evaluation.split == "test" else task.validation
            result = self._cell(stage, name, rows, task.metric, task.max_new_tokens, entry["adapter_sha256"], name)
            self.matrix.set(stage, name, result.score, result.stderr, result.n)
        for name, rows in self.general.items():
            result = self._cell(stage, name, rows, "exact_match", None, entry["adapter_sha256"], None)
            self.matrix.set_general(stage, name, result.score, result.stderr, result.n)
        if self.state.is_main_process:
            self.matrix.write(self.folder.root)

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
        rows_key = f"{self.stream.fingerprint}/{section.split}/{name}/{len(rows)}"
        key = cell_key(self.processor, rows_key, f"{self.base}/{weights}", metric, settings)
        folder = self.folder.cell(self._name(stage), name)
        route = None
        if self.learner.routes():
            current = self.stream[max(stage, 1) - 1]
            route = self.learner.router(self.learner.context(current, self.stream, Accelerator()), task)
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
            self.ledger.append(
                "cell", stage=stage, task=name, score=result.score, n=result.n, seconds=result.seconds, key=key
            )
        return result

    def complete(self) -> None:
        """Writes the matrix a last time and marks the run as complete."""
        if self.state.is_main_process:
            self.matrix.write(self.folder.root)
        if self.ledger.find("run_complete") is None:
            self.ledger.append("run_complete", peak_memory_mib=peak_memory_mib())

    # continuing --------------------------------------------------------------------------------------------------------

    def _restore(self) -> None:
        """Loads the last stage that the ledger says is complete. Stages after it are done again."""
        done = [entry["stage"] for entry in self.ledger.entries if entry["event"] == "stage_trained"]
        if done:
            stage = max(done)
            folder = self.folder.stage(self._name(stage))
            self.learner.load_stage(folder / "adapter", folder / "method", stage)

    def _check_ledger(self) -> None:
        """A run belongs to one stream and one base model."""
        facts = {"stream_fingerprint": self.stream.fingerprint, "base_fingerprint": self.base, "tasks": self.tasks}
        started = self.ledger.find("started")
        if started is None:
            self.ledger.append("started", **facts)
            return
        for name, what in (
            ("stream_fingerprint", "the rows of the stream"),
            ("base_fingerprint", "the weights of the base model"),
        ):
            if started[name] != facts[name]:
                raise StreamError(
                    f"{self.folder.root}: {what} changed since this run was started.",
                    fix="restore them, or start a new run in another output_dir.",
                )

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
