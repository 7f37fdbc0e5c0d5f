"""A Hub small enough to read: the HTTP protocol of huggingface_hub's client, in memory, with faults on demand.

It keeps what the real one keeps (repositories, branches, commits, weights by their hash) and answers with its status
codes and headers. What it does not know is 501, so a request nobody thought of fails a test.
"""

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
from urllib.parse import unquote, urlsplit

USER, ORGANISATION, TOKEN = "me", "my-org", "hf_" + "s3cr3tT0k3n" * 3
CARD = "---\nlicense: apache-2.0\nlanguage: en\n---\n# base\n"
"""Of a base model."""
LFS_SUFFIXES = (".safetensors", ".bin", ".png")

Files = dict[str, bytes]
Fault = Callable[[int, str, str], str | None]
"""(number of the request, method, path) -> "drop", "drop answer", a status, "page" (of a proxy), "slow", "hang" (does
what was asked and answers too late), or None."""
HANG = 0.7
"""Seconds."""


@dataclass
class Commit:
    """One state of a branch."""

    files: Files
    message: str
    id: str


@dataclass
class Repo:
    """A repository: branches of commits, oldest first."""

    private: bool = False
    branches: dict[str, list[Commit]] = field(default_factory=dict)

    def add(self, branch: str, files: Files, message: str) -> Commit:
        history = self.branches.setdefault(branch, [])
        seed = json.dumps([len(history), branch, message, sorted(files)]).encode() + b"".join(files.values())
        history.append(Commit(files, message, hashlib.sha1(seed).hexdigest()))
        return history[-1]

    def find(self, revision: str) -> Commit | None:
        """By branch or by commit."""
        if revision in self.branches:
            return self.branches[revision][-1]
        return next((c for history in self.branches.values() for c in history if c.id == revision), None)


class FakeHub:
    """A server on a port of its own, in a thread; `url` goes into HF_ENDPOINT."""

    def __init__(self) -> None:
        self.reset()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # or every answer waits 40 ms for an acknowledgement

            def handle_one(self) -> None:
                Exchange(hub, self).answer()

            do_GET = do_HEAD = do_POST = do_PUT = handle_one

            def log_message(self, format: str, *arguments: Any) -> None:
                """Quiet."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def reset(self) -> None:
        """An empty Hub without faults."""
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.collections: dict[str, list[str]] = {}
        self.requests: list[tuple[str, str]] = []
        self.fault: Fault = lambda number, method, path: None
        self.role = "write"
        self.scopes: list[dict[str, Any]] = []
        self.lock = threading.Lock()

    def seed(self, repo_id: str, folder: Path, card: str = "") -> None:
        """Put a folder on the Hub behind the client's back."""
        files = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
        self.repos[repo_id] = Repo()
        self.repos[repo_id].add("main", files | ({"README.md": card.encode()} if card else {}), "seed")

    def pushed(self) -> Iterator[tuple[str, bytes]]:
        """Every byte that anyone could download, by repository and path."""
        for repo_id, repo in self.repos.items():
            for history in repo.branches.values():
                for commit in history:
                    yield from ((f"{repo_id}/{name}", data) for name, data in commit.files.items())
        yield from self.blobs.items()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class Refusal(Exception):
    """An answer that is no success: status, what stands in the error headers, and more of the body."""

    def __init__(self, status: int, code: str = "", message: str = "", **body: Any) -> None:
        self.status, self.code, self.message, self.body = status, code, message, body


class Exchange:
    """One request and its answer."""

    def __init__(self, hub: FakeHub, handler: BaseHTTPRequestHandler) -> None:
        self.hub, self.handler = hub, handler
        self.path = unquote(urlsplit(handler.path).path)
        self.body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        self.is_known = handler.headers.get("Authorization") == f"Bearer {TOKEN}"

    def answer(self) -> None:
        with self.hub.lock:
            number = len(self.hub.requests)
            self.hub.requests.append((self.handler.command, self.path))
            fault = self.hub.fault(number, self.handler.command, self.path)
            if fault == "drop":
                self.handler.close_connection = True
                return
            if fault == "slow":
                time.sleep(0.05)
            try:
                if fault is not None and fault.isdecimal():
                    raise Refusal(int(fault), message="injected")
                status, headers, data = 200, {}, self.route()
            except Refusal as refusal:
                status, data = refusal.status, {"error": refusal.message} | refusal.body
                headers = {"X-Error-Code": refusal.code, "X-Error-Message": refusal.message}
            if isinstance(data, tuple):
                headers, data = data
            if fault == "page":
                status, headers, data = 502, {}, b"<html>Bad gateway</html>"
            if fault == "drop answer":
                self.handler.close_connection = True
                return
        if fault == "hang":
            time.sleep(HANG)
        try:
            self.send(status, headers, data if isinstance(data, bytes) else json.dumps(data).encode())
        except OSError:  # nobody waits any more
            self.handler.close_connection = True

    def send(self, status: int, headers: dict[str, str], data: bytes) -> None:
        self.handler.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | headers).items():
            if value:
                self.handler.send_header(name, value)
        self.handler.end_headers()
        if self.handler.command != "HEAD":
            self.handler.wfile.write(data)

    def route(self) -> Any:
        name = "[^/]+/[^/]+"
        routes: list[tuple[str, str, Callable[..., Any]]] = [
            ("GET", "/api/whoami-v2", self.whoami),
            ("POST", "/api/repos/create", self.create),
            ("POST", "/api/validate-yaml", self.validate),
            ("GET", f"/api/models/({name})", self.info),
            ("GET", f"/api/models/({name})/revision/(.+)", self.info),
            ("GET", f"/api/models/({name})/tree/([^/]+)", self.tree),
            ("POST", f"/api/models/({name})/branch/(.+)", self.branch),
            ("POST", f"/api/models/({name})/preupload/(.+)", self.preupload),
            ("POST", f"/api/models/({name})/commit/(.+)", self.commit),
            ("POST", f"/({name})\\.git/info/lfs/objects/batch", self.batch),
            ("PUT", "/lfs/([0-9a-f]{64})", self.put),
            ("POST", "/lfs/([0-9a-f]{64})/verify", self.verify),
            ("POST", f"/api/collections/({name})/items", self.collect),
            ("GET", f"/({name})/resolve/([^/]+)/(.+)", self.resolve),
            ("HEAD", f"/({name})/resolve/([^/]+)/(.+)", self.resolve),
        ]
        for method, pattern, action in routes:
            found = re.fullmatch(pattern, self.path)
            if found and method == self.handler.command:
                return action(*found.groups())
        raise Refusal(501, message=f"{self.handler.command} {self.path}")

    # --- who and where ---

    def must_be_known(self) -> None:
        if not self.is_known:
            raise Refusal(401, message="Invalid username or password.")

    def repo(self, repo_id: str) -> Repo:
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.private and not self.is_known):
            raise Refusal(404 if self.is_known else 401, "RepoNotFound", "Repository not found")
        return repo

    def state(self, repo_id: str, revision: str) -> Commit:
        commit = self.repo(repo_id).find(revision)
        if commit is None:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def whoami(self) -> Any:
        self.must_be_known()
        token = {"role": self.hub.role, "fineGrained": {"scoped": self.hub.scopes}}
        return {"name": USER, "orgs": [{"name": ORGANISATION}], "auth": {"accessToken": token}}

    # --- writing ---

    def create(self) -> Any:
        self.must_be_known()
        asked = json.loads(self.body)
        repo_id = f"{asked['organization'] or USER}/{asked['name']}"
        if repo_id.partition("/")[0] not in (USER, ORGANISATION):
            raise Refusal(403, message="You don't have the rights to create a model under this namespace")
        if repo_id in self.hub.repos:
            raise Refusal(409, message="You already created this model repo", url=f"{self.hub.url}/{repo_id}")
        repo = self.hub.repos[repo_id] = Repo(private=asked.get("visibility") == "private")
        repo.add("main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
        return {"url": f"{self.hub.url}/{repo_id}"}

    def branch(self, repo_id: str, branch: str) -> Any:
        self.must_be_known()
        repo = self.repo(repo_id)
        if branch in repo.branches:
            raise Refusal(409, message="Reference already exists")
        repo.branches[branch] = list(repo.branches["main"])
        return {}

    def validate(self) -> Any:
        content = json.loads(self.body)["content"]
        if not re.match(r"---\n.*?^license: [a-z0-9.-]+$.*?\n---\n", content, re.S | re.M):
            raise Refusal(400, message="metadata")
        return {"errors": [], "warnings": []}

    def preupload(self, repo_id: str, revision: str) -> Any:
        self.must_be_known()
        files = self.state(repo_id, revision).files
        return {
            "files": [
                {
                    "path": asked["path"],
                    "uploadMode": "lfs" if asked["path"].endswith(LFS_SUFFIXES) else "regular",
                    "shouldIgnore": False,
                    "oid": blob_id(files[asked["path"]]) if asked["path"] in files else None,
                }
                for asked in json.loads(self.body)["files"]
            ]
        }

    def batch(self, repo_id: str) -> Any:
        self.must_be_known()
        objects = json.loads(self.body)["objects"]
        for asked in objects:
            if asked["oid"] not in self.hub.blobs:
                href = f"{self.hub.url}/lfs/{asked['oid']}"
                asked["actions"] = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
        return {"transfer": "basic", "objects": objects}

    def put(self, oid: str) -> Any:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400, message="bytes and hash differ")
        self.hub.blobs[oid] = self.body
        return {}

    def verify(self, oid: str) -> Any:
        if oid not in self.hub.blobs:
            raise Refusal(404, message="not uploaded")
        return {}

    def commit(self, repo_id: str, branch: str) -> Any:
        self.must_be_known()
        lines = [json.loads(line) for line in self.body.splitlines()]
        header, last = lines[0]["value"], self.state(repo_id, branch)
        if header.get("parentCommit") not in (None, last.id):
            raise Refusal(412, message="A commit has happened since. Please refresh and try again.")
        files = dict(last.files)
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            else:
                raise Refusal(501, message=line["key"])
        commit = self.repo(repo_id).add(branch, files, header["summary"])
        return {"commitUrl": f"{self.hub.url}/{repo_id}/commit/{commit.id}", "commitOid": commit.id, "success": True}

    def collect(self, slug: str) -> Any:
        self.must_be_known()
        if slug not in self.hub.collections:
            raise Refusal(404, message="Collection not found")
        self.hub.collections[slug].append(json.loads(self.body)["item"]["id"])
        return {"slug": slug, "title": "t", "owner": {}, "items": [], "position": 0, "private": False, "theme": ""} | {
            "lastUpdated": "2026-01-01T00:00:00.000Z",
            "upvotes": 0,
        }

    # --- reading ---

    def info(self, repo_id: str, revision: str = "main") -> Any:
        commit = self.state(repo_id, revision)
        siblings = [{"rfilename": name} for name in commit.files]
        found = {"id": repo_id, "sha": commit.id, "private": self.repo(repo_id).private, "siblings": siblings}
        card = commit.files.get("README.md", b"").decode()
        data = dict(re.findall(r"^(license|language): (\S+)$", card.partition("\n---\n")[0], re.M))
        return found | ({"cardData": data} if data else {})

    def tree(self, repo_id: str, revision: str) -> Any:
        entries = []
        for name, data in self.state(repo_id, revision).files.items():
            entry = {"type": "file", "path": name, "size": len(data), "oid": blob_id(data)}
            if name.endswith(LFS_SUFFIXES):
                entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
            entries.append(entry)
        return entries

    def resolve(self, repo_id: str, revision: str, name: str) -> Any:
        commit = self.state(repo_id, revision)
        if name not in commit.files:
            raise Refusal(404, "EntryNotFound", "Entry not found")
        data = commit.files[name]
        return {"ETag": f'"{blob_id(data)}"', "X-Repo-Commit": commit.id, "Accept-Ranges": "none"}, data


def blob_id(data: bytes) -> str:
    """As git names a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
