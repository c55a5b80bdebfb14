"""Where progress is shown. The loop reports; the command line draws."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

from transformers import TrainerCallback, TrainerState, TrainingArguments


class Progress(Protocol):
    """What the loop needs of a display."""

    def bar(self, description: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        """Shows a bar; the function it yields advances it by a number of rows."""
        ...

    def waiting(self, description: str) -> AbstractContextManager[None]:
        """Shows that something is going on whose length is unknown."""
        ...


class Silent:
    """Shows nothing."""

    def bar(self, description: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        return contextlib.nullcontext(lambda rows: None)

    def waiting(self, description: str) -> AbstractContextManager[None]:
        return contextlib.nullcontext()


class StepProgress(TrainerCallback):
    """Advances a bar of `rows` rows with the optimizer steps, wherever training (re)starts."""

    def __init__(self, advance: Callable[[int], None], rows: int) -> None:
        self.advance, self.rows, self.shown = advance, rows, 0

    def _show(self, state: TrainerState) -> None:
        reached = round(self.rows * state.global_step / max(state.max_steps, 1))
        self.advance(reached - self.shown)
        self.shown = reached

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._show(state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._show(state)
