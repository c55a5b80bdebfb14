"""Fetches UCIT: instruction files and most images from one Hub data set.

Run without arguments to see sizes and licences first.
"""

from __future__ import annotations

import sys

from _fetch import Part, Plan, run

from mllm_cl.data.builders.ucit import FAMILY

_HUB = "HaiyangGuo/UCIT"
PLAN = Plan(
    FAMILY,
    parts=(
        Part("instructions", "training, test and caption files", hub=_HUB, patterns=("*.json",), strip="UCIT/"),
        Part("archives", "images, as packed on the Hub", hub=_HUB, patterns=("*.zip", "*.tar*"), unpack="datasets"),
    ),
    by_hand=(
        "two archives of the Hub data set were reported damaged: a community mirror exists; extraction says which",
        "IconQA: https://iconqa.github.io, ArxivQA: Hub MMInstruction/ArxivQA, CLEVR-Math: Hub dali-does/clevr-math",
    ),
)

if __name__ == "__main__":
    sys.exit(run(PLAN))
