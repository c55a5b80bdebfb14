"""Runs recipes in forked children, some of which are killed on the way. One JSON request per line in, one answer out.

Everything is imported once; a child costs no more than the run itself. Faults are injected here, by replacing functions of the
package in the child: `{"at": POINT, "n": 2, "when": "before" | "after"}` kills the child with SIGKILL around the n-th call of
POINT, which is `module:Class.function`, `replace:NAME` (a file or folder of that name gets into place), `append:EVENT` (a line
of the ledger) or `any` (whatever can be told apart from outside); `"torn": "ledger" | "predictions"` leaves half a line behind.
"""

from __future__ import annotations

import errno
import gc
import importlib
import json
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch

torch.set_num_threads(1)

import mllm_cl.evaluation.cell
import mllm_cl.evaluation.engine
import mllm_cl.training.loop
from mllm_cl.errors import MllmClError
from mllm_cl.recipe import load_recipe
from mllm_cl.training.ledger import Ledger

TRACED = (
    "transformers.generation.utils:GenerationMixin.generate",
    "mllm_cl.training.trainer:ContinualTrainer.training_step",
)


def patch(place: str, around: Callable[..., Any]) -> None:
    """Replaces a function by `around(original, *args, **kwargs)`, wherever modules of the package have imported it."""
    module_name, _, path = place.partition(":")
    owner: Any = importlib.import_module(module_name)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    original = getattr(owner, name)

    def replacement(*args: Any, **kwargs: Any) -> Any:
        return around(original, *args, **kwargs)

    setattr(owner, name, replacement)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Fault:
    """Kills this process around the n-th call that matches."""

    def __init__(self, n: int = 1, when: str = "before", torn: str | None = None, root: str = "") -> None:
        self.left, self.when, self.torn, self.root = n, when, torn, Path(root)

    def __call__(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.left -= 1
        if self.left == 0 and self.when == "before":
            self.tear()
            die()
        result = original(*args, **kwargs)
        if self.left == 0:
            die()
        return result

    def tear(self) -> None:
        if self.torn == "ledger":
            with (self.root / "ledger.jsonl").open("a") as file:
                file.write('{"event": "stage_trained", "stage": 1, "adap')
        elif self.torn == "predictions":
            for part in self.root.glob("evaluation/*/*/predictions.part*.jsonl"):
                with part.open("a") as file:
                    file.write('{"id": "task-1/test/0", "prediction": "r')


def install(request: dict[str, Any], root: str) -> None:
    kind, _, what = request["at"].partition(":")
    fault = Fault(request.get("n", 1), request.get("when", "before"), request.get("torn"), root)

    def if_named(original: Callable[..., Any], source: Any, target: Any) -> Any:
        return fault(original, source, target) if Path(target).name == what else original(source, target)

    def if_event(original: Callable[..., Any], ledger: Ledger, event: str, **fields: Any) -> Any:
        wanted = event == what
        return fault(original, ledger, event, **fields) if wanted else original(ledger, event, **fields)

    if kind == "replace":
        patch("os:replace", if_named)
    elif kind == "append":
        patch("mllm_cl.training.ledger:Ledger.append", if_event)
    elif kind == "any":
        for place in ("os:replace", "shutil:rmtree", "mllm_cl.training.ledger:Ledger.append", *TRACED):
            patch(place, fault)
    else:
        patch(request["at"], fault)


def fail(request: dict[str, Any]) -> None:
    """From the n-th write into `name` on, the disk is full (or whatever `errno` says)."""
    number, name = getattr(errno, request["errno"]), request["name"]

    def refuse(original: Callable[..., Any], source: Any, target: Any) -> Any:
        if Path(target).name == name:
            raise OSError(number, os.strerror(number), str(target))
        return original(source, target)

    patch("os:replace", refuse)


def child(request: dict[str, Any]) -> int:
    recipe = load_recipe(request["recipe"])
    if not request.get("sync"):
        os.fsync = lambda descriptor: None  # survives a kill anyway; only a power cut needs it
    if "fault" in request:
        install(request["fault"], recipe.output_dir)
    if "fail" in request:
        fail(request["fail"])
    if "largest_file" in request:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["largest_file"], request["largest_file"]))
    try:
        mllm_cl.training.loop.run_stream(recipe)
    except MllmClError as error:
        print(f"{type(error).__name__}: {error}")
        return 2
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def main() -> None:
    gc.collect()
    gc.freeze()
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        with open(request["log"], "wb") as log:
            process = os.fork()
            if process == 0:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
                code = child(request)
                sys.stdout.flush()
                os._exit(code)
        _, status = os.waitpid(process, 0)
        print(json.dumps(os.waitstatus_to_exitcode(status)), flush=True)


if __name__ == "__main__":
    main()
