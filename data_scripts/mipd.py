"""Says how to get MIPD (from its authors); nothing can be fetched by address.

Run without arguments for what is known of its licence and layout.
"""

from __future__ import annotations

import sys

from _fetch import Plan, run

from mllm_cl.data.builders.mipd import FAMILY

PLAN = Plan(
    FAMILY,
    by_hand=(
        "ask as the readme of https://github.com/BUCT-IUSRC/Dataset__MIPD says",
        "write the spreadsheets of the scalar sensors as CSV, with their column names",
    ),
)

if __name__ == "__main__":
    sys.exit(run(PLAN))
