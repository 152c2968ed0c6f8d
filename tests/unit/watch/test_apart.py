"""A view in a process of its own: it may hang, print, die or outlive the training, which goes on."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from torchkeep.errors import RunFolderError, SettingsError
from torchkeep.files import FolderLock
from torchkeep.watch.afterwards import sync
from torchkeep.watch.apart import Apart
from torchkeep.watch.feeds import Unreachable
from torchkeep.watch.media import MediaStore
from torchkeep.watch.recorder import Recorder

CLIENT = """
import sys, time
from torchkeep.watch.apart import Attempts

class Client(Attempts):
    def begin(self, first):
        print("a client says what it likes")
        return True

    def send(self, records):
        for record in records:
            if record["kind"] == "hang":
                time.sleep(1000)
            if record["kind"] == "wrong":
                raise ValueError("no such thing")
            if record["kind"] == "unreached":
                raise ConnectionError("nobody is there")
            with (self.folder / "sent.txt").open("a") as file:
                file.write(f"{record['attempt']}:{record['seq']} ")
            self.seq = record["seq"]

    def end(self, is_whole):
        with (self.folder / "sent.txt").open("a") as file:
            file.write("end ")
"""


class View(Apart):
    name = "json"  # any package that is there
    sender = "client_of_a_test:Client"
    answer_s = 20.0


class Settings(SimpleNamespace):
    def model_dump(self) -> dict[str, Any]:
        return vars(self)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "client_of_a_test.py").write_text(CLIENT)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def view(folder: Path) -> View:
    return View(folder, 0, "run", Settings(models=False, close_timeout_s=10.0))


def record(seq: int, kind: str = "scalars", attempt: int = 0) -> dict[str, Any]:
    return {"kind": kind, "attempt": attempt, "rank": 0, "seq": seq, "step": seq, "samples": 0, "epoch": 0, "time": 0.0}


def sent(folder: Path) -> list[str]:
    return (folder / "sent.txt").read_text().split()


def test_records_arrive_once_and_attempts_end(folder: Path) -> None:
    shown, media = view(folder), MediaStore(folder)
    shown.write([record(0), record(1)], media)
    shown.write([record(0), record(1), record(2), record(0, attempt=1)], media)
    shown.close()
    assert sent(folder) == ["0:0", "0:1", "0:2", "end", "1:0", "end"]
    assert "a client says" in (folder / "json" / "client.log").read_text()


def test_what_cannot_be_sent_is_told_apart(folder: Path) -> None:
    shown, media = view(folder), MediaStore(folder)
    with pytest.raises(Unreachable, match="nobody is there"):
        shown.write([record(0), record(1, "unreached")], media)
    with pytest.raises(RuntimeError, match="no such thing"):
        shown.write([record(1, "wrong")], media)
    shown.write([record(2)], media)
    shown.close()
    assert sent(folder) == ["0:0", "0:2", "end"]


def test_a_client_that_hangs_is_ended_and_its_records_are_sent_again(folder: Path) -> None:
    recorder = Recorder(folder / "records.jsonl", attempt=0)
    for step, kind in enumerate(["scalars", "wrong", "scalars", "scalars"]):
        recorder.log(kind, step=step, samples=0, epoch=0)
    recorder.close()
    shown, media = view(folder), MediaStore(folder)
    shown.write([record(0)], media)
    shown.answer_s = 0.5
    with pytest.raises(Unreachable, match="no answer"):
        shown.write([record(1, "hang")], media)
    shown.answer_s = 20
    shown.write([record(3)], media)
    shown.close()
    assert sent(folder) == ["0:0", "0:0", "0:2", "0:3", "end"]


def test_what_was_handed_over_is_sent_when_the_training_is_killed(folder: Path) -> None:
    program = (
        "import os, sys; sys.path.append(os.environ['TESTS']); from pathlib import Path; import test_apart as t\n"
        f"folder = Path({str(folder)!r}); v = t.view(folder); v.write([t.record(0)], t.MediaStore(folder)); os._exit(9)"
    )
    done = subprocess.run([sys.executable, "-c", program], env={"PYTHONPATH": str(folder.parent), "TESTS": HERE})
    assert done.returncode == 9
    deadline = time.monotonic() + 20
    while sent(folder)[-1] != "end":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert sent(folder) == ["0:0", "end"]


HERE = str(Path(__file__).parent)


def test_a_client_that_is_missing_is_said(tmp_path: Path) -> None:
    class Missing(View):
        name = "no_such_client"

    with pytest.raises(SettingsError) as refused:
        Missing(tmp_path, 0, "run", Settings(close_timeout_s=1.0))
    assert refused.value.fix == 'pip install "torchkeep[no_such_client]"'


def test_a_run_is_not_sent_while_it_goes_on_or_without_a_record(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="cannot be read"):
        sync(tmp_path, "mlflow")
    with contextlib.closing(FolderLock(tmp_path).acquire()), pytest.raises(RunFolderError, match="goes on"):
        sync(tmp_path, "mlflow")


def test_tensorboard_is_made_anew_from_the_record(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for attempt, (first, last) in enumerate([(0, 6), (4, 8)]):
        recorder = Recorder(tmp_path / "records.jsonl", attempt=attempt)
        recorder.log("attempt_start", step=first, samples=0, epoch=0, from_step=first)
        for step in range(first + 1, last + 1):
            recorder.log("scalars", step=step, samples=0, epoch=0, values={"train/loss": attempt + step / 10})
        recorder.close()
    for _ in range(2):
        assert sync(tmp_path, "tensorboard") == 10
        shown = EventAccumulator(str(tmp_path / "tensorboard"))
        shown.Reload()
        rows = shown.Tensors("train/loss") if "train/loss" in shown.Tags()["tensors"] else shown.Scalars("train/loss")
        assert [row.step for row in rows] == list(range(1, 9))
