"""Says where TRACE's archive is (a drive without a stable address) and unpacks it: `--out` with the archive inside.

Run without arguments for licence and layout.
"""

from __future__ import annotations

import sys
from pathlib import Path

from _fetch import Plan, run

from mllm_cl.data.builders.trace import FAMILY
from mllm_cl.data.extract import extract
from mllm_cl.errors import DataError


def unpack(folder: Path) -> str:
    """Unpacks the archive that was put into the folder, and moves its tasks to where the builder looks."""
    archives = sorted(folder.glob("*.zip")) + sorted(folder.glob("*.tar*"))
    if not archives and not any((folder / task.name).is_dir() for task in FAMILY.tasks):
        raise DataError(
            f"{folder}: neither an archive nor the tasks are there.",
            fix="download TRACE's archive as its readme says, put it into this folder and start again.",
        )
    files = [path for archive in archives for path in extract(archive, folder)]
    moved = 0
    for task in FAMILY.tasks:
        for found in sorted({path.parent for path in files if path.parent.name == task.name}):
            if found != folder / task.name and not (folder / task.name).exists():
                found.rename(folder / task.name)
                moved += 1
    return f"unpacked {len(files)} files, moved {moved} tasks"


PLAN = Plan(
    FAMILY,
    by_hand=("the archive LLM-CL_Benchmark is linked from the readme of https://github.com/BeyonderXX/TRACE",),
    convert=unpack,
)

if __name__ == "__main__":
    sys.exit(run(PLAN))
