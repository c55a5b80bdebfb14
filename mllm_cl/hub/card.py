"""The model card of a published stage: metadata that the Hub understands, results, and code that runs without mllm_cl."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined

from mllm_cl.hub.results import TASK_TYPE, model_index
from mllm_cl.recipe import HubSection
from mllm_cl.reporting import formatting
from mllm_cl.reporting.report import general_table, heat_rows, metric_rows
from mllm_cl.reporting.run import RunSummary

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class Router:
    """A router that the card can show in a few lines: nearest prototype of the untouched base's embedding.

    Args:
        state: where its prototypes lie below `run/`, a safetensors file with `prototype/TASK`.
        limits: task -> similarity below which a row goes to the untouched base.
    """

    state: str
    limits: dict[str, float]


def write_card(
    run: RunSummary,
    *,
    repo_id: str,
    section: HubSection,
    tasks: Sequence[str] | None = None,
    router: Router | None = None,
    gated: bool = False,
    figures: Sequence[str] = (),
) -> str:
    """Returns `README.md` of a published stage.

    Args:
        run: the run until that stage.
        tasks: names of the per-task adapters; `None` for one adapter in the root.
        router: how one of them is chosen; by the name of the task when not given.
        gated: the adapter holds experts, whose gates lie in the methods' state.
        figures: paths of pictures to show.
    """
    base = section.base_model or run.model or ""
    model = run.recipe.get("model") or {}
    learnt = [stage.task for stage in run.stages]
    rows, through = metric_rows(run)
    content = {
        "run": run,
        "repo_id": repo_id,
        "base": base,
        "base_is_public": is_hub_id(base),
        "revision": model.get("revision"),
        "image_mode": model.get("image_mode") or "native",
        "prompt_profile": model.get("prompt_profile"),
        "quantization": model.get("quantization"),
        "license": section.license,
        "learnt": learnt,
        "adapters": None if tasks is None else [task for task in learnt if task in tasks],
        "router": router,
        "gated": gated,
        "max_new_tokens": (run.recipe.get("evaluation") or {}).get("max_new_tokens", 16),
        "heat": [[stage, *(_cell(cell) for cell in cells)] for stage, cells in heat_rows(run)],
        "heat_header": ["after stage", *(run.matrix.tasks if run.matrix else ())],
        "general": general_table(run),
        "metrics": [[row.label, row.value, row.divisor, row.sentence] for row in rows if row.measured],
        "through": through,
        "settings": _settings(run),
        "figures": figures,
        "recipe": published_recipe(run.recipe),
        "versions": formatting.flatten(run.environment.get("versions") or {}),
    }
    text = _templates().get_template("card.md.jinja").render(content)
    return ModelCard(f"---\n{_metadata(run, base, section).to_yaml()}\n---\n\n{text}").content


def is_hub_id(name: str) -> bool:
    """True for `owner/name`, false for a folder of this machine and for the built-in model."""
    return bool(_HUB_ID.fullmatch(name)) and not Path(name).exists()


def _metadata(run: RunSummary, base: str, section: HubSection) -> ModelCardData:
    results = model_index(run)
    public = {"base_model": base, "base_model_relation": "adapter"} if is_hub_id(base) else {}
    datasets = sorted({dataset.partition(":")[0] for dataset in section.datasets.values()})
    return ModelCardData(
        **public,  # type: ignore[arg-type]
        model_name=run.name,
        library_name="peft",
        pipeline_tag=TASK_TYPE,
        license=section.license,
        datasets=datasets or None,
        tags=["continual-learning", "mllm-cl", "lora", *dict.fromkeys(name for name, _ in run.methods)],
        eval_results=results or None,
        ignore_metadata_errors=False,
    )


def _cell(cell: Any) -> str:
    return cell.text + (f" ({cell.change})" if cell.change else "")


def _settings(run: RunSummary) -> list[tuple[str, str]]:
    """Method, hyper-parameters and seed, one line each."""
    known: dict[str, object] = {"method": run.method, "stream": run.stream, "seed": run.seed}
    for name, options in run.methods:
        known |= {f"{name}.{key}": value for key, value in formatting.flatten(options).items()}
    for part in ("model.lora", "training"):
        section: Any = run.recipe
        for key in part.split("."):
            section = (section or {}).get(key)
        known |= {f"{part}.{key}": value for key, value in formatting.flatten(section).items()}
    return [(key, "not recorded" if value is None else formatting.plain(value)) for key, value in known.items()]


def published_recipe(recipe: dict[str, Any]) -> str:
    """Returns the recipe without the folders of this machine; what is left identifies the run as before."""
    content = {**recipe, "output_dir": Path(str(recipe.get("output_dir", "run"))).name}
    if isinstance(content.get("stream"), dict):
        stream = dict(content["stream"])
        for key in ("path", "root"):
            if isinstance(stream.get(key), str) and Path(stream[key]).is_absolute():
                stream[key] = Path(stream[key]).name
        content["stream"] = stream
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


@cache
def _templates() -> Environment:
    environment = Environment(
        loader=PackageLoader("mllm_cl", "hub/templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"cell": formatting.markdown_cell, "python": repr}
    environment.globals |= {"markdown_table": formatting.markdown_table, "not_measured": formatting.NOT_MEASURED}
    return environment
