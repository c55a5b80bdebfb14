"""What a run says of the answers beside their scores: drift of the language side, and answers in the form asked for.

Numbers only; `report.py` writes them stage by stage, `compare.py` those after the last stage.
"""

from __future__ import annotations

from collections.abc import Sequence

from mllm_cl.evaluation.instructions import obedience
from mllm_cl.reporting.run import RunSummary, as_index, as_number, predictions_path, read_json_lines

DRIFT = ("feature_shift", "one_word_share", "mean_words")
"""Numbers of a `drift` event, see `evaluation/drift.py`."""


def drift_by_stage(run: RunSummary) -> dict[int, dict[str, float | None]]:
    """Returns index of the stage -> the numbers of its last `drift` event, in the order of the stages."""
    found = {as_index(entry.get("stage")): entry for entry in run.ledger if entry.get("event") == "drift"}
    known = [stage for stage in range(len(run.stages) + 1) if stage in found]
    return {stage: {name: as_number(found[stage].get(name)) for name in DRIFT} for stage in known}


def final_drift(run: RunSummary, field: str) -> float | None:
    """Returns a number of the drift probes after the last stage, `None` where they did not run then."""
    return drift_by_stage(run).get(len(run.stages), {}).get(field) if run.stages else None


def form_shares(run: RunSummary, stages: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Returns test set -> stage -> percent of the answers in the form that their question asks for.

    Args:
        run (`RunSummary`): its predictions are read.
        stages (`Sequence[str]`, *optional*): names of the stages to look at; all by default.

    Test sets whose questions ask for no form are absent.
    """
    if run.matrix is None:
        return {}
    shares: dict[str, dict[str, float]] = {}
    for name in (*run.matrix.tasks, *run.matrix.general_names):
        for stage in run.matrix.stages if stages is None else stages:
            lines = read_json_lines(predictions_path(run, stage, name), [])
            pairs = [(str(line.get("question", "")), str(line.get("prediction", ""))) for line in lines]
            percent = obedience(pairs).percent
            if percent is not None:
                shares.setdefault(name, {})[stage] = percent
    return shares


def final_obedience(run: RunSummary) -> float | None:
    """Returns the mean over test sets of `form_shares` after the last stage, `None` where no question asks for a form."""
    if run.matrix is None or not run.complete:
        return None
    shares = [percent for own in form_shares(run, run.matrix.stages[-1:]).values() for percent in own.values()]
    return sum(shares) / len(shares) if shares else None
