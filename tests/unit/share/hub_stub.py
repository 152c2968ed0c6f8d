"""A stand-in for the Hugging Face hub on loopback: what its client asks for while a package comes and goes."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

TOKEN = "hf_0123456789abcdefghijklmnopqrstuvwx"
USER = "ada"


@dataclass
class StubRepo:
    """A repository: the files of each commit, the last one first asked for."""

    is_private: bool
    commits: list[tuple[str, str, dict[str, bytes]]] = field(default_factory=list)

    def at(self, revision: str) -> tuple[str, str, dict[str, bytes]] | None:
        """The commit of a branch or by its hash: hash, message, files."""
        found = [commit for commit in self.commits if commit[0] == revision]
        return self.commits[-1] if revision == "main" else found[0] if found else None

    def add(self, message: str, changes: dict[str, bytes]) -> str:
        files = {**(self.commits[-1][2] if self.commits else {}), **changes}
        name = hashlib.sha1(repr((len(self.commits), sorted(files))).encode()).hexdigest()
        self.commits.append((name, message, files))
        return name


class HubStub:
    """``answers`` gives a status, with a text, to each request whose method and path fit a pattern; 0 closes the
    connection unanswered. ``cut_bytes`` ends the next download after so many bytes, and the server with it."""

    def __init__(self) -> None:
        self.repos: dict[str, StubRepo] = {}
        self.blobs: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.answers: dict[str, tuple[int, str]] = {}
        self.cut_bytes: int | None = None
        stub = self

        class Handler(_Handler):
            hub = stub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def put(self, repo: str, *, private: bool = False, **files: bytes) -> str:
        """Files in a repository, as if others had pushed them; ``_tkp`` ends a name with .tkp."""
        held = self.repos.setdefault(repo, StubRepo(private))
        return held.add("by others", {name.replace("_tkp", ".tkp"): data for name, data in files.items()})

    def files(self, repo: str) -> dict[str, bytes]:
        return self.repos[repo].commits[-1][2]


class _Handler(BaseHTTPRequestHandler):
    hub: HubStub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self) -> None:
        path = unquote(self.path.partition("?")[0])
        asked, body = f"{self.command} {path}", self._body()
        self.hub.asked.append(asked)
        for pattern, (status, text) in self.hub.answers.items():
            if re.search(pattern, asked):
                return self._say(status, {"error": text}) if status else self._hang_up()
        for method, pattern, act in _ROUTES:
            if (match := re.fullmatch(pattern, path)) and re.fullmatch(method, self.command):
                return act(self, body, *match.groups())
        return self._say(404, {"error": f"the stub has no {asked}"})

    do_GET = do_HEAD = do_POST = do_PUT = _answer  # noqa: N815

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _hang_up(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(2)

    def _say(self, status: int, data: Any = None, code: str = "", raw: bytes | None = None, **headers: str) -> None:
        text = raw if raw is not None else json.dumps(data).encode()
        self.send_response(status)
        message = data["error"] if isinstance(data, dict) and "error" in data else ""
        rows = {"Content-Length": str(len(text)), "X-Error-Code": code, "X-Error-Message": message, **headers}
        for name, value in rows.items():
            if value:
                self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if raw is not None and self.hub.cut_bytes is not None:
            text = text[: self.hub.cut_bytes]
            self.hub.answers[""] = (0, "")
        self.wfile.write(text)
        if len(text) < int(rows["Content-Length"]):
            self._hang_up()

    @property
    def is_known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _visible(self, name: str) -> StubRepo | None:
        """A repository that the asker may see; else the answer is that there is none."""
        repo = self.hub.repos.get(name)
        if repo is not None and (self.is_known or not repo.is_private):
            return repo
        self._say(404 if self.is_known else 401, {"error": "Repository not found"}, "RepoNotFound")
        return None

    def create(self, body: bytes) -> None:
        if not self.is_known:
            return self._say(401, {"error": "Invalid username or password."})
        asked = json.loads(body)
        name = f"{asked['organization'] or USER}/{asked['name']}"
        if not name.startswith(f"{USER}/"):
            return self._say(403, {"error": "You don't have the rights to create a model under this namespace"})
        if name in self.hub.repos:
            return self._say(409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"})
        self.hub.repos[name] = StubRepo(asked.get("visibility") == "private" or bool(asked.get("private")))
        self.hub.repos[name].add("initial commit", {".gitattributes": b"*.tkp filter=lfs\n"})
        return self._say(200, {"url": f"{self.hub.url}/{name}"})

    def info(self, _: bytes, name: str, revision: str | None = None) -> None:
        if (repo := self._visible(name)) is None:
            return None
        if (commit := repo.at(revision or "main")) is None:
            return self._say(404, {"error": "Invalid rev id"}, "RevisionNotFound")
        rows = [{"rfilename": file} for file in commit[2]]
        return self._say(200, {"id": name, "sha": commit[0], "private": repo.is_private, "siblings": rows})

    def validate(self, _: bytes) -> None:
        self._say(200, {"warnings": [], "errors": []})

    def preupload(self, body: bytes, name: str) -> None:
        if self._visible(name) is not None:
            rows = [{"path": row["path"], "shouldIgnore": False, "oid": None,
                     "uploadMode": "lfs" if row["path"].endswith(".tkp") else "regular"}
                    for row in json.loads(body)["files"]]  # fmt: skip
            self._say(200, {"files": rows})

    def batch(self, body: bytes, _: str) -> None:
        rows = [{**row, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{row['oid']}"}}}
                for row in json.loads(body)["objects"]]  # fmt: skip
        self._say(200, {"transfer": "basic", "objects": rows})

    def upload(self, body: bytes, name: str) -> None:
        assert hashlib.sha256(body).hexdigest() == name
        self.hub.blobs[name] = body
        self._say(200, {})

    def commit(self, body: bytes, name: str) -> None:
        if (repo := self._visible(name)) is None:
            return
        rows = [json.loads(line) for line in body.splitlines()]
        files = {row["value"]["path"]: base64.b64decode(row["value"]["content"])
                 for row in rows if row["key"] == "file"}  # fmt: skip
        large = {row["value"]["path"]: self.hub.blobs[row["value"]["oid"]] for row in rows if row["key"] == "lfsFile"}
        made = repo.add(rows[0]["value"]["summary"], files | large)
        self._say(200, {"commitUrl": f"{self.hub.url}/{name}/commit/{made}", "commitOid": made})

    def resolve(self, _: bytes, name: str, revision: str, file: str) -> None:
        if (repo := self._visible(name)) is None:
            return None
        if (commit := repo.at(revision)) is None:
            return self._say(404, {"error": "Invalid rev id"}, "RevisionNotFound")
        if file not in commit[2]:
            return self._say(404, {"error": "Entry not found"}, "EntryNotFound", X_Repo_Commit=commit[0])
        data = commit[2][file]
        headers = {"X_Repo_Commit": commit[0], "ETag": f'"{hashlib.sha256(data).hexdigest()}"'}
        return self._say(200, raw=data, **headers)


_NAME = r"([\w.-]+/[\w.-]+)"
_ROUTES: tuple[tuple[str, str, Any], ...] = (
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate),
    ("POST", f"/api/models/{_NAME}/preupload/main", _Handler.preupload),
    ("POST", f"/api/models/{_NAME}/commit/main", _Handler.commit),
    ("GET", f"/api/models/{_NAME}(?:/revision/(.+))?", _Handler.info),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", r"/lfs/(\w+)", _Handler.upload),
    ("HEAD|GET", f"/{_NAME}/resolve/([^/]+)/(.+)", _Handler.resolve),
)
