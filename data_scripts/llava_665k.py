"""Fetches the mixture of LLaVA-1.5: the rows from the Hub, images of COCO, GQA, TextVQA and Visual Genome.

Run without arguments to see sizes and licences first.
"""

from __future__ import annotations

import sys

from _fetch import Part, Plan, run

from mllm_cl.data.builders.llava_665k import FAMILY
from mllm_cl.data.download import Remote

_VG = "https://cs.stanford.edu/people/rak248/VG_100K_2"


def _images(name: str, what: str, url: str, unpack: str) -> Part:
    return Part(name, what, [Remote(url, f"archives/{name}.zip")], unpack=unpack)


PLAN = Plan(
    FAMILY,
    parts=(
        Part(
            "rows",
            "665,298 conversations",
            hub="liuhaotian/LLaVA-Instruct-150K",
            patterns=("llava_v1_5_mix665k.json",),
        ),
        _images("coco", "COCO train2017", "http://images.cocodataset.org/zips/train2017.zip", "coco"),
        _images("gqa", "GQA", "https://downloads.cs.stanford.edu/nlp/data/gqa/images.zip", "gqa"),
        _images("textvqa", "TextVQA", "https://dl.fbaipublicfiles.com/textvqa/images/train_val_images.zip", "textvqa"),
        _images("vg", "Visual Genome, part 1", f"{_VG}/images.zip", "vg"),
        _images("vg2", "Visual Genome, part 2", f"{_VG}/images2.zip", "vg"),
    ),
    by_hand=("OCR-VQA: images by the download script of https://ocr-vqa.github.io into ocr_vqa/images/, all as .jpg",),
)

if __name__ == "__main__":
    sys.exit(run(PLAN))
