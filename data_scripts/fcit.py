"""Fetches FCIT: instruction files, client partitions and the images of DVQA and FigureQA from the Hub.

`llava-c` reads the same folder. Run without arguments to see sizes and licences first.
"""

from __future__ import annotations

import sys

from _fetch import Part, Plan, run

from mllm_cl.data.builders.fcit import TASK_FAMILY
from mllm_cl.data.download import Remote

_HUB = "MLLM-CL/FCIT"
_COCO = "http://images.cocodataset.org/zips"
PLAN = Plan(
    TASK_FAMILY,
    parts=(
        Part("instructions", "training and test files", hub=_HUB, patterns=("instructions*",), unpack=""),
        Part("partitions", "50 clients a stage", hub=_HUB, patterns=("partitioned_data*",), unpack=""),
        Part("images", "images of DVQA and FigureQA", hub=_HUB, patterns=("dataset/*",), unpack="datasets"),
        Part(
            "COCO",
            "images of Grounding and AOKVQA",
            [Remote(f"{_COCO}/{name}.zip", f"archives/{name}.zip") for name in ("train2014", "val2014", "test2014")],
            unpack="datasets/COCO2014",
        ),
    ),
    by_hand=(
        "ArxivQA: Hub MMInstruction/ArxivQA; ImageNet-R and Flickr30k: Hub HaiyangGuo/UCIT",
        "IconQA: https://iconqa.github.io; CLEVR-Math: Hub dali-does/clevr-math",
        "Super-CLEVR: https://github.com/Lizw14/Super-CLEVR; TabMWP: https://github.com/lupantech/PromptPG",
        "OCR-VQA: images from the drive folder 1_GYPY5UkUy7HIcR0zq3ZCFgeZN7BAfm_",
    ),
)

if __name__ == "__main__":
    sys.exit(run(PLAN))
