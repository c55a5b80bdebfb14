"""task_adapters: one adapter per task and a router that picks one for every sample.

Idea: nothing that was learnt is ever touched again; the price is the choice at inference.
Formula: ΔW(x) = ΔW_{k(x)}; oracle router: k = the task of the row; prototype router: k = argmax_t cos(φ(x), μ_t) with
μ_t the mean embedding of task t's training inquiries under the untouched base. A sample that is further from its best
prototype than `reject` standard deviations of that task's own rows goes to the untouched base.
Stored per task: one adapter, one prototype (2 × hidden, float32) and two numbers. Cost per step: 1×; inference: one
embedding pass.
Reference: the prototype routing of HiDe-LLaVA (ACL 2025) and DISCO (ICCV 2025), whose released code averages gates over
the batch or keeps prototype sums in bfloat16; here routing is per sample and float32.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from mllm_cl.methods.base import Context, Method, MethodState, RouteBatch
from mllm_cl.models.adapters import task_adapter

_ROUNDING = 1e-6  # of a similarity; a task of one row has deviation 0


class TaskAdapters(Method):
    """Per-task adapters.

    Args:
        router: `prototype` or `oracle` (needs the task of every test row; general rows go to the base).
        samples: training rows that make a prototype.
        reject: standard deviations below a task's own mean similarity at which a sample goes to the base; `None`
            always routes to a task.
    """

    name = "task_adapters"
    summary = "one adapter per task, routed per sample (prototype or oracle)"
    adapters = "per_task"

    def __init__(
        self,
        *,
        router: Literal["prototype", "oracle"] = "prototype",
        samples: Annotated[int, Field(ge=2)] = 256,
        reject: Annotated[float, Field(gt=0)] | None = 4.0,
    ) -> None:
        self.router, self.samples, self.reject = router, samples, reject
        self.needs = frozenset({"task_id"}) if router == "oracle" else frozenset()  # type: ignore[misc]
        self.tasks: list[str] = []
        self.prototypes: dict[str, Tensor] = {}
        self.similarity: dict[str, tuple[float, float]] = {}

    def end_task(self, ctx: Context) -> None:
        self.tasks.append(ctx.task.name)
        if self.router == "oracle":
            return
        count = min(self.samples, len(ctx.task.train))
        chosen = torch.randperm(len(ctx.task.train), generator=ctx.rng)[:count].sort().values.tolist()
        embeddings = ctx.embed([ctx.task.train[index] for index in chosen]).cpu()
        prototype = normalize(embeddings.mean(dim=0), dim=0)
        own = cosine_similarity(embeddings, prototype.unsqueeze(0))
        self.prototypes[ctx.task.name] = prototype
        self.similarity[ctx.task.name] = (own.mean().item(), own.std(correction=0).item())

    def route(self, ctx: Context, batch: RouteBatch) -> list[dict[str, float]] | None:
        if self.router == "oracle":
            known = set(self.tasks)
            return [{task_adapter(task): 1.0} if task is not None and task in known else {} for task in batch.tasks]
        names = list(self.prototypes)
        if not names:
            return [{} for _ in batch.rows]
        prototypes = torch.stack([self.prototypes[name] for name in names])  # (tasks, features)
        embeddings = ctx.embed(batch.rows).cpu()  # (rows, features)
        similarity = cosine_similarity(embeddings.unsqueeze(1), prototypes.unsqueeze(0), dim=-1)  # (rows, tasks)
        best = similarity.argmax(dim=1).tolist()
        return [self._choice(names[task], similarity[row, task].item()) for row, task in enumerate(best)]

    def _choice(self, name: str, similarity: float) -> dict[str, float]:
        mean, deviation = self.similarity[name]
        if self.reject is not None and similarity < mean - self.reject * deviation - _ROUNDING:
            return {}
        return {task_adapter(name): 1.0}

    def state_dict(self) -> MethodState:
        data = {"tasks": self.tasks, "similarity": {name: list(pair) for name, pair in self.similarity.items()}}
        return MethodState(tensors=dict(self.prototypes), data=data)

    def load_state_dict(self, state: MethodState) -> None:
        self.tasks = list(state.data["tasks"])
        self.prototypes = {name: state.tensors[name] for name in self.tasks if name in state.tensors}
        self.similarity = {name: (pair[0], pair[1]) for name, pair in state.data["similarity"].items()}
