"""Pulls a published run into a folder: as a run that `matrix`, `report`, `evaluate` and `run` know."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError

from mllm_cl.errors import HubError, RunError
from mllm_cl.evaluation.matrix import stage_name
from mllm_cl.files import folder_sha256, new_folder
from mllm_cl.hub.client import make_api, patiently
from mllm_cl.hub.layout import CONFIG, WEIGHTS, rebase, stage_branch
from mllm_cl.hub.push import MAIN
from mllm_cl.parse import parse_json, parse_yaml
from mllm_cl.recipe import Recipe, load_recipe

_FOLDER_NAME = re.compile(r"(?!\.)[^/\\\0]{1,200}")
_DEEPEST = 16  # folders above a file; a run has five, and a repository of thousands would end Python's own functions
_WANTED = [CONFIG, WEIGHTS, "adapters/*", "run/*"]


@dataclass(frozen=True)
class Pulled:
    """What a pull brought.

    Args:
        folder: the run.
        recipe: as it was resolved, with this folder as its `output_dir`.
        stage, stage_name: the last stage.
        complete (`bool`): the run had learnt all its tasks.
        continuable (`bool`): the methods' state came with it.
        missing: earlier stages whose adapters are not on the Hub.
    """

    folder: Path
    recipe: Recipe
    stage: int
    stage_name: str
    complete: bool
    continuable: bool
    missing: tuple[str, ...]


def pull(repo_id: str, out: str | Path, *, revision: str = MAIN, api: HfApi | None = None) -> Pulled:
    """Writes a published run into a new folder; every adapter must be what the run's ledger says it was.

    Earlier stages come from their branches, where those were pushed.

    Args:
        out: must be missing or empty.
        revision: branch or commit.

    Raises:
        RunError: the folder is in use.
        HubError: the repository cannot be read, or holds no run or a damaged one.
    """
    out, api = Path(out), api or make_api()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(f"{out}: is not empty.", expected="a new folder", fix="choose another --out.")
    snapshot = _download(api, repo_id, revision)
    recipe, ledger = read_published(snapshot, repo_id)
    tasks, trained = read_stages(ledger, repo_id)
    last, base = max(trained), recipe.model.name_or_path
    with new_folder(out) as place:
        shutil.copytree(snapshot / "run", place, dirs_exist_ok=True)
        missing = []
        for stage in sorted(trained):
            name = stage_name(stage, tasks)
            source = snapshot if stage == last else _stage_snapshot(api, repo_id, stage, revision)
            target = place / "stages" / name / "adapter"
            if source is None or not _copy_adapter(source, target, base, trained[stage]):
                if stage == last:
                    raise HubError(
                        f"{repo_id}: the adapter is not the one that its ledger names.",
                        expected="a run as mllm-cl pushed it",
                        fix="somebody changed the repository; pull an earlier commit with --revision.",
                    )
                missing.append(name)
                continue
            method = Path("stages") / name / "method"
            if (source / "run" / method).is_dir():
                shutil.copytree(source / "run" / method, place / method, dirs_exist_ok=True)
            (place / method).mkdir(parents=True, exist_ok=True)
        recipe = recipe.model_copy(update={"output_dir": str(out)})
        (place / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
        _note_origin(place / "ledger.jsonl", last, f"{repo_id}@{snapshot.name}")
        states = any((place / "stages" / stage_name(last, tasks) / "method").iterdir())
    complete = any(entry.get("event") == "run_complete" for entry in ledger) or last == len(tasks)
    continuable = complete or states or not recipe.methods
    return Pulled(out, recipe, last, stage_name(last, tasks), complete, continuable, tuple(missing))


def find_published(recipe: Recipe, api: HfApi | None = None) -> bool:
    """Returns whether `hub.repo_id` holds this very run.

    Raises:
        HubError: it holds the run of another recipe, or cannot be reached.
    """
    repo_id, api = recipe.hub.repo_id or "", api or make_api()

    def files() -> list[str]:
        try:
            return api.list_repo_files(repo_id)
        except RepositoryNotFoundError:
            return []

    if "run/recipe.yaml" not in patiently(f"{repo_id}: looking for the run", files):
        return False
    published, _ = read_published(_download(api, repo_id, MAIN), repo_id)
    if published.sha256 != recipe.sha256:
        raise HubError(
            f"{repo_id}: holds the run of another recipe ({published.name}).",
            expected="a repository of this run, or a new one",
            fix="change hub.repo_id.",
        )
    return True


def read_published(snapshot: Path, repo_id: str) -> tuple[Recipe, list[dict[str, Any]]]:
    """Returns recipe and ledger of a downloaded repository.

    Raises:
        HubError: it holds no run.
    """
    try:
        content = parse_yaml((snapshot / "run/recipe.yaml").read_text(encoding="utf-8"))
        lines = (snapshot / "run/ledger.jsonl").read_text(encoding="utf-8").split("\n")
        ledger = [parse_json(line) for line in lines if line]
        if not isinstance(content, dict) or not all(isinstance(entry, dict) for entry in ledger):
            raise ValueError("mappings were expected")
        return load_recipe(content), ledger
    except (OSError, ValueError) as error:
        raise HubError(
            f"{repo_id}: holds no readable run ({error}).",
            expected="run/recipe.yaml and run/ledger.jsonl, as `mllm-cl push` writes them",
            fix="check the name; a plain adapter is loaded with PEFT instead.",
        ) from error


def read_stages(ledger: Sequence[Mapping[str, Any]], repo_id: str) -> tuple[list[str], dict[int, str]]:
    """Returns the tasks that a ledger names, and the hash of the adapter of every trained stage.

    Whoever wrote it may be a stranger, and its names become folders.

    Raises:
        HubError: it is not what `mllm-cl push` writes.
    """
    started = next((entry for entry in ledger if entry.get("event") == "started"), {})
    trained = [entry for entry in ledger if entry.get("event") == "stage_trained"]
    tasks, hashes = started.get("tasks"), {entry.get("stage"): entry.get("adapter_sha256") for entry in trained}
    if (
        not isinstance(tasks, list)
        or not all(isinstance(task, str) and _FOLDER_NAME.fullmatch(task) for task in tasks)
        or not hashes
        or not all(type(stage) is int and 1 <= stage <= len(tasks) for stage in hashes)
        or not all(isinstance(sha256, str) for sha256 in hashes.values())
    ):
        raise HubError(
            f"{repo_id}: its ledger is not one that mllm-cl has written.",
            expected="names of tasks that can be folders, and trained stages with the hashes of their adapters",
            fix="check the name, or pull an earlier commit with --revision.",
        )
    return tasks, hashes  # type: ignore[return-value]


def _download(api: HfApi, repo_id: str, revision: str) -> Path:
    """The repository in the client's cache, where an interrupted download continues."""
    listing = f"{repo_id}: listing the files of {revision}"
    if any(
        name.count("/") > _DEEPEST
        for name in patiently(listing, lambda: api.list_repo_files(repo_id, revision=revision))
    ):
        raise HubError(
            f"{repo_id}: holds folders in more than {_DEEPEST} folders.",
            expected="a run as mllm-cl pushed it",
            fix="check the name, or pull an earlier commit with --revision.",
        )
    return Path(
        patiently(
            f"{repo_id}: downloading {revision}",
            lambda: api.snapshot_download(repo_id, revision=revision, allow_patterns=_WANTED),
        )
    )


def _stage_snapshot(api: HfApi, repo_id: str, stage: int, revision: str) -> Path | None:
    if revision != MAIN:
        return None
    refs = patiently(f"{repo_id}: listing its branches", lambda: api.list_repo_refs(repo_id))
    branch = stage_branch(stage)
    return _download(api, repo_id, branch) if branch in [ref.name for ref in refs.branches] else None


def _copy_adapter(source: Path, target: Path, base_model: str, sha256: str) -> bool:
    """Copies the adapter, or those of all tasks; false if it is not the expected one."""
    per_task = (source / "adapters").is_dir()
    found = [*(source / "adapters").rglob("*")] if per_task else [source / CONFIG, source / WEIGHTS]
    for path in found:
        if not path.is_file():
            continue
        copy = target / path.relative_to(source / "adapters" if per_task else source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        content = path.read_bytes()
        copy.write_bytes(_of_base(content, base_model) if path.name == CONFIG else content)
    if target.is_dir() and folder_sha256(target) == sha256:
        return True
    shutil.rmtree(target, ignore_errors=True)
    return False


def _of_base(config: bytes, base_model: str) -> bytes:
    """The configuration as the run wrote it: it may have been published under another name of the base model."""
    try:
        content = parse_json(config)
    except ValueError:
        return config  # damaged, as its hash will tell
    if not isinstance(content, dict) or content.get("base_model_name_or_path") == base_model:
        return config
    return rebase(config, base_model)


def _note_origin(ledger: Path, stage: int, place: str) -> None:
    """The ledger of a stage is pushed before it can say where it went."""
    entry = {"event": "published", "stage": stage, "place": place, "time": round(time.time(), 3)}
    with ledger.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry, ensure_ascii=False) + "\n")
