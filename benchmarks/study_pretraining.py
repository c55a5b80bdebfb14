"""Continual pre-training in miniature: what the chapter `pretraining` of the LLaVA-c study runs.

The base model can only describe pictures (it has its projector, and no instruction beyond that); then it learns the
general mixture source by source, LoRA on language part and projector. `general` is describing, its ability beforehand.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from run_grid import ROOT, Job

from mllm_cl.data.builders.study_mixture import SOURCES
from mllm_cl.data.builders.wording import WORDINGS

STREAM = "study-mixture"
SAC, UIR = "spectral_consolidation", "inquiry_regularization"


def pretraining_jobs(seeds: Sequence[int]) -> list[Job]:
    """Methods × orders × seeds; test split."""
    inquiries: dict[str, Any] = {"pool": "{output}/describe.txt", "images": "task"}
    methods: dict[str, list[Any]] = {
        "finetune": ["finetune"],
        "joint": ["joint"],
        "ModelMix": [{SAC: {"rate": "uniform", "strength": 0.5}}],
        "replay 5 %": [{"replay": {"size": 240, "share": 0.25, "policy": "balanced"}}],
        "LLaVA-c (SAC + UIR)": [{SAC: {"strength": 1.0}}, {UIR: inquiries}],
    }
    changes = {
        "model": {"name_or_path": "{output}/captioner", "train_bridge": True},
        "training": {"num_train_epochs": 2},
        "evaluation": {"general": ["study-captions"]},
    }
    return [
        Job(label, own, STREAM, SOURCES[::-1] if order == "reversed" else None, order, seed, changes=changes)
        for seed in seeds
        for order in ("given", "reversed")
        for label, own in methods.items()
    ]


def make_captioner(output: Path, pictures: int = 16_000) -> None:
    """Trains the base model, about three minutes, and writes the inquiries; nothing is done twice."""
    output.mkdir(parents=True, exist_ok=True)
    (output / "describe.txt").write_text("\n".join(WORDINGS["caption"].train) + "\n", encoding="utf-8")
    if (output / "captioner").exists():
        return
    script = [sys.executable, str(ROOT / "data_scripts" / "build_tiny_llava.py"), "--kinds", "caption"]
    script += ["--questions", "1", "--pictures", str(pictures), "--out", str(output / "captioner")]
    subprocess.run(script, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)
