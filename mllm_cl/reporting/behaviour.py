"""What a run says of the answers beside their scores: drift of the language side, and answers in the form asked for.

Numbers only; `report.py` writes them stage by stage, `compare.py` those after the last stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mllm_cl.evaluation.instructions import obedience
from mllm_cl.reporting.run import RunSummary, predictions_path, read_json_lines


def drift_by_stage(run: RunSummary) -> dict[int, dict[str, Any]]:
    """Returns index of the stage -> its last `drift` event (see `evaluation/drift.py`), in the order of the stages."""
    found = {entry["stage"]: entry for entry in run.ledger if entry.get("event") == "drift"}
    return {stage: found[stage] for stage in sorted(found) if stage <= len(run.stages)}


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
