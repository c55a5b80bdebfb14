"""Whether an answer has the form that was asked for, right or wrong: SMoLoRA's measure of instruction following (MIF).

A row says which form in `answer_form`: `letter`, `short` or `caption`. MIF is the mean over the tasks of the last stage of
the share of answers in form, the derived mean of a matrix scored by `mif`.

Source: the scripts `eval_*_instruction.py` of `Minato-Zackie/SMoLoRA`.
"""

from __future__ import annotations

from collections.abc import Sequence

from mllm_cl.evaluation.scorers.references import accepted

FORMS = ("letter", "short", "caption")


def mif(prediction: str, references: Sequence[str], answer_form: object = None, **row_fields: object) -> float:
    """Returns 1.0 for an answer in form, else 0.0.

    * `letter`: one letter of the alphabet, in either case.
    * `short`: at most two words, or the accepted answer whatever its length. An empty answer is in form, as there.
    * `caption`: a full stop at the end, and more than four words, or else part of an accepted caption.

    A row that asks for no known form has no answer in form.
    """
    answer, known = prediction.strip(), [text.lower() for text in accepted(references)]
    words = len(answer.split())
    if answer_form == "letter":
        return float(len(answer) == 1 and answer.upper() in "ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    if answer_form == "short":
        return float(words <= 2 or answer.lower() in known)
    if answer_form == "caption":
        return float(answer.endswith(".") and (words > 4 or any(answer.lower() in text for text in known)))
    return 0.0
