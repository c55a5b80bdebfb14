"""Checkpoints inside a task: atomic folders of safetensors and JSON, no pickle.

`transformers.Trainer` writes optimizer, scheduler and random states with `torch.save`, file by file into the final folder: a kill
in the middle leaves a folder that looks like a checkpoint. Here a checkpoint is written beside its place and renamed when it is
complete, and every number in it is restored exactly. Sharded launchers (DeepSpeed, FSDP) keep their own format.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.trainer_utils import get_last_checkpoint, rotate_checkpoints

from mllm_cl.files import PARTIAL, explained

Tree = Any


def last_checkpoint(folder: Path) -> Path | None:
    """Returns the newest complete checkpoint below `folder`; unfinished ones are deleted."""
    if not folder.is_dir():
        return None
    for unfinished in folder.glob(f"*{PARTIAL}"):
        shutil.rmtree(unfinished, ignore_errors=True)
    found = get_last_checkpoint(str(folder))
    return Path(found) if found else None


def pack(tree: Tree, tensors: dict[str, Tensor], name: str = "root") -> Tree:
    """Returns the tree as JSON, its tensors moved into `tensors` under their paths."""
    if isinstance(tree, Tensor):
        tensors[name] = tree.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(tree, Mapping):
        return {"map": [[key, pack(value, tensors, f"{name}/{key}")] for key, value in tree.items()]}
    if isinstance(tree, (list, tuple)):
        kind = "list" if isinstance(tree, list) else "tuple"
        return {kind: [pack(value, tensors, f"{name}/{index}") for index, value in enumerate(tree)]}
    if tree is None or isinstance(tree, (bool, int, float, str)):
        return tree
    raise TypeError(f"{name}: a checkpoint cannot hold {type(tree).__name__}")


def unpack(content: Tree, tensors: Mapping[str, Tensor]) -> Tree:
    """Inverse of `pack`."""
    if not isinstance(content, dict):
        return content
    ((kind, value),) = content.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "map":
        return {key: unpack(child, tensors) for key, child in value}
    children = [unpack(child, tensors) for child in value]
    return children if kind == "list" else tuple(children)


def save_tree(folder: Path, name: str, tree: Tree) -> None:
    """Writes `name.json` and `name.safetensors`."""
    tensors: dict[str, Tensor] = {}
    (folder / f"{name}.json").write_text(json.dumps(pack(tree, tensors)), encoding="utf-8")
    save_file(tensors, folder / f"{name}.safetensors")


def load_tree(folder: Path, name: str) -> Tree:
    """Reads what `save_tree` wrote."""
    content = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    return unpack(content, load_file(folder / f"{name}.safetensors"))


def random_states() -> dict[str, Any]:
    """Returns the states of all random generators of this process."""
    kind, keys, position, has_gauss, cached = np.random.get_state()
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), int(position), int(has_gauss), float(cached)),
        "torch": torch.random.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.random.get_rng_state_all()
    return states


def restore_random_states(states: Mapping[str, Any]) -> None:
    """Inverse of `random_states`."""
    random.setstate(states["python"])
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.random.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.random.set_rng_state_all(states["cuda"])


class CheckpointMixin:
    """Replaces how a `Trainer` writes and reads checkpoints under the plain and DDP launchers.

    The host says what the model and the methods put in: `write_model(folder)` and `read_model(folder)`.
    """

    def write_model(self, folder: Path) -> None:
        raise NotImplementedError

    def read_model(self, folder: Path) -> None:
        raise NotImplementedError

    def _is_sharded(self) -> bool:
        return self.is_deepspeed_enabled or self.is_fsdp_enabled  # type: ignore[attr-defined]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self._is_sharded():
            super()._save_checkpoint(model, trial)  # type: ignore[misc]
            return
        root = Path(self._get_output_dir(trial=trial))  # type: ignore[attr-defined]
        final = root / f"checkpoint-{self.state.global_step}"  # type: ignore[attr-defined]
        partial = final.with_name(final.name + PARTIAL)
        writes = self.args.should_save  # type: ignore[attr-defined]
        with explained(final):
            if writes:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
            self.accelerator.wait_for_everyone()  # type: ignore[attr-defined]
            save_tree(partial, f"random-{self.args.process_index}", random_states())  # type: ignore[attr-defined]
            if writes:
                self.store_flos()  # type: ignore[attr-defined]
                self.write_model(partial)
                save_tree(partial, "optimizer", self.optimizer.state_dict())  # type: ignore[attr-defined]
                save_tree(partial, "scheduler", self.lr_scheduler.state_dict())  # type: ignore[attr-defined]
                self.state.save_to_json(str(partial / "trainer_state.json"))  # type: ignore[attr-defined]
            self.accelerator.wait_for_everyone()  # type: ignore[attr-defined]
            if writes:
                shutil.rmtree(final, ignore_errors=True)
                os.replace(partial, final)
                limit = self.args.save_total_limit  # type: ignore[attr-defined]
                rotate_checkpoints(output_dir=str(root), save_total_limit=limit, use_mtime=False)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self._is_sharded():
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
        else:
            self.read_model(Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self._is_sharded():
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
            return
        self.optimizer.load_state_dict(load_tree(Path(checkpoint), "optimizer"))  # type: ignore[attr-defined]
        self.lr_scheduler.load_state_dict(load_tree(Path(checkpoint), "scheduler"))  # type: ignore[attr-defined]

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None or self._is_sharded():
            super()._load_rng_state(checkpoint)  # type: ignore[misc]
            return
        name = f"random-{self.args.process_index}"  # type: ignore[attr-defined]
        if (Path(checkpoint) / f"{name}.json").exists():
            restore_random_states(load_tree(Path(checkpoint), name))
