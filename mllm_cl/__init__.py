"""Continual instruction tuning of multimodal LLMs: one task after another, and what the model could do before stays.

The names below are imported when they are first used, so `import mllm_cl` costs next to nothing and loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mllm_cl import errors
    from mllm_cl.evaluation.matrix import AccuracyMatrix
    from mllm_cl.evaluation.scorers import get_scorer
    from mllm_cl.methods import Method
    from mllm_cl.models.load import load_model
    from mllm_cl.recipe import Recipe, load_recipe
    from mllm_cl.streams import Stream, Task, load_stream
    from mllm_cl.training.learner import Learner
    from mllm_cl.training.loop import run_stream
    from mllm_cl.training.trainer import ContinualTrainer, LlavaCTrainer

__version__ = "0.1.0"

_PLACES = {
    "AccuracyMatrix": "mllm_cl.evaluation.matrix",
    "ContinualTrainer": "mllm_cl.training.trainer",
    "Learner": "mllm_cl.training.learner",
    "LlavaCTrainer": "mllm_cl.training.trainer",
    "Method": "mllm_cl.methods",
    "Recipe": "mllm_cl.recipe",
    "Stream": "mllm_cl.streams",
    "Task": "mllm_cl.streams",
    "get_scorer": "mllm_cl.evaluation.scorers",
    "load_model": "mllm_cl.models.load",
    "load_recipe": "mllm_cl.recipe",
    "load_stream": "mllm_cl.streams",
    "run_stream": "mllm_cl.training.loop",
}

__all__ = [
    "AccuracyMatrix",
    "ContinualTrainer",
    "Learner",
    "LlavaCTrainer",
    "Method",
    "Recipe",
    "Stream",
    "Task",
    "errors",
    "get_scorer",
    "load_model",
    "load_recipe",
    "load_stream",
    "run_stream",
]


def __getattr__(name: str) -> Any:
    if name == "errors":
        return importlib.import_module("mllm_cl.errors")
    if name not in _PLACES:
        raise AttributeError(f"module 'mllm_cl' has no attribute {name!r}")
    value = getattr(importlib.import_module(_PLACES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
