"""A learner in the middle of a task, and what `loss_terms` is given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch


@pytest.fixture
def begin(make_learner: Callable[..., Any]) -> Callable[..., tuple[Any, Any]]:
    """Returns a function that begins the next task: methods, stream -> learner, context."""
    from accelerate import Accelerator

    def start(stream: Any, *methods: Any, learner: Any = None, **settings: Any) -> tuple[Any, Any]:
        learner = learner or make_learner(*methods, **settings)
        return learner, learner.begin_task(stream[learner.stage], stream, Accelerator(cpu=True))

    return start


@pytest.fixture
def disturb() -> Callable[..., None]:
    """Returns a function that moves an adapter away from where it is."""
    from mllm_cl.models.adapters import adapter_parameters

    def move(model: Any, name: str, seed: int = 0, size: float = 0.2) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in adapter_parameters(model, name).values():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * size)

    return move


@pytest.fixture
def micro_batch() -> Callable[..., Any]:
    """Returns a function that makes the `TrainBatch` of collated rows, as if it were the whole batch."""
    from mllm_cl.methods import TrainBatch

    def make(inputs: dict[str, Any]) -> Any:
        inputs = dict(inputs)
        companions = inputs.pop("companions", {})
        return TrainBatch(inputs, companions, {"step": 1.0, "rows": 1.0, "tokens": 1.0, "inquiry": 1.0})

    return make
