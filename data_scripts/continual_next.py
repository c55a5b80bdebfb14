"""Says where the fifteen data sets of Continual-NExT come from; their published bundle has no address that we could read.

Run without arguments for licence and layout.
"""

from __future__ import annotations

import sys

from _fetch import Plan, run

from mllm_cl.data.builders.continual_next import FAMILY

PLAN = Plan(
    FAMILY,
    by_hand=(
        "see the readme of https://github.com/ECNU-SII/Continual-NExT for the data of each task",
        "put each task's rows into TASK/train.json (or .jsonl, .parquet) and TASK/test.json, images below TASK/",
    ),
)

if __name__ == "__main__":
    sys.exit(run(PLAN))
