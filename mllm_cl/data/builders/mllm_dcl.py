"""MLLM-DCL: five domains (remote sensing, medicine, driving, science, finance).

* Paper: Zhao et al., MLLM-CL (arXiv 2506.05453); code `bjzhb666/MLLM-CL`, Apache-2.0.
* Data: Hub `MLLM-CL/MLLM-CL`, ModelScope `zhaohongbo/MLLM-CL`; about 18 GiB with images.
* Order: RS (RSVQA), Med (PathVQA), AD (DriveLM), Sci (AI2D, SciVerse, MapQA, TQA), Fin (StockQA).
* Row: LLaVA JSON for training, `question_id`, `image`, `text`, `answer` for test; image paths start at the task's folder.

Not recoverable: exact row counts (the numbers below are rounded, from memory of the paper).
"""

from __future__ import annotations

from mllm_cl.data.builders.checks import ImageCount, Question
from mllm_cl.data.builders.family import Family, Files, RowFunction, TaskFiles

_MED = "Answer the question with a single word (or phrase)."


def _task(
    name: str,
    metric: str,
    corrected: str | None,
    about: str,
    functions: tuple[RowFunction, ...] = (),
) -> TaskFiles:
    return TaskFiles(
        name,
        Files(f"{name}/train.json", images=name),
        Files(f"{name}/test.json", images=name, format="llava_test"),
        metric,
        corrected=corrected,
        functions=(ImageCount(), *functions),
        train_functions=(ImageCount(1, 6),),
        suffix=_MED if name == "Med" else None,
        max_new_tokens=128,
        description=about,
    )


FAMILY = Family(
    name="mllm-dcl",
    title="MLLM-CL, domains (MLLM-DCL)",
    link="https://huggingface.co/datasets/MLLM-CL/MLLM-CL",
    licence="code Apache-2.0; data: those of RSVQA, PathVQA, DriveLM (CC BY-NC-SA 4.0), AI2D, SciVerse, MapQA, TQA, StockQA",
    citation="Zhao et al., MLLM-CL: Continual Learning for Multimodal LLMs, arXiv 2506.05453",
    layout="""
  RS/images/ train.json test.json    (and Med, AD, Sci, Fin likewise)
""",
    tasks=(
        _task("RS", "mllmcl_contains_word", "contains_words", "remote sensing; about 60k / 10k rows"),
        _task("Med", "mllmcl_pathvqa", "contains_words", "medicine; about 23k / 9.8k rows"),
        _task("AD", "mllmcl_contains_word", "contains_words", "driving; about 10k / 10k rows"),
        _task("Sci", "mllmcl_sci", None, "science; about 33k / 8.2k rows", (Question(),)),
        _task("Fin", "mllmcl_fin", "exact_match", "finance; about 60k / 10k rows"),
    ),
    script="data_scripts/mllm_dcl_acl.py",
    gaps=(
        "row counts are not checked",
        "Med: `yesterday` is right for `yes` under the official substring rule",
        "Fin: the official rule removes blanks from the prediction only, so answers of several words are always wrong; "
        "its driver also chooses the instruction by looking at the gold answer, which is not done here",
        f"Med: the official driver appends `{_MED}` to test questions after a blank; here it is on a line of its own",
        "Sci: which rule applies is chosen from the image's file name",
    ),
)
build = FAMILY.build
