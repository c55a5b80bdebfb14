"""Fetches CoIN: instruction files from the Hub, images from the servers of their authors (ImageNet and two drives by hand).

Run without arguments to see sizes and licences first.
"""

from __future__ import annotations

import sys

from _fetch import Part, Plan, run

from mllm_cl.data.builders.coin import FAMILY
from mllm_cl.data.download import Remote

COCO = "http://images.cocodataset.org/zips"
VIZWIZ = "https://vizwiz.cs.colorado.edu/VizWiz_final/images"
TEXTVQA = "https://dl.fbaipublicfiles.com/textvqa"

PLAN = Plan(
    FAMILY,
    parts=(
        Part("instructions", "training and test files of both styles", hub="Zacks-Chen/CoIN", patterns=("*.json",)),
        Part(
            "COCO",
            "images of Grounding and VQAv2",
            [Remote(f"{COCO}/{name}.zip", f"archives/{name}.zip") for name in ("train2014", "val2014", "test2015")],
            unpack="COCO2014",
        ),
        Part(
            "GQA",
            "images of GQA",
            [Remote("https://downloads.cs.stanford.edu/nlp/data/gqa/images.zip", "archives/gqa_images.zip")],
            unpack="GQA",
        ),
        Part(
            "TextVQA",
            "images of TextVQA",
            [
                Remote(f"{TEXTVQA}/images/{name}.zip", f"archives/{name}.zip")
                for name in ("train_val_images", "test_images")
            ],
            unpack="TextVQA",
        ),
        Part(
            "TextVQA-annotations",
            "ten answers per question",
            [Remote(f"{TEXTVQA}/data/TextVQA_0.5.1_val.json", "TextVQA/TextVQA_0.5.1_val.json")],
        ),
        Part(
            "VizWiz",
            "images of VizWiz",
            [Remote(f"{VIZWIZ}/{name}.zip", f"archives/vizwiz_{name}.zip") for name in ("train", "val", "test")],
            unpack="VizWiz",
        ),
    ),
    by_hand=(
        "ImageNet: register at https://image-net.org, unpack into ImageNet/",
        "OCR-VQA: images from the drive folder 1_GYPY5UkUy7HIcR0zq3ZCFgeZN7BAfm_ into OCR-VQA/images/",
        "ScienceQA: images from the drive folder 1w8imCXWYn2LxajmGeGH_g5DaL2rabHev into ScienceQA/",
        "if the Hub's instruction files are archives, unpack them so that Instruction_Type1/TASK/train.json exists",
    ),
)

if __name__ == "__main__":
    sys.exit(run(PLAN))
