"""Multiple choice: the image part of ScienceQA, MMBench with all rotations, SEED-Bench (images).

Hub ids and columns are those that lmms-eval 0.7.3 reads.
"""

from __future__ import annotations

from mllm_cl.evaluation.benchmarks import prompts as words
from mllm_cl.evaluation.benchmarks.benchmark import Benchmark, Question, Raw, as_list


def _scienceqa(raw: Raw, prompts: str) -> list[Question]:
    choices = words.lettered(raw["choices"])
    context = f"Context: {raw['hint']}" if raw.get("hint") else None
    text = words.options(raw["question"], choices, prompts, context)
    return [Question(text, ["ABCDEFGHIJ"[int(raw["answer"])]], as_list(raw["image"]), {"choices": choices})]


scienceqa_img = Benchmark(
    "scienceqa-img",
    "lmms-lab-encoder/ScienceQA:ScienceQA-IMG@test",
    ("question", "choices", "answer", "image"),
    _scienceqa,
    keep=lambda raw: raw["image"] is not None,
    scan=("image",),
)


def _mmbench(raw: Raw, prompts: str) -> list[Question]:
    choices = words.lettered([raw.get(letter) for letter in "ABCD"])
    hint = words.lettered([raw.get("hint")]).get("A")
    fields = {"choices": choices, "index": int(raw["index"]), "category": raw.get("category")}
    text = words.options(raw["question"], choices, prompts, hint)
    return [Question(text, [str(raw["answer"])], as_list(raw["image"]), fields)]


_MMBENCH = ("index", "question", "A", "B", "answer", "image")
mmbench = Benchmark("mmbench", "lmms-lab-encoder/MMBench:en@dev", _MMBENCH, _mmbench)
mmbench_cn = Benchmark("mmbench-cn", "lmms-lab-encoder/MMBench:cn@dev", _MMBENCH, _mmbench)


def _seed(raw: Raw, prompts: str) -> list[Question]:
    choices = words.lettered([raw[f"choice_{letter}"] for letter in "abcd"])
    fields = {"choices": choices, "category": raw.get("question_type_id")}
    text = words.options(raw["question"], choices, prompts)
    return [Question(text, [str(raw["answer"])], as_list(raw["image"]), fields)]


seed_bench = Benchmark(
    "seed-bench",
    "lmms-lab-encoder/SEED-Bench@test",
    ("question", "choice_a", "choice_b", "choice_c", "choice_d", "answer", "data_type", "image"),
    _seed,
    keep=lambda raw: raw["data_type"] == "image",
    scan=("data_type",),
)
