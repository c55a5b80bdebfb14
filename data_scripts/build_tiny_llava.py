"""Trains the tiny LLaVA that ships with the package, from nothing, on one processor core.

    python data_scripts/build_tiny_llava.py [--seed 0] [--out mllm_cl/models/tiny_llava]

Same seed, same versions, same machine: same weights. Everything comes from installed packages (`pip install "mllm_cl[demo]"`); nothing is
downloaded. A picture is encoded once and asked several questions: each question is a *branch* that sees the picture and itself
but not the other questions, which gives exactly the loss of separate rows at less than half the cost. One
picture in ten is an ordinary conversation of several turns instead.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.nn.functional import cross_entropy
from transformers import LlavaForConditionalGeneration, LlavaProcessor
from transformers.utils import logging as transformers_logging

from mllm_cl.data.builders.general import Question, general_pictures, general_rows, generator
from mllm_cl.data.builders.scenes import Picture
from mllm_cl.data.images import load_image
from mllm_cl.data.rows import Rows
from mllm_cl.models.tiny import ASSISTANT, BOS, EOS, IMAGE, USER, build_model, build_processor, tiny_llava_folder, train_tokenizer

IGNORED = -100


@dataclass
class Sample:
    """A picture with its questions as one sequence; see the module docstring.

    Args:
        tokens, targets, branches, positions (`list[int]`): per token; `targets` are already shifted to the token that predicts
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
        sample = Sample(prefix, [IGNORED] * len(prefix), [0] * len(prefix), list(range(len(prefix))), pixels)
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

    tokens, targets = padded("tokens", model.config.text_config.pad_token_id), padded("targets", IGNORED)
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


def train(
    model: LlavaForConditionalGeneration,
    samples: list[Sample],
    pixels: torch.Tensor,
    args: argparse.Namespace,
    console: Console,
) -> None:
    """Trains all parameters with AdamW and one cycle of the learning rate."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    steps = args.epochs * -(-len(samples) // args.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=steps + 1, pct_start=0.08)
    rng = generator("batches", args.seed)
    columns = (TextColumn("training"), BarColumn(), TextColumn("{task.completed}/{task.total} loss {task.fields[loss]:.3f}"))
    done, average, started = 0, 0.0, time.monotonic()
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress:
        bar = progress.add_task("training", total=steps, loss=0.0)
        for _ in range(args.epochs):
            for batch in batches_of(samples, args.batch_size, rng):
                loss = loss_of(model, batch, pixels)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                done += 1
                average = loss.item() if done == 1 else 0.98 * average + 0.02 * loss.item()
                progress.update(bar, advance=1, loss=average)
                if not console.is_terminal and done % 250 == 0:
                    console.print(f"step {done}/{steps} loss {average:.3f} {time.monotonic() - started:.0f} s")
    model.eval()


@torch.inference_mode()
def answers_of(model: LlavaForConditionalGeneration, processor: LlavaProcessor, rows: Rows, batch_size: int = 100) -> list[str]:
    """Returns the greedy answers to rows, generated in batches of similar rows."""
    answers = [""] * len(rows)
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]["images"]))
    for start in range(0, len(order), batch_size):
        chunk = order[start : start + batch_size]
        prompts = [
            processor.apply_chat_template(rows[index]["messages"], add_generation_prompt=True, tokenize=False) for index in chunk
        ]
        images = [load_image(reference) for index in chunk for reference in rows[index]["images"]]
        inputs = processor(text=prompts, images=images or None, return_tensors="pt", padding=True, add_special_tokens=False)
        output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
        texts = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for index, text in zip(chunk, texts):
            answers[index] = text.strip()
    return answers


def benchmark(model: LlavaForConditionalGeneration, processor: LlavaProcessor, rows: Rows) -> tuple[float, dict[str, float]]:
    """Returns the exact match in percent, overall and per kind."""
    hits = defaultdict(list)
    for row, answer in zip(rows, answers_of(model, processor, rows)):
        hits[row["kind"]].append(answer in row["answers"])
    return 100 * float(np.mean(sum(hits.values(), []))), {kind: 100 * float(np.mean(hit)) for kind, hit in hits.items()}


README = """\
# tiny-llava

A `LlavaForConditionalGeneration` with {parameters:,} parameters (CLIP vision tower, MLP projector, Llama decoder, byte-level BPE of {vocabulary}
tokens), trained from nothing on the general mixture of `mllm_cl/data/builders/general.py`. It exists for demos, tests and studies of
forgetting; it is of no other use. Half precision on disk, float32 once loaded.

    {command}

Seed {seed}; {steps} steps of {batch_size} pictures; {minutes:.1f} minutes with {threads} thread(s); torch {torch}, transformers {transformers}.

Exact match on the benchmark `quickstart-general` ({rows} rows: images and paraphrases not seen in training), greedy
generation: **{overall:.1f} %**.

| kind | exact match, % |
|---|---|
{table}

Sources of the images: see `mllm_cl/data/builders/sources.py`. Licence of the weights: Apache-2.0, as the package.
"""


def save(model: LlavaForConditionalGeneration, processor: LlavaProcessor, folder: Path, readme: str) -> None:
    """Writes weights (half precision), processor and README; the folder appears at once or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    half = model.half()
    half.config.dtype = torch.float32  # what loading without `dtype` gives
    half.save_pretrained(temporary)
    processor.save_pretrained(temporary)
    (temporary / "README.md").write_text(readme, encoding="utf-8")
    temporary.chmod(0o755)
    old = None
    if folder.exists():
        old = folder.with_name(f".{folder.name}-old-{os.getpid()}")
        folder.rename(old)
    temporary.rename(folder)
    if old is not None:
        shutil.rmtree(old)


def main() -> None:
    """Parses the command line and builds the weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pictures", type=int, default=50_000)
    parser.add_argument("--questions", type=int, default=5, help="asked about each picture")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=24)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--vocabulary", type=int, default=640)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=tiny_llava_folder())
    args = parser.parse_args()
    started, console = time.monotonic(), Console()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    torch.use_deterministic_algorithms(True)
    transformers_logging.disable_progress_bar()

    console.print(f"drawing {args.pictures} pictures")
    pictures = list(general_pictures("train", args.pictures, args.questions, args.seed))
    texts = (text for _, questions in pictures[:8000] for question in questions for text in (question.text, question.answer))
    processor = build_processor(train_tokenizer(texts, args.vocabulary))
    model = build_model(processor, seed=args.seed)
    samples, pixels = prepare(processor, pictures, args.seed)
    tokens = sum(len(sample.tokens) for sample in samples) / len(samples)
    console.print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(processor.tokenizer)} tokens in the vocabulary, "
        f"{tokens:.1f} tokens per picture; ready after {time.monotonic() - started:.0f} s"
    )
    del pictures
    train(model, samples, pixels, args, console)

    # Measure what is shipped: the weights as rounded to half precision.
    model = model.half().float()
    rows = general_rows("test")
    overall, kinds = benchmark(model, processor, rows)
    minutes = (time.monotonic() - started) / 60
    for kind, value in kinds.items():
        console.print(f"{kind:>16} {value:5.1f} %")
    console.print(f"{'overall':>16} {overall:5.1f} %   ({minutes:.1f} minutes)")
    readme = README.format(
        parameters=sum(p.numel() for p in model.parameters()),
        vocabulary=len(processor.tokenizer),
        command="python data_scripts/build_tiny_llava.py " + " ".join(sys.argv[1:]),
        seed=args.seed,
        steps=args.epochs * -(-len(samples) // args.batch_size),
        batch_size=args.batch_size,
        minutes=minutes,
        threads=args.threads,
        torch=torch.__version__,
        transformers=__import__("transformers").__version__,
        rows=len(rows),
        overall=overall,
        table="\n".join(f"| {kind} | {value:.0f} |" for kind, value in kinds.items()),
    )
    save(model, processor, args.out, readme)
    console.print(f"written to {args.out} ({sum(f.stat().st_size for f in args.out.iterdir()) / 1e6:.2f} MB)")


if __name__ == "__main__":
    main()
