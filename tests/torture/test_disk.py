"""A disk that is full, and one that fails: what was saved stays good, and the run says what happened."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from course import (
    Child,
    Ended,
    Note,
    Place,
    Seam,
    assert_safe,
    begin,
    clear,
    end_of,
    go_on,
    hand_end,
    hand_loop,
    run_in,
    write_course,
)

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="forks its children")

SYSCALLS = ("write", "fsync", "rename", "mkdir", "unlink,unlinkat", "rmdir")


def assert_said(ended: Ended) -> None:
    """One message of ours, and no traceback."""
    assert "Traceback" not in ended.said, ended.said
    assert ended.said.count("StorageError: ") == 1, ended.said
    assert ended.code in (1, 2), ended


# --- ENOSPC


@contextmanager
def mounted(folder: Path, *words: str) -> Iterator[None]:
    folder.mkdir(exist_ok=True)
    done = subprocess.run(["mount", *words, str(folder)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mount is not possible here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def is_root() -> bool:
    return hasattr(os, "geteuid") and os.geteuid() == 0


@pytest.mark.skipif(not is_root() or sys.platform != "linux", reason="needs root, to mount a small tmpfs")
def test_a_disk_that_is_full_at_every_size(tmp_path: Path, note: Note) -> None:
    place = Place(tmp_path)
    write_course(tmp_path)
    assert place.run_whole(begin("whole")).code == 0
    wanted, page, full, goes_on = end_of(tmp_path / "whole"), os.sysconf("SC_PAGESIZE"), 0, 0
    small = tmp_path / "small"
    for pages in range(2, 400, 2):
        place.acks.unlink(missing_ok=True)
        with mounted(small, "-t", "tmpfs", "-o", f"size={pages * page}", "tmpfs"):
            ended = place.run(begin("small/run", "--preflight", "off"))
            acked = place.acked()
            if ended.code == 0 and "could not be written" not in ended.said:
                break
            newest = assert_safe(run_in(small, "run") / "checkpoints", acked)
            if ended.code == 0:
                goes_on += 1
            else:
                assert_said(ended)
                full += 1
            subprocess.run(["mount", "-o", "remount,size=16m", str(small)], check=True)
            resumed = place.run(go_on(small, "run"))
            assert resumed.code == 0, f"{pages} pages: {ended.said}\n{resumed.said}"
            assert newest < 0 or f"resumed from step {newest}," in resumed.said
            assert end_of(run_in(small, "run")) == wanted
    assert full > 10
    note(sizes=full + goes_on + 1, ended_with_a_message=full, went_on_and_said_so=goes_on, room_bytes=pages * page,
         same_sha256=full + goes_on, lost_acknowledged=0)  # fmt: skip


# --- EIO, through the seam: of a run, whichever thread it hits


def test_a_disk_that_fails_at_each_call_of_a_run(tmp_path: Path, note: Note) -> None:
    place = Place(tmp_path)
    write_course(tmp_path)
    assert place.run_whole(begin("whole")).code == 0
    wanted, ended_so, number = end_of(tmp_path / "whole"), Counter[str](), 0
    record, late = tmp_path / "hurt-run" / "records.jsonl", list[int]()
    while True:
        number += 1
        place.acks.unlink(missing_ok=True)
        clear(tmp_path, "hurt-run")
        ended = place.run(begin(str(tmp_path / "hurt-run")), Seam(number, "error"))
        if not ended.hurt:
            break
        newest = assert_safe(run_in(tmp_path, "hurt-run") / "checkpoints", place.acked())
        if ended.code:
            assert_said(ended)
            ended_so["message"] += 1
        else:
            # outside the run lies what can be made again; what is put out of sight goes at the next save; lines of the
            # record that were not taken are written again
            call, _, path = ended.hurt.partition(" ")
            is_silent = "/hurt-run" not in path or path.endswith(".retired") or (call, path) == ("write", str(record))
            if (call, path) == ("fsync", str(record)):
                late.append(number)
            else:
                assert is_silent or "could not be written" in ended.said, f"{ended.hurt}: {ended.said}"
            ended_so["went on"] += 1
        resumed = place.run(go_on(tmp_path, "hurt-run"))
        assert resumed.code == 0, f"after EIO at {ended.hurt}: {ended.said}\n{resumed.said}"
        assert newest < 0 or f"resumed from step {newest}," in resumed.said
        assert end_of(run_in(tmp_path, "hurt-run")) == wanted, ended.hurt
    # the last call, when the record is closed and its end was synced before; runs differ in how often lines are written
    assert min(late) > number - 4
    assert ended_so["message"] > 10
    note(errors=ended_so.total(), ended=dict(ended_so), same_sha256=ended_so.total(), lost_acknowledged=0)


# --- the same by strace, at the border of the system: of a loop that saves in its one thread


def traced(place: Place, child: Child, syscalls: str, what: str, number: int) -> tuple[Ended, bool]:
    """A child whose ``number``-th call of each of some system calls is hurt; whether one was."""
    log = place.folder / "strace"
    log.unlink(missing_ok=True)

    def stopped() -> int:
        os.kill(os.getpid(), signal.SIGSTOP)
        return child()

    pid = place.fork(stopped)
    os.waitpid(pid, os.WUNTRACED)
    words = ["strace", "-f", "-qq", "-o", str(log), "-p", str(pid), "-e", f"trace={syscalls}",
             "-e", f"inject={syscalls}:{what}:when={number}"]  # fmt: skip
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as strace:
        while f"TracerPid:\t{strace.pid}\n" not in Path(f"/proc/{pid}/status").read_text():
            if strace.poll() is not None:
                os.kill(pid, signal.SIGKILL), os.waitpid(pid, 0)
                pytest.skip(f"strace cannot attach here: {strace.communicate()[1].strip()}")
            time.sleep(0.001)
        os.kill(pid, signal.SIGCONT)
        ended = place.wait(pid)
    text = log.read_text()
    return ended, "INJECTED" in text or "killed by SIGKILL" in text


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
@pytest.mark.parametrize("what", ["signal=SIGKILL", "error=EIO"])
def test_each_system_call_of_a_loop_that_saves(what: str, tmp_path: Path, note: Note) -> None:
    place, hurt, said = Place(tmp_path), Counter[str](), 0
    assert place.run_whole(hand_loop(tmp_path / "whole")).code == 0
    wanted = hand_end(tmp_path / "whole")
    for syscalls in SYSCALLS:
        for number in range(1, 1000):
            place.acks.unlink(missing_ok=True)
            clear(tmp_path, "hurt-loop")
            ended, is_hurt = traced(place, hand_loop(tmp_path / "hurt-loop"), syscalls, what, number)
            if not is_hurt:
                break
            hurt[syscalls] += 1
            assert_safe(tmp_path / "hurt-loop", place.acked())
            if what == "signal=SIGKILL":
                assert ended.code == -signal.SIGKILL, ended
            elif ended.code:
                assert_said(ended)
                said += 1
            assert place.run(hand_loop(tmp_path / "hurt-loop")).code == 0
            assert hand_end(tmp_path / "hurt-loop") == wanted
        assert hurt[syscalls]
    note(hurt=hurt.total(), of=dict(hurt), ended_with_a_message=said, same_sha256=hurt.total(), lost_acknowledged=0)
