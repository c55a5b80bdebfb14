"""Scorers: how answers are compared with the accepted answers. One file per family; this dict is the catalogue.

A scorer is a plain function `(prediction, references, **row_fields) -> value`. Its `kind` says what it takes and gives:

* `score`: one answer and the list of accepted answers -> 0 (wrong) to 1 (right);
* `aggregate`: lists of both for a whole test set -> the score, or a dict of scores;
* `string`, `letter`, `yesno`: one answer -> what another scorer would compare. These are no metrics.

Names with a peer in them repeat that peer, quirks included; `mllm_cl.evaluation.scorers.profiles` says which scorer
stands for a benchmark under which profile, as in `pope:llava`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, Protocol

from mllm_cl.errors import EvaluationError, suggest
from mllm_cl.evaluation.scorers import (
    boxes,
    choice,
    circular,
    classes,
    format_following,
    numbers,
    overlap,
    text,
    vqa,
    yesno,
)
from mllm_cl.evaluation.scorers import captions as caption_scorers
from mllm_cl.evaluation.scorers.caption_text import TOKENISER
from mllm_cl.evaluation.scorers.exact_match import exact_match, exact_match_strict
from mllm_cl.evaluation.scorers.profiles import BENCHMARK_SCORERS, PROFILES
from mllm_cl.evaluation.scorers.tally import Aggregate

Kind = Literal["score", "aggregate", "string", "letter", "yesno"]


class Scorer(Protocol):
    """Scores one answer: 0.0 is wrong, 1.0 is right, soft scores lie between. Further row fields come by name."""

    def __call__(self, prediction: str, references: Sequence[str], **row_fields: object) -> float: ...


class ScorerEntry(NamedTuple):
    """A scorer with what is known about it.

    Args:
        scorer: the function.
        description: one line for listings.
        profile: whose rule it is.
        kind: what it takes and gives.
        version: raised whenever a score can change; part of every cache key.
        scale: what a score is multiplied by in a report: 100 for percent, 1 for points.
        needs_java: it is nothing without METEOR, which needs Java and the extra `[caption]`.
        fields: row fields without which a score means nothing, each with the values it may have.
    """

    scorer: Callable[..., Any]
    description: str
    profile: str = "strict"
    kind: Kind = "score"
    version: int = 1
    scale: float = 100.0
    needs_java: bool = False
    fields: Mapping[str, Sequence[str]] = MappingProxyType({})


CHOICE_LIKELIHOOD = "choice_likelihood"
"""Scores the likeliest choice instead of a generated answer, see `mllm_cl.evaluation.likelihood`."""

EACH = "each"
"""`each:NAME,NAME`: tasks of several scorers that are learnt as one."""

_E, _A = ScorerEntry, Aggregate
SCORERS: dict[str, ScorerEntry] = {
    # ours
    "exact_match": _E(exact_match, "equal after NFKC, case folding, white space and one final period", version=2),
    "exact_match_strict": _E(exact_match_strict, "equal character by character", version=2),
    "contains_words": _E(text.contains_words, "the reference's words stand in the answer"),
    "anls_strict": _E(text.anls_strict, "edit similarity, 0 below one half"),
    "relaxed_accuracy": _E(numbers.relaxed_accuracy, "numbers within 5 %, else equal", version=2),
    "mathvista_answer": _E(numbers.mathvista, "last number or chosen option, without a judge", version=2),
    "vqa_accuracy": _E(vqa.vqa_accuracy, "agreement with annotators, always normalised"),
    "multiple_choice": _E(choice.multiple_choice, "the option named beyond doubt", version=2),
    CHOICE_LIKELIHOOD: _E(choice.choice_likelihood, "the likeliest choice is right; nothing is generated"),
    "yes_no": _E(yesno.yes_no, "first word yes or no", version=2),
    "macro_f1": _E(_A(classes.macro_f1, "macro_f1"), "mean F1 of the classes, with the accuracy", kind="aggregate"),
    "ocr_contains": _E(text.ocr_contains, "the reference is part of the answer, blanks and case aside"),
    "box_iou": _E(boxes.box_iou, "intersection over union of the only box in the answer", version=2),
    "box_accuracy@0.5": _E(boxes.box_accuracy, "intersection over union of at least 0.5", version=2),
    "pope_strict": _E(_A(yesno.pope, "f1"), "POPE; neither yes nor no is wrong", kind="aggregate", version=2),
    "mme_strict": _E(_A(yesno.mme, "share"), "share of MME's points; first word yes or no", kind="aggregate", version=2),
    "mmbench_strict": _E(
        _A(circular.mmbench_strict, "circular"), "right under all rotations", kind="aggregate", version=2
    ),
    "captions": _E(_A(caption_scorers.captions, "CIDEr"), "CIDEr, with BLEU and ROUGE-L", kind="aggregate", version=2),
    "cider": _E(_A(caption_scorers.captions, "CIDEr", single=True), "CIDEr-D", kind="aggregate", version=2),
    "bleu_4": _E(_A(caption_scorers.captions, "Bleu_4", single=True), "corpus BLEU-4", kind="aggregate", version=2),
    "rouge_l": _E(caption_scorers.rouge_l_score, "ROUGE-L with beta 1.2, best reference", version=2),
    # VQA
    "vqav2_official": _E(vqa.vqav2_official, "VQA accuracy of the official evaluator", "official"),
    "vqav2_lmms_eval": _E(vqa.vqav2_lmms_eval, "VQA accuracy of lmms-eval", "lmms_eval"),
    "textvqa_m4c": _E(vqa.textvqa_m4c, "VQA accuracy of the m4c evaluator", "llava"),
    "vizwiz_lmms_eval": _E(vqa.vizwiz_lmms_eval, "VQA accuracy of lmms-eval on VizWiz", "lmms_eval"),
    "vqa_score_vlmevalkit": _E(vqa.vqa_score_vlmevalkit, "VQA accuracy of VLMEvalKit", "vlmevalkit"),
    "evalai_processor": _E(vqa.evalai_processor, "what EvalAI compares", "llava", "string"),
    "vqa_official_normaliser": _E(vqa.vqa_official_normaliser, "what is compared", "official", "string"),
    # short answers
    "gqa_llava": _E(text.gqa_llava, "equal in lower case without final periods", "llava"),
    "gqa_lmms_eval": _E(text.gqa_lmms_eval, "equal in lower case without punctuation", "lmms_eval"),
    "anls": _E(text.anls, "edit similarity, 0 below one half", "lmms_eval"),
    "chartqa_relaxed": _E(numbers.chartqa_relaxed, "numbers within 5 %, else equal", "lmms_eval"),
    "mathvista_normalise": _E(numbers.mathvista_normalise, "equal once normalised", "lmms_eval", version=2),
    "ocrbench": _E(text.ocrbench, "the reference is part of the answer", "lmms_eval"),
    "ocrbench_mcitlib": _E(text.ocrbench_mcitlib, "the reference is part of the answer", "mllm_cl"),
    # multiple choice
    "scienceqa_llava": _E(choice.scienceqa_llava, "letter, `X. ` or one `The answer is X.`", "llava"),
    "scienceqa_lmms_eval": _E(choice.scienceqa_lmms_eval, "letter in either case, or `X.`", "lmms_eval"),
    "seed_llava": _E(choice.seed_llava, "the output is the letter", "llava"),
    "seed_lmms_eval": _E(choice.seed_lmms_eval, "the first character is the letter", "lmms_eval"),
    "cvbench_letter": _E(choice.cvbench_letter, "the first letter of the reply", "lmms_eval"),
    "mcq_extract_lmms_eval": _E(choice.mcq_extract_lmms_eval, "surest letter", "lmms_eval", "letter"),
    "mcq_can_infer_vlmevalkit": _E(choice.mcq_can_infer_vlmevalkit, "only letter", "vlmevalkit", "letter"),
    "mmbench_circular": _E(
        _A(circular.mmbench_circular, "circular", single=True),
        "right under all rotations",
        "lmms_eval",
        "aggregate",
        2,
    ),
    # yes or no
    "pope_parse_llava": _E(yesno.pope_parse_llava, "no, not or else yes", "llava", "yesno"),
    "yorn_extract_vlmevalkit": _E(yesno.yorn_extract_vlmevalkit, "the only one", "vlmevalkit", "yesno"),
    "mme_parse_lmms_eval": _E(yesno.mme_parse_lmms_eval, "first four letters", "lmms_eval", "yesno"),
    "pope_llava": _E(_A(yesno.pope_llava, "f1"), "POPE; an empty answer is yes", "llava", "aggregate"),
    "pope_lmms_eval": _E(_A(yesno.pope_lmms_eval, "f1"), "POPE; the bare word", "lmms_eval", "aggregate"),
    "mme_score": _E(
        _A(yesno.mme_score, "score", single=True), "MME points", "lmms_eval", "aggregate", scale=1.0
    ),
    # boxes
    "refcoco_iou_lmms_eval": _E(boxes.refcoco_iou_lmms_eval, "IoU of a box in square brackets", "lmms_eval"),
    "refcoco_acc@0.5_lmms_eval": _E(boxes.refcoco_acc_lmms_eval, "that IoU is at least 0.5", "lmms_eval"),
    "coin_grounding_acc@0.5": _E(boxes.coin_grounding, "IoU above 0.5 after cutting both ends", "coin", version=2),
    # continual instruction tuning
    "coin_exact_match": _E(text.coin_exact_match, "equal in upper case", "coin"),
    "coin_ocrvqa": _E(text.coin_ocrvqa, "equal in lower case", "coin"),
    "coin_imagenet": _E(text.coin_imagenet, "either contains the other; empty is right", "coin"),
    "mllmcl_contains_word": _E(text.mllmcl_contains_word, "contained, by four string tests", "mllm_cl"),
    "mllmcl_pathvqa": _E(text.mllmcl_pathvqa, "contained in lower case", "mllm_cl"),
    "mllmcl_fin": _E(text.mllmcl_fin, "equal without blanks and periods", "mllm_cl"),
    "mllmcl_sci": _E(text.mllmcl_sci, "rule by the name of the image file", "mllm_cl"),
    "mllmcl_vp": _E(text.mllmcl_vp, "contained without blanks and periods", "mllm_cl"),
    "fcit_contained": _E(overlap.fcit_contained, "part of the reference; empty is right", "fcit"),
    "contained": _E(overlap.contained, "part of the reference"),
    "edit_similarity": _E(overlap.edit_similarity, "share of characters in matching blocks", "trace"),
    "first_letter": _E(overlap.first_letter, "option letter in front, rationale aside", "trace"),
    "sari": _E(overlap.sari, "words added, kept and deleted against the text that was simplified", "trace"),
    "mif": _E(
        format_following.mif,
        "the answer has the form that was asked for",
        "smolora",
        fields={"answer_form": format_following.FORMS},
    ),
    # captions
    "coco_caption": _E(_A(caption_scorers.coco_caption, "CIDEr"), "seven caption metrics", "official", "aggregate", 2),
    "ucit_caption": _E(
        _A(caption_scorers.coco_caption, "average_percent"),
        "their mean, in percent",
        "ucit",
        "aggregate",
        2,
        scale=1.0,
        needs_java=True,
    ),
}  # fmt: skip


CAPTIONS = frozenset({"captions", "cider", "bleu_4", "rouge_l", "coco_caption", "ucit_caption"})
"""Scorers of words, whose scores depend on the tokeniser too."""


def _each_own(names: str) -> Scorer:
    """The scorer of tasks that were merged: each row names its own in `scorer`, one of `names` (commas between)."""
    scorers: dict[str, Callable[..., Any]] = {}
    for name in names.split(","):
        plain, entry = find_scorer(name)
        if entry.kind != "score":
            raise EvaluationError(
                f"{name!r} scores whole test sets, so rows of other scorers cannot stand between.",
                expected="scorers of single answers in merged tasks",
                fix="leave that task out of `stream.merge`, or give it a scorer of single answers.",
            )
        scorers[plain] = scorers[name] = entry.scorer

    def each(prediction: str, references: Sequence[str], scorer: object = None, **row_fields: object) -> float:
        if scorer not in scorers:
            raise EvaluationError(f"a row is to be scored by {scorer!r}.", expected=", ".join(scorers))
        return float(scorers[str(scorer)](prediction, references, **row_fields))

    return each


def find_scorer(name: str, profile: str | None = None) -> tuple[str, ScorerEntry]:
    """Returns the plain name and the entry of a scorer, of a benchmark, or of `benchmark:profile`.

    Raises:
        EvaluationError: no scorer has that name, or the benchmark lacks that profile; the message suggests one.

    Example:

    ```python
    >>> from mllm_cl.evaluation.scorers import find_scorer
    >>> find_scorer("pope:llava")[0], find_scorer("pope")[1].profile
    ('pope_llava', 'strict')

    ```
    """
    benchmark, _, after = name.partition(":")
    if benchmark == EACH:
        return name, _E(_each_own(after), "every row by its own scorer")
    wanted = profile or after or None
    if benchmark in BENCHMARK_SCORERS and (benchmark not in SCORERS or wanted):
        own = BENCHMARK_SCORERS[benchmark]
        wanted = wanted or next(iter(own))
        if wanted not in own:
            raise EvaluationError(
                f"{benchmark} has no profile {wanted!r}.", expected=suggest(wanted, own), fix="name another profile."
            )
        return own[wanted], SCORERS[own[wanted]]
    if name not in SCORERS:
        known = [*SCORERS, *(f"{benchmark}:{own}" for benchmark, of in BENCHMARK_SCORERS.items() for own in of)]
        raise EvaluationError(f"no scorer is called {name!r}.", expected=suggest(name, known))
    if profile not in (None, SCORERS[name].profile):
        raise EvaluationError(
            f"the scorer {name!r} has the profile {SCORERS[name].profile!r}, not {profile!r}.", fix="leave it out."
        )
    return name, SCORERS[name]


def get_scorer(name: str, profile: str | None = None) -> Scorer:
    """Returns the scorer called `name`, see `find_scorer`.

    Raises:
        EvaluationError: no scorer has that name; the message suggests one.

    Example:

    ```python
    >>> from mllm_cl.evaluation.scorers import get_scorer
    >>> get_scorer("exact_match")("A bus", ["a bus"])
    1.0

    ```
    """
    return find_scorer(name, profile)[1].scorer


def find_metric(name: str) -> tuple[str, ScorerEntry]:
    """Returns the plain name and the entry of a scorer that can be the metric of a task.

    Raises:
        EvaluationError: there is none of that name, or it returns a text instead of a score.
    """
    plain, entry = find_scorer(name)
    if entry.kind not in ("score", "aggregate"):
        metrics = [other for other, own in SCORERS.items() if own.kind in ("score", "aggregate")]
        raise EvaluationError(
            f"{name!r} reads an answer but does not score it.", expected=suggest(name, metrics), fix="name a metric."
        )
    return plain, entry


def scorer_identity(name: str) -> str:
    """Returns name, profile and version of a metric: what a score depends on besides answers and references.

    That of captions also names the tokeniser, as in `captions/strict/2/ptb-regex/2`.
    """
    plain, entry = find_metric(name)
    words = f"/{TOKENISER}" if plain in CAPTIONS else ""
    return f"{plain}/{entry.profile}/{entry.version}{words}"


__all__ = [
    "BENCHMARK_SCORERS",
    "CHOICE_LIKELIHOOD",
    "PROFILES",
    "SCORERS",
    "Scorer",
    "ScorerEntry",
    "find_metric",
    "find_scorer",
    "get_scorer",
    "scorer_identity",
]
