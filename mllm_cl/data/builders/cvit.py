"""CVIT, the benchmark of SMoLoRA: six tasks with one instruction each, or with several.

* Paper: Wang et al., SMoLoRA, ICCV 2025 (arXiv 2411.13949); code `Minato-Zackie/SMoLoRA`.
* Data: instruction files on the Hub, `zackie29/SMoLoRA`; images from the ten data sets.
* Order: ScienceQA, TextVQA, Flickr30k, ImageNet, GQA, VQAv2. Few-shot Places365 and the unseen VizWiz, TextCaps and
  OCR-VQA are no tasks of the stream.
* Row: LLaVA JSON for training, `question_id`, `image`, `text`, `answer` for test (a list of captions in Flickr30k).

Not recoverable: row counts; the folder name of the several-instructions version (`Instructions_Multi` and two other
spellings are tried); the readme's licence.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllm_cl.data.builders.checks import Choices, ImageCount, ReadTextVqa
from mllm_cl.data.builders.family import Family, Files, RowFunction, Scoring, TaskFiles, check_option
from mllm_cl.data.rows import Row

_TASKS: tuple[tuple[str, str, str, str | None, tuple[RowFunction, ...]], ...] = (
    ("ScienceQA", "test.json", "scienceqa_llava", None, (ImageCount(0), Choices())),
    ("TextVQA", "val.json", "textvqa_m4c", None, (ImageCount(),)),
    ("Flickr30k", "val.json", "cider", None, (ImageCount(),)),
    ("ImageNet", "test.json", "coin_imagenet", "exact_match", (ImageCount(),)),
    ("GQA", "test.json", "gqa_llava", None, (ImageCount(),)),
    ("VQAv2", "val.json", "coin_exact_match", "exact_match", (ImageCount(),)),
)
_FORMS = {"ScienceQA": "letter", "Flickr30k": "caption"}  # the others ask for a word or two
MEASURES = ("answers", "format")
_FOLDERS = {
    "single": ("Instructions_Single",),
    "multi": ("Instructions_Multi", "Instructions_Multiple", "Instructions_multi"),
}


@dataclass(frozen=True)
class AnswerForm:
    """Adds the form that a task asks for, which `mif` reads."""

    form: str

    def __call__(self, row: Row, position: int) -> Row:
        return {**row, "answer_form": self.form}  # type: ignore[typeddict-item]


def _family(instructions: str) -> Family:
    tops = _FOLDERS[instructions]
    tasks = tuple(
        TaskFiles(
            name,
            Files(tuple(f"{top}/{name}/train.json" for top in tops), images="dataset"),
            Files(
                tuple(f"{top}/{name}/{file}" for top in tops for file in (test, "test.json", "val.json")),
                images="dataset",
                format="llava_test",
            ),
            metric,
            corrected=corrected,
            functions=(*functions, AnswerForm(_FORMS.get(name, "short"))),
            train_functions=() if name == "ScienceQA" else (ImageCount(),),
            references=ReadTextVqa("dataset/TextVQA/TextVQA_0.5.1_val.json") if name == "TextVQA" else None,
            max_new_tokens=128,
        )
        for name, test, metric, corrected, functions in _TASKS
    )
    return Family(
        name="cvit",
        title="CVIT (SMoLoRA)",
        link="https://huggingface.co/datasets/zackie29/SMoLoRA",
        licence="none stated for the instruction files; images: those of the data sets",
        citation="Wang et al., SMoLoRA, ICCV 2025, arXiv 2411.13949",
        layout="""
  dataset/...                                             images, as the rows name them
  dataset/TextVQA/TextVQA_0.5.1_val.json                  ten answers per question
  Instructions_Single/ScienceQA/train.json test.json      TextVQA, Flickr30k, VQAv2: val.json
  Instructions_Single/ImageNet/ GQA/
""",
        tasks=tasks,
        script="data_scripts/cvit.py",
        gaps=(
            "row counts are unknown",
            "the official Flickr30k number is CIDEr against the best caption of a row; `cider` takes all captions, as usual",
            "MIF (share of answers in the requested form): `measure: format` scores every task by it; its official rule lets an "
            "empty answer pass where a word or two are asked for",
        ),
    )


def build(
    root: str | Path | None = None,
    *,
    instructions: str = "single",
    scoring: Scoring = "official",
    measure: str = "answers",
) -> list[dict[str, Any]]:
    """Returns the six tasks.

    Args:
        root: folder of the layout.
        instructions (`str`): `single` or `multi`.
        scoring (`str`): `official` or `corrected`.
        measure (`str`): `answers`, or `format`: every task is scored by the form of its answers alone (MIF).
    """
    check_option("instructions", instructions, tuple(_FOLDERS))
    check_option("measure", measure, MEASURES)
    tasks = _family(instructions).build(root, scoring=scoring)
    return [task | {"metric": "mif"} if measure == "format" else task for task in tasks]


FAMILY = _family("single")
