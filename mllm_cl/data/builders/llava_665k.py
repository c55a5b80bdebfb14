"""LLaVA-665k by source, for continual pre-training: the instruction mixture of LLaVA-1.5, one task per image folder.

* Data: Hub `liuhaotian/LLaVA-Instruct-150K`, file `llava_v1_5_mix665k.json`; the tasks are LLaVA-c's (arXiv 2506.08666).
* Order: not published; coco, ocr_vqa, textvqa, gqa, vg here, and `text` (no image) in front on request.
* Row: LLaVA JSON of many turns; images in `coco/train2017`, `gqa/images`, `ocr_vqa/images`, `textvqa/train_images`,
  `vg/VG_100K` and `vg/VG_100K_2`. Sizes: 665,298 rows, about 364k / 80k / 22k / 72k / 86k and 41k without image.

The mixture has no test split. One image in `1 / test_share` is held out here with all its rows, by a hash of its path;
answers are long, so the score (ROUGE-L) only follows forgetting; the paper reports general benchmarks.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllm_cl.data.builders.family import Family, Files, check_option
from mllm_cl.data.readers import read_rows_by
from mllm_cl.errors import DataError

SOURCES = ("coco", "ocr_vqa", "textvqa", "gqa", "vg")
_FILE = Files("llava_v1_5_mix665k.json", count=665_298)

FAMILY = Family(
    name="llava-665k",
    title="LLaVA-665k by source",
    link="https://huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K",
    licence="annotations CC BY 4.0, and the terms of OpenAI for what GPT-4 wrote; images: COCO, GQA, OCR-VQA, TextVQA, "
    "Visual Genome, each its own",
    citation="Liu et al., Improved Baselines with Visual Instruction Tuning, CVPR 2024, arXiv 2310.03744",
    layout="""
  llava_v1_5_mix665k.json
  coco/train2017/  gqa/images/  ocr_vqa/images/  textvqa/train_images/  vg/VG_100K/  vg/VG_100K_2/
""",
    script="data_scripts/llava_665k.py",
    gaps=(
        "LLaVA-c's order of the sources and its treatment of the 41k text-only rows are not published",
        "there is no official test split: rows of held-out images stand in for it",
        "the textvqa folder holds TextCaps captions",
    ),
    files=(_FILE,),
)


@dataclass(frozen=True)
class _Label:
    """`SOURCE/SPLIT` of a raw row."""

    test_share: float

    def __call__(self, raw: Any) -> str:
        image = raw.get("image") if isinstance(raw, Mapping) else None
        source = image.split("/", 1)[0] if isinstance(image, str) else "text"
        key = image if isinstance(image, str) else str(raw.get("id")) if isinstance(raw, Mapping) else ""
        is_test = zlib.crc32(key.encode()) < self.test_share * 2**32
        return f"{source}/{'test' if is_test else 'train'}"


def build(
    root: str | Path | None = None, *, test_share: float = 0.005, text: str = "leave"
) -> list[dict[str, Any]]:  # fmt: skip
    """Returns the five tasks.

    Args:
        root: folder of the layout.
        test_share (`float`, defaults to 0.005): share of the images held out as test rows.
        text (`str`, defaults to `"leave"`): `"leave"` the text-only rows out, or make them the `"first"` task.

    Raises:
        DataError: the file is missing or a row names an image of an unknown folder.
    """
    check_option("text", text, ("leave", "first"))
    if not 0 < test_share < 1:
        raise DataError(f"stream.options.test_share: {test_share} given.", expected="a number between 0 and 1")
    place = FAMILY.open(root)
    path = place / _FILE.candidates[0]
    parts = read_rows_by(path, _Label(test_share), format="llava", image_folder=place, task="llava-665k")
    unknown = sorted({name.rsplit("/", 1)[0] for name in parts} - {*SOURCES, "text"})
    if unknown:
        raise DataError(f"{path}: rows name images in {', '.join(unknown)}.", expected=", ".join(SOURCES))
    names = (["text"] if text == "first" else []) + list(SOURCES)
    missing = [part for name in names for part in (f"{name}/train", f"{name}/test") if part not in parts]
    if missing:
        raise DataError(
            f"{path}: no rows of {', '.join(missing)}.", fix="use the whole file, or raise options.test_share."
        )
    return [
        {
            "name": name,
            "train": parts[f"{name}/train"],
            "test": parts[f"{name}/test"],
            "metric": "rouge_l",
            "max_new_tokens": 128,
            "description": "rows without images" if name == "text" else f"images of {name}",
        }
        for name in names
    ]
