"""A power cut: the image of a disk is copied while a program saves on it, and each copy is mounted as after a cut."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from course import Child, Note, Place, assert_safe, hand_loop
from test_disk import is_root, mounted

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not is_root() or shutil.which("mkfs.ext4") is None,
    reason="needs root, loop devices and mkfs.ext4",
)

NUM_CUTS = int(os.environ.get("TORTURE_CUTS", "60"))
IMAGE_BYTES = 24 << 20
STEPS = 400


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder in memory, where there is one: a copy of the image takes milliseconds there."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        yield Path(folder)


def at_one_moment(image: Path) -> bytes:
    """The image as it was between two readings that are equal: the disk was not written to meanwhile."""
    before = image.read_bytes()
    while (data := image.read_bytes()) != before:
        before = data
    return data


def careless(child: Child) -> Child:
    """The same program on a system whose syncs do nothing."""

    def run() -> int:
        os.fsync = lambda handle: None  # type: ignore[assignment]
        return child()

    return run


def cuts(memory: Path, tmp_path: Path, keep_last: int, wait: bool, is_careless: bool, count: int) -> dict[str, int]:
    """How many copies were looked at, how much was acknowledged, and in how many something of it is not whole."""
    place, image, disk = Place(tmp_path), memory / "image", tmp_path / "disk"
    draws, looked_at, lost, acknowledged = random.Random(0), 0, 0, 0
    assert place.run_whole(hand_loop(tmp_path / "warm", 2)).code == 0
    subprocess.run(["truncate", "-s", str(IMAGE_BYTES), str(image)], check=True)
    while looked_at < count:
        subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True)
        place.acks.unlink(missing_ok=True)
        copies: list[tuple[list[int], Path]] = []
        with mounted(disk, "-o", "loop", str(image)):
            child = hand_loop(disk / "checkpoints", STEPS, keep_last, wait)
            pid = place.fork(careless(child) if is_careless else child)
            while len(copies) < 12 and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                time.sleep(draws.uniform(0, 0.15))
                acked = place.acked()  # before the copy: later ones may be in it as well
                copy = memory / f"copy-{len(copies)}"
                copy.write_bytes(at_one_moment(image))
                copies.append((acked, copy))
            os.kill(pid, 9)
            ended = place.wait(pid)
            assert ended.code in (0, -9), ended.said
        for acked, copy in copies:
            with mounted(disk, "-o", "loop", str(copy)):
                looked_at, acknowledged = looked_at + 1, acknowledged + len(acked)
                try:
                    assert_safe(disk / "checkpoints", acked)
                    kept = acked[-keep_last:]
                    there = {path.name for path in (disk / "checkpoints").glob("step-*")}
                    # a later save may have retired the oldest of them, and nothing else
                    assert keep_last < STEPS or {f"step-{step:08d}" for step in kept} <= there
                except (AssertionError, OSError):
                    lost += 1
            copy.unlink()
    assert acknowledged > looked_at
    return {"cuts": looked_at, "acknowledged": acknowledged, "cuts_that_lost_acknowledged": lost}


@pytest.mark.parametrize(("keep_last", "wait"), [(STEPS, True), (2, True), (2, False)])
def test_what_was_acknowledged_is_there_after_a_power_cut(
    keep_last: int, wait: bool, memory: Path, tmp_path: Path, note: Note
) -> None:
    figures = cuts(memory, tmp_path, keep_last, wait, False, NUM_CUTS)
    assert not figures["cuts_that_lost_acknowledged"]
    note(**figures)


def test_a_power_cut_is_seen_where_nothing_is_synced(memory: Path, tmp_path: Path, note: Note) -> None:
    """That the tests above can fail: without a sync they lose what was acknowledged."""
    figures = cuts(memory, tmp_path, STEPS, True, True, 12)
    assert figures["cuts_that_lost_acknowledged"] > figures["cuts"] // 2
    note(**figures)
