"""What `mllm-cl doctor` looks at. Each check is a function that never raises."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Literal

from mllm_cl.errors import EvaluationError

State = Literal["ok", "warning", "missing", "broken"]

# Distribution -> lowest version that is supported; pyproject.toml says the same.
REQUIRED: dict[str, str] = {
    "torch": "2.8",
    "transformers": "5.18",
    "peft": "0.21",
    "accelerate": "1.12",
    "datasets": "4.4",
    "safetensors": "0.6",
    "huggingface_hub": "1.3",
    "pydantic": "2.11",
    "pyyaml": "6.0",
    "typer": "0.20",
    "rich": "14.0",
    "jinja2": "3.1",
    "matplotlib": "3.10",
    "numpy": "2.0",
    "scipy": "1.14",
    "scikit-learn": "1.6",
    "pillow": "11.0",
}

# Module, extra of pyproject.toml, what works with it (and does not without).
OPTIONAL: tuple[tuple[str, str, str], ...] = (
    ("skimage", "demo", "the quickstart stream and `mllm-cl demo`"),
    (
        "deepspeed",
        "deepspeed",
        "training under ZeRO-1 and 2 (docs/launchers.md)",
    ),
    ("bitsandbytes", "quantization", "4-bit and 8-bit base models"),
    ("pycocoevalcap", "caption", "the caption metrics of COCO"),
    ("flwr", "flower", "federated runs on Flower"),
)


@dataclass(frozen=True)
class Check:
    """One line of the listing: what was looked at, its state, what was found and what that means."""

    name: str
    state: State
    found: str
    meaning: str = ""


def check_environment() -> list[Check]:
    """Returns all checks, required parts first."""
    return [
        *check_versions(),
        *check_devices(),
        *check_optional(),
        check_lmms_eval(),
        *check_folders(),
        check_model(),
    ]


def check_versions() -> Iterator[Check]:
    """Python and the required packages."""
    python = platform.python_version()
    fine = sys.version_info >= (3, 11)
    yield Check("python", "ok" if fine else "broken", python, "" if fine else "3.11 or later is required")
    for name, lowest in REQUIRED.items():
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield Check(name, "broken", "not installed", f"{lowest} or later is required")
            continue
        old = _numbers(version) < _numbers(lowest)
        yield Check(name, "broken" if old else "ok", version, f"{lowest} or later is required" if old else "")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit())


def check_devices() -> Iterator[Check]:
    """Accelerators, threads, and a torchvision that does not fit."""
    if util.find_spec("torch") is None:
        return
    import torch

    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        yield Check(f"cuda:{index}", "ok", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    if not torch.cuda.is_available():
        meaning = "training on the CPU: fine for tiny-llava and the demo, too slow for models of billions of parameters"
        yield Check("cuda", "missing", "no CUDA device", meaning)
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    yield Check("threads", "ok", f"{torch.get_num_threads()} torch threads on {cores} cores")
    if util.find_spec("torchvision") is not None and torch.version.cuda is None and torch.version.hip is None:
        meaning = "if built for another torch it breaks AutoProcessor: `pip uninstall torchvision`"
        yield Check("torchvision", "warning", "installed beside a CPU-only torch", meaning)


def check_optional() -> Iterator[Check]:
    """Optional parts and what needs them."""
    for module, extra, what in OPTIONAL:
        if util.find_spec(module) is not None:
            yield Check(module, "ok", "installed", f"{what}: available")
        else:
            yield Check(module, "missing", "not installed", f"{what}: not available (`pip install 'mllm_cl[{extra}]'`)")


def check_lmms_eval() -> Check:
    """lmms-eval, which lives in an environment of its own."""
    from mllm_cl.evaluation.bridges.lmms_environment import find_lmms_eval, find_python, how_to_make

    if find_python() is None:
        return Check("lmms-eval", "missing", "no environment", f"`--tasks lmms:...`: not available ({how_to_make()})")
    try:
        found = find_lmms_eval()
    except EvaluationError as error:
        return Check("lmms-eval", "warning", error.given, f"`--tasks lmms:...`: not available; {error.fix}")
    return Check("lmms-eval", "ok", found.versions["lmms-eval"], f"`--tasks lmms:...`: available, with {found.python}")


def check_folders() -> Iterator[Check]:
    """Where runs and downloads are written."""
    hub = os.environ.get("HF_HOME") or str(Path.home() / ".cache" / "huggingface")
    for name, folder in (("working folder", Path.cwd()), ("hub cache", Path(hub))):
        place = next(parent for parent in (folder, *folder.parents) if parent.exists())
        try:
            with tempfile.NamedTemporaryFile(dir=place):
                free = shutil.disk_usage(place).free / 2**30
        except OSError as error:
            meaning = "give an absolute output_dir" if name == "working folder" else "set HF_HOME to a writable folder"
            yield Check(name, "warning", f"{folder}: not writable ({error.strerror})", meaning)
            continue
        yield Check(name, "ok", f"{folder}: writable, {free:.0f} GiB free")


def check_model() -> Check:
    """Loads the built-in model, which needs a working torch, transformers and processor."""
    try:
        from mllm_cl.models.load import load_model

        model, _ = load_model()
    except Exception as error:
        return Check("tiny-llava", "broken", str(error).splitlines()[0], "the built-in model does not load")
    return Check("tiny-llava", "ok", f"loads ({sum(p.numel() for p in model.parameters()):,} parameters)")
