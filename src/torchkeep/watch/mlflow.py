"""The record at MLflow: one run an attempt, under a parent that is named as the run.

With every batch of metrics goes the tag ``torchkeep.seq``, the last record that is in: so the server itself tells what
it has. A metric that is sent once more with the same step, time and value is kept once there.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import Field

from ..contracts import Json
from ..settings import Settings, flatten
from .apart import Apart, Attempts
from .feeds import Unreachable
from .records import Record

_METRICS = 900  # the server takes 1,000 entities a request
_PARAMS = 100
_PARAM_CHARACTERS = 500
_KEY_CHARACTERS = 250
_NUMBERS = ("scalars", "timing", "system")
_FILES = {"image": ".png", "prediction": ".png", "figure": ".png", "audio": ".wav", "mesh": ".safetensors",
          "graph": ".json", "profile": ".json"}  # fmt: skip
_JSON = {"prediction": "rows", "confusion": "counts", "pr_curve": "precision", "trainable_map": "rows",
         "bad_samples": "samples_bad", "alert": "text"}  # fmt: skip
_HEAD = ("kind", "attempt", "rank", "seq")
_ENDS = {"finished": "FINISHED", "failed": "FAILED"}
_SEQ = "torchkeep.seq"
# the server's fault, or nobody's: all other codes say that what was sent is wrong
_LATER = {"INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "RESOURCE_EXHAUSTED", "IO_ERROR",
          "UNAUTHENTICATED", "PERMISSION_DENIED", "CANCELLED"}  # fmt: skip


class MlflowSettings(Settings):
    """Where MLflow keeps a run."""

    uri: str | None = None
    """The server or database; left out, $MLFLOW_TRACKING_URI, else mlflow.db beside the run's folder."""
    experiment: str | None = None
    """The experiment; left out, $MLFLOW_EXPERIMENT_NAME, else "torchkeep"."""
    models: bool = False
    """Whether packages and the best checkpoint are uploaded."""
    close_timeout_s: float = Field(default=60.0, gt=0)
    """Seconds that the end of a run waits for the upload; what is left then, ``torchkeep sync`` sends."""


class MlflowView(Apart):
    """One run in MLflow for this attempt; earlier attempts that were cut off are completed."""

    name = "mlflow"
    sender = "torchkeep.watch.mlflow:MlflowSender"


@contextlib.contextmanager
def _reachable() -> Iterator[None]:
    """Turns what the client says of a server that does not answer into Unreachable."""
    try:
        yield
    except Exception as error:
        if getattr(error, "error_code", "") in _LATER:
            raise Unreachable(f"MLflow does not answer: {error}") from error
        raise


class MlflowSender(Attempts):
    """Sends records by MLflow's client."""

    def __init__(self, folder: Path, attempt: int, run_name: str, settings: dict[str, Any]):
        super().__init__(folder, attempt, run_name, settings)
        beside = folder.absolute().parent
        uri = settings["uri"] or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{beside / 'mlflow.db'}"
        waits = {"TIMEOUT": "20", "MAX_RETRIES": "1", "BACKOFF_FACTOR": "0"}  # the feed tries again, with pauses
        os.environ.update({f"MLFLOW_HTTP_REQUEST_{name}": value for name, value in waits.items()})
        os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
        import mlflow
        from mlflow.entities import Metric, Param

        self._client = mlflow.MlflowClient(uri)
        self._metric, self._param = Metric, Param
        self._artifacts = (beside / "mlartifacts").as_uri() if uri.startswith("sqlite:") else None
        self._parent = ""

    # --- runs

    @_reachable()
    def begin(self, first: Record) -> bool:
        if not self._parent:
            name = self.settings["experiment"] or os.environ.get("MLFLOW_EXPERIMENT_NAME") or "torchkeep"
            found = self._client.get_experiment_by_name(name)
            self._experiment = found.experiment_id if found else self._client.create_experiment(name, self._artifacts)
            self._parent = self._opened("all", self.name, first, {}).info.run_id
        attempt = str(first["attempt"])
        run = self._opened(attempt, f"{self.name}/attempt-{attempt}", first, {"mlflow.parentRunId": self._parent})
        self._run, self._params = run.info.run_id, set(run.data.params)
        self.seq, self._epoch, self._ended_s = int(run.data.tags.get(_SEQ, -1)), -1, first["time"]
        self._status = run.info.status if run.info.status != "RUNNING" else "KILLED"
        if first["attempt"] > 0:
            self._describe(self.run_start())
        return True

    def _opened(self, attempt: str, name: str, first: Record, tags: dict[str, str]) -> Any:
        """The run with these marks, made where it is not there yet."""
        marks = {"torchkeep.run": self.run_id(), "torchkeep.attempt": attempt}
        wanted = " and ".join(f"tags.`{key}` = '{value}'" for key, value in marks.items())
        for found in self._client.search_runs([self._experiment], wanted, max_results=1):
            return found
        tags = {**marks, **tags, "torchkeep.folder": str(self.folder)}
        return self._client.create_run(self._experiment, int(first["time"] * 1000), tags, name)

    @_reachable()
    def end(self, is_whole: bool) -> None:
        for run in (self._run, self._parent):  # the parent ends as its newest attempt
            self._client.set_terminated(run, self._status, int(self._ended_s * 1000))

    # --- records

    @_reachable()
    def send(self, records: list[Record]) -> None:
        metrics: list[Any] = []
        epoch = self._epoch
        for record in records:
            metrics += self._metrics(record, epoch)
            epoch = record["epoch"] if record["kind"] in _NUMBERS else epoch
            self._send_files(record)
            act = getattr(self, f"_{record['kind']}", None)
            if act is not None:
                act(record)
        for start in range(0, len(metrics), _METRICS):
            self._client.log_batch(self._run, metrics[start : start + _METRICS])
        if records:
            self._client.set_tag(self._run, _SEQ, str(records[-1]["seq"]))
            self.seq, self._ended_s, self._epoch = records[-1]["seq"], records[-1]["time"], epoch

    def _metrics(self, record: Record, epoch: int) -> list[Any]:
        values = dict(record["values"]) if record["kind"] in _NUMBERS else {}
        if values and record["epoch"] != epoch:
            values["epoch"] = record["epoch"]
        if record["kind"] == "histogram" and record["num"]:
            mean = record["sum"] / record["num"]
            deviation = max(record["sum_squares"] / record["num"] - mean**2, 0) ** 0.5
            found = {"min": record["min"], "mean": mean, "max": record["max"], "std": deviation, "nan": record["nan"]}
            values = {f"{record['tag']}/{name}": value for name, value in found.items()}
        elif record["kind"] == "run_end":
            values = record.get("metrics") or {}
        at = int(record["time"] * 1000), record["step"]
        return [self._metric(_key(tag), float(value), *at) for tag, value in values.items()]

    def _send_files(self, record: Record) -> None:
        """What is no number: files by tag and step, and as JSON what a picture does not say."""
        kind = record["kind"]
        place = f"{kind}/{_key(str(record.get('tag', kind)))}"
        stem = f"step-{record['step']:08d}-{record['seq']}"
        if kind in _FILES and record.get("media"):
            self._upload(self.media.read(record["media"]), place, stem + _FILES[kind])
        if kind in _JSON:
            told = {key: value for key, value in record.items() if key not in _HEAD}
            self._client.log_dict(self._run, told, f"{place}/{stem}.json")
        elif kind == "text":
            data = self.media.read(record["media"]) if record.get("media") else record["text"].encode()
            self._upload(data, place, f"{stem}.txt")

    def _upload(self, data: bytes, place: str, name: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / name
            path.write_bytes(data)
            self._client.log_artifact(self._run, str(path), place)

    def _attempt_start(self, record: Record) -> None:
        self._send_params(record.get("settings") or {})

    def _run_start(self, record: Record) -> None:
        self._describe(record)
        code = record.get("code") or {}
        lock = "\n".join((record.get("environment") or {}).get("lock") or ())
        for name, text in {"diff.patch": code.get("diff"), "requirements.txt": lock}.items():
            if text:
                self._client.log_text(self._run, text, f"code/{name}")

    def _describe(self, start: Record) -> None:
        environment = {k: v for k, v in (start.get("environment") or {}).items() if k != "lock"}
        facts = {"seed": start.get("seed"), "command": start.get("command"), "environment": environment}
        self._send_params({**facts, **(start.get("settings") or {})})
        if commit := (start.get("code") or {}).get("commit"):
            self._client.set_tag(self._run, "mlflow.source.git.commit", commit)

    def _send_params(self, settings: Json) -> None:
        """Flat; a parameter cannot be changed at the server, so the first value stays."""
        flat = {_key(name): str(value)[:_PARAM_CHARACTERS] for name, value in flatten(settings).items() if name}
        fresh = [self._param(name, value) for name, value in flat.items() if name not in self._params]
        for start in range(0, len(fresh), _PARAMS):
            self._client.log_batch(self._run, params=fresh[start : start + _PARAMS])
        self._params |= flat.keys()

    def _decision(self, record: Record) -> None:
        self._send_params({f"decisions/{record['name']}": record["value"]})

    def _artifact(self, record: Record) -> None:
        if record["type"] == "code":
            folder, _, name = f"code/untracked/{record['name']}".rpartition("/")
            self._upload(self.media.read(record["media"]), folder, name)
            return
        self._client.set_tag(self._run, f"torchkeep.{record['type']}.{_key(record['name'])}", record["sha256"])
        if self.is_model(record):
            source = self.source(record)
            send = self._client.log_artifacts if source.is_dir() else self._client.log_artifact
            send(self._run, str(source), f"models/{_key(record['name'])}")

    def _run_end(self, record: Record) -> None:
        self._status = _ENDS.get(record["status"], "KILLED")
        self._client.log_batch(self._parent, self._metrics(record, record["epoch"]))


def _key(tag: str) -> str:
    """A name that MLflow takes; one that is changed for it gets a mark, so that two never become one."""
    parts = [part for part in re.sub(r"[^\w\-. :/]", "_", tag, flags=re.ASCII).split("/") if part.strip(".")]
    name = "/".join(parts)
    if name == tag and len(name) <= _KEY_CHARACTERS:
        return name
    return f"{name[: _KEY_CHARACTERS - 9]}-{hashlib.sha256(tag.encode()).hexdigest()[:8]}".lstrip("/")
