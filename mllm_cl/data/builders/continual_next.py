"""Continual-NExT: fifteen tasks, the longest public order of multimodal instruction tuning.

* Code: `ECNU-SII/Continual-NExT` (Apache-2.0, a fork of ms-swift).
* Order: ArxivQA, GeoChat, IconQA, CLEVR-Math, CodeQA, ImageNet, Flickr30k, DocVQA, TextVQA, MathQA, ChartQA, PathVQA,
  Grounding, ScienceQA, WikiQA (CodeQA, MathQA and WikiQA are text).
* Row: ms-swift's (`messages` or `query`/`response`, `images`); any known format is read.

Not recoverable: folder and file names of the published data (the layout below is ours), test row counts, prompts. The
official score of long answers is the cosine of sentence embeddings; ROUGE-L is used here, so those columns are not
comparable.
"""

from __future__ import annotations

from mllm_cl.data.builders.checks import ImageCount
from mllm_cl.data.builders.family import Family, Files, TaskFiles

_CHOICE, _FILL, _LONG = "exact_match", "contains_words", "rouge_l"
# name, metric, thousands of training rows as published, has images
_TASKS = (
    ("ArxivQA", _CHOICE, 43, True), ("GeoChat", _FILL, 31, True), ("IconQA", _CHOICE, 33, True),
    ("CLEVR-Math", _CHOICE, 43, True), ("CodeQA", _LONG, 59, False), ("ImageNet", _FILL, 135, True),
    ("Flickr30k", "cider", 31, True), ("DocVQA", _FILL, 40, True), ("TextVQA", _FILL, 40, True),
    ("MathQA", _CHOICE, 37, False), ("ChartQA", _FILL, 30, True), ("PathVQA", _FILL, 33, True),
    ("Grounding", "box_accuracy@0.5", 142, True), ("ScienceQA", _CHOICE, 20, True), ("WikiQA", _LONG, 29, False),
)  # fmt: skip


def _task(name: str, metric: str, thousands: int, has_images: bool) -> TaskFiles:
    count = ImageCount(0 if name == "ScienceQA" else 1, 8) if has_images else ImageCount(0, 0)

    def files(split: str) -> Files:
        return Files(tuple(f"{name}/{split}{suffix}" for suffix in (".json", ".jsonl", ".parquet")), name, "auto")

    return TaskFiles(
        name,
        files("train"),
        files("test"),
        metric,
        functions=(count,),
        train_functions=(count,),
        max_new_tokens=128,
        description=f"about {thousands}k training rows",
    )


FAMILY = Family(
    name="continual-next",
    title="Continual-NExT",
    link="https://github.com/ECNU-SII/Continual-NExT",
    licence="code Apache-2.0; data: those of the fifteen data sets",
    citation="Continual-NExT, ECNU-SII, 2025-2026 (arXiv 2602.18055 for its any-to-any successor)",
    layout="""
  ArxivQA/train.json test.json images/     (and 14 more folders; .jsonl and .parquet are read too; the layout is ours)
""",
    tasks=tuple(_task(*task) for task in _TASKS),
    script="data_scripts/continual_next.py",
    gaps=(
        "folder and file names are not published in a form we could read: the layout is ours",
        "official scores of long answers are embedding cosines; ROUGE-L is used and is not comparable",
        "the published scripts hold that cosine only (paraphrase-multilingual-MiniLM-L12-v2): how case and punctuation are "
        "treated where choices must be equal and short answers contain the reference is not known; words are compared here",
        "row counts are rounded and not checked",
    ),
)
build = FAMILY.build
