"""Yes or no: the three splits of POPE, and MME with two questions on each image.

Hub ids and columns are those that lmms-eval 0.7.3 reads.
"""

from __future__ import annotations

from mllm_cl.evaluation.benchmarks import prompts as words
from mllm_cl.evaluation.benchmarks.benchmark import Benchmark, Question, Raw, as_list

ASKS_FOR_IT = " Please answer yes or no."


def _pope(raw: Raw, prompts: str) -> list[Question]:
    fields = {"category": raw.get("category")}
    text = words.short(str(raw["question"]).strip(), prompts)
    return [Question(text, [str(raw["answer"])], as_list(raw["image"]), fields)]


def _split(category: str) -> Benchmark:
    return Benchmark(
        f"pope-{category}",
        f"lmms-lab-encoder/POPE:Full@{category}",
        ("question", "answer", "image"),
        _pope,
        keep=lambda raw: raw.get("category") in (category, None),
        scan=("category",),
    )


pope_random, pope_popular, pope_adversarial = map(_split, ("random", "popular", "adversarial"))


def _mme(raw: Raw, prompts: str) -> list[Question]:
    question = str(raw["question"]).strip()
    text = words.short(question.replace(ASKS_FOR_IT, ""), prompts) if prompts == "llava_v1" else question
    fields = {"category": raw["category"], "question_id": raw["question_id"]}
    return [Question(text, [str(raw["answer"])], as_list(raw["image"]), fields)]


mme = Benchmark("mme", "lmms-lab-encoder/MME@test", ("question", "answer", "category", "question_id", "image"), _mme)
