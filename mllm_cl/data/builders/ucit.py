"""UCIT: six tasks that LLaVA-1.5 has not been trained on.

* Paper: Guo et al., HiDe-LLaVA, ACL 2025 (arXiv 2503.12941); code `Ghy0501/HiDe-LLaVA`, paths as in `Ghy0501/MCITlib`.
* Data: Hub `HaiyangGuo/UCIT` (also `MLLM-CL/UCIT`).
* Order: ImageNet-R, ArxivQA, VizWiz captions, IconQA, CLEVR-Math, Flickr30k captions.
* Row: LLaVA JSON for training, `question_id`, `image`, `text`, `answer` for test; image paths start at the root. The two
  caption tasks have a COCO file whose image ids count the test rows.

Not recoverable: whether the caption files' ids are complete (one mirror has 2,999 for 3,000 VizWiz rows; a row without
captions keeps its own answer).
"""

from __future__ import annotations

from mllm_cl.data.builders.checks import AnswerMatches, ImageCount, ReadCoco
from mllm_cl.data.builders.family import Family, Files, RowFunction, TaskFiles

_ONE = (ImageCount(),)
LETTER = AnswerMatches(r"[A-Z]", "one capital letter")
NUMBER = AnswerMatches(r"\d+", "a whole number")


def _task(
    name: str,
    folders: tuple[str, ...],
    train: str,
    count: int | None = None,
    *,
    functions: tuple[RowFunction, ...] = (),
    captions: bool = False,
    about: str = "",
) -> TaskFiles:
    tests = ("test_3000.json", "test.json")
    return TaskFiles(
        name,
        Files(tuple(f"{folder}/{file}" for folder in folders for file in (train, "train.json")), count=count),
        Files(tuple(f"{folder}/{file}" for folder in folders for file in tests), format="llava_test", count=3000),
        "ucit_caption" if captions else "coin_exact_match",
        corrected="captions" if captions else "exact_match",
        functions=(*_ONE, *functions),
        train_functions=(*_ONE, *functions),
        references=ReadCoco(f"{folders[0]}/val_coco_type_3000.json") if captions else None,
        max_new_tokens=256,
        description=about,
    )


FAMILY = Family(
    name="ucit",
    title="UCIT",
    link="https://huggingface.co/datasets/HaiyangGuo/UCIT",
    licence="none stated for the whole; images: ImageNet-R (MIT), ArxivQA (CC BY-SA 4.0), VizWiz (CC BY 4.0), IconQA "
    "(CC BY-NC-SA 4.0), CLEVR (CC BY 4.0), Flickr30k (research only). Check at the sources before use",
    citation="Guo et al., HiDe-LLaVA, ACL 2025, arXiv 2503.12941",
    layout="""
  datasets/...                                         images, as the rows name them
  ImageNet-R/train.json test_3000.json    ArxivQA/train_4w.json test_3000.json
  VizWiz-caption/train.json test_3000.json val_coco_type_3000.json
  IconQA/train.json test_3000.json        CLEVR-Math/train_4w.json test_3000.json
  Flickr30k-cap/train_brief_4w.json test_3000.json val_coco_type_3000.json
""",
    tasks=(
        _task("ImageNet-R", ("ImageNet-R",), "train.json", about="about 24k training rows"),
        _task("ArxivQA", ("ArxivQA",), "train_4w.json", 40_000, functions=(LETTER,)),
        _task("VizWiz", ("VizWiz-caption",), "train.json", captions=True, about="about 40k training rows"),
        _task("IconQA", ("IconQA",), "train.json", about="about 30k training rows"),
        _task("CLEVR-Math", ("CLEVR-Math",), "train_4w.json", 40_000, functions=(NUMBER,)),
        _task("Flickr30k", ("Flickr30k-cap",), "train_brief_4w.json", 40_000, captions=True),
    ),
    script="data_scripts/ucit.py",
    gaps=(
        "training row counts of ImageNet-R, VizWiz and IconQA are rounded and not checked",
        "MCITlib evaluates most methods on centre-cropped images and trains on padded ones; both are padded here",
        "the captions' official score is the mean of BLEU-1..4, METEOR, ROUGE-L and CIDEr; METEOR needs Java and the extra "
        "[caption]: `scoring: corrected` reports CIDEr, which needs neither",
        "one published VizWiz caption file has 2,999 ids for 3,000 rows (issue 7 of HiDe-LLaVA)",
    ),
)
build = FAMILY.build
