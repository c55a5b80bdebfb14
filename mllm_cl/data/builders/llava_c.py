"""LLaVA-c's fine-tuning additions: IconQA, Super-CLEVR and CLEVR-Math after LLaVA-1.5.

* Paper: LLaVA-c (arXiv 2506.08666). Its instruction files are not public; those of the same data sets in FCIT
  (Hub `MLLM-CL/FCIT`) are read, so the root is laid out as FCIT's.
* Order: IconQA, Super-CLEVR, CLEVR-Math as the paper names them (second-hand).

Not recoverable: prompts, sizes and test splits of the paper.
"""

from __future__ import annotations

from mllm_cl.data.builders.family import Family
from mllm_cl.data.builders.fcit import TASK_FAMILY

_ORDER = ("IconQA", "super-CLEVR", "CLEVR-Math")

FAMILY = Family(
    name="llava-c",
    title="LLaVA-c's fine-tuning additions",
    link=TASK_FAMILY.link,
    licence="IconQA CC BY-NC-SA 4.0, Super-CLEVR and CLEVR-Math CC BY 4.0 (check at the sources); instruction files: none",
    citation="Lu et al., IconQA; Li et al., Super-CLEVR; Lindstroem et al., CLEVR-Math; setting of arXiv 2506.08666",
    layout="""
  datasets/IconQA/iconqa_data/iconqa/  datasets/super-CLEVR/images/  datasets/CLEVR/images/
  instructions/IconQA/ super-CLEVR/ CLEVR-Math/     as in fcit-task
""",
    tasks=tuple(task for name in _ORDER for task in TASK_FAMILY.tasks if task.name == name),
    script="data_scripts/fcit.py",
    gaps=("prompts, sizes and splits of the paper are not public: FCIT's files of the same data sets are read",),
)
build = FAMILY.build
