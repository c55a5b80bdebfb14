"""Which scorer stands for a benchmark under which profile: the same answer gets different scores from different peers.

`benchmark:profile`, such as `pope:llava`, is the name of a scorer everywhere; `pope` alone is the first profile listed.
`strict` is ours and the default of new work; the others repeat a peer with its quirks.
"""

from __future__ import annotations

PROFILES = (
    "strict",
    "official",
    "llava",
    "coin",
    "mllm_cl",
    "ucit",
    "lmms_eval",
    "vlmevalkit",
    "fcit",
    "trace",
    "smolora",
)
"""`mllm_cl` is the profile of the MLLM-DCL / MLLM-ACL benchmarks (MCITlib), after their paper's name."""

BENCHMARK_SCORERS: dict[str, dict[str, str]] = {
    "vqa": {
        "strict": "vqa_accuracy",
        "official": "vqav2_official",
        "llava": "textvqa_m4c",
        "coin": "coin_exact_match",
        "lmms_eval": "vqav2_lmms_eval",
        "vlmevalkit": "vqa_score_vlmevalkit",
    },
    "vizwiz": {
        "strict": "vqa_accuracy",
        "official": "vqav2_official",
        "llava": "textvqa_m4c",
        "coin": "coin_exact_match",
        "lmms_eval": "vizwiz_lmms_eval",
    },
    "textvqa": {
        "strict": "vqa_accuracy",
        "llava": "textvqa_m4c",
        "coin": "textvqa_m4c",
        "lmms_eval": "textvqa_m4c",
    },
    "gqa": {"strict": "exact_match", "llava": "gqa_llava", "coin": "gqa_llava", "lmms_eval": "gqa_lmms_eval"},
    "docvqa": {"strict": "anls_strict", "lmms_eval": "anls"},
    "chartqa": {"strict": "relaxed_accuracy", "lmms_eval": "chartqa_relaxed"},
    "mathvista": {"strict": "mathvista_answer", "lmms_eval": "mathvista_normalise"},
    "scienceqa": {
        "strict": "multiple_choice",
        "llava": "scienceqa_llava",
        "coin": "scienceqa_llava",
        "lmms_eval": "scienceqa_lmms_eval",
    },
    "mmbench": {"strict": "mmbench_strict", "lmms_eval": "mmbench_circular"},
    "seed_bench": {"strict": "multiple_choice", "llava": "seed_llava", "lmms_eval": "seed_lmms_eval"},
    "cvbench": {"strict": "multiple_choice", "mllm_cl": "mllmcl_vp", "lmms_eval": "cvbench_letter"},
    "pope": {"strict": "pope_strict", "llava": "pope_llava", "lmms_eval": "pope_lmms_eval"},
    "mme": {"strict": "mme_strict", "lmms_eval": "mme_score"},
    "refcoco": {"strict": "box_accuracy@0.5", "lmms_eval": "refcoco_acc@0.5_lmms_eval"},
    "grounding": {"strict": "box_accuracy@0.5", "coin": "coin_grounding_acc@0.5"},
    "ocrbench": {"strict": "ocr_contains", "mllm_cl": "ocrbench_mcitlib", "lmms_eval": "ocrbench"},
    "ocrvqa": {"strict": "exact_match", "coin": "coin_ocrvqa"},
    "imagenet": {"strict": "exact_match", "coin": "coin_imagenet", "ucit": "coin_exact_match"},
    "ucit": {"strict": "exact_match", "ucit": "coin_exact_match"},
    "remote_sensing": {"strict": "contains_words", "mllm_cl": "mllmcl_contains_word"},
    "driving": {"strict": "contains_words", "mllm_cl": "mllmcl_contains_word"},
    "pathvqa": {"strict": "contains_words", "mllm_cl": "mllmcl_pathvqa"},
    "finance": {"strict": "exact_match", "mllm_cl": "mllmcl_fin"},
    "science": {"strict": "exact_match", "mllm_cl": "mllmcl_sci"},
    "caption": {"strict": "captions", "official": "coco_caption", "ucit": "ucit_caption"},
}
