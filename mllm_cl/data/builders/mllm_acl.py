"""MLLM-ACL: four abilities (OCR, mathematics and logic, visual perception, apps), tested on other data than trained on.

* Paper: Zhao et al., MLLM-CL (arXiv 2506.05453); code `bjzhb666/MLLM-CL`, Apache-2.0.
* Data: Hub `MLLM-CL/MLLM-CL`, ModelScope `zhaohongbo/MLLM-CL`; about 107 GiB with images.
* Order: OCR (Monkey-style data, tested on OCRBench), Math (MathV360k, MathVista), VP (CLEVR and TallyQA, CV-Bench
  counting), APP (GUI data, MMT-Bench).
* Row: LLaVA JSON for training; test files in the folders `*_test` with `question_id`, `image`, `text`, `answer` and
  fields of the scorers (`category` or `type`, ...).

Not recoverable: exact row counts; the names of the scorer fields in the test files. Math is officially scored by a GPT
extractor and APP by a server: neither can be run here, see `gaps`.
"""

from __future__ import annotations

from mllm_cl.data.builders.checks import ImageCount, Question
from mllm_cl.data.builders.family import Family, Files, RowFunction, TaskFiles


def _task(
    name: str, metric: str, max_new_tokens: int, about: str, functions: tuple[RowFunction, ...] = ()
) -> TaskFiles:
    return TaskFiles(
        name,
        Files(f"{name}/train.json", images=name),
        Files(f"{name}_test/test.json", images=f"{name}_test", format="llava_test"),
        metric,
        functions=(ImageCount(0, 8), *functions),
        train_functions=(ImageCount(0, 8),),
        max_new_tokens=max_new_tokens,
        description=about,
    )


FAMILY = Family(
    name="mllm-acl",
    title="MLLM-CL, abilities (MLLM-ACL)",
    link="https://huggingface.co/datasets/MLLM-CL/MLLM-CL",
    licence="code Apache-2.0; data: those of MathV360k, MathVista (CC BY-SA 4.0), OCRBench, CLEVR (CC BY 4.0), TallyQA, "
    "CV-Bench (Apache-2.0), MMT-Bench and others",
    citation="Zhao et al., MLLM-CL: Continual Learning for Multimodal LLMs, arXiv 2506.05453",
    layout="""
  OCR/images/ train.json       OCR_test/images/ test.json
  Math/ Math_test/  VP/ VP_test/  APP/ APP_test/   likewise
""",
    tasks=(
        _task("OCR", "ocrbench_mcitlib", 256, "about 128k / 1k rows"),
        _task("Math", "mathvista_answer", 256, "about 526k / 1k rows", (Question(),)),
        _task("VP", "mllmcl_vp", 64, "counting; about 120k / 788 rows"),
        _task("APP", "mllmcl_contains_word", 128, "graphical interfaces; about 147k / 817 rows"),
    ),
    script="data_scripts/mllm_dcl_acl.py --abilities",
    gaps=(
        "row counts are not checked",
        "Math: the official score lets GPT-4o-mini extract the answer; `mathvista_answer` does without and is not comparable",
        "APP: the official score comes from an evaluation server; the rule of RS is used here and is not comparable",
        "OCR: the official driver puts `<image>` and a blank before the question; the template's own form is used here",
    ),
)
build = FAMILY.build
