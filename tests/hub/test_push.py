"""Pushing and pulling with huggingface_hub's own client, through everything that goes wrong on a network."""

from __future__ import annotations

import json
import logging
import time
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from mllm_cl.cli.pull import resume_from_hub
from mllm_cl.cli.push import StagePusher, publish
from mllm_cl.errors import HubError, RunError
from mllm_cl.files import folder_sha256
from mllm_cl.hub import gather, pull, push
from mllm_cl.hub.pull import find_published
from mllm_cl.recipe import HubSection

REPO = "owner/colours"
LARGE_PUT, COMMIT = r"^/large/", r"/commit/"


@cache
def parcel(run: Path, stage: int | None = None, with_state: bool = False) -> Any:
    """What a push of a stage uploads; drawn once, since figures take their time."""
    return gather(run, REPO, stage, with_state=with_state)


def fault(hub: Any, *args: Any) -> None:
    """Adds a fault: method, path, kind, count."""
    from dataclasses import make_dataclass

    names = ["method", "path", "kind", "count"]
    hub.faults.append(make_dataclass("Planned", names)(*[*args, 1][:4]))


def expected(publication: Any) -> dict[str, bytes]:
    return {file.path: file.read() for file in publication.files}


def on_hub(hub: Any, branch: str = "main") -> dict[str, bytes]:
    return {path: content for path, content in hub.tree(REPO, branch).items() if path != ".gitattributes"}


def test_a_push_is_what_was_listed_in_one_commit(hub: Any, finished: Path) -> None:
    publication = parcel(finished)
    push(publication)
    assert on_hub(hub) == expected(publication)
    assert len(hub.repositories[REPO].branches["main"]) == 2
    assert not hub.repositories[REPO].private
    uploads = [line for line in hub.log if "/large/" in line]
    push(publication)  # nothing changed: no commit, no upload
    assert len(hub.repositories[REPO].branches["main"]) == 2
    assert [line for line in hub.log if "/large/" in line] == uploads


def test_a_later_push_replaces_what_is_ours_and_nothing_else(hub: Any, finished: Path) -> None:
    push(parcel(finished, 1, with_state=True))
    hub.tree(REPO)["notes.txt"] = b"by hand"
    publication = parcel(finished, with_state=True)
    push(publication)
    assert on_hub(hub) == {**expected(publication), "notes.txt": b"by hand"}


def test_a_branch_for_a_stage(hub: Any, finished: Path) -> None:
    first, last = parcel(finished, 1), parcel(finished)
    push(last)
    push(first, branch=first.branch)
    assert on_hub(hub, "stage-01") == expected(first)
    assert on_hub(hub) == expected(last)


def test_private_is_private_or_refused(hub: Any, finished: Path) -> None:
    publication = parcel(finished)
    push(publication, private=True)
    assert hub.repositories[REPO].private
    hub.repositories[REPO].private = False
    commits = len(hub.repositories[REPO].branches["main"])
    with pytest.raises(HubError, match="is public"):
        push(publication, private=True)
    assert len(hub.repositories[REPO].branches["main"]) == commits


@pytest.mark.parametrize(
    ("method", "path", "kind", "count"),
    [
        ("POST", "repos/create", 500, 2),
        ("POST", "preupload", 429, 2),
        ("PUT", LARGE_PUT, 500, 1),
        ("PUT", LARGE_PUT, "drop", 2),
        ("POST", "objects/batch", "silent", 1),
        ("POST", COMMIT, 503, 2),
        ("POST", COMMIT, "drop", 1),
        ("POST", COMMIT, "silent", 1),
        ("POST", COMMIT, "lost", 1),
    ],
)
def test_what_fails_for_the_moment_is_tried_again(
    hub: Any, finished: Path, method: str, path: str, kind: int | str, count: int
) -> None:
    publication = parcel(finished)
    fault(hub, method, path, kind, count)
    push(publication)
    assert hub.faults[0].count == 0
    assert on_hub(hub) == expected(publication)
    assert len(hub.repositories[REPO].branches["main"]) == 2  # one commit, also when its answer was lost


@pytest.mark.parametrize(("method", "path", "kind"), [("PUT", LARGE_PUT, 500), ("POST", COMMIT, 500)])
def test_a_push_that_fails_leaves_the_stage_before(
    hub: Any, finished: Path, method: str, path: str, kind: int, caplog: pytest.LogCaptureFixture
) -> None:
    first, last = parcel(finished, 1), parcel(finished)
    push(first)
    fault(hub, method, path, kind, 10**6)
    with caplog.at_level(logging.DEBUG), pytest.raises(HubError, match=r"pushing 02-is\.red: failed") as failure:
        push(last)
    assert on_hub(hub) == expected(first)
    assert "same command again" in str(failure.value)
    own = "\n".join(
        record.getMessage() for record in caplog.records if record.name.startswith(("mllm_cl", "huggingface"))
    )
    assert "trying again" in own
    for text in (str(failure.value), own):
        assert "hf_" not in text
        assert "SECRET" not in text
    assert failure.value.__suppress_context__
    hub.faults.clear()
    before = [line for line in hub.log if line.startswith("PUT /large/")]
    push(last)
    assert on_hub(hub) == expected(last)
    if path == COMMIT:  # what went up before is not uploaded twice
        assert [line for line in hub.log if line.startswith("PUT /large/")] == before


def test_the_hub_says_how_long_to_wait(hub: Any, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: (waited.append(seconds), sleep(seconds)))
    fault(hub, "POST", COMMIT, 429)
    push(parcel(finished))
    assert 77.0 in waited
    assert on_hub(hub) == expected(parcel(finished))


def test_what_a_server_objects_to_is_said(hub: Any, finished: Path) -> None:
    fault(hub, "POST", COMMIT, 400)
    with pytest.raises(HubError, match="Bad request for commit endpoint: for the moment"):
        push(parcel(finished))
    hub.faults.clear()
    hub.repositories.clear()
    fault(hub, "POST", "create", 409)  # an answer without the address that the client looks for
    with pytest.raises(HubError, match="creating the repository: failed"):
        push(parcel(finished))


@pytest.mark.parametrize(
    "name", ["colours", "a/b/c", "../colours", "owner/na me", "https://huggingface.co/owner/a", ""]
)
def test_what_is_no_name_is_refused_before_anybody_is_asked(hub: Any, finished: Path, name: str) -> None:
    with pytest.raises(HubError, match="is not the name of a repository"):
        gather(finished, name)
    assert not hub.log


def test_what_cannot_succeed_fails_at_once(hub: Any, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_" + "another" * 5)
    with pytest.raises(HubError, match=r"creating the repository: failed .*401") as refused:
        push(parcel(finished))
    assert "another" not in str(refused.value)
    assert "hf auth login" in str(refused.value)
    assert len(hub.log) <= 2  # once, and a look whether it exists: not five times
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("mllm_cl.hub.client.get_token", lambda: None)
    with pytest.raises(HubError, match="not logged in"):
        push(parcel(finished))
    assert not hub.repositories


# pulling -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["finished", "routed"])
def test_a_pulled_run_has_the_adapters_of_the_pushed_one(
    hub: Any, request: pytest.FixtureRequest, which: str, tmp_path: Path
) -> None:
    run = request.getfixturevalue(which)
    section = HubSection(base_model="owner/base")  # published under another name, as after training on a local folder
    for stage in (1, 2):
        publication = gather(run, REPO, stage, section=section, with_state=True)
        push(publication, branch=publication.branch)
    push(publication)
    fault(hub, "GET", r"/resolve/.*safetensors", "drop")
    fault(hub, "GET", r"/resolve/.*recipe", 429)
    pulled = pull(REPO, tmp_path / "pulled")
    assert (pulled.stage_name, pulled.complete, pulled.missing) == ("02-is.red", True, ())
    for stage in ("01-colour", "02-is.red"):
        for part in ("adapter", "method"):
            path = Path("stages") / stage / part
            assert folder_sha256(tmp_path / "pulled" / path) == folder_sha256(run / path), path
    assert (tmp_path / "pulled/matrix.json").read_bytes() == (run / "matrix.json").read_bytes()
    recipe = yaml.safe_load((tmp_path / "pulled/recipe.yaml").read_text())
    assert recipe["output_dir"] == str(tmp_path / "pulled")


def test_earlier_stages_are_missing_where_they_were_not_pushed(hub: Any, finished: Path, tmp_path: Path) -> None:
    push(parcel(finished))
    pulled = pull(REPO, tmp_path / "pulled")
    assert pulled.missing == ("01-colour",)
    assert pulled.complete
    with pytest.raises(RunError, match="not empty"):
        pull(REPO, tmp_path / "pulled")


def test_a_changed_adapter_is_refused_and_leaves_nothing(hub: Any, finished: Path, tmp_path: Path) -> None:
    push(parcel(finished))
    hub.tree(REPO)["adapter_config.json"] = b'{"peft_type": "LORA"}'
    with pytest.raises(HubError, match="not the one that its ledger names"):
        pull(REPO, tmp_path / "pulled")
    assert not list(tmp_path.glob("pulled*"))


def test_what_is_no_published_run_is_refused(hub: Any, finished: Path, tmp_path: Path) -> None:
    with pytest.raises(HubError, match="failed") as refused:
        pull("owner/nothing", tmp_path / "pulled")
    assert "check the name" in str(refused.value)
    push(parcel(finished))
    hub.tree(REPO).pop("run/ledger.jsonl")
    with pytest.raises(HubError, match="holds no readable run"):
        pull(REPO, tmp_path / "pulled")


@pytest.mark.parametrize("name", ["run/", "run/stages/", "adapters/"])
def test_folders_in_folders_without_end_are_not_downloaded(hub: Any, finished: Path, tmp_path: Path, name: str) -> None:
    push(parcel(finished))
    hub.tree(REPO)[name + "x/" * 1500 + "weights.safetensors"] = b""
    with pytest.raises(HubError, match="holds folders in more than 16 folders"):
        pull(REPO, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("event", "key", "value"),
    [
        ("started", "tasks", ["colour", "x/../../../../escaped"]),
        ("started", "tasks", ["colour", "/../../escaped"]),
        ("started", "tasks", ["colour", "x\0y"]),
        ("started", "tasks", ["colour", 5]),
        ("started", "tasks", ["colour"]),
        ("started", "tasks", None),
        ("stage_trained", "stage", 99),
        ("stage_trained", "stage", 0),
        ("stage_trained", "stage", "2"),
        ("stage_trained", "adapter_sha256", None),
    ],
)
def test_a_ledger_of_strangers_is_not_trusted(
    hub: Any, finished: Path, tmp_path: Path, event: str, key: str, value: Any
) -> None:
    """Its names become folders: none of them may lead out of the one that was asked for."""
    push(parcel(finished))
    lines = [json.loads(line) for line in hub.tree(REPO)["run/ledger.jsonl"].splitlines()]
    for line in lines:
        if line["event"] == event:
            line[key] = value
    hub.tree(REPO)["run/ledger.jsonl"] = "".join(json.dumps(line) + "\n" for line in lines).encode()
    with pytest.raises(HubError, match="its ledger is not one that mllm-cl has written"):
        pull(REPO, tmp_path / "deep/in/pulled")
    assert not (tmp_path / "deep").exists()
    assert not list(tmp_path.glob("**/escaped"))


@pytest.mark.parametrize(
    ("path", "content", "said"),
    [
        ("run/recipe.yaml", b"", "holds no readable run"),
        ("run/recipe.yaml", b"- 1", "holds no readable run"),
        ("run/ledger.jsonl", b"[1]\n2\n", "holds no readable run"),
        ("run/ledger.jsonl", b"[" * 100_000, "holds no readable run"),
        ("run/recipe.yaml", b"[" * 3_000, "holds no readable run"),
        ("adapter_config.json", b"\xff{", "not the one that its ledger names"),
        ("adapter_config.json", b"[1]", "not the one that its ledger names"),
    ],
)
def test_damaged_files_are_refused(
    hub: Any, finished: Path, tmp_path: Path, path: str, content: bytes, said: str
) -> None:
    push(parcel(finished))
    hub.tree(REPO)[path] = content
    with pytest.raises(HubError, match=said):
        pull(REPO, tmp_path / "pulled")
    assert not list(tmp_path.glob("pulled*"))


# runs that push as they go ------------------------------------------------------------------------------------------


class Stop(Exception):
    """The machine is lost."""


def test_a_run_goes_on_from_the_hub_on_a_machine_that_has_nothing(
    hub: Any, finished: Path, recipe_for: Any, tmp_path: Path
) -> None:
    from mllm_cl.training.loop import run_stream

    section = {"push": True, "repo_id": REPO, "private": True}
    method = {"replay": {"size": 8, "share": 0.3}}
    first = recipe_for(tmp_path / "first", method, hub=section)
    pusher = StagePusher(first)

    def then_stop(run: Path, stage: int) -> None:
        assert pusher(run, stage)
        raise Stop

    with pytest.raises(Stop):
        run_stream(first, after_stage=then_stop)
    assert set(hub.repositories[REPO].branches) == {"main", "stage-01"}
    assert hub.repositories[REPO].private

    elsewhere = recipe_for(tmp_path / "elsewhere", method, hub=section)
    resume_from_hub(elsewhere)
    pusher = StagePusher(elsewhere)
    run_stream(elsewhere, after_stage=pusher)
    pusher.check()
    for name in (
        "stages/01-colour/adapter",
        "stages/02-is.red/adapter",
    ):  # the bytes of a run that was never interrupted
        assert folder_sha256(tmp_path / "elsewhere" / name) == folder_sha256(finished / name)
    values = [json.loads((place / "matrix.json").read_text())["values"] for place in (finished, tmp_path / "elsewhere")]
    assert values[0] == values[1]
    events = [json.loads(line) for line in (tmp_path / "elsewhere/ledger.jsonl").read_text().splitlines()]
    assert [event["stage"] for event in events if event["event"] == "stage_trained"] == [1, 2]
    assert [event["stage"] for event in events if event["event"] == "published"] == [1, 2]
    assert set(hub.repositories[REPO].branches) == {"main", "stage-01", "stage-02"}
    assert on_hub(hub) == on_hub(hub, "stage-02")

    with pytest.raises(HubError, match="holds the run of another recipe"):
        find_published(recipe_for(tmp_path / "other", "finetune", hub=section))
    assert not find_published(recipe_for(tmp_path / "new", method, hub={**section, "repo_id": "owner/new"}))


def test_a_stage_that_cannot_be_pushed_does_not_stop_the_run(
    hub: Any, finished: Path, recipe_for: Any, tmp_path: Path
) -> None:
    recipe = recipe_for(tmp_path / "run", hub={"push": True, "repo_id": REPO})
    pusher = StagePusher(recipe)
    fault(hub, "POST", "create", 500, 10**6)
    assert pusher(finished, 1) is None
    hub.faults.clear()
    assert (pusher(finished, 2) or "").startswith(f"{REPO}@")
    with pytest.raises(HubError, match="stage 1 could not be pushed"):
        pusher.check()
    last = on_hub(hub)
    assert StagePusher(recipe)(finished, 1)  # later: to its branch only, main stays at the last stage
    assert on_hub(hub) == last
    assert on_hub(hub, "stage-01") == expected(publish(finished, REPO, 1, recipe.hub, with_state=True))
