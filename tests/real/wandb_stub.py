"""A stand-in for Weights & Biases' server on loopback: what its client asks for while a run is made, and no more."""

from __future__ import annotations

import contextlib
import gzip
import json
import re
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "0123456789" * 4
_OPERATION = re.compile(r"(?:query|mutation)\s+(\w+)")


@dataclass
class StubRun:
    """One run as the server keeps it; lines by their offset, so that one sent twice is kept once, as there."""

    facts: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    lines: dict[int, str] = field(default_factory=dict)
    sent_lines: int = 0
    summary: dict[str, Any] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    alerts: list[dict[str, Any]] = field(default_factory=list)
    exit_code: int | None = None

    @property
    def history(self) -> list[dict[str, Any]]:
        return [json.loads(self.lines[offset]) for offset in sorted(self.lines)]


class WandbStub:
    """``stop`` closes the port and every connection; ``start`` opens the same port with what was kept."""

    def __init__(self) -> None:
        self.runs: dict[str, StubRun] = {}
        self.artifacts: list[dict[str, Any]] = []
        self.manifests: dict[str, bytes] = {}
        self.operations: list[str] = []
        self.port = 0
        self._server: ThreadingHTTPServer | None = None
        self._open: set[Any] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        stub = self

        class Handler(_Handler):
            answers = stub

        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        server, self._server = self._server, None
        if server is None:
            return
        server.shutdown()
        server.server_close()
        for connection in list(self._open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    # --- what is asked

    def graphql(self, query: str, variables: dict[str, Any]) -> Any:
        found = _OPERATION.search(query)
        name = found.group(1) if found else ""
        self.operations.append(name)
        answer = getattr(self, f"_{name}", None)
        return answer(variables) if answer else {}

    def _Viewer(self, _: Any) -> Any:  # noqa: N802
        viewer = {
            "id": "1",
            "entity": "team",
            "username": "someone",
            "email": "",
            "flags": "{}",
            "teams": {"edges": []},
        }
        return {"viewer": viewer}

    def _ServerFeaturesQuery(self, _: Any) -> Any:  # noqa: N802
        return {"serverInfo": {"features": []}}

    def _RunResumeStatus(self, asked: Any) -> Any:  # noqa: N802
        run = self.runs.get(asked["name"])
        project = {"id": "1", "name": asked["project"], "entity": {"id": "1", "name": "team"}}
        if run is None:
            return {"model": {**project, "bucket": None}}
        tail = json.dumps([run.lines[max(run.lines)]] if run.lines else [])
        bucket = {
            "id": asked["name"], "name": asked["name"], "displayName": run.facts.get("displayName"),
            "summaryMetrics": json.dumps(run.summary), "logLineCount": 0, "historyLineCount": len(run.lines),
            "eventsLineCount": 0, "historyTail": tail, "eventsTail": "[]", "config": json.dumps(run.config),
            "tags": [], "notes": "", "wandbConfig": json.dumps({"t": 1}),
        }  # fmt: skip
        return {"model": {**project, "bucket": bucket}}

    def _UpsertBucket(self, asked: Any) -> Any:  # noqa: N802
        name = asked.get("name") or asked.get("id")
        is_new = name not in self.runs
        run = self.runs.setdefault(name, StubRun())
        run.facts |= {key: value for key, value in asked.items() if value is not None}
        run.config |= json.loads(asked.get("config") or "{}")
        run.summary |= json.loads(asked.get("summaryMetrics") or "{}")
        project = {
            "id": "1",
            "name": run.facts.get("project") or "uncategorized",
            "entity": {"id": "1", "name": "team"},
        }
        bucket = {
            "id": name, "name": name, "displayName": run.facts.get("displayName"), "description": "",
            "config": json.dumps(run.config), "sweepName": None, "project": project,
            "historyLineCount": len(run.lines),
        }  # fmt: skip
        return {"upsertBucket": {"bucket": bucket, "inserted": is_new}}

    def _CreateRunFiles(self, asked: Any) -> Any:  # noqa: N802
        files = [{"name": name, "uploadUrl": f"{self.url}/store/run/{asked['run']}/{name}"} for name in asked["files"]]
        return {"createRunFiles": {"runID": asked["run"], "uploadHeaders": [], "files": files}}

    def _NotifyScriptableRunAlert(self, asked: Any) -> Any:  # noqa: N802
        self.runs[asked["runName"]].alerts.append(asked)
        return {"notifyScriptableRunAlert": {"success": True}}

    def _ArtifactType(self, _: Any) -> Any:  # noqa: N802
        return {"project": None}

    def _CreateArtifact(self, asked: Any) -> Any:  # noqa: N802
        made = {"id": str(len(self.artifacts)), **asked["input"], "is_committed": False, "files": {}}
        self.artifacts.append(made)
        artifact = {"id": made["id"], "state": "PENDING", "artifactSequence": {"id": "1", "latestArtifact": None}}
        return {"createArtifact": {"artifact": artifact}}

    def _CreateArtifactManifest(self, asked: Any) -> Any:  # noqa: N802
        file = {"id": "1", "uploadUrl": f"{self.url}/store/manifest/{asked['artifactID']}", "uploadHeaders": []}
        return {"createArtifactManifest": {"artifactManifest": {"id": asked["artifactID"], "file": file}}}

    def _UpdateArtifactManifest(self, asked: Any) -> Any:  # noqa: N802
        name = asked["artifactManifestID"]
        file = {"id": "1", "uploadUrl": f"{self.url}/store/manifest/{name}", "uploadHeaders": []}
        return {"updateArtifactManifest": {"artifactManifest": {"id": name, "file": file}}}

    def _CreateArtifactFiles(self, asked: Any) -> Any:  # noqa: N802
        nodes = []
        for file in asked["input"]["artifactFiles"]:
            place = f"{file['artifactID']}/{file['name']}"
            node = {
                "storagePath": place, "uploadUrl": f"{self.url}/store/artifact/{place}", "uploadHeaders": [],
                "uploadMultipartUrls": None, "artifact": {"id": file["artifactID"]},
            }  # fmt: skip
            nodes.append({"node": node})
        return {"createArtifactFiles": {"files": {"edges": nodes}}}

    def _CommitArtifact(self, asked: Any) -> Any:  # noqa: N802
        made = self.artifacts[int(asked["artifactID"])]
        made["is_committed"] = True
        return {"commitArtifact": {"artifact": {"id": made["id"], "digest": made.get("digest")}}}

    def _ArtifactByID(self, asked: Any) -> Any:  # noqa: N802
        made = self.artifacts[int(asked["id"])]
        project = {"id": "1", "internalId": "1", "name": made["projectName"], "entity": {"name": "team"}}
        collection = {"__typename": "ArtifactSequence", "name": made["artifactCollectionName"], "project": project}
        artifact = {
            "__typename": "Artifact", "id": made["id"], "artifactSequence": collection, "versionIndex": 0,
            "artifactType": {"name": made["artifactTypeName"]}, "description": None, "metadata": made.get("metadata"),
            "ttlDurationSeconds": -1, "ttlIsInherited": False, "tags": [], "historyStep": None, "state": "COMMITTED",
            "size": 1, "digest": made.get("digest"), "digestAlgorithm": "MANIFEST_MD5", "commitHash": "1",
            "fileCount": 1, "createdAt": "2026-01-01T00:00:00", "updatedAt": "2026-01-01T00:00:00", "aliases": [],
        }  # fmt: skip
        return {"artifact": artifact}

    def stream(self, name: str, sent: dict[str, Any]) -> None:
        """Lines of a run's files as they grow."""
        run = self.runs[name]
        files = sent.get("files") or {}
        for file, part in files.items():
            lines = part["content"]
            if file == "wandb-history.jsonl":
                run.sent_lines += len(lines)
                run.lines |= {part["offset"] + place: line for place, line in enumerate(lines)}
            elif file == "wandb-summary.json":
                run.summary |= json.loads(lines[-1])
        if sent.get("complete"):
            run.exit_code = sent.get("exitcode")

    def store(self, place: str, data: bytes) -> None:
        kind, owner, *rest = place.split("/", 2)
        if kind == "run":
            self.runs[owner].files[rest[0]] = data
        elif kind == "manifest":
            self.manifests[owner] = data
        else:
            self.artifacts[int(owner)]["files"][rest[0]] = data


class _Handler(BaseHTTPRequestHandler):
    answers: WandbStub
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.answers._open.add(self.connection)

    def finish(self) -> None:
        self.answers._open.discard(self.connection)
        super().finish()

    def do_POST(self) -> None:
        body = self._body()
        if self.path.startswith("/graphql"):
            asked = json.loads(body)
            self._answer({"data": self.answers.graphql(asked["query"], asked.get("variables") or {})})
        elif self.path.endswith("/file_stream"):
            self.answers.stream(self.path.split("/")[-2], json.loads(body))
            self._answer({"exitcode": None, "limits": {}})
        else:
            self._answer({})

    def do_PUT(self) -> None:
        self.answers.store(self.path.removeprefix("/store/").partition("?")[0], self._body())
        self._answer({})

    def do_GET(self) -> None:
        self._answer({})

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (OSError, ValueError):  # the stub was stopped
            self.close_connection = True

    def _body(self) -> bytes:
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(data) if self.headers.get("Content-Encoding") == "gzip" else data

    def _answer(self, data: Any) -> None:
        body = json.dumps(data).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None: ...
