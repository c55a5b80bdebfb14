"""Starts `tests/training/ddp_job.py` on two processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def torchrun(
    requests: list[dict[str, Any]], folder: Path, timeout: int = 3600
) -> tuple[int, list[dict[str, Any]], str]:
    """Returns the exit code, what each process reports and the log."""
    path = folder / "requests.json"
    path.write_text(json.dumps(requests))
    for rank in range(2):
        Path(f"{path}.{rank}").unlink(missing_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    job = str(Path(__file__).parent / "training" / "ddp_job.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, job, str(path)], capture_output=True, text=True, timeout=timeout, env=environment, check=False
    )
    reports = [Path(f"{path}.{rank}") for rank in range(2)]
    read = [json.loads(report.read_text()) for report in reports if report.exists()]
    return done.returncode, read, done.stdout[-3000:] + done.stderr[-6000:]
