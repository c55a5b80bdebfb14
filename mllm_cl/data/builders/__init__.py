"""The catalogue of built-in streams and general benchmarks: name -> where it is built, and one line about it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from mllm_cl.errors import DataError, suggest

if TYPE_CHECKING:
    from mllm_cl.data.builders.family import Family


class Entry(NamedTuple):
    """One built-in data set: `module:function`, a description, and `module:FAMILY` for data that must be downloaded.

    A benchmark also has a `metric` (`None`: a judge scores it later) and the longest answer.
    """

    place: str
    description: str
    family: str | None = None
    metric: str | None = "exact_match"
    max_new_tokens: int | None = None


def _public(module: str, description: str, function: str = "build", family: str = "FAMILY") -> Entry:
    place = f"mllm_cl.data.builders.{module}"
    return Entry(f"{place}:{function}", description, f"{place}:{family}")


# `function(...) -> list of tasks`, each a mapping with the fields of `mllm_cl.streams.Task`. Those with a family take
# `root`, the folder of the downloaded data, and their options.
STREAMS: dict[str, Entry] = {
    "quickstart": Entry(
        "mllm_cl.data.builders.quickstart:build",
        "six instruction tasks on real images from ordinary packages; nothing to download",
    ),
    "study-letters": Entry("mllm_cl.data.builders.study:build_letters", "four small tasks on letters of real fonts"),
    "study-surfaces": Entry("mllm_cl.data.builders.study:build_surfaces", "four small tasks on photographed surfaces"),
    "study-mixture": Entry(
        "mllm_cl.data.builders.study_mixture:build", "the general mixture by source, for a model that can only describe"
    ),
    "coin": _public("coin", "CoIN, 8 tasks: ScienceQA, TextVQA, ImageNet, GQA, VizWiz, Grounding, VQAv2, OCR-VQA"),
    "ucit": _public("ucit", "UCIT, 6 tasks: ImageNet-R, ArxivQA, VizWiz, IconQA, CLEVR-Math, Flickr30k"),
    "mllm-dcl": _public("mllm_dcl", "MLLM-CL's 5 domains: remote sensing, medicine, driving, science, finance"),
    "mllm-acl": _public("mllm_acl", "MLLM-CL's 4 abilities: OCR, mathematics, visual perception, apps"),
    "cvit": _public("cvit", "SMoLoRA's 6 tasks: ScienceQA, TextVQA, Flickr30k, ImageNet, GQA, VQAv2"),
    "fcit-task": _public("fcit", "FCIT, 8 stages of one task, with client partitions", "build_tasks", "TASK_FAMILY"),
    "fcit-capability": _public(
        "fcit", "FCIT, 12 data sets in 4 groups, with client partitions", "build_capabilities", "CAPABILITY_FAMILY"
    ),
    "llava-665k": _public("llava_665k", "the mixture of LLaVA-1.5 by source, 5 tasks, for continual pre-training"),
    "llava-c": _public("llava_c", "LLaVA-c's fine-tuning additions: IconQA, Super-CLEVR, CLEVR-Math"),
    "continual-next": _public("continual_next", "Continual-NExT, 15 tasks from ArxivQA to WikiQA"),
    "trace": _public("trace", "TRACE, 8 text tasks from C-STANCE to 20Minuten"),
    "aide": _public("aide", "AIDE, 4 driver-monitoring tasks on frames of several cameras"),
    "mipd": _public("mipd", "MIPD, 5 tasks on a road camera with sensors as text (experimental)"),
    "interhand": _public("interhand", "InterHand2.6M, 5 tasks: handedness, gesture, bend, touch, relation"),
}


def _general(place: str, description: str, metric: str | None, max_new_tokens: int = 128) -> Entry:
    return Entry(f"mllm_cl.evaluation.benchmarks.{place}", description, None, metric, max_new_tokens)


# `function(split) -> rows` with answers; split is `test` or `validation`.
BENCHMARKS: dict[str, Entry] = {
    "quickstart-general": Entry(
        "mllm_cl.data.builders.general:benchmark",
        "held-out part of the general mixture that tiny-llava was pre-trained on",
    ),
    "study-captions": Entry(
        "mllm_cl.data.builders.study_mixture:captions", "descriptions of the general mixture's pictures"
    ),
    "vqav2": _general("short_answers:vqav2", "VQAv2, validation split", "vqa:strict"),
    "gqa": _general("short_answers:gqa", "GQA, balanced test-dev split", "gqa:strict"),
    "vizwiz": _general("short_answers:vizwiz", "VizWiz-VQA, validation split", "vizwiz:strict"),
    "textvqa": _general(
        "short_answers:textvqa", "TextVQA, validation split, OCR tokens in the prompt", "textvqa:strict"
    ),
    "chartqa": _general("short_answers:chartqa", "ChartQA, test split", "chartqa:strict"),
    "ocrbench": _general("short_answers:ocrbench", "OCRBench, 1000 questions", "ocrbench:strict"),
    "mathvista": _general("short_answers:mathvista", "MathVista, testmini, without a judge", "mathvista:strict", 1024),
    "scienceqa-img": _general("choices:scienceqa_img", "ScienceQA, test rows with an image", "scienceqa:strict", 1024),
    "mmbench": _general("choices:mmbench", "MMBench, English dev split, all rotations", "mmbench:strict", 1024),
    "mmbench-cn": _general("choices:mmbench_cn", "MMBench, Chinese dev split, all rotations", "mmbench:strict", 1024),
    "seed-bench": _general("choices:seed_bench", "SEED-Bench, image rows", "seed_bench:strict"),
    "pope-random": _general("yes_no:pope_random", "POPE, random objects", "pope:strict"),
    "pope-popular": _general("yes_no:pope_popular", "POPE, popular objects", "pope:strict"),
    "pope-adversarial": _general("yes_no:pope_adversarial", "POPE, adversarial objects", "pope:strict"),
    "mme": _general("yes_no:mme", "MME, two questions per image; points, not percent", "mme:strict"),
    "mm-vet": _general("open_ended:mm_vet", "MM-Vet; predictions for a judge", None, 1024),
    "llava-bench": _general("open_ended:llava_bench", "LLaVA-Bench (in the wild); predictions for a judge", None, 1024),
    "refcoco": _general("grounding:refcoco", "RefCOCO, val split, box in the padded square", "refcoco:strict"),
    "refcoco-testA": _general("grounding:refcoco_test_a", "RefCOCO, testA (people)", "refcoco:strict"),
    "refcoco-testB": _general("grounding:refcoco_test_b", "RefCOCO, testB (other objects)", "refcoco:strict"),
}


def find_builder(name: str, catalogue: dict[str, Entry]) -> Callable[..., Any]:
    """Returns the function behind a name of `STREAMS` or `BENCHMARKS`.

    Raises:
        DataError: there is no such name.
    """
    if name not in catalogue:
        raise DataError(f"{name!r} is not built in.", expected=suggest(name, catalogue))
    return _object(catalogue[name].place)


def find_family(name: str) -> Family | None:
    """Returns what is known about a stream whose data must be downloaded; `None` for the others."""
    place = STREAMS[name].family if name in STREAMS else None
    return None if place is None else _object(place)


def _object(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)
