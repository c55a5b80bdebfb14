"""How `build_tiny_llava.py` trains: first the eyes alone, then everything together.

1. *Seeing.* The vision tower learns to tell the facts of a picture (colour, shape, digit, letter, place, ...) through
   a linear layer that is thrown away. It costs a tenth of a step of the whole model; without it the decoder learns for
   a long time from features that tell colours only. Large LLaVAs start from a trained CLIP tower for the same reason.
2. *Answering.* All parameters learn to answer. A picture is encoded once and asked several questions: each is a
   *branch* that sees the picture and itself but not the other questions, which gives exactly the loss of separate rows
   at less than half the cost. One picture in ten is an ordinary conversation of several turns instead.

Matrices are trained with Muon, everything else with AdamW.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.nn.functional import cross_entropy
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from mllm_cl.data.builders.general import Question, generator
from mllm_cl.data.builders.scenes import COLOURS, NUMBER_WORDS, PLACES, SHAPES, Picture
from mllm_cl.data.builders.sources import GENERAL_LETTERS, GENERAL_PHOTOS
from mllm_cl.models.tiny import ASSISTANT, BOS, EOS, IMAGE, USER

IGNORED = -100


class Muon(torch.optim.Optimizer):
    """Momentum whose update of every matrix is orthogonalised by five Newton-Schulz iterations (Jordan et al., 2024).

    As `torch.optim.Muon`, but in float32 (bfloat16 is slow on most processors) and with equal shapes stacked. The
    update is scaled to the root mean square of AdamW's (Liu et al., 2025, arXiv:2502.16982).
    """

    def __init__(
        self, parameters: list[torch.nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.05
    ):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Updates every matrix that has a gradient."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[tuple[torch.nn.Parameter, torch.Tensor]]] = {}
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                average = self.state[parameter].setdefault("average", torch.zeros_like(parameter))
                average.lerp_(parameter.grad, 1 - group["momentum"])
                nesterov = parameter.grad.lerp(average, group["momentum"])
                shapes.setdefault(parameter.shape, []).append((parameter, nesterov))
            for (rows, columns), updates in shapes.items():
                stacked = torch.stack([update for _, update in updates])
                matrix = stacked.mT if rows > columns else stacked  # (count, short, long)
                matrix = matrix / (matrix.norm(dim=(-2, -1), keepdim=True) + 1e-7)
                for _ in range(5):
                    gram = matrix @ matrix.mT
                    matrix = 3.4445 * matrix + (-4.7750 * gram + 2.0315 * gram @ gram) @ matrix
                scale = group["lr"] * 0.2 * max(rows, columns) ** 0.5
                for (parameter, _), update in zip(updates, matrix.mT if rows > columns else matrix):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-scale)


class Training:
    """The two optimizers, their common schedule (short warm-up, constant, linear to zero) and a progress bar."""

    def __init__(self, parts: list[torch.nn.Module], muon_lr: float, adamw_lr: float, steps: int) -> None:
        named = [pair for part in parts for pair in part.named_parameters()]
        self.parameters = [parameter for _, parameter in named]
        matrices = [p for name, p in named if p.ndim == 2 and "embed" not in name and "lm_head" not in name]
        chosen = {id(parameter) for parameter in matrices}
        rest = [parameter for parameter in self.parameters if id(parameter) not in chosen]
        self.optimizers = [
            Muon(matrices, lr=muon_lr),
            torch.optim.AdamW(rest, lr=adamw_lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
        ]
        self.rates, self.steps, self.done = (muon_lr, adamw_lr), steps, 0

    def step(self, loss: torch.Tensor) -> None:
        """Updates the parameters."""
        progress = self.done / self.steps
        factor = min(1.0, (progress + 1 / self.steps) / 0.04, (1 - progress) / 0.55)
        for optimizer, rate in zip(self.optimizers, self.rates):
            optimizer.param_groups[0]["lr"] = rate * factor
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.done += 1

    def run(self, losses: Iterator[torch.Tensor], title: str, console: Console) -> None:
        """Takes a step for each loss, with a progress bar (or, without a terminal, ten lines)."""
        columns = (
            TextColumn(title),
            BarColumn(),
            TextColumn("{task.completed}/{task.total} loss {task.fields[loss]:.3f}"),
        )
        average = 0.0
        with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress:
            bar = progress.add_task(title, total=self.steps, loss=0.0)
            for loss in losses:
                self.step(loss)
                average = loss.item() if self.done == 1 else 0.98 * average + 0.02 * loss.item()
                progress.update(bar, advance=1, loss=average)
                if not console.is_terminal and self.done % -(-self.steps // 10) == 0:
                    console.print(f"{title}: step {self.done}/{self.steps} loss {average:.3f}")


@dataclass
class Sample:
    """A picture with its questions as one sequence; see the module docstring.

    Args:
        tokens, targets, branches, positions (`list[int]`): per token; `targets` are already shifted to the token that
        predicts
            them, branch 0 is seen by everybody, branch -1 is padding.
        pixels (`tuple[int, ...]`): which rows of the pixel array.
    """

    tokens: list[int]
    targets: list[int]
    branches: list[int]
    positions: list[int]
    pixels: tuple[int, ...]


class Packer:
    """Turns pictures with questions into samples, token for token as the chat template writes them."""

    def __init__(self, processor: LlavaProcessor) -> None:
        tokenizer = processor.tokenizer
        self.encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
        self.bos, self.eos, self.image, self.user, self.assistant = tokenizer.convert_tokens_to_ids(
            [BOS, EOS, IMAGE, USER, ASSISTANT]
        )
        self.image_tokens = (processor.image_processor.size["height"] // processor.patch_size) ** 2
        self.cache: dict[str, list[int]] = {}

    def text(self, text: str) -> list[int]:
        """Returns the tokens of a text."""
        if text not in self.cache:
            self.cache[text] = self.encode(text)
        return self.cache[text]

    def pack(self, questions: list[Question], pixels: tuple[int, ...], conversation: bool) -> Sample:
        """Returns the sample of a picture: one branch per question, or one conversation."""
        prefix = [self.bos, self.user] + [self.image] * (self.image_tokens * len(pixels))
        sample = Sample(list(prefix), [IGNORED] * len(prefix), [0] * len(prefix), list(range(len(prefix))), pixels)
        for number, question in enumerate(questions, start=1):
            prompt = [*self.text(question.text), self.assistant]
            if conversation and number > 1:
                prompt = [self.user, *prompt]
            answer = [*self.text(question.answer), self.eos]
            start = len(sample.tokens) if conversation else len(prefix)
            count = len(prompt) + len(answer)
            sample.tokens += prompt + answer
            sample.targets += [IGNORED] * (len(prompt) - 1) + answer + [IGNORED]
            sample.branches += [0 if conversation else number] * count
            sample.positions += range(start, start + count)
        return sample


def prepare(
    processor: LlavaProcessor, pictures: list[tuple[Picture, list[Question]]], seed: int
) -> tuple[list[Sample], torch.Tensor]:
    """Returns the samples and the pixels of all images, which come from the very processor, in half precision."""
    packer, rng = Packer(processor), generator("conversations", seed)
    samples, images = [], []
    for picture, questions in pictures:
        pixels = tuple(range(len(images), len(images) + len(picture.images)))
        images.extend(picture.images)
        samples.append(packer.pack(questions, pixels, conversation=rng.random() < 0.1))
    chunks = [
        processor.image_processor(images[start : start + 512], return_tensors="pt")["pixel_values"].half()
        for start in range(0, len(images), 512)
    ]
    return samples, torch.cat(chunks)


def batches_of(samples: list[Sample], batch_size: int, rng: np.random.Generator) -> list[list[Sample]]:
    """Returns one epoch of batches of roughly similar lengths in random order.

    Roughly, because the length tells the family: a batch of nothing but photographs would pull the weights their way.
    """
    order = rng.permutation(len(samples)).tolist()
    length = np.array([len(sample.tokens) for sample in samples]) + rng.normal(0, 5, len(samples))
    batches = []
    for start in range(0, len(order), batch_size * 24):
        chunk = sorted(order[start : start + batch_size * 24], key=lambda index: length[index])
        batches += [chunk[at : at + batch_size] for at in range(0, len(chunk), batch_size)]
    return [[samples[index] for index in batches[at]] for at in rng.permutation(len(batches)).tolist()]


def loss_of(model: LlavaForConditionalGeneration, batch: list[Sample], pixels: torch.Tensor) -> torch.Tensor:
    """Returns the mean cross-entropy of the answer tokens of a batch."""
    length = max(len(sample.tokens) for sample in batch)

    def padded(name: str, fill: int) -> torch.Tensor:
        rows = [getattr(sample, name) + [fill] * (length - len(sample.tokens)) for sample in batch]
        return torch.tensor(rows)

    tokens = padded("tokens", 0)  # the padding token
    targets = padded("targets", IGNORED)
    branches, positions = padded("branches", -1), padded("positions", 0)
    # (batch, 1, length, length): a token sees what came before it in branch 0 and in its own branch
    same = (branches[:, None, :] == 0) | (branches[:, None, :] == branches[:, :, None])
    mask = (same & torch.ones(length, length, dtype=torch.bool).tril())[:, None]
    indices = [index for sample in batch for index in sample.pixels]
    hidden = model.model(
        input_ids=tokens,
        pixel_values=pixels[indices].float() if indices else None,
        attention_mask=mask,
        position_ids=positions,
        use_cache=False,
    ).last_hidden_state
    chosen = targets != IGNORED
    return cross_entropy(model.lm_head(hidden[chosen]), targets[chosen])


# Facts that the eyes learn to tell: head -> classes.
FACTS: dict[str, tuple] = {
    "family": ("digit", "letter", "shape", "several", "photo"),
    "name": (*NUMBER_WORDS, *GENERAL_LETTERS, *SHAPES, *GENERAL_PHOTOS),
    "colour": tuple(COLOURS),
    "size": ("big", "small"),
    "place": tuple(PLACES),
    "background": ("black", "grey"),
    "tone": ("colour", "grey"),
    "count": (2, 3, 4),
    **{
        f"{what}{slot}": classes
        for slot in range(3)
        for what, classes in (("shape", SHAPES), ("colour", tuple(COLOURS)))
    },
}


def facts_of(picture: Picture) -> list[int]:
    """Returns the class of every head of `FACTS` for a picture, `IGNORED` where it has none."""
    facts = {**picture.facts, "family": picture.family}
    if facts.get("in_row"):
        for slot, (shape, colour) in enumerate(zip(facts["shapes"], facts["colours"])):
            facts |= {f"shape{slot}": shape, f"colour{slot}": colour}
    return [classes.index(facts[head]) if facts.get(head) in classes else IGNORED for head, classes in FACTS.items()]


def train_eyes(
    model: LlavaForConditionalGeneration,
    pictures: list[Picture],
    samples: list[Sample],
    pixels: torch.Tensor,
    *,
    batch_size: int,
    seed: int,
    console: Console,
) -> None:
    """Trains the vision tower alone, one epoch; see the module docstring."""
    chosen = [index for index, picture in enumerate(pictures) if len(picture.images) == 1]
    labels = torch.tensor([facts_of(pictures[index]) for index in chosen])
    rows = torch.tensor([samples[index].pixels[0] for index in chosen])
    tower = model.model.vision_tower
    hidden = tower.embeddings.position_embedding.embedding_dim
    sizes = [len(classes) for classes in FACTS.values()]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # one layer for all patches, averaged: what an attention head of the decoder can read as well
        head = torch.nn.Sequential(torch.nn.LayerNorm(hidden), torch.nn.Linear(hidden, sum(sizes)))
    order = torch.from_numpy(generator("eyes", seed).permutation(len(chosen))).split(batch_size)

    def losses() -> Iterator[torch.Tensor]:
        for batch in order:
            # (batch, 1 + patches, hidden), the class token dropped
            features = tower(pixel_values=pixels[rows[batch]].float()).last_hidden_state[:, 1:]
            scores = head(features).mean(dim=1).split(sizes, dim=1)
            wanted = labels[batch].unbind(dim=1)
            terms = [cross_entropy(a, b, ignore_index=IGNORED, reduction="sum") for a, b in zip(scores, wanted)]
            yield torch.stack(terms).sum() / len(batch)

    tower.train()
    Training([tower, head], muon_lr=4e-3, adamw_lr=2e-3, steps=len(order)).run(losses(), "seeing", console)


def train_all(
    model: LlavaForConditionalGeneration,
    samples: list[Sample],
    pixels: torch.Tensor,
    *,
    batch_size: int,
    epochs: int,
    seed: int,
    console: Console,
) -> None:
    """Trains all parameters to answer."""
    rng = generator("batches", seed)
    steps = epochs * len(batches_of(samples, batch_size, np.random.default_rng(0)))

    def losses() -> Iterator[torch.Tensor]:
        for _ in range(epochs):
            for batch in batches_of(samples, batch_size, rng):
                yield loss_of(model, batch, pixels)

    model.train()
    Training([model], muon_lr=3e-3, adamw_lr=3e-3, steps=steps).run(losses(), "answering", console)
    model.eval()
