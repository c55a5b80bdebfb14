"""Saves and restores what methods carry: `state.safetensors` and `state.json` in a folder per method."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mllm_cl.errors import RunError
from mllm_cl.methods import Method, MethodState
from mllm_cl.parse import parse_json


def _folder(root: Path, position: int, method: Method) -> Path:
    return root / f"{position:02d}-{method.name}"


def save_states(root: Path, methods: Sequence[Method]) -> None:
    """Writes the state of every method below `root`."""
    for position, method in enumerate(methods):
        state = method.state_dict()
        folder = _folder(root, position, method)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.tensors.items()}
        save_file(tensors, folder / "state.safetensors")
        content = {"method": method.name, "version": method.version, "data": state.data}
        (folder / "state.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def load_states(root: Path, methods: Sequence[Method]) -> None:
    """Restores the state of every method from `root`.

    Raises:
        RunError: a state is missing or was written by another version of the method.
    """
    for position, method in enumerate(methods):
        folder = _folder(root, position, method)
        try:
            content = parse_json((folder / "state.json").read_text(encoding="utf-8"))
            tensors = load_file(folder / "state.safetensors")
        except (OSError, ValueError, SafetensorError) as error:
            raise RunError(f"{folder}: the state of {method.name} cannot be read ({error}).") from error
        if not isinstance(content, dict) or not isinstance(content.get("data"), dict) or "version" not in content:
            raise RunError(f"{folder / 'state.json'}: is not what {method.name} has written.", fix="restore the file.")
        if content["version"] != method.version:
            raise RunError(
                f"{folder}: was written by version {content['version']} of {method.name}, this is {method.version}.",
                fix="finish the run with the package version it was started with.",
            )
        try:
            method.load_state_dict(MethodState(tensors=tensors, data=content["data"]))
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise RunError(
                f"{folder}: is not what {method.name} has written ({type(error).__name__}: {error}).",
                fix="restore the folder.",
            ) from error
