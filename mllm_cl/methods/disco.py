"""disco: one adapter per task, mixed per sample by how much its question resembles each task's.

Idea: the question tells which task it is; where it does not, a mixture of the nearest tasks' adapters is a fair answer.
Formula: ΔW(x) = Σ_t α_t(x) ΔW_t, α = softmax(cos(φ(x), μ_t) / temperature), φ an embedding of the question alone.
Stored per task: one adapter and one prototype. Cost per step: 1×; per task: one embedding pass over `samples` rows;
inference: one over the rows, and rows with different gates are generated one by one.
Reference: DISCO, the centralised form (ICCV 2025; Ghy0501/FCIT). Fidelity: all layers are gated, as in the paper; φ comes
from the untouched base instead of CLIP's text encoder. The released code averages the gates over the batch; here they are
per sample.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor

from mllm_cl.data.inquiry import ask, question_of
from mllm_cl.methods._routing import gates
from mllm_cl.methods.base import Context, RouteBatch
from mllm_cl.methods.task_adapters import Samples, TaskAdapters
from mllm_cl.models.adapters import task_adapter


class Disco(TaskAdapters):
    """DISCO.

    Args:
        samples: training rows that make a prototype.
        temperature: of the softmax over tasks.
    """

    name = "disco"
    summary = "one adapter per task, mixed per sample by the question's similarity"

    def __init__(self, *, samples: Samples = 256, temperature: Annotated[float, Field(gt=0)] = 0.05) -> None:
        super().__init__(samples=samples, reject=None)
        self.temperature = temperature

    def embed(self, ctx: Context, rows: list) -> Tensor:
        return ctx.embed([ask(question_of(row), [], row["id"]) for row in rows]).cpu()

    def route(self, ctx: Context, batch: RouteBatch) -> list[dict[str, float]] | None:
        if not self.tasks:
            return [{} for _ in batch.rows]
        weights = gates(self.compare(ctx, batch)[1], self.temperature).tolist()
        names = [task_adapter(task) for task in self.tasks]
        return [dict(zip(names, own)) for own in weights]
