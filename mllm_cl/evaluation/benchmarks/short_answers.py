"""Questions with short answers: VQAv2, GQA, VizWiz, TextVQA, ChartQA, OCRBench, MathVista.

Hub ids and columns are those that lmms-eval 0.7.3 reads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from mllm_cl.data.raw import only_columns
from mllm_cl.evaluation.benchmarks import prompts as words
from mllm_cl.evaluation.benchmarks.benchmark import Benchmark, Question, Raw, as_list


def _annotations(raw: Raw) -> list[str]:
    """Answers of annotators, given as texts or as records with `answer`."""
    return [str(entry["answer"]) if isinstance(entry, Mapping) else str(entry) for entry in raw["answers"]]


def _vqav2(raw: Raw, prompts: str) -> list[Question]:
    return [Question(words.short(raw["question"], prompts), _annotations(raw), as_list(raw["image"]), {})]


vqav2 = Benchmark(
    "vqav2", "lmms-lab-encoder/VQAv2@validation", ("question", "answers", "image"), _vqav2
)  # fmt: skip


def _gqa(raw: Raw, prompts: str) -> list[Question]:
    return [Question(words.short(raw["question"], prompts), [str(raw["answer"])], as_list(raw["image"]), {})]


def _gqa_images(tables: Mapping[str, Sequence[Raw]]) -> Callable[[Raw], Raw]:
    """GQA keeps each image once, in a table of its own."""
    table = tables["images"]
    places = {str(raw["id"]): index for index, raw in enumerate(only_columns(table, ["id"]))}
    return lambda raw: {**raw, "image": table[places[str(raw["imageId"])]]["image"]}


gqa = Benchmark(
    "gqa",
    "lmms-lab-encoder/GQA:testdev_balanced_instructions@testdev",
    ("question", "answer", "imageId"),
    _gqa,
    tables={"images": "lmms-lab-encoder/GQA:testdev_balanced_images@testdev"},
    prepare=_gqa_images,
)


def _vizwiz(raw: Raw, prompts: str) -> list[Question]:
    unanswerable = words.UNANSWERABLE if prompts == "llava_v1" else None
    text = words.short(raw["question"], prompts, unanswerable)
    return [Question(text, _annotations(raw), as_list(raw["image"]), {})]


vizwiz = Benchmark("vizwiz", "lmms-lab-encoder/VizWiz-VQA@val", ("question", "answers", "image"), _vizwiz)


def _textvqa(raw: Raw, prompts: str) -> list[Question]:
    tokens = ", ".join(map(str, raw["ocr_tokens"]))
    seen = f"Reference OCR token: {tokens}" if prompts == "llava_v1" else None
    text = words.short(raw["question"], prompts, seen)
    return [Question(text, _annotations(raw), as_list(raw["image"]), {})]


textvqa = Benchmark(
    "textvqa", "lmms-lab-encoder/textvqa@validation", ("question", "answers", "image", "ocr_tokens"), _textvqa
)


def _chartqa(raw: Raw, prompts: str) -> list[Question]:
    answers = [str(answer) for answer in as_list(raw["answer"])]
    fields = {"type": raw.get("type")}
    return [Question(words.short(raw["question"], prompts), answers, as_list(raw["image"]), fields)]


chartqa = Benchmark("chartqa", "lmms-lab-encoder/ChartQA@test", ("question", "answer", "image"), _chartqa)


def _ocrbench(raw: Raw, prompts: str) -> list[Question]:
    answers = [str(answer) for answer in as_list(raw["answer"])]
    fields = {"dataset": raw["dataset"], "category": raw["question_type"]}
    return [Question(str(raw["question"]).strip(), answers, as_list(raw["image"]), fields)]


ocrbench = Benchmark(
    "ocrbench", "echo840/OCRBench@test", ("question", "answer", "dataset", "question_type", "image"), _ocrbench
)


def _mathvista(raw: Raw, prompts: str) -> list[Question]:
    fields = {name: raw.get(name) for name in ("choices", "question_type", "answer_type", "precision")}
    text = str(raw["query"]) if prompts == "llava_v1" else str(raw["question"])
    return [Question(text, [str(raw["answer"])], as_list(raw["decoded_image"]), fields)]


mathvista = Benchmark(
    "mathvista",
    "AI4Math/MathVista@testmini",
    ("query", "question", "answer", "question_type", "answer_type", "decoded_image"),
    _mathvista,
)
