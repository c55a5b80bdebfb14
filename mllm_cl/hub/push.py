"""Pushes a stage as one commit: what the repository shows is the stage before, or the whole new one."""

from __future__ import annotations

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

from mllm_cl.errors import HubError
from mllm_cl.hub.client import make_api, patiently, require_token
from mllm_cl.hub.layout import OURS, Publication

MAIN = "main"


def push(publication: Publication, *, branch: str = MAIN, private: bool = False, api: HfApi | None = None) -> str:
    """Pushes one stage and returns the commit.

    The large files go up first; card, adapter and results then appear together, in one commit that also removes what
    an earlier stage left under the paths of `layout.OURS`. Pushing again after a failure uploads only what is missing.

    Args:
        branch: created when it is missing.
        private: make the repository private; one that exists and is public is refused.

    Raises:
        HubError: not logged in, refused, or unreachable for longer than the retries last.
    """
    require_token()
    api = api or make_api()
    repo_id = publication.repo_id
    _prepare_repository(api, repo_id, private)
    if branch != MAIN:
        patiently(f"{repo_id}: creating {branch}", lambda: api.create_branch(repo_id, branch=branch, exist_ok=True))
    files = {file.path: file.content for file in publication.files}

    def commit() -> str:
        remote = api.list_repo_files(repo_id, revision=branch)
        stale = [path for path in remote if path.startswith(OURS) and path not in files]
        added = [CommitOperationAdd(path_in_repo=path, path_or_fileobj=file) for path, file in files.items()]
        deleted = [CommitOperationDelete(path_in_repo=path) for path in stale]
        message = f"{publication.stage_name}: adapter, card and results"
        return api.create_commit(repo_id, [*added, *deleted], commit_message=message, revision=branch).oid

    return patiently(f"{repo_id}: pushing {publication.stage_name}", commit)


def _prepare_repository(api: HfApi, repo_id: str, private: bool) -> None:
    patiently(
        f"{repo_id}: creating the repository",
        lambda: api.create_repo(repo_id, private=private or None, exist_ok=True),
    )
    if private and not patiently(f"{repo_id}: looking at it", lambda: api.repo_info(repo_id)).private:
        raise HubError(
            f"{repo_id}: exists and is public.",
            expected="a private repository, as asked for",
            fix="make it private in its settings, or choose another name. Nothing was uploaded.",
        )
