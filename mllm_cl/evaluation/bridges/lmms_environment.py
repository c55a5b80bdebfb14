"""Where lmms-eval lives: an interpreter of another environment, since its requirements replace torch.

The interpreter is `$MLLM_CL_LMMS_EVAL_PYTHON`, else that of the environment in the user's cache. Both lmms-eval and mllm_cl
have to be installed there: `pip install 'mllm_cl[lmms-eval]'`.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from mllm_cl.errors import EvaluationError
from mllm_cl.parse import parse_json

VARIABLE = "MLLM_CL_LMMS_EVAL_PYTHON"
SERIES = "0.7."
"""The releases whose output and plug-in interface were read; tried with 0.7.3."""

PACKAGES = ("lmms-eval", "mllm_cl", "torch", "transformers", "peft")
_SECONDS = 120
_PROBE = """
import json, sys
from importlib import metadata
found = {}
for name in sys.argv[1:]:
    try:
        found[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
        pass
print(json.dumps(found))
"""


@dataclass(frozen=True)
class LmmsEnvironment:
    """An interpreter that can run lmms-eval with our model, and the versions of the packages there."""

    python: Path
    versions: Mapping[str, str]


def default_folder() -> Path:
    """The environment that is looked for when the variable is not set."""
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(cache) / "mllm_cl" / "lmms-eval"


def how_to_make() -> str:
    """The commands that make the environment."""
    folder = default_folder()
    return (
        f"`python -m venv {folder}`, then `{folder}/bin/pip install -c constraints.txt 'mllm_cl[lmms-eval]'` "
        f"(constraints.txt keeps the version of torch), or set {VARIABLE} to the interpreter of another environment"
    )


def find_python() -> Path | None:
    """Returns the interpreter that is named by the variable or lies in the cache; `None` if there is none."""
    named = os.environ.get(VARIABLE)
    if named:
        return Path(named)
    own = default_folder() / "bin" / "python"
    return own if own.exists() else None


def find_lmms_eval() -> LmmsEnvironment:
    """Returns the environment after a look at what is installed there.

    Raises:
        EvaluationError: there is none, its interpreter does not start, or packages are missing or of another version.
    """
    python = find_python()
    if python is None:
        raise EvaluationError(
            "lmms-eval has no environment here.", expected=VARIABLE, fix=f"make one: {how_to_make()}."
        )
    try:
        done = subprocess.run(
            [str(python), "-c", _PROBE, *PACKAGES], capture_output=True, text=True, timeout=_SECONDS, check=True
        )
        versions = parse_json(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise EvaluationError(
            f"{python}: does not run ({error}).", expected="a Python interpreter", fix=f"correct {VARIABLE}."
        ) from error
    environment = LmmsEnvironment(python, versions)
    missing = [name for name in PACKAGES if name not in versions]
    if missing:
        raise EvaluationError(
            f"{python}: {', '.join(missing)} not installed there.",
            expected="an environment with lmms-eval and mllm_cl",
            fix=f"make one: {how_to_make()}.",
        )
    for name, found, fits in (
        ("lmms-eval", versions["lmms-eval"], versions["lmms-eval"].startswith(SERIES)),
        ("mllm_cl", versions["mllm_cl"], versions["mllm_cl"] == metadata.version("mllm_cl")),
    ):
        if not fits:
            wanted = f"{SERIES}x" if name == "lmms-eval" else metadata.version("mllm_cl")
            raise EvaluationError(
                f"{python}: has {name} {found}.", expected=f"{name} {wanted}", fix="install that version there."
            )
    return environment
