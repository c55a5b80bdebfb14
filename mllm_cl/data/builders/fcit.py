"""FCIT: federated continual instruction tuning, in stages of one task or of one capability, with client partitions.

* Paper: Guo et al., ICCV 2025 (arXiv 2503.12897); code `Ghy0501/FCIT`; data Hub `MLLM-CL/FCIT`.
* `fcit-task`: eight stages: ImageNet-R, ArxivQA, IconQA, CLEVR-Math, OCR-VQA, Flickr30k, FigureQA, super-CLEVR.
* `fcit-capability`: twelve data sets in four stages: General, Other, Math, Chart. Every data set is a task of the stream
  and `STAGES` says which of them are learnt together; `stream.merge` trains a group as one stage.
* `client_rows` reads the published partition of one stage; `partition` draws one as the paper describes it.
* Row: LLaVA JSON for training, `question_id`, `image`, `text`, `answer` for test; images start at `datasets/`.

Not recoverable: sizes beyond those in file names; which of two stage orders the published partitions use (the path list
of the code and its evaluation script disagree: the script's order is taken); test files of IconQA, DVQA, CLEVR-Math.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mllm_cl.data.builders.checks import BoxAnswer, ImageCount, ImageSize, ReadCoco
from mllm_cl.data.builders.family import Family, Files, RowFunction, Scoring, TaskFiles, check_option
from mllm_cl.data.builders.ucit import LETTER, NUMBER
from mllm_cl.data.readers import read_rows
from mllm_cl.data.rows import Row, Rows
from mllm_cl.errors import DataError

CLIENTS, SAMPLED, ROUNDS = 50, 5, 10
BETAS = (0.5, 1.0, 5.0)
STAGES = {
    "General": ("AOKVQA", "IconQA", "Grounding", "ImageNet-R"),
    "Other": ("Flickr30k", "OCR-VQA"),
    "Math": ("CLEVR-Math", "super-CLEVR", "TabMWP"),
    "Chart": ("ArxivQA", "FigureQA", "DVQA"),
}
# Which tasks (positions in the stage order) the sampled clients of each heterogeneous stage work on.
HETEROGENEOUS_TASKS = (
    (1, 2, 4, 5, 6), (3, 4, 5, 7, 7), (0, 2, 3, 4, 5), (0, 0, 1, 3, 7),
    (1, 2, 4, 4, 5), (0, 3, 5, 7, 7), (2, 2, 5, 7, 7), (5, 5, 5, 6, 6),
)  # fmt: skip
HETEROGENEOUS_CAPABILITIES = ((0, 1, 1, 3, 3), (0, 2, 2, 2, 3), (1, 2, 2, 3, 3), (0, 0, 0, 1, 1))


def _task(
    name: str,
    folder: str,
    train: str,
    tests: tuple[str, ...],
    metric: str = "coin_exact_match",
    corrected: str | None = "exact_match",
    functions: tuple[RowFunction, ...] = (),
    counts: tuple[int | None, int | None] = (None, None),
    captions: str | None = None,
) -> TaskFiles:
    place = f"instructions/{folder}"
    return TaskFiles(
        name,
        Files((f"{place}/{train}", f"{place}/train.json"), images="datasets", count=counts[0]),
        Files(
            tuple(f"{place}/{test}" for test in tests), images="datasets", format="llava_test", count=counts[1]
        ),
        metric,
        corrected=corrected,
        functions=(ImageCount(), *functions),
        train_functions=(ImageCount(),),
        references=ReadCoco(f"{place}/{captions}") if captions else None,
        max_new_tokens=128,
    )  # fmt: skip


_ALL = {
    task.name: task
    for task in (
        _task("ImageNet-R", "ImageNet-R", "train.json", ("test.json",)),
        _task(
            "ArxivQA", "ArxivQA", "train_4w.json", ("test_1w.json",), functions=(LETTER,), counts=(40_000, 10_000)
        ),
        _task("IconQA", "IconQA", "train.json", ("test.json", "val.json")),
        _task(
            "CLEVR-Math", "CLEVR-Math", "train_4w.json", ("test_1w.json", "test.json"),
            functions=(NUMBER,), counts=(40_000, 10_000),
        ),
        _task("OCR-VQA", "OCRVQA", "train_10w.json", ("test_1w.json",), counts=(100_000, 10_000)),
        _task(
            "Flickr30k", "Flickr30k-cap", "train_brief_4w.json", ("val_brief.json",), "ucit_caption", "captions",
            counts=(40_000, None), captions="val_coco_type.json",
        ),
        _task("FigureQA", "FigureQA", "train.json", ("test.json",), "fcit_contained", "contained"),
        _task("super-CLEVR", "super-CLEVR", "train.json", ("test.json",)),
        _task("AOKVQA", "AOKVQA", "train.json", ("val.json", "test.json")),
        _task(
            "Grounding", "Grounding", "train_11w.json", ("test_6000.json",), "coin_grounding_acc@0.5",
            "box_accuracy@0.5", functions=(BoxAnswer(), ImageSize()), counts=(None, 6000),
        ),
        _task("DVQA", "DVQA", "train.json", ("test.json", "val.json"), "fcit_contained", "contained"),
        _task("TabMWP", "TabMWP", "train.json", ("test.json",)),
    )
}  # fmt: skip
_TASK_ORDER = ("ImageNet-R", "ArxivQA", "IconQA", "CLEVR-Math", "OCR-VQA", "Flickr30k", "FigureQA", "super-CLEVR")


def _family(name: str, title: str, order: Sequence[str]) -> Family:
    return Family(
        name=name,
        title=title,
        link="https://huggingface.co/datasets/MLLM-CL/FCIT",
        licence="none stated for the instruction files; images: those of the twelve data sets",
        citation="Guo et al., Federated Continual Instruction Tuning, ICCV 2025, arXiv 2503.12897",
        layout="""
  datasets/...                                              images, as the rows name them
  instructions/ArxivQA/train_4w.json test_1w.json           likewise the other data sets
  instructions/Flickr30k-cap/train_brief_4w.json val_brief.json val_coco_type.json
  partitioned_data/Task-related/seq/1.0/Task1/client_0.json       50 clients a stage; beta 0.5, 1.0, 5.0
  partitioned_data/Capability-related/cap/1.0/Task1/client_0.json
""",
        tasks=tuple(_ALL[task] for task in order),
        script="data_scripts/fcit.py",
        gaps=(
            "the path list of the code has another stage order than its evaluation script, which is followed here",
            "beta skews how many rows a client has, not which: the partitioner cuts a shuffled data set",
            "the published partitioner passes beta where its floor of 50 rows should go; `partition` keeps the floor",
            "Flickr30k's official score needs Java for METEOR: `scoring: corrected` reports CIDEr",
            "FigureQA and DVQA: the official rule accepts any answer that is part of the reference, the empty one too",
        ),
    )


TASK_FAMILY = _family("fcit-task", "FCIT, one task a stage", _TASK_ORDER)
CAPABILITY_FAMILY = _family(
    "fcit-capability", "FCIT, one capability a stage", [task for group in STAGES.values() for task in group]
)
FAMILY = TASK_FAMILY
build_tasks = TASK_FAMILY.build


def build_capabilities(
    root: str | Path | None = None, *, scoring: Scoring = "official", captions: str | None = None
) -> list[dict[str, Any]]:
    """Returns the twelve tasks, group after group; `stream.merge` with `STAGES` makes one stage of a group.

    Args:
        root: folder of the layout.
        scoring (`str`): `official` or `corrected`.
        captions (`str`, *optional*): scorer of Flickr30k. The official and the corrected one score a whole test set, which a
            merged stage cannot: `rouge_l` scores single answers.
    """
    check_option("captions", captions, (None, "rouge_l"))
    tasks = CAPABILITY_FAMILY.build(root, scoring=scoring)
    return [task | {"metric": captions} if captions and task["name"] == "Flickr30k" else task for task in tasks]


def client_rows(root: str | Path, setting: str, stage: int, client: int, beta: float = 1.0) -> Rows:
    """Returns the published rows of one client.

    Args:
        root: folder of the layout.
        setting (`str`): `task` or `capability`.
        stage (`int`): from 1.
        client (`int`): from 0.
        beta (`float`, defaults to 1.0): concentration of the partition: 0.5, 1.0 or 5.0.

    Raises:
        DataError: there is no such file, or it cannot be read.
    """
    check_option("setting", setting, ("task", "capability"))
    check_option("beta", beta, BETAS)
    below = "Task-related/seq" if setting == "task" else "Capability-related/cap"
    path = Path(root) / "partitioned_data" / below / str(beta) / f"Task{stage}" / f"client_{client}.json"
    if not path.is_file():
        raise DataError(
            f"{path}: there is no published partition of stage {stage}, client {client}.",
            fix="download partitioned_data, or draw a partition of your own (`mllm_cl.data.builders.fcit.partition`).",
        )
    images = Path(root) / "datasets"
    return read_rows(path, format="llava", image_folder=images, task=f"client-{client}", split="train")


def partition(
    rows: Sequence[Row], *, clients: int = CLIENTS, beta: float = 1.0, least: int = 50, seed: int = 0
) -> list[Rows]:
    """Returns one view of the rows per client: shuffled rows cut into Dirichlet(beta) shares of at least `least` rows.

    Raises:
        DataError: there are fewer than `clients * least` rows, or beta is not positive.
    """
    if beta <= 0 or clients < 1 or clients * least > len(rows):
        raise DataError(
            f"partition: {len(rows)} rows for {clients} clients with at least {least} each, beta {beta}.",
            expected="a positive beta and at least clients x least rows",
            fix="lower `clients` or `least`.",
        )
    rng = np.random.default_rng([seed, clients])
    free = len(rows) - clients * least
    exact = rng.dirichlet([beta] * clients) * free
    sizes = np.floor(exact).astype(int)
    for client in np.argsort(sizes - exact, kind="stable")[: free - int(sizes.sum())]:
        sizes[client] += 1
    order = rng.permutation(len(rows)).tolist()
    ends = np.cumsum(sizes + least).tolist()
    whole = rows if isinstance(rows, Rows) else Rows(rows)
    return [whole.select(order[start:end]) for start, end in zip([0, *ends], ends)]
