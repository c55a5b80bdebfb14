"""Open questions that a judge grades: MM-Vet and LLaVA-Bench (in the wild). Predictions now, judged later.

Hub ids and columns are those that lmms-eval 0.7.3 reads; the question is put as it is, as LLaVA-1.5 does.
"""

from __future__ import annotations

from mllm_cl.evaluation.benchmarks.benchmark import Benchmark, Question, Raw, as_list


def _mm_vet(raw: Raw, prompts: str) -> list[Question]:
    fields = {"capability": ",".join(map(str, as_list(raw["capability"]))), "question": raw["question"]}
    return [Question(str(raw["question"]), [str(raw["answer"])], as_list(raw["image"]), fields)]


mm_vet = Benchmark("mm-vet", "lmms-lab-encoder/MMVet@test", ("question", "answer", "capability", "image"), _mm_vet)


def _llava_bench(raw: Raw, prompts: str) -> list[Question]:
    fields = {"category": raw["category"], "caption": raw["caption"], "question": raw["question"]}
    return [Question(str(raw["question"]), [str(raw["gpt_answer"])], as_list(raw["image"]), fields)]


llava_bench = Benchmark(
    "llava-bench",
    "lmms-lab-encoder/llava-bench-in-the-wild@train",
    ("question", "gpt_answer", "caption", "category", "image"),
    _llava_bench,
)
