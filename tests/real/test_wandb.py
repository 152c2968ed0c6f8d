"""Weights & Biases' real client: offline files read back, and online against a stub of a server that goes and comes."""

from __future__ import annotations

import io
import json
import math
import struct
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from safetensors.numpy import save
from wandb_stub import KEY, StubRun, WandbStub

from torchkeep.errors import StorageError
from torchkeep.watch.afterwards import sync
from torchkeep.watch.feeds import Unreachable
from torchkeep.watch.histograms import histogram
from torchkeep.watch.media import MediaStore, Medium
from torchkeep.watch.recorder import Recorder
from torchkeep.watch.records import read_records
from torchkeep.watch.wandb import WandbSettings, WandbView

pytest.importorskip("wandb", reason="the extra wandb is not installed")

SETTINGS = {"model": {"name": "convnet"}, "train": {"epochs": 2}}


@pytest.fixture(autouse=True)
def _at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_MODE", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbStub]:
    server = WandbStub()
    server.start()
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB__FILE_STREAM_TRANSMIT_INTERVAL", "1")
    yield server
    server.stop()


def png() -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)).save(buffer, "png")
    return buffer.getvalue()


def wav() -> bytes:
    import wave

    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(bytes(1600))
    return buffer.getvalue()


def view(folder: Path, attempt: int, **settings: Any) -> WandbView:
    return WandbView(folder, attempt, folder.name, WandbSettings(project="tests", **settings))


class Run:
    """A run that records as a training does."""

    def __init__(self, folder: Path, attempt: int = 0, from_step: int = 0, **settings: Any):
        folder.mkdir(exist_ok=True)
        self.alerts: list[str] = []
        self.view = view(folder, attempt, **settings)
        self.recorder = Recorder(
            folder / "records.jsonl", attempt=attempt, views=[self.view], on_alert=self.alerts.append
        )
        if attempt == 0:
            code = {"commit": "c0ffee", "diff": "+ a line", "untracked": {"new.py": "1"}}
            environment = {"python": "3.11", "lock": ["torch==2.13"]}
            self.log("run_start", 0, began=0.0, seed=7, command=["train"], code=code, environment=environment)
            self.log("artifact", 0, name="pkg/new.py", type="code", parents=[], sha256="1", bytes=5,
                     late=Medium(b"x = 1", ".txt"))  # fmt: skip
        self.log("attempt_start", from_step, from_step=from_step, settings=SETTINGS)

    def log(self, kind: str, step: int, **payload: Any) -> None:
        self.recorder.log(kind, step=step, samples=step * 8, epoch=step // 10, **payload)

    def train(self, first: int, last: int) -> None:
        for step in range(first, last + 1):
            self.log("scalars", step, values={"train/loss": 1 / step, "_own": float(step)})
            self.recorder.flush()

    def end(self, status: str = "finished") -> None:
        self.log("run_end", 99, status=status, reason="", metrics={"valid/accuracy": 0.5}, artifacts=[])
        self.recorder.close()


def log_every_kind(run: Run, step: int) -> None:
    size = {"width": 4, "height": 4}
    mesh = {"vertices": np.eye(3, dtype=np.float32), "colors": np.zeros((3, 3), np.uint8)}
    faces = mesh | {"faces": np.array([[0, 1, 2]], np.int32)}
    curve = {f"{is_right}_{said}": [1, 0] for is_right in ("true", "false") for said in ("positives", "negatives")}
    row = {"sample": 1, "input": None, "truth": "ant", "output": "bee", "confidence": 0.5, "is_right": False}
    media = run.recorder.media
    run.log("image", step, tag="a picture", caption="here", media=media.put(png(), ".png"), **size)
    run.log("figure", step, tag="figure", media=media.put(png(), ".png"), **size)
    run.log("prediction", step, tag="valid/prediction", media=media.put(png(), ".png"), rows=[row], **size)
    run.log("mesh", step, tag="mesh", media=media.put(save(faces), ".safetensors"), num_vertices=3, num_faces=1)
    run.log("mesh", step, tag="points", media=media.put(save(mesh), ".safetensors"), num_vertices=3, num_faces=0)
    run.log("text", step, tag="text", text="<b>bold</b>", num_characters=11, media=None)
    run.log("audio", step, tag="sound", media=media.put(wav(), ".wav"), sample_rate=8000, seconds=0.1, caption="")
    run.log("confusion", step, tag="valid/confusion", classes=["ant", "bee"], counts=[[3, 1], [0, 2]])
    run.log("pr_curve", step, tag="valid/pr", thresholds=[0, 1], precision=[1, 1], recall=[1, 0], **curve)
    run.log("trainable_map", step, rows=[{"name": "features", "is_frozen": True, "shape": [1, 2]}], frontier=None)
    run.log("bad_samples", step, samples_bad=[{"id": "x.png", "reason": "torn"}])
    run.log("graph", step, tag="model", media=media.put(b'{"nodes": []}', ".json"), num_nodes=0, how="modules")
    run.log("profile", step, media=media.put(b'{"traceEvents": []}', ".json"), first_step=1, last_step=2)
    run.log("alert", step, name="loss", level="warning", text="the loss stands still", fix="wait")
    run.log("decision", step, name="threads", value=2, reason="measured", override="threads")
    counts = {"nan": 1, "positive_infinite": 0, "negative_infinite": 0, "bins": [], "counts": []}
    run.log("histogram", step, tag="empty", num=0, min=None, max=None, sum=0, sum_squares=0, **counts)
    run.log("histogram", step, tag="weights", late=histogram(np.arange(100, dtype=np.float32)))
    run.log("scalars", step, values={"nan": math.nan, "inf": math.inf, "-inf": -math.inf})


MEDIA = {"a picture", "figure", "valid/prediction", "valid/prediction/table", "mesh", "points", "text", "sound",
         "valid/confusion_table", "valid/pr_table", "trainable_map", "bad_samples", "alert/loss",
         "empty/nan", "weights"}  # fmt: skip


def transaction_log(path: Path) -> Iterator[Any]:
    """The records of a .wandb file: protobuf in LevelDB's log format, behind a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, parts = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        _, size, kind = struct.unpack_from("<IHB", data, place)
        parts += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # a whole record, or its last part
            record = Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def history_of(records: list[Any]) -> list[dict[str, Any]]:
    return [
        {
            item.nested_key[0] if item.nested_key else item.key: json.loads(item.value_json)
            for item in record.history.item
        }
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]


def test_offline_files_hold_everything(tmp_path: Path) -> None:
    hooks = sys.excepthook, sys.exit
    run = Run(tmp_path / "run", mode="offline")
    run.train(1, 3)
    log_every_kind(run, 3)
    run.end()
    assert run.alerts == []
    assert (sys.excepthook, sys.exit) == hooks
    inside = tmp_path / "run" / "wandb"
    (path,) = inside.glob("wandb/offline-run-*/run-*.wandb")
    records = list(transaction_log(path))
    rows = history_of(records)
    losses = [(row["step"], row["train/loss"], row["value/_own"]) for row in rows if "train/loss" in row]
    assert losses == [(step, 1 / step, step) for step in (1, 2, 3)]
    assert all(row["samples"] == row["step"] * 8 for row in rows)
    assert [row["_timestamp"] for row in rows] == pytest.approx([
        record["time"] for record in read_records(tmp_path / "run" / "records.jsonl")
        if record["kind"] in ROW_KINDS
    ])  # fmt: skip
    assert set().union(*rows) >= MEDIA
    (last,) = [row for row in rows if "nan" in row]
    assert [str(last[name]) for name in ("nan", "inf", "-inf")] == ["nan", "inf", "-inf"]
    config = {item.key: json.loads(item.value_json) for record in records if record.HasField("config")
              for item in record.config.update}  # fmt: skip
    (started,) = [record.run for record in records if record.HasField("run")]
    assert started.run_group == "run"
    assert started.display_name == "run/attempt-0"
    assert config["model"] == {"name": "convnet"}
    assert config["seed"] == 7
    assert config["environment"] == {"python": "3.11"}
    assert config["decisions/threads"] == 2
    artifacts = {record.artifact.type: record.artifact for record in records if record.HasField("artifact")}
    code = {entry.path: Path(entry.local_path) for entry in artifacts["code"].manifest.contents}
    assert code.keys() == {"commit.txt", "diff.patch", "requirements.txt", "untracked/pkg/new.py"}
    assert all(place.is_relative_to(inside) for place in code.values())
    assert code["untracked/pkg/new.py"].read_text() == "x = 1"
    assert {"graph", "profile"} <= artifacts.keys()
    files = {name for record in records if record.HasField("files") for name in (f.path for f in record.files.files)}
    assert len([name for name in files if name.startswith("media/images/")]) == 3
    assert not list((tmp_path / "home").glob("*")), "something was written outside the run's folder"


ROW_KINDS = ("scalars", "image", "figure", "prediction", "mesh", "text", "audio", "confusion", "pr_curve",
             "trainable_map", "bad_samples", "alert", "histogram")  # fmt: skip


def only(stub: WandbStub, attempt: int = 0) -> StubRun:
    (run,) = [run for name, run in stub.runs.items() if name.endswith(f"-{attempt}")]
    return run


def steps(run: StubRun) -> list[int]:
    """The steps of the losses that the server has; each number of a row must be there once."""
    numbers = [row["_step"] for row in run.history]
    assert numbers == sorted(set(numbers))
    return [row["step"] for row in run.history if "train/loss" in row]


def wait_for(is_there: Any) -> None:
    deadline = time.monotonic() + 30
    while not is_there():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def kill_client() -> None:
    (client,) = [child for child in psutil.Process().children() if "torchkeep.watch" in " ".join(child.cmdline())]
    client.kill()


def test_online_the_server_gets_everything(tmp_path: Path, stub: WandbStub) -> None:
    run = Run(tmp_path / "run", models=True, tags=["mine"])
    run.train(1, 3)
    log_every_kind(run, 3)
    (tmp_path / "run" / "checkpoints" / "best").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "best" / "model.safetensors").write_bytes(b"weights")
    run.log("artifact", 3, name="best", type="checkpoint", path="checkpoints/best", sha256="ab", bytes=7,
            parents=["xxh3:data"])  # fmt: skip
    run.end()
    assert run.alerts == []
    kept = only(stub)
    assert steps(kept) == [1, 2, 3]
    assert {"groupName": "run", "displayName": "run/attempt-0", "jobType": "train"}.items() <= kept.facts.items()
    assert kept.facts["tags"] == ["mine"]
    assert kept.config["model"]["value"] == {"name": "convnet"}
    assert kept.summary["valid/accuracy"] == 0.5
    assert kept.summary["status"] == "finished"
    assert kept.exit_code == 0
    assert [alert["title"] for alert in kept.alerts] == ["loss"]
    assert set().union(*kept.history) >= MEDIA
    assert sum(next(row["weights"]["values"] for row in kept.history if "weights" in row)) == 100
    suffixes = [Path(name).suffix for name in kept.files if name.startswith("media/")]
    assert {".png": 3, ".wav": 1, ".html": 1, ".obj": 1}.items() <= Counter(suffixes).items()
    by_type = {made["artifactTypeName"]: made for made in stub.artifacts}
    assert by_type["code"]["files"]["untracked/pkg/new.py"] == b"x = 1"
    assert by_type["model"]["files"] == {"model.safetensors": b"weights"}
    assert by_type["dataset"]["files"] == {"fingerprint.txt": b"xxh3:data"}
    assert all(made["is_committed"] for made in stub.artifacts)
    assert "UseArtifact" in stub.operations
    sent, artifacts = kept.sent_lines, len(stub.artifacts)
    assert sync(tmp_path / "run", "wandb", WandbSettings(project="tests")) > 0
    assert (only(stub).sent_lines, len(kept.alerts)) == (sent, 1)
    assert len(stub.runs) == 1
    assert artifacts


def test_a_server_that_dies_stops_nothing_and_loses_nothing(tmp_path: Path, stub: WandbStub) -> None:
    run = Run(tmp_path / "run", close_timeout_s=10)
    run.train(1, 4)
    wait_for(lambda: stub.runs and only(stub).lines)
    stub.stop()
    run.train(5, 8)
    log_every_kind(run, 8)
    began = time.monotonic()
    run.end()
    assert time.monotonic() - began < 20
    assert any("wandb" in alert for alert in run.alerts)
    with pytest.raises(StorageError, match="has not taken all") as refused:
        sync(tmp_path / "run", "wandb", WandbSettings(project="tests", close_timeout_s=10))
    assert "torchkeep sync" in refused.value.fix
    there = only(stub).sent_lines
    stub.start()
    assert sync(tmp_path / "run", "wandb", WandbSettings(project="tests")) == len(
        list(read_records(tmp_path / "run" / "records.jsonl"))
    )
    kept = only(stub)
    assert steps(kept) == list(range(1, 9))
    assert set().union(*kept.history) >= MEDIA
    assert kept.sent_lines == len(kept.lines) > there
    assert kept.exit_code == 0
    assert sum(name.startswith("media/images/") for name in kept.files) == 3


def test_a_client_that_dies_is_begun_anew(tmp_path: Path, stub: WandbStub) -> None:
    run = Run(tmp_path / "run")
    run.train(1, 4)
    wait_for(lambda: stub.runs and only(stub).lines)
    kill_client()
    run.train(5, 8)
    run.end()
    kept = only(stub)
    assert steps(kept) == list(range(1, 9))
    assert kept.sent_lines == len(kept.lines)


def test_without_a_key_a_run_is_offline_and_is_sent_later(
    tmp_path: Path, stub: WandbStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY")
    run = Run(tmp_path / "run")
    run.train(1, 4)
    files = tmp_path / "run" / "wandb" / "wandb"
    wait_for(lambda: list(files.glob("offline-run-*")))
    kill_client()
    run.train(5, 8)
    run.end()
    (path,) = files.glob("offline-run-*/run-*.wandb")
    rows = history_of(list(transaction_log(path)))
    assert [row["step"] for row in rows if "train/loss" in row] == list(range(1, 9))
    assert stub.operations == []
    with pytest.raises(StorageError) as refused:
        sync(tmp_path / "run", "wandb", WandbSettings(project="tests", close_timeout_s=10))
    assert refused.value.fix == "wandb login"
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    for _ in range(2):
        sync(tmp_path / "run", "wandb", WandbSettings(project="tests"))
        assert steps(only(stub)) == list(range(1, 9))
        assert only(stub).sent_lines == len(only(stub).lines)


def test_a_resumed_run_completes_the_attempt_before(tmp_path: Path, stub: WandbStub) -> None:
    run = Run(tmp_path / "run")
    run.train(1, 6)
    run.recorder.close()  # as where the process is ended: nothing says that the run has
    run = Run(tmp_path / "run", attempt=1, from_step=4)
    run.train(5, 8)
    run.end()
    assert steps(only(stub, 0)) == [1, 2, 3, 4, 5, 6]
    assert steps(only(stub, 1)) == [5, 6, 7, 8]
    assert only(stub, 1).facts["groupName"] == only(stub, 0).facts["groupName"]
    assert only(stub, 1).config["seed"]["value"] == 7
    for attempt in (0, 1):
        assert only(stub, attempt).sent_lines == len(only(stub, attempt).lines)


def test_without_a_server_nothing_is_opened(tmp_path: Path, stub: WandbStub) -> None:
    stub.stop()
    shown = view(tmp_path, 0, close_timeout_s=5)
    head = {"attempt": 0, "rank": 0, "seq": 0, "step": 1, "samples": 1, "epoch": 0, "time": 1.0}
    (tmp_path / "records.jsonl").write_bytes(b"{}\n")
    with pytest.raises(Unreachable):
        shown.write([{"kind": "scalars", **head, "values": {"loss": 1.0}}], MediaStore(tmp_path))
    shown.close()
