"""Fetches CVIT's instruction files from the Hub; the images are those of CoIN and Flickr30k.

Run without arguments to see sizes and licences first.
"""

from __future__ import annotations

import sys

from _fetch import Part, Plan, run

from mllm_cl.data.builders.cvit import FAMILY
from mllm_cl.data.download import Remote

PLAN = Plan(
    FAMILY,
    parts=(
        Part(
            "instructions", "training and test files", hub="zackie29/SMoLoRA", patterns=("*.json", "*.zip"), unpack=""
        ),
        Part(
            "TextVQA-annotations",
            "ten answers per question",
            [
                Remote(
                    "https://dl.fbaipublicfiles.com/textvqa/data/TextVQA_0.5.1_val.json",
                    "dataset/TextVQA/TextVQA_0.5.1_val.json",
                )
            ],
        ),
    ),
    by_hand=(
        "images of ScienceQA, TextVQA, ImageNet, GQA and VQAv2: data_scripts/coin.py; put or link them below dataset/",
        "Flickr30k: request access at https://shannon.cs.illinois.edu/DenotationGraph/",
    ),
)

if __name__ == "__main__":
    sys.exit(run(PLAN))
