"""Starts `tests/training/ddp_job.py` on two processes, and compares what two runs have learnt."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


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


def assert_same_learning(one: Path, two: Path, method: str, log: str, rounding: float = 1e-5) -> None:
    """Up to `rounding`, two runs have the same files, adapters and states of the methods, and have learnt something."""
    files = sorted(path.relative_to(one) for path in one.glob("stages/*/*/**/*.safetensors"))
    largest = 0.0
    assert files
    assert files == sorted(path.relative_to(two) for path in two.glob("stages/*/*/**/*.safetensors")), log
    for file in files:
        expected, found = load_file(one / file), load_file(two / file)
        assert expected.keys() == found.keys()
        for key, tensor in expected.items():
            if "lora_" in key and len(file.parts) == 4:
                continue  # factors of an SVD are unique only together; their product is compared below
            # logits in half precision; eigenvectors of a near-degenerate spectrum, which magnify what two sums differ by
            own = {"derpp": 1e-3, "inflora": 1e-2}.get(method, rounding) if "method" in file.parts else rounding
            torch.testing.assert_close(
                found[key],
                tensor,
                atol=own,
                rtol=1e-4,
                msg=lambda m, f=file, k=key: f"{f} {k}: {m}",
            )
        for key in expected:
            if key.endswith("lora_A.weight"):
                other = key.replace("lora_A", "lora_B")
                update = expected[other] @ expected[key]  # (out, rank) @ (rank, in)
                # starts from the smallest eigenvectors of the inputs, near-degenerate too
                own = 5 * rounding if method == "lora_null" else rounding
                torch.testing.assert_close(found[other] @ found[key], update, atol=own, rtol=1e-4)
                largest = max(largest, update.abs().max().item())
    prompts = any(key.startswith("vectors/") for file in files for key in load_file(one / file))
    assert largest > 1e-3 or prompts  # something was learnt; methods of prompts leave the adapter alone
