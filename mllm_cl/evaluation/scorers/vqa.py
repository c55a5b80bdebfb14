"""VQA accuracy: the share of annotators that agree with an answer, as five evaluators compute it, and strictly.

Score of one question = mean over the annotators k of min(1, matches among the others / 3). With ten annotators that is
0, 0.3, 0.6, 0.9 and 1 for 0, 1, 2, 3 and more matches. (The short form min(n / 3, 1) is another metric.)
"""

from __future__ import annotations

from collections.abc import Sequence

from mllm_cl.evaluation.scorers.references import accepted
from mllm_cl.evaluation.scorers.vqa_text import (
    EVALAI,
    OFFICIAL,
    VLMEVALKIT,
    clean,
    evalai,
    normalise,
    strip_marks,
    strip_words,
)


def agreement(answer: str, annotations: Sequence[str]) -> float:
    """Returns the mean over annotators of min(1, matches among the others / 3); 0 without annotators."""
    if not annotations:
        return 0.0
    matches = sum(annotation == answer for annotation in annotations)
    shares = [min(1.0, (matches - (annotation == answer)) / 3) for annotation in annotations]
    return sum(shares) / len(shares)


def vqav2_official(prediction: str, references: Sequence[str], **row_fields: object) -> float:
    """The official evaluator: both sides are normalised only if the annotators' answers differ from each other."""
    answer, annotations = clean(prediction), [clean(reference) for reference in accepted(references)]
    if len(set(annotations)) > 1:
        answer, annotations = normalise(answer), [normalise(annotation) for annotation in annotations]
    return agreement(answer, annotations)


def vqav2_lmms_eval(prediction: str, references: Sequence[str], **row_fields: object) -> float:
    """lmms-eval 0.7.3: both sides are always normalised."""
    annotations = [normalise(clean(reference), EVALAI) for reference in accepted(references)]
    return agreement(normalise(clean(prediction), EVALAI), annotations)


def textvqa_m4c(prediction: str, references: Sequence[str], **row_fields: object) -> float:
    """The m4c evaluator of LLaVA and CoIN: both sides go through the EvalAI processor."""
    return agreement(evalai(prediction), [evalai(reference) for reference in accepted(references)])


def vizwiz_lmms_eval(prediction: str, references: Sequence[str], **row_fields: object) -> float:
    """lmms-eval 0.7.3 on VizWiz: the EvalAI processor on both sides."""
    return textvqa_m4c(prediction, references)


def vqa_score_vlmevalkit(prediction: str, references: Sequence[str], **row_fields: object) -> float:
    """VLMEvalKit: always normalised; a period after a digit stays."""
    annotations = [normalise(clean(reference), VLMEVALKIT) for reference in accepted(references)]
    return agreement(normalise(clean(prediction), VLMEVALKIT), annotations)


def vqa_accuracy(prediction: str, references: Sequence[str], **row_fields: object) -> float:
    """Both sides always normalised by the official rules; an answer of which nothing is left is wrong.

    With fewer than four annotators full agreement with the others is 1; with one annotator it is plain equality.
    """
    answer = normalise(clean(prediction))
    annotations = [normalise(clean(reference)) for reference in accepted(references)]
    if not answer or not annotations:
        return 0.0
    if len(annotations) == 1:
        return float(answer == annotations[0])
    needed = min(3, len(annotations) - 1)
    matches = annotations.count(answer)
    shares = [min(1.0, (matches - (annotation == answer)) / needed) for annotation in annotations]
    return sum(shares) / len(shares)


def evalai_processor(prediction: str, references: object = None, **row_fields: object) -> str:
    """Returns the text that the EvalAI processor compares."""
    return evalai(prediction)


def vqa_official_normaliser(prediction: str, references: object = None, **row_fields: object) -> str:
    """Returns the text that the official evaluator compares once it normalises."""
    return strip_words(strip_marks(prediction, OFFICIAL))
