"""A Hub on this machine: the endpoints that huggingface_hub calls, over repositories in memory."""

import base64
import hashlib
import json
import os
import re
import socket
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlparse

from tests.processes import run_script

KINDS = {"models": "", "datasets": "datasets/", "spaces": "spaces/"}
LARGE = (".safetensors", ".bin", ".arrow", ".png", ".jpg")


@dataclass
class Repository:
    """Branches and commits; a commit is a dict of files."""

    branches: dict[str, str] = field(default_factory=lambda: {"main": "0" * 40})
    commits: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"0" * 40: {}})

    def commit(self, branch: str, files: dict[str, bytes | None]) -> str:
        """Adds or (by `None`) deletes files; returns the commit's sha."""
        after = {**self.commits[self.branches[branch]], **files}
        after = {path: content for path, content in after.items() if content is not None}
        digest = hashlib.sha1(self.branches[branch].encode())
        for path in sorted(after):
            digest.update(path.encode() + hashlib.sha256(after[path]).digest())
        sha = digest.hexdigest()
        self.commits[sha], self.branches[branch] = after, sha
        return sha

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        sha = self.branches.get(revision, revision)
        return (sha, self.commits[sha]) if sha in self.commits else None


class LoopbackHub:
    """
    A server on 127.0.0.1.

    Attributes:
        repositories: `("models", "org/name")` -> [`Repository`].
        blobs: sha256 -> content of uploaded large files.
        break_larger_than: uploads of more bytes than this lose their connection halfway; `None`: no upload does.
        requests: how often each kind of request came: `("PUT", "blob")`, `("GET", "resolve org/name")`, …
        down: answer nothing, as if the Hub could not be reached.
    """

    def __init__(self):
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.break_larger_than: int | None = None
        self.requests: Counter[tuple[str, str]] = Counter()
        self.down = False
        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def upload(self, repo_id: str, folder: Path, kind: str = "models", branch: str = "main") -> str:
        """Puts a folder's files into a repository without a request; returns the commit's sha."""
        files = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
        return self.repositories.setdefault((kind, repo_id), Repository()).commit(branch, files)

    def files(self, repo_id: str, revision: str = "main", kind: str = "models") -> dict[str, bytes]:
        return self.repositories[(kind, repo_id)].at(revision)[1]

    def environment(self, home: Path, **more: str) -> dict[str, str]:
        """Environment of a process that uses this Hub, with its own cache in `home`."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and k != "PYTHONPATH"}
        return kept | {
            "HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_TOKEN": "hf_loopback", "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
            "DISABLE_SAFETENSORS_CONVERSION": "1", "TOKENIZERS_PARALLELISM": "false", **more,
        }  # fmt: skip

    def run(self, script: str, *arguments: object, home: Path, cwd: Path, **more: str) -> subprocess.CompletedProcess:
        """Runs Python source in its own process, outside this checkout; its output is text."""
        return run_script(script, *arguments, cwd=cwd, environment=self.environment(home, **more))


@contextmanager
def loopback_hub() -> Iterator[LoopbackHub]:
    hub = LoopbackHub()
    try:
        yield hub
    finally:
        hub.server.shutdown()
        hub.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        self.answer("GET")

    def do_HEAD(self):
        self.answer("HEAD")

    def do_POST(self):
        self.answer("POST")

    def do_PUT(self):
        self.answer("PUT")

    def answer(self, method: str) -> None:
        hub, url = self.hub, urlparse(self.path)
        path = unquote(url.path)
        if hub.down:
            self.connection.close()
            return
        length = int(self.headers.get("Content-Length") or 0)
        if method == "PUT" and path.startswith("/blob/"):
            self.blob(path.removeprefix("/blob/"), length)
            return
        body = self.rfile.read(length)
        with hub.lock:
            for verb, pattern, action in ROUTES:
                match = re.fullmatch(pattern, path)
                if match and method in verb:
                    action(self, body, parse_qs(url.query), **match.groupdict())
                    return
        self.json({"error": f"no such endpoint: {method} {path}"}, 404)

    def count(self, verb: str, what: str) -> None:
        self.hub.requests[(verb, what)] += 1

    def json(self, content, status: int = 200, **headers: str) -> None:
        self.send(json.dumps(content).encode(), status, **{"Content-Type": "application/json"} | headers)

    def send(self, content: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", headers.get("length", str(len(content))))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def missing(self, code: str) -> None:
        self.json({"error": code}, 404, X_Error_Code=code, X_Error_Message=code)

    def repository(self, kind: str, name: str) -> Repository | None:
        repository = self.hub.repositories.get((kind, name))
        if repository is None:
            self.missing("RepoNotFound")
        return repository

    # Uploading

    def create(self, body, query):
        given = json.loads(body)
        kind = f"{given.get('type') or 'model'}s"
        name = f"{given['organization']}/{given['name']}" if given.get("organization") else given["name"]
        url = f"{self.hub.url}/{KINDS[kind]}{name}"
        if (kind, name) in self.hub.repositories:
            self.json({"error": "exists", "url": url}, 409)
            return
        self.hub.repositories[(kind, name)] = Repository()
        self.json({"url": url, "id": name, "name": name})

    def branch(self, body, query, kind, name, branch):
        repository = self.repository(kind, name)
        if repository is not None:
            taken = branch in repository.branches
            repository.branches.setdefault(branch, repository.branches["main"])
            self.json({"error": "exists"} if taken else {}, 409 if taken else 200)

    def preupload(self, body, query, kind, name, revision):
        files = [
            {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(LARGE) else "regular", "shouldIgnore": False}
            for f in json.loads(body)["files"]
        ]
        self.json({"files": files})

    def batch(self, body, query, name):
        objects = []
        for wanted in json.loads(body)["objects"]:
            action = {"href": f"{self.hub.url}/blob/{wanted['oid']}", "header": {}}
            known = wanted["oid"] in self.hub.blobs
            objects.append(wanted | ({} if known else {"actions": {"upload": action}}))
        self.json({"transfer": "basic", "objects": objects})

    def blob(self, oid: str, length: int) -> None:
        with self.hub.lock:
            self.count("PUT", "blob")
            broken = self.hub.break_larger_than is not None and length > self.hub.break_larger_than
        if broken:
            self.rfile.read(length // 2)
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        content = self.rfile.read(length)
        assert hashlib.sha256(content).hexdigest() == oid
        with self.hub.lock:
            self.hub.blobs[oid] = content
        self.send(b"")

    def commit(self, body, query, kind, name, revision):
        repository, files = self.repository(kind, name), {}
        if repository is None:
            return
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif entry["key"] == "deletedFile":
                files[value["path"]] = None
        sha = repository.commit(revision, files)
        self.count("POST", "commit")
        self.json({"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{KINDS[kind]}{name}/commit/{sha}"})

    # Downloading

    def info(self, body, query, kind, name, revision="main"):
        repository = self.repository(kind, name)
        if repository is None:
            return
        commit = repository.at(revision)
        if commit is None:
            self.missing("RevisionNotFound")
            return
        sha, files = commit
        siblings = [{"rfilename": path} for path in sorted(files)]
        self.json({"id": name, "modelId": name, "sha": sha, "siblings": siblings, "private": False, "tags": [],
                   "gated": False, "disabled": False, "downloads": 0, "likes": 0})  # fmt: skip

    def tree(self, body, query, kind, name, revision, folder=None):
        repository = self.repository(kind, name)
        commit = None if repository is None else repository.at(revision)
        if commit is None:
            if repository is not None:
                self.missing("RevisionNotFound")
            return
        inside = {p: c for p, c in commit[1].items() if not folder or p.startswith(f"{folder}/")}
        if folder and not inside:
            self.missing("EntryNotFound")
            return
        recursive = query.get("recursive", ["false"])[0].lower() == "true"
        below = len(folder) + 1 if folder else 0
        entries = {p: c for p, c in inside.items() if recursive or "/" not in p[below:]}
        self.json([
            {"type": "file", "path": p, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
            | ({"lfs": {"oid": hashlib.sha256(c).hexdigest(), "size": len(c), "pointerSize": 100}} if p.endswith(LARGE) else {})
            for p, c in entries.items()
        ])  # fmt: skip

    def resolve(self, body, query, name, revision, path, kind="models"):
        kind = kind or "models"
        repository = self.repository(kind, name)
        if repository is None:
            return
        commit = repository.at(revision)
        if commit is None:
            self.missing("RevisionNotFound")
        elif path not in commit[1]:
            self.json({"error": path}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit[0])
        else:
            content = commit[1][path]
            if self.command == "GET":
                self.count("GET", f"resolve {name}")
            start = int((re.match(r"bytes=(\d+)-", self.headers.get("Range") or "") or [0, 0])[1])
            self.send(
                content[start:], 206 if start else 200, ETag=f'"{hashlib.sha256(content).hexdigest()}"',
                X_Repo_Commit=commit[0], X_Linked_Size=str(len(content)),
            )  # fmt: skip

    def who(self, body, query):
        self.json({"name": "org", "type": "user", "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def yaml(self, body, query):
        self.json({"errors": [], "warnings": []})


_KIND = "(?P<kind>models|datasets|spaces)"
_NAME = "(?P<name>[^/]+/[^/]+)"
_REV = "(?P<revision>[^/]+)"
ROUTES = [
    (("POST",), "/api/repos/create", _Handler.create),
    (("POST",), "/api/validate-yaml", _Handler.yaml),
    (("GET",), "/api/whoami-v2", _Handler.who),
    (("POST",), f"/api/{_KIND}/{_NAME}/branch/(?P<branch>.+)", _Handler.branch),
    (("POST",), f"/api/{_KIND}/{_NAME}/preupload/{_REV}", _Handler.preupload),
    (("POST",), f"/(?:datasets/|spaces/)?{_NAME}\\.git/info/lfs/objects/batch", _Handler.batch),
    (("POST",), f"/api/{_KIND}/{_NAME}/commit/{_REV}", _Handler.commit),
    (("GET",), f"/api/{_KIND}/{_NAME}/tree/{_REV}(?:/(?P<folder>.+))?", _Handler.tree),
    (("GET",), f"/api/{_KIND}/{_NAME}/revision/{_REV}", _Handler.info),
    (("GET",), f"/api/{_KIND}/{_NAME}", _Handler.info),
    (("GET", "HEAD"), f"/(?:(?P<kind>datasets|spaces)/)?{_NAME}/resolve/{_REV}/(?P<path>.+)", _Handler.resolve),
]
