"""What torchrun starts in `test_ddp.py`: runs the recipes of a JSON list one after another, in the same processes.

`environment` in a request is what the launcher sets beside the ranks; `kill_at` kills the whole process group from outside
in the middle, as a scheduler would; `room` says how many rows each process can hold while it trains.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import traceback
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import torch

torch.set_num_threads(1)

from torch.distributed.tensor import DTensor
from transformers import LlamaModel

from mllm_cl.errors import MllmClError
from mllm_cl.models.sharding import Shards
from mllm_cl.recipe import load_recipe
from mllm_cl.training.loop import run_stream
from mllm_cl.training.trainer import ContinualTrainer

SWITCHES = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_DEEPSPEED_ZERO_STAGE")

written: list[str] = []


def watch(event: str, arguments: tuple) -> None:
    """Notes which files below a run this process opens for writing."""
    if event == "open" and isinstance(arguments[0], str) and isinstance(arguments[1], str) and arguments[1][0] in "wax":
        written.append(arguments[0])


pieces: list[float] = []


def watch_shards() -> None:
    """Notes what share of the layers' frozen weights this process holds whenever they go to pieces."""
    original = Shards._go_to_pieces

    def go_to_pieces(self: Shards) -> None:
        original(self)
        own = [p for layer in self._modules for name, p in layer.named_parameters() if ".lora_" not in name]
        held = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in own)
        pieces.append(held / sum(p.numel() for p in own))

    Shards._go_to_pieces = go_to_pieces  # type: ignore[method-assign]


partitions: dict[str, float] = {}
current: list[str] = []  # the request's name


def watch_partitions() -> None:
    """Notes what share of the trained parameters' optimizer states this process holds under DeepSpeed's engine."""
    original = ContinualTrainer.training_step

    def training_step(self: ContinualTrainer, model, *args, **kwargs):
        if self.is_deepspeed_enabled:
            trained = sum(
                getattr(parameter, "ds_numel", parameter.numel())
                for parameter in self.model.parameters()
                if parameter.requires_grad
            )
            own = "fp32_partitioned_groups_flat" if current[0].endswith("zero3") else "single_partition_of_fp32_groups"
            partitions[current[0]] = sum(part.numel() for part in getattr(model.optimizer, own)) / trained
        return original(self, model, *args, **kwargs)

    ContinualTrainer.training_step = training_step  # type: ignore[method-assign]


room: list[int] = []


def watch_memory(rank: int) -> None:
    """Lets a training pass over more rows than there is room for run out of memory."""
    forward = LlamaModel.forward

    def held(self: LlamaModel, *args, **kwargs):
        if room and torch.is_grad_enabled() and len(kwargs["inputs_embeds"]) > room[rank]:
            raise RuntimeError("CUDA out of memory. Tried to allocate more than there is.")
        return forward(self, *args, **kwargs)

    LlamaModel.forward = held  # type: ignore[method-assign]


def main() -> None:
    rank = int(os.environ["RANK"])
    sys.addaudithook(watch)
    watch_shards()
    watch_partitions()
    watch_memory(rank)
    requests = json.loads(Path(sys.argv[1]).read_text())
    outcome = {}
    for request in requests:
        if request.get("kill_at"):
            step, left = ContinualTrainer.training_step, [request["kill_at"]]

            def training_step(self, *args, _step=step, _left=left, **kwargs):
                _left[0] -= 1
                if _left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return _step(self, *args, **kwargs)

            ContinualTrainer.training_step = training_step
        for switch in SWITCHES:
            os.environ.pop(switch, None)
        os.environ.update(request.get("environment", {}))
        room[:] = request.get("room", [])
        current[:] = [request["name"]]
        try:
            run_stream(load_recipe(request["recipe"]))
            outcome[request["name"]] = "done"
        except MllmClError as error:
            outcome[request["name"]] = str(error)
        except Exception:
            outcome[request["name"]] = traceback.format_exc()
            break  # the other process waits for this one
    gc.collect()
    kinds = ("DistributedDataParallel", "DeepSpeedEngine", "DeepSpeedZeroOptimizer")  # DeepSpeed need not be installed
    wrappers = sum(type(thing).__name__.startswith(kinds) for thing in gc.get_objects())
    result = {"outcome": outcome, "written": sorted(set(written)), "wrappers": wrappers, "pieces": pieces}
    result["partitions"] = partitions
    Path(f"{sys.argv[1]}.{rank}").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
