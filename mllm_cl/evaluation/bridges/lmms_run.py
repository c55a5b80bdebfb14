"""Runs lmms-eval on one of our checkpoints in its own environment and copies what it wrote into our result schema.

lmms-eval ends with exit code 0 also when a run has failed, so only complete results count. It writes into a temporary folder; the
results appear in the output folder when all of them could be read.
"""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mllm_cl.errors import EvaluationError
from mllm_cl.evaluation.bridges.lmms_environment import LmmsEnvironment
from mllm_cl.evaluation.bridges.lmms_results import Outcome, read_outcomes, write_outcomes
from mllm_cl.files import explained

PREFIX = "lmms:"
LAUNCHER = "mllm_cl.training.lmms_eval_model"
_LAST_LINES = 15


@dataclass(frozen=True)
class LmmsOptions:
    """What is handed to lmms-eval's command line.

    Args:
        gen_kwargs: as the user wrote it.
        include_path: a folder with tasks of one's own.
    """

    batch_size: str = "auto"
    limit: int | float | None = None
    offset: int = 0
    seed: int = 0
    gen_kwargs: str | None = None
    include_path: Path | None = None
    device: str | None = None


def run_lmms_eval(
    environment: LmmsEnvironment,
    checkpoint: str,
    tasks: Sequence[str],
    output: Path,
    options: LmmsOptions,
    *,
    stage: str,
    base_model: str | None = None,
) -> list[Outcome]:
    """Measures a checkpoint on tasks of lmms-eval and writes `output/lmms-TASK/{predictions.jsonl,result.json}`.

    Args:
        checkpoint: what `mllm-cl evaluate` takes.
        tasks: names that lmms-eval knows, without a prefix.
        stage: what results call the checkpoint.

    Raises:
        EvaluationError: lmms-eval crashed, or results are missing or incomplete; nothing is written then.
        RunError: the folder cannot be written.
    """
    given = {"run": _absolute(checkpoint), **({"base_model": _absolute(base_model)} if base_model else {})}
    if options.device:
        given["device"] = options.device
    for value in given.values():
        if "," in value or "=" in value:
            raise EvaluationError(
                f"{value}: lmms-eval cannot be given a name with `,` or `=`.", fix="use a path without."
            )
    with explained(output):
        output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output, prefix=".lmms-eval-") as folder:
        scratch = Path(folder)
        given["provenance"] = str((scratch / "provenance.json").resolve())
        command = [str(environment.python), "-m", LAUNCHER, *_flags(given, tasks, scratch / "out", options)]
        started = time.perf_counter()
        log = scratch / "log.txt"
        with log.open("w", encoding="utf-8") as file:
            code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
        try:
            if code:
                raise EvaluationError(f"lmms-eval ended with exit code {code}.")
            seconds = round(time.perf_counter() - started, 3)
            outcomes = read_outcomes(scratch, tasks, environment.versions, stage=stage, seconds=seconds)
        except EvaluationError as error:
            with log.open(encoding="utf-8", errors="replace") as file:
                last = "".join(f"    {line}" for line in deque(file, _LAST_LINES)).rstrip()
            raise EvaluationError(
                f"{error.given} Its last lines:\n{last}",
                expected=error.expected or "results of " + ", ".join(tasks),
                fix=error.fix or "see its message above; nothing was written.",
            ) from error
        write_outcomes(output, outcomes)
    return outcomes


def _absolute(name: str) -> str:
    return str(Path(name).resolve()) if Path(name).exists() else name


def _flags(given: dict[str, str], tasks: Sequence[str], output: Path, options: LmmsOptions) -> list[str]:
    flags = ["--model", "mllm_cl", "--model_args", ",".join(f"{key}={value}" for key, value in given.items())]
    flags += ["--tasks", ",".join(tasks), "--output_path", str(output), "--log_samples"]
    flags += ["--batch_size", options.batch_size, "--seed", str(options.seed), "--process_docs_parallel", "1"]
    if options.limit is not None:
        flags += ["--limit", str(options.limit)]
    if options.offset:
        flags += ["--offset", str(options.offset)]
    if options.gen_kwargs:
        flags += ["--gen_kwargs", options.gen_kwargs]
    if options.include_path is not None:
        flags += ["--include_path", str(options.include_path.resolve())]
    return flags
