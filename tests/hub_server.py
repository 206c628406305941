"""A small Hub on 127.0.0.1 for tests: repositories, branches, LFS and atomic commits, all in memory, standard library only.

Clients reach it with `HF_ENDPOINT`, set before `huggingface_hub` is imported, and `HF_HUB_DISABLE_XET=1` (it offers no Xet
storage). LFS files are served from another host name (`localhost`): a client follows redirects to the same host on HEAD and
would then miss `X-Repo-Commit`. Switches: `fail_next` (answer errors) and `stop_in_upload` (break off for good in mid-upload).
`python tests/hub_server.py 8000` serves one to try things on.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_dummy"
USER = "me"
_LFS = (".safetensors", ".parquet", ".arrow", ".bin", ".pt", ".png", ".jpg")


def _sha1(text: str | bytes) -> str:
    return hashlib.sha1(text.encode() if isinstance(text, str) else text).hexdigest()


@dataclass(frozen=True)
class Commit:
    """One state of a repository."""

    oid: str
    title: str
    files: dict[str, bytes]
    date: str


@dataclass
class Repo:
    """Branches (and pull requests, `refs/pr/N`) with their commits, newest last."""

    private: bool = False
    branches: dict[str, list[Commit]] = field(default_factory=dict)

    def commit(self, branch: str, title: str, files: dict[str, bytes]) -> Commit:
        """Put a new state on a branch."""
        made = self.branches.setdefault(branch, [])
        text = f"{branch}{len(made)}{title}{sorted((name, _sha1(body)) for name, body in files.items())}"
        commit = Commit(_sha1(text), title, dict(files), time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime()))
        made.append(commit)
        return commit

    def at(self, revision: str) -> Commit | None:
        """The newest commit of a branch, or a commit by its id."""
        if revision in self.branches:
            return self.branches[revision][-1]
        return next((one for made in self.branches.values() for one in made if one.oid == revision), None)


class HubServer:
    """The server; use as a context manager. `repos[("dataset", "me/x")].branches["main"][-1].files` is what it holds."""

    def __init__(self, port: int = 0) -> None:
        self._port = port
        self.repos: dict[tuple[str, str], Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.unknown: list[str] = []
        self.tokens = {TOKEN: USER}
        self._lock = threading.RLock()
        self._failures: list[tuple[int, str]] = []
        self._stop_after: int | None = None
        self._stop_where = ""
        self.stopped = False
        self._drop: tuple[int, bool, bool] | None = None
        self._server: ThreadingHTTPServer | None = None

    def __enter__(self) -> HubServer:
        hub = self

        class Handler(_Handler):
            server_hub = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", self._port), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        assert self._server is not None
        self._server.shutdown()
        self._server.server_close()

    @property
    def port(self) -> int:
        """The port that was free."""
        assert self._server is not None
        return int(self._server.server_address[1])

    @property
    def endpoint(self) -> str:
        """Value for `HF_ENDPOINT`."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def lfs_endpoint(self) -> str:
        """Where large files are."""
        return f"http://localhost:{self.port}"

    def env(self, token: str | None = TOKEN) -> dict[str, str]:
        """Variables for a process that is to use this server."""
        found = {"HF_ENDPOINT": self.endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        return found | ({"HF_TOKEN": token} if token else {})

    def files(self, repo_type: str, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Files of the newest commit; empty where there is no repository."""
        repo = self.repos.get((repo_type, repo_id))
        commit = repo.at(revision) if repo else None
        return dict(commit.files) if commit else {}

    def commits(self, repo_type: str, repo_id: str, revision: str = "main") -> list[str]:
        """Titles of a branch's commits, oldest first."""
        repo = self.repos.get((repo_type, repo_id))
        return [one.title for one in repo.branches.get(revision, [])] if repo else []

    def add(self, repo_type: str, repo_id: str, files: dict[str, bytes]) -> None:
        """Put a repository there directly, whatever its files are called."""
        self.repos.setdefault((repo_type, repo_id), Repo()).commit("main", "made by a test", files)

    def fail_next(self, count: int, path: str = "", status: int = 500) -> None:
        """Answer the next `count` requests whose path matches the pattern with an error."""
        self._failures += [(status, path)] * count

    def stop_in_upload(self, after_bytes: int = 0, path: str = "/lfs/|/commit/") -> None:
        """Read this much of the next upload (LFS file or commit), then hang up, and hang up on everything after it."""
        self._stop_after, self._stop_where = after_bytes, path

    def drop(self, number: int, *, after: bool, for_good: bool) -> None:
        """Hang up on the `number`-th request from now (0: the next one).

        Args:
            number: which.
            after: it is carried out, and only the answer is lost; else nothing happens.
            for_good: hang up on everything that comes later too.
        """
        self._drop = (len(self.requests) + number, after, for_good)

    def restart(self) -> None:
        """Serve again after `stop_in_upload` or `drop`."""
        self._stop_after, self.stopped, self._drop = None, False, None

    def take_failure(self, path: str) -> int | None:
        """Status of the failure that is due for this path."""
        with self._lock:
            for index, (status, pattern) in enumerate(self._failures):
                if re.search(pattern, path):
                    del self._failures[index]
                    return status
        return None


class _Answer(Exception):
    """Ends a request with a status and a body."""

    def __init__(self, status: int, body: Any = None, headers: dict[str, str] | None = None) -> None:
        super().__init__(status)
        self.status, self.body, self.headers = status, body, headers or {}


def _missing(kind: str) -> _Answer:
    return _Answer(404, {"error": f"{kind} not found"}, {"X-Error-Code": f"{kind}NotFound"})


class _Handler(BaseHTTPRequestHandler):
    server_hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        """Keep the test output clean."""

    def _serve(self) -> None:
        hub = self.server_hub
        parts = urlsplit(self.path)
        path, self.query = unquote(parts.path), parse_qs(parts.query)
        # an encoded slash belongs to a revision (refs%2Fpr%2F1), a plain one separates segments
        self.segments = [unquote(one) for one in parts.path.strip("/").split("/")]
        hub.requests.append(f"{self.command} {path}")
        dropped = hub._drop is not None and len(hub.requests) - 1 == hub._drop[0]
        late = hub._drop is not None and hub._drop[1]
        if hub.stopped or (dropped and not late):
            hub.stopped = hub.stopped or bool(hub._drop and hub._drop[2])
            self._hang_up()
            return
        try:
            self.body = self._read(path)
            status = hub.take_failure(path)
            if status is not None:
                raise _Answer(status, {"error": "the test wanted this"})
            with hub._lock:
                self._route(path)
            hub.unknown.append(f"{self.command} {path}")
            raise _Answer(404, {"error": f"this test server has no {self.command} {path}"})
        except _Answer as answer:
            if dropped:
                hub.stopped = bool(hub._drop and hub._drop[2])
                self._hang_up()
                return
            self._send(answer)
        except ConnectionAbortedError:
            self._hang_up()

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _hang_up(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.close()

    def _chunks(self) -> Iterator[bytes]:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while size := int(self.rfile.readline().split(b";")[0], 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return
        left = int(self.headers.get("Content-Length") or 0)
        while left:
            part = self.rfile.read(min(left, 4096))
            if not part:
                raise ConnectionAbortedError
            left -= len(part)
            yield part

    def _read(self, path: str) -> bytes:
        hub, body = self.server_hub, b""
        upload = self.command in ("PUT", "POST") and re.search(hub._stop_where, path) and "/info/" not in path
        for part in self._chunks():
            body += part
            if upload and hub._stop_after is not None and len(body) > hub._stop_after:
                hub.stopped = True
                raise ConnectionAbortedError
        if upload and hub._stop_after is not None and len(body) > hub._stop_after:
            hub.stopped = True
            raise ConnectionAbortedError
        return body

    def _send(self, answer: _Answer) -> None:
        body = answer.body
        if not isinstance(body, bytes):
            body = b"" if body is None else json.dumps(body).encode()
            answer.headers.setdefault("Content-Type", "application/json")
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        if "Content-Length" not in answer.headers:
            self.send_header("Content-Length", str(len(body)))
        if isinstance(answer.body, dict) and "error" in answer.body:
            self.send_header("X-Error-Message", answer.body["error"])
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _user(self, *, needed: bool = True) -> str | None:
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if not given and not needed:
            return None
        user = self.server_hub.tokens.get(given)
        if user is None:
            raise _Answer(401, {"error": "Invalid credentials in Authorization header"})
        return user

    def _repo(self, repo_type: str, repo_id: str, *, write: bool = False) -> Repo:
        user = self._user(needed=write)
        repo = self.server_hub.repos.get((repo_type, repo_id))
        if repo is None or (repo.private and user is None):
            raise _missing("Repo")
        return repo

    def _at(self, repo: Repo, revision: str) -> Commit:
        commit = repo.at(revision)
        if commit is None:
            raise _missing("Revision")
        return commit

    def _route(self, path: str) -> None:
        """Find what a request is about; every branch raises `_Answer`."""
        method, parts = self.command, self.segments
        if path == "/api/repos/create" and method == "POST":
            self._create()
        if path == "/api/repos/delete" and method == "DELETE":
            self._user()
            found = json.loads(self.body)
            key = (found.get("type") or "model", f"{found.get('organization') or USER}/{found['name']}")
            if self.server_hub.repos.pop(key, None) is None:
                raise _missing("Repo")
            raise _Answer(200, {})
        if path == "/api/whoami-v2":
            raise _Answer(200, {"type": "user", "name": self._user(), "orgs": [], "auth": {"type": "access_token"}})
        if path == "/api/validate-yaml":
            raise _Answer(200, {"errors": [], "warnings": []})
        if parts[0] == "lfs":
            self._lfs_object(parts[1])
        if parts[0] == "api" and parts[1] in ("models", "datasets"):
            repo_type, rest = parts[1][:-1], parts[2:]
            self._api(repo_type, "/".join(rest[:2]), rest[2:])
        repo_type = "dataset" if parts[0] == "datasets" else "model"
        rest = parts[1:] if parts[0] == "datasets" else parts
        if path.endswith(".git/info/lfs/objects/batch"):
            self._lfs_batch(repo_type, "/".join(rest[:2]).removesuffix(".git"))
        if len(rest) > 4 and rest[2] == "resolve":
            self._resolve(repo_type, "/".join(rest[:2]), rest[3], "/".join(rest[4:]))

    def _create(self) -> None:
        user = self._user()
        found = json.loads(self.body)
        repo_type = found.get("type") or "model"
        repo_id = f"{found.get('organization') or user}/{found['name']}"
        prefix = f"{repo_type}s/" if repo_type != "model" else ""
        answer = {"url": f"{self.server_hub.endpoint}/{prefix}{repo_id}", "name": repo_id}
        if (repo_type, repo_id) in self.server_hub.repos:
            raise _Answer(409, {**answer, "error": "You already created this repo"})
        private = found.get("visibility") == "private" or bool(found.get("private"))
        repo = self.server_hub.repos[repo_type, repo_id] = Repo(private=private)
        repo.commit("main", "initial commit", {".gitattributes": b"*.safetensors filter=lfs\n"})
        raise _Answer(200, answer)

    def _api(self, repo_type: str, repo_id: str, rest: list[str]) -> None:
        what = rest[0] if rest else "revision"
        repo = self._repo(repo_type, repo_id, write=what in ("preupload", "commit", "branch"))
        revision = rest[1] if len(rest) > 1 else "main"
        if what == "branch":
            if self.command == "DELETE":
                repo.branches.pop(revision, None)
            elif revision in repo.branches:
                raise _Answer(409, {"error": "Reference already exists"})
            else:
                start = self._at(repo, json.loads(self.body or b"{}").get("startingPoint") or "main")
                repo.branches[revision] = [start]
            raise _Answer(200, {})
        if what == "refs":
            refs = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": c[-1].oid} for n, c in repo.branches.items()]
            raise _Answer(200, {"branches": refs, "tags": [], "converts": []})
        commit = self._at(repo, revision)
        if what == "revision":
            raise _Answer(200, self._about(repo_id, repo, commit, sizes="blobs" in self.query))
        if what == "tree":
            raise _Answer(200, self._tree(commit, "/".join(rest[2:])))
        if what == "paths-info":
            names = parse_qs(self.body.decode()).get("paths", [])
            raise _Answer(200, [self._file(commit, name) for name in names if name in commit.files])
        if what == "commits":
            made = repo.branches.get(revision, [commit])
            raise _Answer(
                200, [{"id": c.oid, "title": c.title, "message": "", "authors": [], "date": c.date} for c in made[::-1]]
            )
        if what == "preupload":
            files = json.loads(self.body)["files"]
            raise _Answer(200, {"files": [self._mode(commit, one["path"]) for one in files]})
        if what == "commit":
            self._commit(repo_type, repo_id, repo, revision)

    def _about(self, repo_id: str, repo: Repo, commit: Commit, *, sizes: bool) -> dict[str, Any]:
        return {
            "id": repo_id,
            "modelId": repo_id,
            "author": repo_id.split("/")[0],
            "sha": commit.oid,
            "private": repo.private,
            "gated": False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "lastModified": commit.date,
            "createdAt": commit.date,
            "siblings": [
                {"rfilename": name, **({"size": len(body)} if sizes else {})} for name, body in commit.files.items()
            ],
        }

    @staticmethod
    def _mode(commit: Commit, path: str) -> dict[str, Any]:
        old = commit.files.get(path)
        lfs = path.endswith(_LFS)
        oid = None if old is None else hashlib.sha256(old).hexdigest() if lfs else _git_oid(old)
        return {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, "oid": oid}

    @staticmethod
    def _file(commit: Commit, name: str) -> dict[str, Any]:
        body = commit.files[name]
        found: dict[str, Any] = {"type": "file", "path": name, "size": len(body), "oid": _git_oid(body)}
        if name.endswith(_LFS):
            found["lfs"] = {"oid": hashlib.sha256(body).hexdigest(), "size": len(body), "pointerSize": 134}
        last = {"id": commit.oid, "title": commit.title, "date": commit.date}
        return found | {"lastCommit": last}

    def _tree(self, commit: Commit, folder: str) -> list[dict[str, Any]]:
        start = f"{folder}/" if folder else ""
        inside = [name for name in commit.files if name.startswith(start)]
        if folder and not inside:
            raise _missing("Entry")
        deep = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        rest = {name: name.removeprefix(start) for name in inside}
        folders = {start + "/".join(r.split("/")[:n]) for r in rest.values() for n in range(1, r.count("/") + 1)}
        shown = sorted(one for one in folders if deep or "/" not in one.removeprefix(start))
        found = [{"type": "directory", "path": one, "oid": _sha1(one), "size": 0} for one in shown]
        return found + [self._file(commit, name) for name, r in rest.items() if deep or "/" not in r]

    def _commit(self, repo_type: str, repo_id: str, repo: Repo, revision: str) -> None:
        """All operations or none: files change once every line has been understood."""
        lines = [json.loads(line) for line in self.body.splitlines() if line]
        header = next(line["value"] for line in lines if line["key"] == "header")
        before = self._at(repo, revision)
        if header.get("parentCommit") not in (None, before.oid):
            raise _Answer(412, {"error": "A commit has happened since. Please refresh and try again."})
        files = dict(before.files)
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.server_hub.lfs:
                    raise _Answer(400, {"error": f"LFS object {value['oid']} was not uploaded"})
                files[value["path"]] = self.server_hub.lfs[value["oid"]]
            elif line["key"] == "deletedFile":
                if files.pop(value["path"], None) is None:
                    raise _missing("Entry")
            elif line["key"] == "deletedFolder":
                start = value["path"].rstrip("/") + "/"
                files = {name: body for name, body in files.items() if not name.startswith(start)}
        prefix = f"{self.server_hub.endpoint}/{'datasets/' if repo_type == 'dataset' else ''}{repo_id}"
        answer: dict[str, Any] = {"success": True, "hookOutput": ""}
        if "create_pr" in self.query:
            number = 1 + sum(name.startswith("refs/pr/") for name in repo.branches)
            revision = f"refs/pr/{number}"
            answer["pullRequestUrl"] = f"{prefix}/discussions/{number}"
        commit = repo.commit(revision, header["summary"], files)
        raise _Answer(200, {**answer, "commitOid": commit.oid, "commitUrl": f"{prefix}/commit/{commit.oid}"})

    def _lfs_batch(self, repo_type: str, repo_id: str) -> None:
        self._repo(repo_type, repo_id, write=True)
        objects = []
        for one in json.loads(self.body)["objects"]:
            href = f"{self.server_hub.lfs_endpoint}/lfs/{one['oid']}"
            actions = {} if one["oid"] in self.server_hub.lfs else {"upload": {"href": href}, "verify": {"href": href}}
            objects.append({**one, "authenticated": True} | ({"actions": actions} if actions else {}))
        raise _Answer(200, {"transfer": "basic", "objects": objects})

    def _lfs_object(self, oid: str) -> None:
        hub = self.server_hub
        if self.command == "PUT":
            if hashlib.sha256(self.body).hexdigest() != oid:
                raise _Answer(400, {"error": "the bytes are not those of this oid"})
            hub.lfs[oid] = self.body
            raise _Answer(200, {})
        if self.command == "POST":
            raise _Answer(200 if oid in hub.lfs else 404, {})
        self._bytes(hub.lfs[oid], {"ETag": f'"{oid}"'})

    def _resolve(self, repo_type: str, repo_id: str, revision: str, name: str) -> None:
        commit = self._at(self._repo(repo_type, repo_id), revision)
        if name not in commit.files:
            answer = _missing("Entry")
            answer.headers["X-Repo-Commit"] = commit.oid
            raise answer
        body = commit.files[name]
        headers = {"X-Repo-Commit": commit.oid}
        if not name.endswith(_LFS):
            self._bytes(body, {**headers, "ETag": f'"{_git_oid(body)}"'})
        oid = hashlib.sha256(body).hexdigest()
        self.server_hub.lfs.setdefault(oid, body)
        headers |= {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(body)), "ETag": f'"{oid}"'}
        raise _Answer(302, None, {**headers, "Location": f"{self.server_hub.lfs_endpoint}/lfs/{oid}"})

    def _bytes(self, body: bytes, headers: dict[str, str]) -> None:
        headers = {**headers, "Content-Type": "application/octet-stream", "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            raise _Answer(200, body, {**headers, "Content-Length": str(len(body))})
        start, stop = int(asked[1]), min(int(asked[2] or len(body)), len(body) - 1)
        part = body[start : stop + 1]
        headers |= {"Content-Range": f"bytes {start}-{stop}/{len(body)}", "Content-Length": str(len(part))}
        raise _Answer(206, part, headers)


def _git_oid(body: bytes) -> str:
    return _sha1(b"blob %d\x00" % len(body) + body)


if __name__ == "__main__":
    with HubServer(int(sys.argv[1]) if len(sys.argv) > 1 else 8000) as server:
        print("export " + " ".join(f"{name}={value}" for name, value in server.env().items()), flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()
