"""What a published stage consists of.

    README.md                                   the model card
    adapter_config.json, adapter_model.safetensors    one adapter: plain PEFT in the root
    adapters/TASK/...                           or one per task, for methods that route
    figures/*.png, .eval_results/*.yaml         from the results
    run/                                        the run: recipe, ledger, environment, matrix, scores of every cell
    run/stages/NN-task/method/                  state of the methods: for routing and gates, and to continue elsewhere

No predictions, no rows and no images of the stream are among them, and no folder names of the machine: the recipe's
`output_dir` and the paths of its stream are cut to their last part. Replay methods keep rows in their state.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import get_token

from mllm_cl.errors import HubError, RunError
from mllm_cl.files import is_gated, new_folder
from mllm_cl.hub.card import Router, published_recipe, write_card
from mllm_cl.hub.client import check_repo_id
from mllm_cl.hub.results import eval_results, until_stage
from mllm_cl.parse import parse_json
from mllm_cl.recipe import TOKEN, HubSection
from mllm_cl.reporting.figures import write_figures
from mllm_cl.reporting.run import RunSummary, read_run

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
OURS = ("run/", "figures/", "adapters/", ".eval_results/", CONFIG, WEIGHTS)
"""Beginnings of paths that a push replaces as a whole; anything else in the repository is left alone."""

_TOKEN = re.compile(TOKEN.pattern.encode())
_BINARY = (".safetensors", ".png")


@dataclass(frozen=True)
class PublishedFile:
    """A file of a repository: its path there, and a file here or its bytes."""

    path: str
    content: Path | bytes

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size

    def read(self) -> bytes:
        """Returns the bytes."""
        return self.content if isinstance(self.content, bytes) else self.content.read_bytes()


@dataclass(frozen=True)
class Publication:
    """One stage, ready to be pushed.

    Args:
        repo_id: where it goes; the card's snippet names it.
        stage, stage_name: 2, `02-menus`.
        files: everything that is uploaded, and nothing else.
    """

    repo_id: str
    stage: int
    stage_name: str
    files: tuple[PublishedFile, ...]

    @property
    def branch(self) -> str:
        """Name of the branch of this stage."""
        return stage_branch(self.stage)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    def write(self, folder: Path) -> None:
        """Writes the files into a new folder instead.

        Raises:
            RunError: the folder exists or cannot be written.
        """
        if folder.exists():
            raise RunError(f"{folder}: exists already.", expected="a new folder", fix="choose another one.")
        with new_folder(folder) as place:
            for file in self.files:
                path = place / file.path
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(file.read())


def stage_branch(stage: int) -> str:
    """Returns the branch that holds a stage: `stage-02`."""
    return f"stage-{stage:02d}"


def trained_stages(run: RunSummary) -> list[int]:
    """Returns the stages that have an adapter to publish."""
    return [
        entry["stage"] for entry in run.ledger if entry.get("event") == "stage_trained" and entry.get("trained", True)
    ]


def gather(
    folder: str | Path,
    repo_id: str,
    stage: int | None = None,
    *,
    section: HubSection | None = None,
    router: Router | None = None,
    with_state: bool = False,
) -> Publication:
    """Returns what would be published of a stage; nothing is uploaded and nothing in the run changes.

    Args:
        folder: the run.
        repo_id: `owner/name`.
        stage: the last one that was trained when not given.
        section: licence, base model and data sets for the card; those of the run's recipe when not given.
        router: how adapters are chosen, where the card can show it.
        with_state: publish the methods' state, which continuing the run elsewhere needs.

    Raises:
        RunError: there is no such run, stage or adapter.
        HubError: `repo_id` cannot be one, or a file would give a token away.
    """
    check_repo_id(repo_id)
    run = read_run(folder)
    stages = trained_stages(run)
    number = stage if stage is not None else max(stages, default=None)
    if number is None or number not in stages:
        raise RunError(
            f"{folder}: " + ("has not trained a stage yet." if stage is None else f"has no trained stage {stage}."),
            expected="stage " + ", ".join(map(str, stages)) if stages else "a run with a trained stage",
            fix="run it, or name another stage.",
        )
    section = section or HubSection.model_validate(run.recipe.get("hub") or {})
    name = run.stages[number - 1].name
    run = until_stage(run, number)
    adapters = _adapters(run.folder / "stages" / name / "adapter", section.base_model)
    per_task = not any(file.path == CONFIG for file in adapters)
    gated = is_gated(run.folder / "stages" / name)
    files = [*adapters, *_run_files(run, name, with_state or per_task or gated), *_figures(run)]
    files += [PublishedFile(path, text) for path, text in eval_results(run, section.datasets).items()]
    card = write_card(
        run,
        repo_id=repo_id,
        section=section,
        tasks=[Path(file.path).parent.name for file in adapters if file.path.endswith(CONFIG)] if per_task else None,
        router=router,
        gated=gated,
        figures=sorted(file.path for file in files if file.path.startswith("figures/")),
    )
    files.append(PublishedFile("README.md", card.encode()))
    publication = Publication(repo_id, number, name, tuple(sorted(files, key=lambda file: file.path)))
    _check_secrets(publication.files)
    return publication


def rebase(config: bytes, base_model: str) -> bytes:
    """Returns an `adapter_config.json` that names another base model, in the form that PEFT writes."""
    content = parse_json(config)
    content["base_model_name_or_path"] = base_model
    return json.dumps(content, indent=2, sort_keys=True).encode()


def _adapters(folder: Path, base_model: str | None) -> list[PublishedFile]:
    """The adapter in the root, or one folder per task."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    if not any(path.name == CONFIG for path in found):
        raise RunError(f"{folder}: holds no adapter.", expected=f"{CONFIG} and {WEIGHTS}", fix="restore the folder.")
    prefix = "" if (folder / CONFIG).is_file() else "adapters/"
    files = []
    for path in found:
        rebased = base_model is not None and path.name == CONFIG
        content = rebase(path.read_bytes(), base_model) if rebased and base_model else path
        files.append(PublishedFile(prefix + path.relative_to(folder).as_posix(), content))
    return files


def _run_files(run: RunSummary, stage_folder: str, with_state: bool) -> list[PublishedFile]:
    ledger = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in run.ledger)
    files = [
        PublishedFile("run/recipe.yaml", published_recipe(run.recipe).encode()),
        PublishedFile("run/ledger.jsonl", ledger.encode()),
    ]
    if (run.folder / "environment.json").is_file():
        files.append(PublishedFile("run/environment.json", run.folder / "environment.json"))
    if run.matrix is not None:
        text = json.dumps(run.matrix.to_json(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        files.append(PublishedFile("run/matrix.json", text.encode()))
        files.append(PublishedFile("run/matrix.csv", run.matrix.to_csv().encode()))
        paths = [run.folder / "evaluation" / stage for stage in run.matrix.stages]
        files += _below(run.folder, [path for folder in paths for path in sorted(folder.glob("*/result.json"))])
    if with_state:
        files += _below(run.folder, sorted((run.folder / "stages" / stage_folder / "method").rglob("*")))
    return files


def _below(root: Path, paths: Sequence[Path]) -> list[PublishedFile]:
    return [PublishedFile(f"run/{path.relative_to(root).as_posix()}", path) for path in paths if path.is_file()]


def _figures(run: RunSummary) -> list[PublishedFile]:
    with tempfile.TemporaryDirectory() as place:
        paths = write_figures(replace(run, folder=Path(place)))
        return [PublishedFile(f"figures/{path.name}", path.read_bytes()) for path in paths]


def _check_secrets(files: Sequence[PublishedFile]) -> None:
    """Refuses to publish the token in use, or anything that looks like one."""
    own = (get_token() or "").encode()
    for file in files:
        if file.path.endswith(_BINARY):
            continue
        content = file.read()
        if _TOKEN.search(content) or (own and own in content):
            raise HubError(
                f"{file.path}: holds what looks like an access token of the Hub.",
                expected="a token only in HF_TOKEN or behind `hf auth login`",
                fix="take it out of the recipe or the row it comes from, and revoke it.",
            )
