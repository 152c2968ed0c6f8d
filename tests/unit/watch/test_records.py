"""What the record promises: nothing is lost, nothing counts twice, and nothing stops the training but a full disk."""

from __future__ import annotations

import math
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from torchkeep.errors import RunFolderError
from torchkeep.folder import RunFolder
from torchkeep.watch.media import MediaStore
from torchkeep.watch.monitor import MonitorSettings
from torchkeep.watch.reading import RunRecord
from torchkeep.watch.recorder import Recorder
from torchkeep.watch.records import (
    canonical,
    dump_record,
    kept_records,
    next_attempt,
    read_records,
)


def train(path: Path, first: int, last: int, every: int = 1, views: Any = ()) -> None:
    """One attempt that goes on from step ``first`` and is killed after ``last``; evaluated every fifth step."""
    recorder = Recorder(path, attempt=next_attempt(path), views=views)
    recorder.log("attempt_start", step=first, samples=8 * first, epoch=0, from_step=first)
    if first == 0:
        recorder.log("scalars", step=0, samples=0, epoch=0, values={"valid/loss": 9.0})
    for step in range(first + 1, last + 1):
        at = {"step": step, "samples": 8 * step, "epoch": 0}
        recorder.log("scalars", **at, values={"train/loss": 1 / step})
        recorder.log("timing", **at, values={"samples_per_s": time.perf_counter()})
        if step % 5 == 0:
            recorder.log("scalars", **at, values={"valid/loss": 2 / step, "valid/accuracy": math.nan})
    recorder.close()


def test_a_run_of_many_attempts_is_one_run(tmp_path: Path) -> None:
    train(tmp_path / "whole", 0, 30)
    # killed before the first checkpoint; at 10; at 20; the newest checkpoint was damaged, so back to 5; then to the end
    for first, last in [(0, 3), (0, 13), (10, 24), (20, 29), (5, 11), (10, 30)]:
        train(tmp_path / "torn", first, last)
    assert canonical(tmp_path / "torn") == canonical(tmp_path / "whole")
    assert canonical(tmp_path / "whole").count(b"\n") == 1 + 30 + 6
    steps = RunRecord(tmp_path / "torn").scalars(["train/loss"])["step"].to_pylist()
    assert steps == list(range(1, 31))
    assert next_attempt(tmp_path / "torn") == 6


def test_every_pair_of_kills_gives_the_same_record(tmp_path: Path) -> None:
    train(tmp_path / "whole", 0, 7)
    wanted = canonical(tmp_path / "whole")
    for one in range(8):
        for back in range(one + 1):
            for two in range(back, 8):
                path = tmp_path / f"{one}-{back}-{two}"
                for first, last in [(0, one), (back, two), (back, 7)]:
                    lines = [
                        {"kind": "attempt_start", "attempt": next_attempt(path), "step": first, "from_step": first}
                    ]
                    _append(path, lines + _records(next_attempt(path), first, last))
                assert canonical(path) == wanted, path.name


def _records(attempt: int, first: int, last: int) -> list[dict[str, Any]]:
    head = {"kind": "scalars", "attempt": attempt}
    rows = [] if first else [{**head, "step": 0, "samples": 0, "epoch": 0, "values": {"valid/loss": 9.0}}]
    for step in range(first + 1, last + 1):
        at = {**head, "step": step, "samples": 8 * step, "epoch": 0}
        rows.append({**at, "values": {"train/loss": 1 / step}})
        if step % 5 == 0:
            rows.append({**at, "values": {"valid/loss": 2 / step, "valid/accuracy": math.nan}})
    return rows


def _append(path: Path, records: list[dict[str, Any]]) -> None:
    with path.open("ab") as file:
        file.writelines(map(dump_record, records))


def test_a_torn_last_line_is_left_out_and_cut_by_the_next_attempt(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    train(path, 0, 4)
    whole = len(list(read_records(path)))
    with path.open("ab") as file:
        file.write(b'{"kind":"scalars","attempt":0,"step":5')
    assert len(list(read_records(path))) == whole
    assert next_attempt(path) == 1
    train(path, 4, 6)
    assert RunRecord(path).scalars(["train/loss"])["step"].to_pylist() == [
        1,
        2,
        3,
        4,
        5,
        6,
    ]


@pytest.mark.parametrize("damage", [b"\0\0\0\n", b"[1]\n", b'{"kind":"scalars"}\n', b"\xff\n", b"\n"])
def test_another_damaged_line_is_named(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "records.jsonl"
    train(path, 0, 4)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:3], damage, *lines[3:]]))
    with pytest.raises(RunFolderError, match="line 4"):
        list(read_records(path))


def test_a_missing_record_is_said_in_our_form(tmp_path: Path) -> None:
    assert next_attempt(tmp_path / "none") == 0
    (tmp_path / "empty").touch()
    assert next_attempt(tmp_path / "empty") == 0
    with pytest.raises(RunFolderError, match="cannot be read"):
        list(read_records(tmp_path / "none"))


def test_the_last_line_is_found_however_long(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    _append(path, [{"kind": "alert", "attempt": number, "step": 0, "text": "x" * 300_000} for number in range(3)])
    assert next_attempt(path) == 3


def test_numbers_that_are_not_finite_come_back(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    values = {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1.5, "e": np.float32("nan"), "f": np.float64(2)}
    with_none = {"best": None, "more": [math.nan, {"x": math.inf}]}
    recorder = Recorder(path, attempt=0)
    recorder.log("scalars", step=1, samples=1, epoch=0, values=values)
    recorder.log("run_end", step=1, samples=1, epoch=0, status="finished", metrics=with_none)
    recorder.close()
    scalars, end = read_records(path)
    np.testing.assert_array_equal(list(scalars["values"].values()), [math.nan, math.inf, -math.inf, 1.5, math.nan, 2])
    assert end["metrics"]["best"] is None
    assert math.isnan(end["metrics"]["more"][0])
    assert end["metrics"]["more"][1] == {"x": math.inf}
    assert b'"NaN"' in canonical(path)


def test_nothing_that_is_logged_breaks_the_writer(tmp_path: Path) -> None:
    round_trip: list[Any] = []
    round_trip.append(round_trip)
    odd = [Path("x"), {1: 2}, 1 << 80, "\ud800", {3}, object(), round_trip, b"x", np.arange(3), np.int64(3)]
    recorder = Recorder(tmp_path / "r", attempt=0)
    for value in odd:
        recorder.log("alert", step=0, samples=0, epoch=0, value=value)
    recorder.close()
    values = [record["value"] for record in read_records(tmp_path / "r")]
    assert len(values) == len(odd)
    assert values[:3] == ["x", {"1": 2}, str(1 << 80)]
    assert values[-2:] == [[0, 1, 2], 3]


def test_records_arrive_whole_and_in_order(tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []
    recorder = Recorder(tmp_path / "r", attempt=3, on_record=[seen.append])
    for step in range(20_000):
        recorder.log("scalars", step=step, samples=step, epoch=0, values={"train/loss": 0.5})
        if step % 5000 == 0:
            recorder.flush()
            assert sum(1 for _ in read_records(tmp_path / "r")) == step + 1
    recorder.close()
    written = list(read_records(tmp_path / "r"))
    assert [(record["seq"], record["step"]) for record in written] == [(n, n) for n in range(20_000)]
    assert seen == written
    assert {"attempt": 3, "rank": 0}.items() <= written[0].items()
    recorder.close()


def test_the_writer_wakes_by_itself(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "r", attempt=0)
    for number in range(1, 4):
        time.sleep(0.15)
        recorder.log("alert", step=0, samples=0, epoch=0)
        deadline = time.monotonic() + 5
        while sum(1 for _ in read_records(tmp_path / "r")) < number:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    recorder.close()


class FailingView:
    name = "failing"
    close_timeout_s = 20.0

    def __init__(self) -> None:
        self.calls: list[str] = []

    def write(self, records: list[dict[str, Any]], media: MediaStore) -> None:
        self.calls.append("write")
        raise ValueError("no network")

    def flush(self) -> None:
        self.calls.append("flush")

    def close(self) -> None:
        self.calls.append("close")

    def abandon(self) -> None:
        self.calls.append("abandon")


class SlowView(FailingView):
    name = "slow"

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[dict[str, Any]] = []
        self.go_on = threading.Event()

    def write(self, records: list[dict[str, Any]], media: MediaStore) -> None:
        self.go_on.wait(10)
        self.seen += records


def test_a_failing_view_is_said_once_and_left_out(tmp_path: Path) -> None:
    alerts: list[str] = []
    failing, slow = FailingView(), SlowView()
    slow.go_on.set()
    recorder = Recorder(tmp_path / "r", attempt=0, views=[failing, slow], on_alert=alerts.append)
    for step in range(5):
        recorder.log("scalars", step=step, samples=0, epoch=0, values={"a": 1.0})
        deadline = time.monotonic() + 5
        while len(slow.seen) <= step and time.monotonic() < deadline:
            time.sleep(0.01)
    recorder.close()
    assert recorder.view_errors == 8  # the alerts are records too
    assert alerts == ["failing failed and the training goes on: ValueError: no network"] * 3
    kinds = [record["kind"] for record in read_records(tmp_path / "r")]
    assert sorted(kinds) == ["alert"] * 3 + ["scalars"] * 5
    assert [record["step"] for record in slow.seen if record["kind"] == "scalars"] == list(range(5))
    assert slow.calls == ["flush", "close"]


def test_a_slow_view_does_not_hold_up_the_record(tmp_path: Path) -> None:
    slow = SlowView()
    recorder = Recorder(tmp_path / "r", attempt=0, views=[slow])
    recorder.log("alert", step=0, samples=0, epoch=0)
    time.sleep(0.3)
    recorder.log("alert", step=1, samples=0, epoch=0)
    began = time.monotonic()
    recorder.flush(durable=True)
    assert time.monotonic() - began < 5
    assert len(list(read_records(tmp_path / "r"))) == 2
    assert slow.seen == []
    slow.go_on.set()
    recorder.close()
    assert len(slow.seen) == 2


def test_a_view_is_given_the_earlier_records_after_a_resume(tmp_path: Path) -> None:
    path = tmp_path / "r"
    train(path, 0, 13)
    view = SlowView()
    view.go_on.set()
    train(path, 10, 15, views=[view])
    assert view.seen == list(kept_records(path))
    assert {record["attempt"] for record in view.seen} == {0, 1}


def test_what_was_logged_is_written_when_nobody_closes(tmp_path: Path) -> None:
    program = """
        import sys, pathlib
        from torchkeep.watch.recorder import Recorder
        Recorder(pathlib.Path(sys.argv[1]), attempt=0).log("alert", step=0, samples=0, epoch=0)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program), tmp_path / "r"], check=True)
    assert len(list(read_records(tmp_path / "r"))) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="a limit on a file's size is set by the resource module")
def test_a_full_disk_is_said_at_the_checkpoint_and_overcome(tmp_path: Path) -> None:
    program = """
        import pathlib, resource, signal, sys, time
        from torchkeep.errors import StorageError
        from torchkeep.watch.recorder import Recorder
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
        recorder = Recorder(pathlib.Path(sys.argv[1]), attempt=0)
        for step in range(100):
            recorder.log("scalars", step=step, samples=step, epoch=0, values={"train/loss": 0.5})
            if step == 50:
                time.sleep(0.5)
        for _ in range(2):
            try:
                recorder.flush(durable=True)
            except StorageError as error:
                print(error.said())
        if sys.argv[2] == "freed":
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
            recorder.close()
    """
    for name, kept in (("full", False), ("freed", True)):
        command = [sys.executable, "-c", textwrap.dedent(program), tmp_path / name, name]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.stdout.count("StorageError: the disk refused a write") == 2, done.stderr
        seqs = [record["seq"] for record in read_records(tmp_path / name)]
        assert seqs == list(range(len(seqs)))
        assert (len(seqs) == 101) == kept  # the refusal is an alert of its own


def test_settings() -> None:
    assert MonitorSettings().views == ["tensorboard"]
    assert MonitorSettings().log_every is None
    with pytest.raises(ValueError, match="greater than 0"):
        MonitorSettings(log_every=0)


def test_what_a_thread_records_after_the_end_leaves_the_run_finished(tmp_path: Path) -> None:
    for attempt, wanted in enumerate(["finished", "failed"]):
        recorder = Recorder(tmp_path / "records.jsonl", attempt=attempt)
        recorder.log("attempt_start", step=0, samples=0, epoch=0, from_step=0)
        recorder.flush()
        assert RunFolder(tmp_path).status() == "killed"
        recorder.log("run_end", step=1, samples=1, epoch=1, status=wanted, metrics={})
        recorder.log("system", step=1, samples=1, epoch=1, values={"system/cpu_percent": 3.0})
        recorder.close()
        assert RunFolder(tmp_path).status() == wanted
