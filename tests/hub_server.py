"""A small Hub on 127.0.0.1, in memory: enough of the protocol for `huggingface_hub`, `datasets`, transformers and PEFT.

    with HubServer() as hub:
        env = {**os.environ, **hub.env}         # HF_ENDPOINT, HF_TOKEN, HF_HUB_DISABLE_XET
        ...
        hub.fail(2)                             # the next 2 writes are answered with status 500
        hub.hang_up_on = "commit"               # the connection breaks in the middle of that request

Repositories hold a list of commits; a commit maps paths to bytes and is replaced as a whole, so that a failed upload leaves
nothing behind. Large files (`LFS`) are put into a store first, as on the real Hub. LFS downloads answer with a redirect to
another host name (`localhost`), because the client follows redirects to the same host and then misses X-Repo-Commit.
Only the token of `hub.env` may write; private repositories need it to be read.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_dummy"
USER = "me"
LARGE = (".safetensors", ".parquet", ".bin", ".arrow", ".npz")


@dataclass
class Commit:
    """One state of a branch."""

    sha: str
    title: str
    files: dict[str, bytes]
    large: frozenset[str]


@dataclass
class Repo:
    """Branches of commits, oldest first."""

    kind: str
    name: str
    private: bool = False
    branches: dict[str, list[Commit]] = field(default_factory=dict)
    pull_requests: int = 0

    def __post_init__(self) -> None:
        self.branches["main"] = [Commit(_sha(f"{self.kind}{self.name}".encode()), "initial commit", {}, frozenset())]

    def at(self, revision: str) -> Commit | None:
        """Head of a branch, or the commit with that id."""
        if revision in self.branches:
            return self.branches[revision][-1]
        return next((c for commits in self.branches.values() for c in commits if c.sha == revision), None)

    @property
    def head(self) -> Commit:
        """Newest commit of main."""
        return self.branches["main"][-1]


def _sha(data: bytes) -> str:
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()


class HubServer:
    """The server; a context manager. `requests` lists what was asked, `unknown` what had no answer."""

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.store: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.unknown: list[str] = []
        self.failures = 0
        self.hang_up_on: str | None = None
        self.lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"

    @property
    def env(self) -> dict[str, str]:
        """Environment of a process that shall talk to this server."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_DATASETS_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Take the server down; open connections break."""
        self._server.shutdown()
        self._server.server_close()

    def fail(self, count: int) -> None:
        """Answer the next `count` writes with status 500."""
        self.failures = count

    def files(self, name: str, kind: str = "model") -> dict[str, bytes]:
        """Files on main."""
        return self.repos[kind, name].head.files


class _Error(Exception):
    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


_KIND = r"/api/(?P<kind>models|datasets|spaces)/(?P<name>[^/]+/[^/]+)"
_REST = r"(?:/(?P<path>.*))?"
_FILES = r"/(?:(?P<kind>datasets|spaces)/)?(?P<name>[^/]+/[^/]+)"


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    ROUTES = (
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/validate-yaml", "validate"),
        ("POST", r"/api/repos/create", "create"),
        ("DELETE", r"/api/repos/delete", "delete"),
        ("GET", _KIND + r"/refs", "refs"),
        ("GET", _KIND + r"/commits/(?P<revision>[^/]+)", "commits"),
        ("GET", _KIND + r"/tree/(?P<revision>[^/]+)" + _REST, "tree"),
        ("POST", _KIND + r"/paths-info/(?P<revision>[^/]+)", "paths"),
        ("POST", _KIND + r"/preupload/(?P<revision>[^/]+)", "preupload"),
        ("POST", _KIND + r"/commit/(?P<revision>[^/]+)", "commit"),
        ("POST", _KIND + r"/branch/(?P<revision>[^/]+)", "branch"),
        ("GET", _KIND + r"(?:/revision/(?P<revision>[^/]+))?", "info"),
        ("POST", _FILES + r"\.git/info/lfs/objects/batch", "lfs"),
        ("PUT", r"/_store/(?P<oid>[0-9a-f]{64})", "put"),
        ("POST", r"/_verify", "verify"),
        ("GET", r"/_store/(?P<oid>[0-9a-f]{64})", "stored"),
        ("GET", _FILES + r"/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    )

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def log_message(self, *arguments: Any) -> None:
        """Quiet."""

    def _answer(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        method = "GET" if self.command == "HEAD" else self.command
        self.hub.requests.append(f"{self.command} {url.path}")
        try:
            if method != "GET" and self.hub.failures > 0:
                self.hub.failures -= 1
                self._body()
                raise _Error(500, "ServerError", "made to fail")
            for wanted, pattern, name in self.ROUTES:
                found = re.fullmatch(pattern, url.path) if wanted == method else None
                if found:
                    if name == self.hub.hang_up_on:
                        self.rfile.read(min(64, int(self.headers.get("Content-Length") or 0)))
                        self.connection.close()
                        return
                    values = {k: unquote(v) if v else v for k, v in found.groupdict().items()}
                    with self.hub.lock:
                        getattr(self, name)(**values)
                    return
            self.hub.unknown.append(f"{self.command} {url.path}")
            self._body()
            raise _Error(404, "EntryNotFound", "no such route")
        except _Error as error:
            self._json({"error": str(error)}, error.status, {"X-Error-Code": error.code, "X-Error-Message": str(error)})

    # -- plumbing

    def _body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _member(self) -> bool:
        given = self.headers.get("Authorization")
        if given not in (None, f"Bearer {TOKEN}"):
            raise _Error(401, "InvalidToken", "Invalid credentials in Authorization header")
        return given is not None

    def _writer(self) -> None:
        if not self._member():
            self._body()
            raise _Error(401, "InvalidToken", "a token is needed")

    def _repo(self, kind: str | None, name: str) -> Repo:
        repo = self.hub.repos.get(((kind or "models").removesuffix("s"), name))
        if repo is None or (repo.private and not self._member()):
            self._body()
            raise _Error(404, "RepoNotFound", "Repository not found")
        return repo

    def _at(self, repo: Repo, revision: str | None) -> Commit:
        commit = repo.at(revision or "main")
        if commit is None:
            self._body()
            raise _Error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    # -- accounts and repositories

    def whoami(self) -> None:
        self._writer()
        self._json({"type": "user", "name": USER, "fullname": USER, "orgs": [], "auth": {"type": "access_token"}})

    def validate(self) -> None:
        self._body()
        self._json({"errors": [], "warnings": []})

    def create(self) -> None:
        self._writer()
        wanted = json.loads(self._body())
        kind, name = wanted.get("type") or "model", f"{wanted.get('organization') or USER}/{wanted['name']}"
        known = (kind, name) in self.hub.repos
        if not known:
            self.hub.repos[kind, name] = Repo(
                kind, name, wanted.get("private") or wanted.get("visibility") == "private"
            )
        prefix = "" if kind == "model" else f"{kind}s/"
        answer = {"url": f"{self.hub.endpoint}/{prefix}{name}", "name": name, "id": name}
        self._json({**answer, **({"error": "You already created this repo"} if known else {})}, 409 if known else 200)

    def delete(self) -> None:
        self._writer()
        wanted = json.loads(self._body())
        name = f"{wanted.get('organization') or USER}/{wanted['name']}"
        if self.hub.repos.pop((wanted.get("type") or "model", name), None) is None:
            raise _Error(404, "RepoNotFound", "Repository not found")
        self._json({})

    def info(self, kind: str, name: str, revision: str | None) -> None:
        self._member()
        repo = self._repo(kind, name)
        commit = self._at(repo, revision)
        self._json(
            {
                "_id": _sha(name.encode())[:24],
                "id": name,
                "modelId": name,
                "author": name.split("/")[0],
                "sha": commit.sha,
                "private": repo.private,
                "gated": False,
                "disabled": False,
                "downloads": 0,
                "likes": 0,
                "tags": [],
                "lastModified": "2026-01-01T00:00:00.000Z",
                "createdAt": "2026-01-01T00:00:00.000Z",
                "siblings": [{"rfilename": path} for path in commit.files],
            }
        )

    def refs(self, kind: str, name: str) -> None:
        repo = self._repo(kind, name)
        heads = [
            {"name": b, "ref": f"refs/heads/{b}", "targetCommit": c[-1].sha}
            for b, c in repo.branches.items()
            if not b.startswith("refs/")
        ]
        self._json({"branches": heads, "converts": [], "tags": [], "pullRequests": []})

    def commits(self, kind: str, name: str, revision: str) -> None:
        repo = self._repo(kind, name)
        self._at(repo, revision)
        line = repo.branches.get(revision, [])
        day = "2026-01-01T00:00:00.000Z"
        self._json([{"id": c.sha, "title": c.title, "message": "", "date": day, "authors": []} for c in reversed(line)])

    def branch(self, kind: str, name: str, revision: str) -> None:
        self._writer()
        repo = self._repo(kind, name)
        start = json.loads(self._body() or b"{}").get("startingPoint") or "main"
        if revision in repo.branches:
            raise _Error(409, "Conflict", "Reference already exists")
        repo.branches[revision] = [self._at(repo, start)]
        self._json({})

    # -- reading

    def _entry(self, commit: Commit, path: str) -> dict[str, Any]:
        data = commit.files[path]
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": _sha(data)}
        if path in commit.large:
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        return entry

    def tree(self, kind: str, name: str, revision: str, path: str | None) -> None:
        commit = self._at(self._repo(kind, name), revision)
        deep = self.query.get("recursive", ["false"])[0].lower() == "true"
        prefix = f"{path.strip('/')}/" if path else ""
        inside = [p for p in sorted(commit.files) if p.startswith(prefix)]
        if prefix and not inside:
            raise _Error(404, "EntryNotFound", f"{path} does not exist")
        folders = {
            prefix + "/".join(p[len(prefix) :].split("/")[:depth])
            for p in inside
            for depth in range(1, p[len(prefix) :].count("/") + 1)
        }
        found = [{"type": "directory", "path": f, "oid": _sha(f.encode()), "size": 0} for f in sorted(folders)]
        found += [self._entry(commit, p) for p in inside]
        self._json([e for e in found if deep or "/" not in e["path"][len(prefix) :]])

    def paths(self, kind: str, name: str, revision: str) -> None:
        commit = self._at(self._repo(kind, name), revision)
        body = self._body()
        if "json" in self.headers.get("Content-Type", ""):
            wanted = json.loads(body)["paths"]
        else:
            wanted = parse_qs(body.decode()).get("paths", [])
        answer = []
        for path in [wanted] if isinstance(wanted, str) else wanted:
            if path in commit.files:
                answer.append(self._entry(commit, path))
            elif any(p.startswith(f"{path}/") for p in commit.files):
                answer.append({"type": "directory", "path": path, "oid": _sha(path.encode()), "size": 0})
        self._json(answer)

    def resolve(self, kind: str | None, name: str, revision: str, path: str) -> None:
        self._member()
        commit = self._at(self._repo(kind, name), revision)
        headers = {"X-Repo-Commit": commit.sha, "Accept-Ranges": "bytes"}
        if path not in commit.files:
            self._json(
                {"error": "Entry not found"},
                404,
                {**headers, "X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"},
            )
            return
        data = commit.files[path]
        if path in commit.large:
            oid = hashlib.sha256(data).hexdigest()
            headers |= {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(data)), "ETag": f'"{oid}"'}
            self._send(302, b"", {**headers, "Location": f"http://localhost:{self.hub.port}/_store/{oid}"})
            return
        self._bytes(data, {**headers, "ETag": f'"{_sha(data)}"'})

    def stored(self, oid: str) -> None:
        self._bytes(self.hub.store[oid], {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})

    def _bytes(self, data: bytes, headers: dict[str, str]) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not asked:
            self._send(200, data, headers)
            return
        first, last = int(asked[1]), min(int(asked[2] or len(data) - 1), len(data) - 1)
        part = {"Content-Range": f"bytes {first}-{last}/{len(data)}"}
        self._send(206, data[first : last + 1], {**headers, **part})

    # -- writing

    def preupload(self, kind: str, name: str, revision: str) -> None:
        self._writer()
        self._at(self._repo(kind, name), revision)
        files = json.loads(self._body())["files"]
        modes = [
            {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(LARGE) else "regular", "shouldIgnore": False}
            for f in files
        ]
        self._json({"files": modes})

    def lfs(self, kind: str | None, name: str) -> None:
        self._writer()
        self._repo(kind, name)
        objects = []
        for one in json.loads(self._body())["objects"]:
            answer: dict[str, Any] = {"oid": one["oid"], "size": one["size"]}
            if one["oid"] not in self.hub.store:
                base = self.hub.endpoint
                answer["actions"] = {
                    "upload": {"href": f"{base}/_store/{one['oid']}", "header": {}},
                    "verify": {"href": f"{base}/_verify", "header": {}},
                }
            objects.append(answer)
        self._json({"transfer": "basic", "objects": objects}, headers={"Content-Type": "application/vnd.git-lfs+json"})

    def put(self, oid: str) -> None:
        data = self._body()
        if hashlib.sha256(data).hexdigest() != oid:
            raise _Error(400, "BadRequest", "content does not fit its id")
        self.hub.store[oid] = data
        self._send(200, b"", {"ETag": f'"{oid}"'})

    def verify(self) -> None:
        one = json.loads(self._body())
        if len(self.hub.store.get(one["oid"], b"")) != one["size"]:
            raise _Error(404, "EntryNotFound", "not uploaded")
        self._json({})

    def commit(self, kind: str, name: str, revision: str) -> None:
        self._writer()
        repo = self._repo(kind, name)
        before = self._at(repo, revision)
        lines = [json.loads(line) for line in self._body().splitlines() if line.strip()]
        files, large, title = dict(before.files), set(before.large), ""
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                title = value["summary"]
                parent = value.get("parentCommit")
                if parent and parent != before.sha:
                    raise _Error(412, "PreconditionFailed", "the branch has moved on")
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
                large.discard(value["path"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.store:
                    raise _Error(400, "BadRequest", "a large file was not uploaded")
                files[value["path"]] = self.hub.store[value["oid"]]
                large.add(value["path"])
            elif line["key"] == "deletedFile":
                files.pop(value["path"], None)
            elif line["key"] == "deletedFolder":
                files = {p: d for p, d in files.items() if not p.startswith(value["path"].rstrip("/") + "/")}
        made = _sha(f"{before.sha}{title}{time.time_ns()}".encode())
        after = Commit(made, title, files, frozenset(large & set(files)))
        request = None
        if self.query.get("create_pr", ["0"])[0] in ("1", "true", "True"):
            repo.pull_requests += 1
            repo.branches[f"refs/pr/{repo.pull_requests}"] = [after]
            request = f"{self.hub.endpoint}/{name}/discussions/{repo.pull_requests}"
        else:
            repo.branches.setdefault(revision, []).append(after)
        url = f"{self.hub.endpoint}/{name}/commit/{made}"
        self._json({"success": True, "commitOid": made, "commitUrl": url, "pullRequestUrl": request, "hookOutput": ""})
