"""Two small finished runs, and a server on loopback that speaks enough of the Hub's protocol for its own client."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import yaml
from PIL import Image

TOKEN = "hf_" + "loopbacktokenforthetests0123456789"[:34]
LARGE = (".safetensors", ".png")


@dataclass
class Fault:
    """What goes wrong with the next `count` requests of a kind."""

    method: str
    path: str  # regular expression
    kind: (
        int | str
    )  # a status, `drop` (half of the body is read, then the connection ends), `lost` (done, not said), `silent`
    count: int = 1


@dataclass
class Repository:
    private: bool
    branches: dict[str, list[dict[str, bytes]]] = field(default_factory=dict)  # branch -> commits, each path -> content

    def tree(self, revision: str) -> dict[str, bytes] | None:
        if revision in self.branches:
            return self.branches[revision][-1]
        every = [commit for commits in self.branches.values() for commit in commits]
        return next((commit for commit in every if commit_id(commit) == revision), None)


def commit_id(tree: dict[str, bytes]) -> str:
    parts = sorted((path, hashlib.sha1(content).hexdigest()) for path, content in tree.items())
    return hashlib.sha1(json.dumps(parts).encode()).hexdigest()


def blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class HubServer(ThreadingHTTPServer):
    """The Hub's state: repositories with branches of whole trees, large files by hash, and a log of requests."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.log: list[str] = []

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is part of the tests."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def tree(self, repo_id: str, branch: str = "main") -> dict[str, bytes]:
        tree = self.repositories[repo_id].tree(branch)
        assert tree is not None
        return tree

    def fault_for(self, method: str, path: str) -> Fault | None:
        for fault in self.faults:
            if fault.count and fault.method == method and re.search(fault.path, path):
                fault.count -= 1
                return fault
        return None


class Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.serve()

    do_HEAD = do_POST = do_PUT = do_GET

    def serve(self) -> None:
        parts = urlsplit(self.path)
        path, self.query = unquote(parts.path), parse_qs(parts.query)
        self.server.log.append(f"{self.command} {path}")
        fault = self.server.fault_for(self.command, path)
        length = int(self.headers.get("Content-Length") or 0)
        if fault and fault.kind == "drop":
            self.rfile.read(length // 2)
            return self.hang_up()
        body = self.rfile.read(length)
        if fault and fault.kind == "silent":
            time.sleep(1.0)
            return self.hang_up()
        if fault and isinstance(fault.kind, int):
            return self.answer(
                fault.kind, {"error": "for the moment"}, {"Retry-After": "77"} if fault.kind == 429 else None
            )
        if self.command in ("POST", "PUT") and not path.startswith("/large/") and not self.allowed():
            return self.answer(401, {"error": "no token"})
        status, content, headers = self.route(path, body)
        if fault and fault.kind == "lost":
            return self.hang_up()
        return self.answer(status, content, headers)

    def hang_up(self) -> None:
        self.close_connection = True
        self.connection.close()

    def allowed(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def answer(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    # what the Hub does -----------------------------------------------------------------------------------------------

    def route(self, path: str, body: bytes) -> tuple[int, Any, dict[str, str] | None]:
        hub = self.server
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path == "/api/validate-yaml":
            return self.validate(json.loads(body)["content"])
        if found := re.fullmatch(r"/large/(\w+)", path):
            assert hashlib.sha256(body).hexdigest() == found[1]
            hub.large[found[1]] = body
            return 200, {}, None
        if found := re.fullmatch(r"/(.+/.+)\.git/info/lfs/objects/batch", path):
            return 200, {"objects": [self.action(item) for item in json.loads(body)["objects"]]}, None
        if found := re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)", path):
            return self.resolve(*found.groups())
        found = re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)(?:/(\w+)(?:/([^/]+))?)?", path)
        assert found, path
        repo_id, verb, revision = found.groups()
        repository = hub.repositories.get(repo_id)
        if repository is None or (repository.private and not self.allowed()):
            return 404, {"error": "no such repository"}, {"X-Error-Code": "RepoNotFound"}
        if verb == "branch":
            if revision in repository.branches:
                return 409, {"error": "exists"}, None
            repository.branches[revision] = [repository.branches["main"][-1]]
            return 200, {}, None
        if verb == "refs":
            names = [
                {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commit_id(commits[-1])}
                for name, commits in repository.branches.items()
            ]
            return 200, {"branches": names, "converts": [], "tags": []}, None
        tree = repository.tree(revision or "main")
        if tree is None:
            return 404, {"error": "no such revision"}, {"X-Error-Code": "RevisionNotFound"}
        if verb in (None, "revision"):
            return 200, {"id": repo_id, "sha": commit_id(tree), "private": repository.private, "siblings": []}, None
        if verb == "tree":
            return 200, [self.entry(name, content) for name, content in tree.items()], None
        if verb == "preupload":
            files = [self.mode(file["path"], tree) for file in json.loads(body)["files"]]
            return 200, {"files": files}, None
        assert verb == "commit", path
        return self.commit(repo_id, repository, revision, [json.loads(line) for line in body.splitlines()])

    def create(self, wanted: dict[str, Any]) -> tuple[int, Any, None]:
        repo_id = f"{wanted['organization']}/{wanted['name']}"
        known = repo_id in self.server.repositories
        if not known:
            first = {".gitattributes": b"*.safetensors filter=lfs\n"}
            self.server.repositories[repo_id] = Repository(wanted.get("visibility") == "private", {"main": [first]})
        return (409 if known else 200), {"url": f"{self.server.url}/{repo_id}", "name": repo_id}, None

    def validate(self, text: str) -> tuple[int, Any, None]:
        head = yaml.safe_load(text.split("---")[1])
        good = isinstance(head.get("tags"), list) and head.get("pipeline_tag") == "image-text-to-text"
        return (200, {}, None) if good else (400, {"errors": [{"message": "bad metadata"}]}, None)

    def action(self, item: dict[str, Any]) -> dict[str, Any]:
        if item["oid"] in self.server.large:
            return item
        return item | {"actions": {"upload": {"href": f"{self.server.url}/large/{item['oid']}?signature=SECRET"}}}

    def mode(self, path: str, tree: dict[str, bytes]) -> dict[str, Any]:
        large = path.endswith(LARGE)
        found = {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
        if path in tree:
            found["oid"] = hashlib.sha256(tree[path]).hexdigest() if large else blob_id(tree[path])
        return found

    def entry(self, path: str, content: bytes) -> dict[str, Any]:
        found: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": blob_id(content)}
        if path.endswith(LARGE):
            sha256 = hashlib.sha256(content).hexdigest()
            found["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 130}
        return found

    def commit(
        self, repo_id: str, repository: Repository, branch: str, lines: list[dict[str, Any]]
    ) -> tuple[int, Any, None]:
        tree = dict(repository.branches[branch][-1])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                tree[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                tree[value["path"]] = self.server.large[value["oid"]]
            elif line["key"] == "deletedFile":
                del tree[value["path"]]
        repository.branches[branch].append(tree)
        oid = commit_id(tree)
        return 200, {"commitUrl": f"{self.server.url}/{repo_id}/commit/{oid}", "commitOid": oid}, None

    def resolve(self, repo_id: str, revision: str, path: str) -> tuple[int, Any, dict[str, str] | None]:
        repository = self.server.repositories[repo_id]
        tree = repository.tree(revision)
        if tree is None or path not in tree:
            return 404, {"error": "no such file"}, {"X-Error-Code": "EntryNotFound"}
        content = tree[path]
        large = path.endswith(LARGE)
        etag = hashlib.sha256(content).hexdigest() if large else blob_id(content)
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": commit_id(tree)}
        start = re.match(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if start:
            part = content[int(start[1]) :]
            headers["Content-Range"] = f"bytes {start[1]}-{len(content) - 1}/{len(content)}"
            return 206, part, headers
        return 200, content, headers


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """An empty Hub on loopback that the client of this process talks to, with a token, without waiting."""
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    from mllm_cl.hub import client

    server = HubServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    for name, value in {
        "ENDPOINT": server.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_XET": True,  # the server speaks LFS, as self-hosted ones do
        "HF_HUB_OFFLINE": False,
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(client, "SILENCE", 0.4)
    waited = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: waited(min(seconds, 1.0 if seconds == 1.0 else 0.01)))
    close_session()
    yield server
    close_session()
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="session")
def stream_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks of eight rows about plain pictures, one of them with a dot in its name."""
    folder = tmp_path_factory.mktemp("stream")
    tasks = []
    for task, question in (("colour", "What is this?"), ("is.red", "Is this red?")):
        rows = []
        for number in range(8):
            red = number % 2 == 0
            Image.new("RGB", (32, 32), (220 - number, 30, 30) if red else (30, 30, 220 - number)).save(
                folder / f"{number}.png"
            )
            answer = ("red" if red else "blue") if task == "colour" else ("yes" if red else "no")
            turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
            rows.append({"id": f"{task}-{number}", "image": f"{number}.png", "conversations": turns})
        (folder / f"{task}.json").write_text(json.dumps(rows))
        files = {"train": f"{task}.json", "test": f"{task}.json"}
        tasks.append({"name": task, "metric": "exact_match", "image_folder": ".", **files})
    path = folder / "stream.yaml"
    path.write_text(yaml.safe_dump({"name": "tiny", "tasks": tasks}))
    return path


RecipeFor = Callable[..., Any]


@pytest.fixture(scope="session")
def recipe_for(fixture_folder: Path, stream_file: Path) -> RecipeFor:
    """Returns a function that makes a recipe over the small stream."""
    from mllm_cl.recipe import load_recipe

    def make(output_dir: Path, *methods: Any, **sections: Any) -> Any:
        content = {
            "name": "colours",
            "output_dir": str(output_dir),
            "model": {"name_or_path": str(fixture_folder), "lora": {"r": 2, "lora_alpha": 4}},
            "stream": {"path": str(stream_file)},
            "methods": list(methods),
            "training": {
                "learning_rate": 5e-2,
                "num_train_epochs": 4,
                "per_device_train_batch_size": 4,
                "use_cpu": True,
            },
            "evaluation": {"max_new_tokens": 2, "batch_size": 4, "stage_zero": False, "drift": 0},
        }
        return load_recipe(content | sections)

    return make


@pytest.fixture(scope="session")
def finished(recipe_for: RecipeFor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with one adapter."""
    from mllm_cl.training.loop import run_stream

    place = tmp_path_factory.mktemp("one") / "run"
    return run_stream(recipe_for(place, {"replay": {"size": 8, "share": 0.3}})).root


@pytest.fixture(scope="session")
def gated(recipe_for: RecipeFor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with one adapter of experts."""
    from mllm_cl.training.loop import run_stream

    place = tmp_path_factory.mktemp("gated") / "run"
    return run_stream(recipe_for(place, {"branchlora": {"experts": 2, "samples": 6}})).root


@pytest.fixture(scope="session")
def routed(recipe_for: RecipeFor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with one adapter per task."""
    from mllm_cl.training.loop import run_stream

    place = tmp_path_factory.mktemp("routed") / "run"
    return run_stream(recipe_for(place, {"task_adapters": {"samples": 6}})).root
