"""Says how to get AIDE (a form to sign); nothing can be fetched without it.

Run without arguments for licence and layout.
"""

from __future__ import annotations

import sys

from _fetch import Part, Plan, run

from mllm_cl.data.builders.aide import FAMILY
from mllm_cl.data.download import Remote

_RAW = "https://raw.githubusercontent.com/ydk122024/AIDE/main"
PLAN = Plan(
    FAMILY,
    parts=(
        Part(
            "splits",
            "the official split",
            [Remote(f"{_RAW}/{name}.csv", f"{name}.csv") for name in ("training", "validation", "testing")],
        ),
    ),
    by_hand=("AIDE_Dataset: sign the agreement linked from https://github.com/ydk122024/AIDE and unpack it here",),
)

if __name__ == "__main__":
    sys.exit(run(PLAN))
