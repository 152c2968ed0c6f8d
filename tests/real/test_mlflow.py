"""A real MLflow server with sqlite, killed and restarted in the middle of a run; and sqlite without a server."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from torchkeep.errors import StorageError
from torchkeep.watch.afterwards import sync
from torchkeep.watch.media import Medium
from torchkeep.watch.mlflow import MlflowSettings, MlflowView
from torchkeep.watch.recorder import Recorder

pytest.importorskip("mlflow", reason="the extra mlflow is not installed")

START_S = 60
SETTINGS = {"model": {"name": "convnet"}, "notes": "n" * 600}


class Server:
    """``mlflow server`` with one worker; ``kill`` ends it as a power cut does, ``start`` begins it again."""

    def __init__(self, place: Path):
        self.place = place
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        options = {"backend-store-uri": f"sqlite:///{self.place / 'server.db'}", "host": "127.0.0.1", "workers": "1",
                   "artifacts-destination": str(self.place / "kept"), "port": str(self.port)}  # fmt: skip
        flags = [part for name, value in options.items() for part in (f"--{name}", value)]
        with (self.place / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", "mlflow", "server", *flags], stdout=log, stderr=log,
                start_new_session=True, env={**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"},
            )  # fmt: skip
        deadline = time.monotonic() + START_S
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/health", timeout=2):
                return
            assert time.monotonic() < deadline, (self.place / "server.log").read_text()
            time.sleep(0.2)

    def kill(self) -> None:
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.process = None


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    server.start()
    yield server
    server.kill()


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")


class Run:
    """A run that records as a training does."""

    def __init__(self, folder: Path, attempt: int = 0, from_step: int = 0, **settings: Any):
        folder.mkdir(exist_ok=True)
        self.alerts: list[str] = []
        view = MlflowView(folder, attempt, folder.name, MlflowSettings(**settings))
        self.recorder = Recorder(folder / "records.jsonl", attempt=attempt, views=[view], on_alert=self.alerts.append)
        if attempt == 0:
            code = {"commit": "c0ffee", "diff": "+ a line", "untracked": {"new.py": "1"}}
            self.log(
                "run_start", 0, began=0.0, seed=7, command=["train"], code=code, environment={"lock": ["torch==2"]}
            )
            late = Medium(b"x = 1", ".txt")
            self.log("artifact", 0, name="pkg/new.py", type="code", parents=[], sha256="1", bytes=5, late=late)
        self.log("attempt_start", from_step, from_step=from_step, settings=SETTINGS)

    def log(self, kind: str, step: int, **payload: Any) -> None:
        self.recorder.log(kind, step=step, samples=step * 8, epoch=step // 10, **payload)

    def train(self, first: int, last: int) -> None:
        for step in range(first, last + 1):
            self.log("scalars", step, values={"train/loss": 1 / step, "sensor (°C)": float("nan")})
            self.recorder.flush()

    def end(self, status: str = "finished") -> None:
        self.log("run_end", 99, status=status, reason="", metrics={"valid/accuracy": 0.5}, artifacts=[])
        self.recorder.close()


def runs_at(uri: str, name: str) -> dict[str, Any]:
    """The runs of one run's folder by attempt; "all" is their parent."""
    import mlflow

    client = mlflow.MlflowClient(uri)
    experiment = client.get_experiment_by_name("torchkeep").experiment_id
    found = client.search_runs([experiment], f"tags.`torchkeep.folder` LIKE '%/{name}'")
    by_attempt = {run.data.tags["torchkeep.attempt"]: run for run in found}
    assert len(by_attempt) == len(found)
    return by_attempt


def steps(uri: str, run: Any, metric: str = "train/loss") -> list[int]:
    import mlflow

    rows = mlflow.MlflowClient(uri).get_metric_history(run.info.run_id, metric)
    assert all(row.value == 1 / row.step for row in rows) or metric != "train/loss"
    return sorted(row.step for row in rows)


def files(uri: str, run: Any, path: str | None = None) -> Iterator[str]:
    import mlflow

    for found in mlflow.MlflowClient(uri).list_artifacts(run.info.run_id, path):
        if found.is_dir:
            yield from files(uri, run, found.path)
        else:
            yield found.path


@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")  # of mlflow's own store
def test_sqlite_without_a_server(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", models=True)
    run.train(1, 1200)
    size = {"width": 1, "height": 1}
    media = run.recorder.media
    run.log("image", 3, tag="a picture", media=media.put(b"png", ".png"), caption="", **size)
    row = {"sample": 1, "input": None, "truth": "ant", "output": "bee", "confidence": 0.5, "is_right": False}
    run.log("prediction", 3, tag="valid/p", media=media.put(b"png", ".png"), rows=[row], **size)
    run.log("text", 3, tag="text", text="said", num_characters=4, media=None)
    run.log("confusion", 3, tag="c", classes=["a", "b"], counts=[[1, 0], [0, 1]])
    run.log("decision", 3, name="threads", value=2, reason="measured", override="threads")
    left_out = {"nan": 2, "positive_infinite": 0, "negative_infinite": 0, "bins": [1], "counts": [4]}
    run.log("histogram", 3, tag="w", num=4, min=1.0, max=3.0, sum=8.0, sum_squares=18.0, **left_out)
    (tmp_path / "run" / "best").mkdir()
    (tmp_path / "run" / "best" / "model.safetensors").write_bytes(b"weights")
    run.log("artifact", 3, name="best", type="checkpoint", path="best", sha256="ab", bytes=7, parents=["d"])
    run.end()
    assert run.alerts == []
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    kept = runs_at(uri, "run")
    assert kept.keys() == {"all", "0"}
    one = kept["0"]
    assert steps(uri, one) == list(range(1, 1201))
    assert len([tag for tag in one.data.metrics if tag.startswith("sensor __C_-")]) == 1
    wanted = {"w/mean": 2.0, "w/min": 1.0, "w/std": 0.5**0.5, "w/nan": 2.0, "valid/accuracy": 0.5}
    assert wanted.items() <= dict(one.data.metrics).items()
    assert one.data.params["model.name"] == "convnet"
    assert one.data.params["decisions/threads"] == "2"
    assert len(one.data.params["notes"]) == 500
    tags = one.data.tags
    assert tags["mlflow.source.git.commit"] == "c0ffee"
    assert tags["mlflow.parentRunId"] == kept["all"].info.run_id
    assert tags["torchkeep.checkpoint.best"] == "ab"
    assert {run.info.status for run in kept.values()} == {"FINISHED"}
    assert kept["all"].data.metrics["valid/accuracy"] == 0.5
    there = list(files(uri, one))
    suffixes = {".png": 2, ".json": 2, ".txt": 2, ".patch": 1, ".py": 1, ".safetensors": 1}
    assert Counter(Path(path).suffix for path in there) == suffixes
    assert "models/best/model.safetensors" in there
    assert (tmp_path / "mlartifacts").is_dir()
    assert not (Path.cwd() / "mlruns").exists()


def test_a_server_that_is_killed_and_comes_back(tmp_path: Path, running: Server) -> None:
    longer = Run(tmp_path / "longer", uri=running.url)
    longer.train(1, 40)
    missed = Run(tmp_path / "missed", uri=running.url)
    missed.train(1, 10)
    missed.recorder.close()  # as where the process is ended: nothing says that the run has
    missed = Run(tmp_path / "missed", attempt=1, from_step=8, uri=running.url, close_timeout_s=10)
    missed.train(9, 12)
    running.kill()
    longer.train(41, 80)
    missed.train(13, 20)
    missed.end("failed")
    settings = MlflowSettings(uri=running.url)
    with pytest.raises(StorageError, match="has not taken all") as refused:
        sync(tmp_path / "missed", "mlflow", settings)
    assert "torchkeep sync" in refused.value.fix
    running.start()
    longer.train(81, 100)
    longer.end()

    kept = runs_at(running.url, "longer")  # the feed itself has caught up
    assert steps(running.url, kept["0"]) == list(range(1, 101))
    assert kept["0"].info.status == "FINISHED"
    assert any("failed" in alert for alert in longer.alerts)
    assert not any("has not taken all" in alert for alert in longer.alerts)

    for _ in range(2):  # what the run could not send is sent afterwards, and once
        assert sync(tmp_path / "missed", "mlflow", settings) > 20
        kept = runs_at(running.url, "missed")
        assert steps(running.url, kept["0"]) == list(range(1, 11))
        assert steps(running.url, kept["1"]) == list(range(9, 21))
    assert {name: kept[name].info.status for name in kept} == {"all": "FAILED", "0": "KILLED", "1": "FAILED"}
    assert {"code/diff.patch", "code/untracked/pkg/new.py"} <= set(files(running.url, kept["0"]))
    assert kept["1"].data.tags["mlflow.source.git.commit"] == "c0ffee"
