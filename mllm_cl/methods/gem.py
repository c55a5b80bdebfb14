"""gem: never step in a direction that makes the memory of any earlier task worse (gradient episodic memory).

Idea: the gradient may point against none of the gradients on the stored rows of the earlier tasks, one by one; of all
directions that satisfy this the nearest is taken.
Formula: v = argmin ½‖v − g‖² subject to v·m_k ≥ 0 for every earlier task k, m_k the gradient on `batch` of its rows, drawn
anew at every step. Solved exactly in the dual, of as many unknowns as there are earlier tasks: u* = argmin ½ uᵀ M Mᵀ u +
(M g)ᵀ u over u ≥ 0, v = g + Mᵀ(u* + γ), with the margin γ only where g breaks a constraint.
Stored per task: (task, row id) pairs; the rows must stay in the stream. Cost per step: 1×, one forward and backward pass
over `batch` rows of every earlier task, and as many gradients in float32 held at once.
Reference: Lopez-Paz and Ranzato 2017 (NIPS, arXiv 1706.08840; facebookresearch/GradientEpisodicMemory). Fidelity: the
gradients are on drawn rows, there on all that is stored; they are compared after clipping, on accumulated and averaged
gradients. `variant: released` bounds u ≥ γ in the programme and adds 10⁻³ to the diagonal of M Mᵀ, as the released code;
`paper` adds γ to the solution.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
from pydantic import Field
from scipy.optimize import nnls

from mllm_cl.data.memory import look_up
from mllm_cl.methods._gradients import memory_gradient, product, trained_with_gradients
from mllm_cl.methods.agem import AGem
from mllm_cl.methods.base import Context

_DIAGONAL = 1e-3
_NEGLIGIBLE = 1e-12  # eigenvalues below this share of the largest one are zero


class Gem(AGem):
    """GEM, with the memory of A-GEM.

    Args:
        size: rows kept in total, the same number of every task.
        batch: memory rows per earlier task and step.
        margin: γ ≥ 0; beyond 0 it favours steps that lower the loss of earlier tasks.
        variant: how γ enters, as the `paper` says or as the `released` code does.
    """

    name = "gem"
    summary = "project the gradient so that it raises the loss on the stored rows of no earlier task"

    def __init__(
        self,
        *,
        size: Annotated[int, Field(ge=1)] = 200,
        batch: Annotated[int, Field(ge=1)] = 16,
        margin: Annotated[float, Field(ge=0)] = 0.5,
        variant: Literal["paper", "released"] = "paper",
    ) -> None:
        super().__init__(size=size, batch=batch)
        self.margin, self.variant = margin, variant

    def before_step(self, ctx: Context) -> None:
        if not self.memory:
            return
        parameters = trained_with_gradients(ctx)
        gradients = [p.grad for p in parameters if p.grad is not None]
        rng = random.Random(ctx.seed())
        trains = {task.name: task.train for task in ctx.stream}
        memories = []
        for name in dict.fromkeys(task for task, _ in self.memory):
            own = [entry for entry in self.memory if entry[0] == name]
            rows = look_up(rng.sample(own, min(self.batch, len(own))), trains)
            memories.append(memory_gradient(ctx, rows, parameters))
        against = np.array([product(memory, gradients) for memory in memories])  # M g
        if (against >= 0).all():
            return
        gram = np.array([[product(one, two) for two in memories] for one in memories])  # M Mᵀ
        factors = self.factors(gram, against)
        for place, gradient in enumerate(gradients):
            for factor, memory in zip(factors.tolist(), memories):
                gradient.add_((factor * memory[place]).to(gradient.dtype))
        ctx.cost["projected_steps"] += 1

    def factors(self, gram: np.ndarray, against: np.ndarray) -> np.ndarray:
        """What is added of every m_k: (tasks,), from M Mᵀ (tasks, tasks) and M g (tasks,)."""
        if self.variant == "paper":
            return solve_dual(gram, against) + self.margin
        gram = gram + _DIAGONAL * np.eye(len(gram))
        return solve_dual(gram, against + gram @ np.full(len(gram), self.margin)) + self.margin


def solve_dual(gram: np.ndarray, against: Sequence[float] | np.ndarray) -> np.ndarray:
    """Returns argmin ½ uᵀ K u + cᵀ u over u ≥ 0 for K positive semidefinite and c in its range, exactly (active set).

    With K = Rᵀ R it is the non-negative least-squares problem min ‖R u + R⁻ᵀ c‖.

    Args:
        gram: K (n, n).
        against: c (n,).

    Example:

    ```python
    >>> solve_dual(np.diag([1.0, 4.0]), [-3.0, 2.0]).tolist()
    [3.0, 0.0]

    ```
    """
    values, vectors = np.linalg.eigh(gram)
    kept = values > _NEGLIGIBLE * max(values.max(), np.finfo(np.float64).tiny)
    if not kept.any():  # all memories have gradient zero
        return np.zeros(len(gram))
    roots, directions = np.sqrt(values[kept]), vectors[:, kept]
    solution, _ = nnls(roots[:, None] * directions.T, -(directions.T @ np.asarray(against)) / roots)
    return solution
