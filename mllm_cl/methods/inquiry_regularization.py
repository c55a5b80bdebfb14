"""inquiry_regularization: UIR, the second half of LLaVA-c.

Idea: while learning a task, keep answering inquiries (user turns without answers) as a frozen reference would; no label
is read.
Formula: L = CE + weight · mean over inquiry rows of mean over positions of d(θ, reference), d = KL over the reference's
top-k tokens (`target: logits`) or ‖n(h) − n(h_ref)‖²/D, n(h) = h/rms(h) (`target: hidden_last`).
Inquiries: r (`ratio`) general ones per task row, held to the untouched base, and r' (`memory_ratio`) that ask the
questions of one earlier task (texts only), for each of them, held to the previous stage. The mean over all counts
weight · (1 + r'/r · earlier tasks), so that no kind counts less after further tasks. With r' = 0 all earlier tasks
share half of the r. `rollout` lets the reference write its own first tokens: the term sees the answer's onset.
Stored per task: up to `inquiry_memory` question texts. Cost per step: r + r' · earlier tasks further rows per task row
(by default 0.5 at the first task, 3 at the sixth); reference targets are computed once per task and read from disk.
Reference: LLaVA-c (arXiv 2506.08666). Fidelity: label-free regularization on inquiries as far as the description is
public; source, target, distance and weight are our choice, selected by measurement (docs/llava_c.md), and may differ
from the authors'.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mllm_cl.data.inquiry import BUILT_IN, ask, attach, question_of, questions_of, read_pool, without_format
from mllm_cl.data.rows import Row, Rows
from mllm_cl.errors import MethodError
from mllm_cl.methods._held import held_inquiries, reference_targets
from mllm_cl.methods._inquiries import inquiry_settings
from mllm_cl.methods._probe import Distance, Positions, Probe, Target
from mllm_cl.methods.base import EVERY_LAUNCHER, Context, Method, MethodState, ReferenceKind, TrainBatch

_REQUESTS = (
    "Ask a question about this picture.",
    "What would you like to know about this picture?",
    "Write an instruction that can be followed by looking at this picture.",
)
_WRITTEN = 32  # tokens of a generated inquiry


class InquiryRegularization(Method):
    """Unsupervised inquiry regularization.

    Args:
        preset: named combination of the settings below; a setting given beside it wins.
        weight: λ.
        ratio: general inquiries per task row.
        pool: `general` (built in), or a file of your own (see `mllm_cl.data.inquiry`).
        source: general inquiries come from the `pool`, are the current `task`'s questions without their format
            instruction, half of each (`mixed`), or are written by the untouched model (`generated`).
        modality: general inquiries are asked without pictures (`text`), with them (`image`), or in turn (`both`).
        images: pictures of inquiries: their own (`pool`), of the current task (`task`), or in turn (`both`).
        target: what is held: `logits`, `hidden_last` or `hidden_multi`.
        positions: `answer` (the rollout; the default with one), `last` (where an answer would start) or `all` (every
            token before it; the default without a rollout).
        distance: `kl`, `reverse_kl` for logits; `l2`, `cosine` for hidden states.
        rollout: tokens that the reference writes greedily; 0 holds the inquiry alone.
        reference: what general inquiries are held to: the untouched `base` or the `previous` stage.
        inquiry_memory: question texts kept of each task; they are held to the previous stage later. 0 keeps none, and
            needs no previous stage.
        memory_ratio: inquiries per task row with the questions of one earlier task. 0 asks those of all earlier tasks in
            half of the `ratio`.
        top_k: tokens of the reference's distribution that are kept per position.
        temperature: T of the distributions.
    """

    name = "inquiry_regularization"
    summary = "UIR of LLaVA-c: hold the answers to unlabelled inquiries to a frozen reference"
    needs = frozenset({"previous", "generate"})
    supports = EVERY_LAUNCHER

    def __init__(
        self,
        *,
        preset: str = "uir_memory",
        weight: Annotated[float, Field(ge=0)] | None = None,
        ratio: Annotated[float, Field(gt=0)] | None = None,
        pool: str = BUILT_IN,
        source: Literal["pool", "task", "mixed", "generated"] | None = None,
        modality: Literal["text", "image", "both"] | None = None,
        images: Literal["pool", "task", "both"] | None = None,
        target: Target | None = None,
        positions: Positions | None = None,
        distance: Distance | None = None,
        rollout: Annotated[int, Field(ge=0)] | None = None,
        reference: Literal["base", "previous"] | None = None,
        inquiry_memory: Annotated[int, Field(ge=0)] | None = None,
        memory_ratio: Annotated[float, Field(ge=0)] | None = None,
        top_k: Annotated[int, Field(ge=1)] = 32,
        temperature: Annotated[float, Field(gt=0)] = 1.0,
    ) -> None:
        if pool != BUILT_IN and not Path(pool).exists():
            raise MethodError(
                f"inquiry_regularization.pool: there is no {pool!r}.",
                expected=f"{BUILT_IN!r} (built in), a .txt file with one inquiry per line, or a file of rows",
                fix="correct the path.",
            )
        given = {"weight": weight, "ratio": ratio, "source": source, "modality": modality, "images": images}
        given |= {"target": target, "positions": positions, "distance": distance, "rollout": rollout}
        given |= {"reference": reference, "inquiry_memory": inquiry_memory, "memory_ratio": memory_ratio}
        settings = inquiry_settings(preset, given)
        self.weight, self.ratio, self.pool = settings["weight"], settings["ratio"], pool
        self.source, self.modality, self.images = settings["source"], settings["modality"], settings["images"]
        self.rollout, self.reference = settings["rollout"], settings["reference"]
        self.memory_size, self.memory_ratio = settings["inquiry_memory"], settings["memory_ratio"]
        if self.reference == "base" and not self.memory_size:
            self.needs = frozenset({"generate"})  # nothing is held to the previous stage
        self.probe = Probe(settings["target"], settings["positions"], settings["distance"], top_k, temperature)
        self.memory: dict[str, list[str]] = {}

    def train_rows(self, ctx: Context, rows: Sequence[Row]) -> Sequence[Row]:
        if self.weight == 0 or not len(rows):
            return rows
        if self.modality != "text" and not hasattr(ctx.processor, "image_processor"):
            raise MethodError(
                "inquiry_regularization: the inquiries have pictures, and this model takes none.",
                fix="set `modality: text` and a pool of text questions.",
            )
        rng = random.Random(ctx.seed())
        epochs = ctx.epochs.total
        general = max(1, round(self.ratio * len(rows))) * epochs
        remembered = round(self.memory_ratio * len(rows)) * len(self.memory) * epochs
        if self.memory and not self.memory_ratio:
            remembered = general // 2
            general -= remembered
        held = [self._hold(ctx, self._general(ctx, rows, general, rng), self.reference)]
        if remembered:
            held.append(self._hold(ctx, self._remembered(rows, remembered, rng), "previous"))
        places = [(kind, index) for kind, some in enumerate(held) for index in range(len(some))]
        rng.shuffle(places)
        inquiries = Rows(places, lambda place: held[place[0]][place[1]])
        ctx.cost["inquiry_rows"] += len(inquiries) // epochs
        return attach(rows, inquiries, epoch=lambda: ctx.epochs.current, epochs=epochs)

    def companions_per_row(self, earlier: int) -> float:
        return (self.ratio + self.memory_ratio * earlier * (self.memory_size > 0)) * (self.weight > 0)

    def _hold(self, ctx: Context, inquiries: list[Row], reference: ReferenceKind) -> Rows:
        return held_inquiries(ctx, inquiries, reference, self.rollout, self.probe)

    # which inquiries -------------------------------------------------------------------------------------------------

    def _general(self, ctx: Context, rows: Sequence[Row], count: int, rng: random.Random) -> list[Row]:
        """Inquiries that any model could be asked, from the source."""
        own = count // 2 if self.source == "mixed" else count * (self.source == "task")
        pool = _of_task(rows, own, rng) if own else []
        if own < count:
            pool += read_pool(self.pool, count - own, rng.randrange(2**31))
        if self.source == "generated":
            pool = self._generated(ctx, rows, pool, rng)
        return [
            ask(question_of(inquiry), self._pictures(index, inquiry["images"], rows, rng), f"inquiry/{index}")
            for index, inquiry in enumerate(pool[index % len(pool)] for index in range(count))
        ]

    def _remembered(self, rows: Sequence[Row], count: int, rng: random.Random) -> list[Row]:
        """Questions of earlier tasks, about pictures at hand."""
        tasks, pool = list(self.memory), read_pool(self.pool, count, rng.randrange(2**31))
        inquiries = []
        for index in range(count):
            turn, task = divmod(index, len(tasks))
            pictures = self._pictures(turn, pool[index % len(pool)]["images"], rows, rng)
            inquiries.append(ask(rng.choice(self.memory[tasks[task]]), pictures, f"remembered/{index}"))
        return inquiries

    def _generated(self, ctx: Context, rows: Sequence[Row], pool: Sequence[Row], rng: random.Random) -> list[Row]:
        """Inquiries that the untouched model writes about pictures of the pool and of the task."""
        asked = []
        for index, inquiry in enumerate(pool):
            pictures = self._pictures(index, inquiry["images"], rows, rng)
            asked.append(ask(rng.choice(_REQUESTS), pictures, f"request/{index}"))
        written = reference_targets(ctx, asked, "base", _WRITTEN).texts
        inquiries = [ask(text, row["images"], row["id"]) for text, row in zip(written, asked) if text.strip()]
        if not inquiries:
            raise MethodError(
                "inquiry_regularization.source: the model wrote no inquiry when it was asked for one.",
                fix="use `source: pool`.",
            )
        return inquiries

    def _pictures(self, turn: int, own: Sequence[Any], rows: Sequence[Row], rng: random.Random) -> Sequence[Any]:
        if self.modality == "text" or (self.modality == "both" and turn % 2):
            return []
        at = turn // 2 if self.modality == "both" else turn
        if self.images == "pool" or (self.images == "both" and own and at % 2 == 0):
            return own
        return rows[rng.randrange(len(rows))]["images"]

    # the term --------------------------------------------------------------------------------------------------------

    def loss_terms(self, ctx: Context, model: nn.Module, batch: TrainBatch, outputs: Any) -> dict[str, Tensor]:
        inquiries = batch.companions.get("inquiry")
        if inquiries is None or self.weight == 0:
            return {}
        mask = self.probe.mask(inquiries)
        distance = self.probe.distances(self.probe.states(model, inquiries, mask), inquiries["targets"])
        per_row = torch.stack([own.mean() for own in distance.split(mask.sum(dim=1).tolist())])
        weight = self.weight * (1 + self.memory_ratio / self.ratio * len(self.memory))  # of all kinds together
        return {"uir": weight * per_row.mean() * batch.share("inquiry")}

    def end_task(self, ctx: Context) -> None:
        if self.memory_size:
            self.memory[ctx.task.name] = questions_of(ctx.task.train, self.memory_size, ctx.seed())

    def state_dict(self) -> MethodState:
        return MethodState(data={"memory": self.memory})

    def load_state_dict(self, state: MethodState) -> None:
        self.memory = {task: list(texts) for task, texts in state.data["memory"].items()}


def _of_task(rows: Sequence[Row], count: int, rng: random.Random) -> list[Row]:
    """Questions of the task that is learnt, without their format instruction, with their own pictures."""
    chosen = [rows[rng.randrange(len(rows))] for _ in range(count)]
    texts = without_format([question_of(row) for row in chosen])
    return [ask(text, row["images"], f"task/{index}") for index, (text, row) in enumerate(zip(texts, chosen))]
