"""task_adapters: one adapter per task and a router that picks one for every sample.

Idea: nothing that was learnt is ever touched again; the price is the choice at inference.
Formula: ΔW(x) = ΔW_{k(x)}, with the embedding φ of the untouched base and
- oracle: k = the task of the row
- prototype: k = argmax_t cos(φ(x), μ_t), μ_t the mean embedding of task t's training inquiries
- generative: k = argmax_t log N(φ(x); μ_t, Σ), Σ the covariance of the rows about their own task's mean, shrunk towards a
  multiple of I (streaming linear discriminant analysis)
- ridge: k = argmax_t [φ(x)ᵀ (G + λ I)⁻¹ P]_t, G = Σ φ φᵀ and P = Σ φ e_tᵀ over the rows of all tasks (analytic update)
A sample that is further from its task's prototype than `reject` standard deviations of that task's own rows goes to the
untouched base.
Stored per task: one adapter, one prototype (2 × hidden, float32) and two numbers; ridge: G, generative: S, (2 × hidden)²
float32, once.
Cost per step: 1×; per task: one embedding pass over `samples` rows (oracle: none); inference: one over the rows.
Reference: the prototype routing of HiDe-LLaVA (ACL 2025) and DISCO (ICCV 2025), whose released code averages gates over
the batch or keeps prototype sums in bfloat16. Ridge: CF-Router, Li et al. (ICLR 2026 workshop, OpenReview 7tWtYHTIDD);
Any-SSR, Tong et al. 2025 (arXiv 2503.13575). Generative: Deep SLDA, Hayes and Kanan (CVPR workshops 2020).
Fidelity: routing is per sample and float32. Deep SLDA with tasks for classes and equal priors;
S = Σ_t Σ (φ − μ_t)(φ − μ_t)ᵀ is additive, so no old row is needed. `reject` is ours: on tiny-llava 2 sends
44 % of the general benchmark's rows to the base and no row of the six tasks, 3 sends 12 % and 4 none (prototype router,
48 training rows per task, no training).
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from mllm_cl.methods._routing import gaussian_scores, ridge_scores, similarities
from mllm_cl.methods._rows import drawn_rows
from mllm_cl.methods.base import Context, Method, MethodState, RouteBatch
from mllm_cl.models.adapters import task_adapter

_ROUNDING = 1e-6  # of a similarity; a task of one row has deviation 0

Router = Literal["prototype", "oracle", "ridge", "generative"]
Samples = Annotated[int, Field(ge=2)]
Reject = Annotated[float, Field(gt=0)] | None


class TaskAdapters(Method):
    """Per-task adapters.

    Args:
        router: `prototype`, `ridge`, `generative` or `oracle` (needs the task of every test row; general rows go to the base).
        samples: training rows that make a prototype.
        reject: standard deviations below a task's own mean similarity at which a sample goes to the base; `None`
            always routes to a task.
        penalty: λ of the ridge router.
        shrinkage: ε of the generative router: the share of Σ that is a multiple of I.
    """

    name = "task_adapters"
    summary = "one adapter per task, routed per sample (prototype, ridge, generative or oracle)"
    adapters = "per_task"
    roles = frozenset({"routing"})

    def __init__(
        self,
        *,
        router: Router = "prototype",
        samples: Samples = 256,
        reject: Reject = 2.0,
        penalty: Annotated[float, Field(gt=0)] = 0.1,
        shrinkage: Annotated[float, Field(gt=0, le=1)] = 0.1,
    ) -> None:
        self.router, self.samples, self.reject, self.penalty = router, samples, reject, penalty
        self.shrinkage = shrinkage
        self.needs = frozenset({"task_id"}) if router == "oracle" else frozenset()  # type: ignore[misc]
        self.tasks: list[str] = []
        self.prototypes: dict[str, Tensor] = {}
        self.similarity: dict[str, tuple[float, float]] = {}
        self.gram = torch.zeros(0, 0)  # G (features, features)
        self.sums = torch.zeros(0, 0)  # P (features, tasks)
        self.means = torch.zeros(0, 0)  # μ (tasks, features)
        self.scatter = torch.zeros(0, 0)  # S (features, features)
        self.counts: list[int] = []  # rows behind each task's mean

    def end_task(self, ctx: Context) -> None:
        self.tasks.append(ctx.task.name)
        if self.router == "oracle":
            return
        embeddings = self.embed(ctx, drawn_rows(ctx, self.samples))
        prototype = self.prototype(embeddings)
        own = similarities(embeddings, prototype.unsqueeze(0)).squeeze(1)
        self.prototypes[ctx.task.name] = prototype
        self.similarity[ctx.task.name] = (own.mean().item(), own.std(correction=0).item())
        if self.router == "ridge":
            gram = embeddings.mT @ embeddings
            self.gram = gram + self.gram if self.gram.numel() else gram
            column = embeddings.sum(dim=0).unsqueeze(1)
            self.sums = torch.cat([self.sums, column], dim=1) if self.sums.numel() else column
        elif self.router == "generative":
            mean = embeddings.mean(dim=0, keepdim=True)
            scatter = (embeddings - mean).mT @ (embeddings - mean)
            self.scatter = scatter + self.scatter if self.counts else scatter
            self.means = torch.cat([self.means, mean]) if self.counts else mean
            self.counts.append(len(embeddings))

    def embed(self, ctx: Context, rows: list) -> Tensor:
        """What is compared: (rows, features) on the CPU."""
        return ctx.embed(rows).cpu()

    def prototype(self, embeddings: Tensor) -> Tensor:
        """What a task's rows are compared with: (rows, features) -> (features,), of unit length."""
        return normalize(embeddings.mean(dim=0), dim=0)

    def compare(self, ctx: Context, batch: RouteBatch) -> tuple[Tensor, Tensor]:
        """Embeddings (rows, features) and their similarity with the prototypes (rows, tasks)."""
        embeddings = self.embed(ctx, list(batch.rows))
        return embeddings, similarities(embeddings, torch.stack([self.prototypes[name] for name in self.tasks]))

    def route(self, ctx: Context, batch: RouteBatch) -> list[dict[str, float]] | None:
        if self.router == "oracle":
            known = set(self.tasks)
            return [{task_adapter(task): 1.0} if task is not None and task in known else {} for task in batch.tasks]
        if not self.tasks:
            return [{} for _ in batch.rows]
        embeddings, similarity = self.compare(ctx, batch)
        scores = similarity
        if self.router == "ridge":
            scores = ridge_scores(embeddings, self.gram, self.sums, self.penalty)
        elif self.router == "generative":
            scores = gaussian_scores(embeddings, self.means, self.scatter, sum(self.counts), self.shrinkage)
        best = scores.argmax(dim=1).tolist()
        return [self._choice(self.tasks[task], similarity[row, task].item()) for row, task in enumerate(best)]

    def _choice(self, name: str, similarity: float) -> dict[str, float]:
        if similarity < self.lowest_similarity(*self.similarity[name]):
            return {}
        return {task_adapter(name): 1.0}

    def lowest_similarity(self, mean: float, deviation: float) -> float:
        """The similarity below which a row goes to the base, from that of a task's own rows."""
        return -1.0 - _ROUNDING if self.reject is None else mean - self.reject * deviation - _ROUNDING

    def state_dict(self) -> MethodState:
        data = {"tasks": self.tasks, "similarity": {name: list(pair) for name, pair in self.similarity.items()}}
        tensors = {f"prototype/{name}": tensor for name, tensor in self.prototypes.items()}
        if self.router == "generative":
            tensors |= {"means": self.means, "scatter": self.scatter}
            data["counts"] = self.counts
        return MethodState(tensors=tensors | {"gram": self.gram, "sums": self.sums}, data=data)

    def load_state_dict(self, state: MethodState) -> None:
        self.tasks = list(state.data["tasks"])
        known = [name for name in self.tasks if f"prototype/{name}" in state.tensors]
        self.prototypes = {name: state.tensors[f"prototype/{name}"] for name in known}
        self.similarity = {name: (pair[0], pair[1]) for name, pair in state.data["similarity"].items()}
        self.gram, self.sums = state.tensors["gram"], state.tensors["sums"]
        if self.router == "generative":
            self.means, self.scatter = state.tensors["means"], state.tensors["scatter"]
            self.counts = list(state.data["counts"])
