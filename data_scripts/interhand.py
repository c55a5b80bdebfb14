"""Says how to get InterHand2.6M (about 80 GB at 5 frames per second) and unpacks what was downloaded by hand.

Run without arguments for licence and layout.
"""

from __future__ import annotations

import sys
from pathlib import Path

from _fetch import Plan, run

from mllm_cl.data.builders.interhand import FAMILY
from mllm_cl.data.extract import extract


def unpack(folder: Path) -> str:
    """Unpacks the archives that were put into the folder; the parts of a split tar must be joined first."""
    archives = [path for pattern in ("*.zip", "*.tar", "*.tar.gz") for path in sorted(folder.glob(pattern))]
    files = sum(len(extract(archive, folder)) for archive in archives)
    return f"unpacked {files} files of {len(archives)} archives"


PLAN = Plan(
    FAMILY,
    by_hand=(
        "annotations and image archives: links on https://mks0601.github.io/InterHand2.6M/",
        "join split archives (`cat NAME.tar.part* > NAME.tar`) and check the checksums listed beside them",
    ),
    convert=unpack,
)

if __name__ == "__main__":
    sys.exit(run(PLAN))
