"""The results of a stage as the Hub reads them: `model-index` of the card and `.eval_results/*.yaml`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import yaml
from huggingface_hub import EvalResult, EvalResultEntry
from huggingface_hub import eval_result_entries_to_yaml as entries_to_yaml

from mllm_cl.errors import HubError
from mllm_cl.evaluation.matrix import AccuracyMatrix, stage_name
from mllm_cl.reporting.report import metric_rows
from mllm_cl.reporting.run import RunSummary

TASK_TYPE = "image-text-to-text"


def until_stage(run: RunSummary, stage: int) -> RunSummary:
    """Returns the run as it was after a stage: what came later is left out of matrix, stages and ledger."""
    matrix = run.matrix
    if matrix is not None and stage < len(matrix.tasks):
        rows = matrix.has_base + stage
        matrix = AccuracyMatrix(
            tasks=matrix.tasks[:stage],
            metric=matrix.metric[:stage],
            stages=matrix.stages[:rows],
            values=[row[:stage] for row in matrix.values[:rows]],
            stderr=[row[:stage] for row in matrix.stderr[:rows]],
            n=matrix.n[:stage],
            general_names=matrix.general_names,
            general_metric=matrix.general_metric,
            general_values=matrix.general_values[:rows],
            general_stderr=matrix.general_stderr[:rows],
            general_n=matrix.general_n,
            single=matrix.single[:stage] if matrix.single else None,
            run=matrix.run,
        )
    later = [entry for entry in run.ledger if stage < len(run.stages) and _is_later(entry, stage)]
    ledger = tuple(entry for entry in run.ledger if entry not in later and not _is_own_push(entry, stage))
    return replace(run, matrix=matrix, stages=run.stages[:stage], ledger=ledger)


def _is_later(entry: Mapping[str, object], stage: int) -> bool:
    at = entry.get("stage", 0)
    return entry.get("event") == "run_complete" or (isinstance(at, int) and at > stage)


def _is_own_push(entry: Mapping[str, object], stage: int) -> bool:
    """A stage cannot hold where it was pushed to: pushing it again must not change it."""
    return entry.get("event") == "published" and entry.get("stage") == stage


def model_index(run: RunSummary) -> list[EvalResult]:
    """Returns one result per task and general benchmark at the last stage, and the derived metrics of the stream."""
    matrix = run.matrix
    if matrix is None:
        return []
    stage = stage_name(len(matrix.tasks), matrix.tasks)
    found = [
        _result(f"{run.stream}/{name}", name, metric, value, split=_split(run))
        for name, metric, value in zip(matrix.tasks, matrix.metric, matrix.row(stage).values())
        if value is not None
    ]
    found += [
        _result(name, name, metric, value, split=_split(run))
        for name, metric, value in zip(matrix.general_names, matrix.general_metric, matrix.general_values[-1])
        if value is not None
    ]
    rows, through = metric_rows(run)
    values = matrix.derived(through) if through else {}
    for row in rows:
        value = values[row.key].value
        if value is not None:
            found.append(_result(str(run.stream), f"{run.stream} ({through} tasks)", row.key, value, name=row.label))
    return found


def _result(
    dataset: str, dataset_name: str, metric: str, value: float, *, name: str | None = None, split: str | None = None
) -> EvalResult:
    return EvalResult(
        task_type=TASK_TYPE,
        dataset_type=dataset,
        dataset_name=dataset_name,
        dataset_split=split,
        metric_type=metric,
        metric_name=name or f"{metric} (percent)",
        metric_value=round(value, 4),
    )


def _split(run: RunSummary) -> str:
    return str((run.recipe.get("evaluation") or {}).get("split", "test"))


def eval_results(run: RunSummary, datasets: Mapping[str, str]) -> dict[str, bytes]:
    """Returns `.eval_results/NAME.yaml` of every task or benchmark whose data set is on the Hub.

    The Hub links these entries to data sets, so a task of somebody's own files has none; it is in `model-index`.

    Args:
        datasets: task or benchmark -> `owner/name` or `owner/name:task_id`.

    Raises:
        HubError: a name that the run did not measure.
    """
    matrix = run.matrix
    if matrix is None:
        return {}
    own = dict(zip(matrix.tasks, zip(matrix.metric, matrix.values[-1], matrix.n)))
    own |= dict(zip(matrix.general_names, zip(matrix.general_metric, matrix.general_values[-1], matrix.general_n)))
    files = {}
    for name, dataset in datasets.items():
        if name not in own:
            if any(stage.task == name for stage in run.stages) or name in _all_tasks(run):
                continue  # a task of a later stage
            raise HubError(f"hub.datasets: the run has no {name!r}.", expected=", ".join(own))
        metric, value, count = own[name]
        if value is None:
            continue
        dataset_id, _, task_id = dataset.partition(":")
        entry = EvalResultEntry(
            dataset_id=dataset_id,
            task_id=task_id or "default",
            value=round(value, 4),
            notes=f"percent, {metric}, {matrix.stages[-1]}, {count or 'an unknown number of'} {_split(run)} rows",
        )
        text = yaml.safe_dump(entries_to_yaml([entry]), sort_keys=False, allow_unicode=True)
        files[f".eval_results/{name}.yaml"] = text.encode()
    return files


def _all_tasks(run: RunSummary) -> list[str]:
    """The tasks of the stream, those of later stages too."""
    started = next((entry for entry in run.ledger if entry.get("event") == "started"), {})
    return list(started.get("tasks") or [])
