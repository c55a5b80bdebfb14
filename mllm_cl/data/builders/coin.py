"""CoIN: eight tasks, the first benchmark of continual instruction tuning for multimodal LLMs.

* Paper: Chen et al., CoIN, NeurIPS 2024 Datasets and Benchmarks (arXiv 2403.08350); code `zackschen/CoIN`.
* Order: ScienceQA, TextVQA, ImageNet, GQA, VizWiz, Grounding, VQAv2, OCR-VQA; two instruction styles.
* Row: LLaVA JSON for training, `question_id`, `image`, `text`, `answer` for test. Image paths start at the root.
* SEFE's diversified version (CoIN-ASD, `jinpeng0528/CoIN-ASD`) has the same layout under `annotations/`, with training
  files `train_x20.json` and the like: `options: {asd: 20}`.

Not recoverable: exact row counts (papers and mirrors differ; the numbers below are rounded), which of `test.json`,
`val.json`, `test_1.json` a mirror uses (all are tried), licence of the instruction files.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from mllm_cl.data.builders.checks import BoxAnswer, Choices, ImageCount, ImageSize, ReadTextVqa
from mllm_cl.data.builders.family import Family, Files, RowFunction, Scoring, TaskFiles, check_option

_TEXTVQA = "TextVQA/TextVQA_0.5.1_val.json"
# name, folder, metric, corrected metric, longest answer, test checks, train checks, about
_TASKS: tuple[tuple[str, str, str, str | None, int, tuple[RowFunction, ...], tuple[RowFunction, ...], str], ...] = (
    ("ScienceQA", "ScienceQA", "scienceqa_llava", None, 16, (Choices(), ImageCount(0)), (), "12k / 4k rows"),
    ("TextVQA", "TextVQA", "textvqa_m4c", None, 128, (ImageCount(),), (ImageCount(),), "34k / 5k rows"),
    ("ImageNet", "ImageNet", "coin_imagenet", "exact_match", 128, (ImageCount(),), (ImageCount(),), "117k / 5k rows"),
    ("GQA", "GQA", "gqa_llava", None, 128, (ImageCount(),), (ImageCount(),), "72k / 1k rows"),
    ("VizWiz", "VizWiz", "coin_exact_match", "exact_match", 128, (ImageCount(),), (ImageCount(),), "20k / 8k rows"),
    (
        "Grounding",
        "Grounding",
        "coin_grounding_acc@0.5",
        "box_accuracy@0.5",
        64,
        (ImageCount(), BoxAnswer(), ImageSize()),
        (ImageCount(),),
        "RefCOCO, RefCOCO+ and RefCOCOg; 55k / 31k rows",
    ),
    ("VQAv2", "VQAv2", "coin_exact_match", "exact_match", 128, (ImageCount(),), (ImageCount(),), "82k / 107k rows"),
    ("OCR-VQA", "OCRVQA", "coin_ocrvqa", "exact_match", 128, (ImageCount(),), (ImageCount(),), "165k / 100k rows"),
)

LAYOUT = """
  COCO2014/train2014/  GQA/images/  OCR-VQA/images/  TextVQA/train_images/ ...   images, as the rows name them
  TextVQA/TextVQA_0.5.1_val.json                      official annotations: ten answers per question
  Instruction_Type1/ScienceQA/train.json test.json    (also annotations/ as SEFE arranges it)
  Instruction_Type1/TextVQA/  ImageNet/  GQA/  VizWiz/  Grounding/  VQAv2/  OCRVQA/
"""

FAMILY = Family(
    name="coin",
    title="CoIN",
    link="https://github.com/zackschen/CoIN",
    licence="instruction files: none stated; images: those of the ten data sets (ImageNet, VizWiz, TextVQA, ... each its own)",
    citation="Chen et al., CoIN: A Benchmark of Continual Instruction tuNing for MLLMs, NeurIPS 2024, arXiv 2403.08350",
    layout=LAYOUT,
    script="data_scripts/coin.py",
    gaps=(
        "row counts of published copies differ (issue 1 of HiDe-LLaVA); none is checked",
        "the official grounding scorer cuts a character off both ends of a box and scores right boxes 0: "
        "`scoring: corrected` uses IoU >= 0.5",
        "the official ImageNet scorer accepts an empty answer: `scoring: corrected` uses exact_match",
        "VQAv2 and VizWiz are scored against one answer, not by the soft accuracy of their authors",
        "the official ScienceQA score leaves missing predictions out of the divisor; here every row counts",
    ),
)


def _family(instructions: int, asd: int | None) -> Family:
    folders = (f"Instruction_Type{instructions}", f"Instructions_Type{instructions}")
    folders += ("Instructions_Original", "annotations") * (instructions == 1)
    trains = ("train.json",) if asd is None else (f"train_x{asd}.json",)
    tests = ("test.json", "val.json", "test_1.json")

    def files(folder: str, names: tuple[str, ...], format: str) -> Files:
        return Files(tuple(f"{top}/{folder}/{name}" for top in folders for name in names), format=format)

    tasks = tuple(
        TaskFiles(
            name,
            files(folder, trains, "llava"),
            files(folder, tests, "llava_test"),
            metric,
            corrected=corrected,
            functions=functions,
            train_functions=train_functions,
            references=ReadTextVqa(_TEXTVQA) if name == "TextVQA" else None,
            max_new_tokens=max_new_tokens,
            description=about,
        )
        for name, folder, metric, corrected, max_new_tokens, functions, train_functions, about in _TASKS
    )
    return dataclasses.replace(FAMILY, tasks=tasks)


def build(
    root: str | Path | None = None,
    *,
    instructions: int = 1,
    asd: int | None = None,
    scoring: Scoring = "official",
) -> list[dict[str, Any]]:
    """Returns the eight tasks.

    Args:
        root: folder of `LAYOUT`.
        instructions (`int`, defaults to 1): instruction style, 1 or 2.
        asd (`int`, *optional*): share X (in percent) of CoIN-ASD's diversified training files.
        scoring (`str`): `official` or `corrected`.
    """
    check_option("instructions", instructions, (1, 2))
    check_option("asd", asd, (None, 10, 20, 40, 60, 80))
    return _family(instructions, asd).build(root, scoring=scoring)


FAMILY = _family(1, None)
