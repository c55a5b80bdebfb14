"""`mllm-cl run` on several processes: what `accelerate launch` and `torchrun` start.

    torchrun --nproc_per_node 2 recipes/train.py recipes/quickstart/llava_c.yaml output_dir=runs/two

On CPUs use torchrun: `accelerate launch --cpu` starts one process only, unless there is MPI. Only the main process
shows progress and results. Whichever process meets an error first says so, once.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
import traceback
from pathlib import Path

from mllm_cl.cli.quiet import be_quiet
from mllm_cl.errors import MllmClError, RecipeError

USER_MISTAKE, FAILED, INTERRUPTED = 2, 1, 130
_TIME_TO_SPEAK = 1.0  # seconds that the others leave the first one: the launcher stops everybody once one has ended


def main(arguments: list[str]) -> int:
    """Runs a recipe as one of several processes; returns the exit code."""
    is_main = int(os.environ.get("RANK", "0")) == 0
    be_quiet(level=logging.WARNING if is_main else logging.ERROR)
    import torch
    from accelerate import PartialState

    from mllm_cl.training.launchers import hidden_from_accelerate

    with hidden_from_accelerate():
        PartialState(cpu=not torch.cuda.is_available())  # before anything else can set the process group up differently
    try:
        _run(arguments, is_main)
    except MllmClError as error:
        return _end(USER_MISTAKE, f"error: {error}\n")
    except KeyboardInterrupt:
        return _end(INTERRUPTED, "Interrupted. What was completed is kept; the same command continues.\n")
    except Exception:
        return _end(FAILED, traceback.format_exc())
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return 0


def _run(arguments: list[str], is_main: bool) -> None:
    if not arguments:
        raise RecipeError("no recipe is given.", expected="recipes/train.py RECIPE [section.key=value ...]")
    from accelerate import PartialState

    from mllm_cl.cli.pull import resume_from_hub
    from mllm_cl.cli.run import execute
    from mllm_cl.recipe import load_recipe
    from mllm_cl.training.loop import run_stream

    recipe = load_recipe(Path(arguments[0]), arguments[1:])
    if recipe.hub.push:
        if is_main:
            resume_from_hub(recipe)
        PartialState().wait_for_everyone()  # all of them read the folder
    if is_main:
        execute(recipe)
    else:
        run_stream(recipe)


def _end(code: int, message: str) -> int:
    """Says what happened unless another process has done so, and returns the code of whoever was first."""
    first = _first_to_fail(code)
    if first is None:
        sys.stderr.write(message)
        sys.stderr.flush()
        return code
    time.sleep(_TIME_TO_SPEAK)
    return first


def _first_to_fail(code: int) -> int | None:
    """Claims the error for this process: `None` if it is the first one, else the exit code of the first."""
    from torch import distributed

    if not distributed.is_initialized():
        return None
    with contextlib.suppress(Exception):  # the store is gone: the launcher is ending everybody already
        store = distributed.distributed_c10d._get_default_store()
        if store.add("mllm_cl/failed", 1) == 1:
            store.set("mllm_cl/exit_code", str(code))
            return None
        return int(store.get("mllm_cl/exit_code"))
    return code


if __name__ == "__main__":
    ended = main(sys.argv[1:])
    sys.stdout.flush()
    # a process group that others still wait in cannot be taken down in order
    os._exit(ended) if ended else sys.exit(0)
