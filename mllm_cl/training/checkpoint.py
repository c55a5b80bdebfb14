"""Checkpoints inside a task: atomic folders of safetensors and JSON, no pickle.

`transformers.Trainer` writes optimizer, scheduler and random states with `torch.save`, file by file into the final folder: a kill
in the middle leaves a folder that looks like a checkpoint. Here a checkpoint is written beside its place and renamed when it is
complete, and every number in it is restored exactly, or nothing at all if a file has changed since. Sharded launchers (DeepSpeed,
FSDP) keep their own format.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint, rotate_checkpoints

from mllm_cl.errors import RunError
from mllm_cl.files import PARTIAL, explained, folder_sha256, publish, remove
from mllm_cl.parse import parse_json

Tree = Any
SEAL = "sha256.txt"  # in a checkpoint: the hash of all other files


def last_checkpoint(folder: Path) -> str | None:
    """Returns the newest complete checkpoint below `folder`."""
    return get_last_checkpoint(str(folder)) if folder.is_dir() else None


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
    if isinstance(tree, np.generic):
        return tree.item()
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
    content = parse_json((folder / f"{name}.json").read_text(encoding="utf-8"))
    return unpack(content, load_file(folder / f"{name}.safetensors"))


def random_states() -> dict[str, Any]:
    """Returns the states of all random generators of this process."""
    kind, keys, position, has_gauss, cached = np.random.get_state()
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached),
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


class CheckpointedTrainer(Trainer):
    """A `Trainer` that writes and reads checkpoints like this under the plain and DDP launchers.

    The subclass says what model and methods put in: `write_model(folder)` and `read_model(folder)`.
    """

    def write_model(self, folder: Path) -> None:
        raise NotImplementedError

    def read_model(self, folder: Path) -> None:
        raise NotImplementedError

    @property
    def _is_sharded(self) -> bool:
        return self.is_deepspeed_enabled or self.is_fsdp_enabled

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self._is_sharded:
            super()._save_checkpoint(model, trial)
            return
        root = Path(self._get_output_dir(trial=trial))
        final = root / f"checkpoint-{self.state.global_step}"
        partial = final.with_name(final.name + PARTIAL)
        self.store_flos()
        with explained(final):
            try:
                self._write_checkpoint(partial)
                if self.args.should_save:
                    publish(partial, final)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
            if self.args.should_save:
                rotate_checkpoints(str(root), self.args.save_total_limit, use_mtime=False)

    def _write_checkpoint(self, folder: Path) -> None:
        """Every process its random states, the main process the rest; complete when all return."""
        if self.args.should_save:
            remove(folder)
            folder.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        save_tree(folder, f"random-{self.args.process_index}", random_states())
        if self.args.should_save:
            self.write_model(folder)
            for name, part in self._training_parts().items():
                save_tree(folder, name, part.state_dict())
            self.state.save_to_json(str(folder / "trainer_state.json"))
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            (folder / SEAL).write_text(folder_sha256(folder, besides=SEAL), encoding="utf-8")

    def _training_parts(self) -> dict[str, Any]:
        parts = {"optimizer": self.optimizer, "scheduler": self.lr_scheduler, "scaler": self.accelerator.scaler}
        return {name: part for name, part in parts.items() if part is not None}

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self._is_sharded:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        folder = Path(resume_from_checkpoint)
        seal = folder / SEAL
        if not seal.is_file() or seal.read_bytes() != folder_sha256(folder, besides=SEAL).encode():
            raise RunError(
                f"{folder}: is not what was saved there.",
                expected="a checkpoint of which no file has changed",
                fix="remove this folder; training continues from the checkpoint before it, or from the beginning of the task.",
            )
        self.read_model(folder)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self._is_sharded:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        for name, part in self._training_parts().items():
            part.load_state_dict(load_tree(Path(checkpoint), name))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None or self._is_sharded:
            super()._load_rng_state(checkpoint)
            return
        try:
            states = load_tree(Path(checkpoint), f"random-{self.args.process_index}")
        except FileNotFoundError as error:
            raise RunError(
                f"{checkpoint}: was written by fewer processes than there are now.",
                fix="continue with as many processes as before.",
            ) from error
        restore_random_states(states)
