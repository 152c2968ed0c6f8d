"""kill -9 before each write, sync and rename in turn, and at random moments: always resumable, to the same bits."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from course import Fault, Note, Place, Seam, assert_safe, begin, clear, end_of, go_on, run_in, write_course

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="forks its children")

NUM_KILLS = int(os.environ.get("TORTURE_KILLS", "300"))


@pytest.mark.parametrize("fault", ["kill", "torn"])
def test_a_run_killed_before_each_call_that_changes_the_disk(fault: Fault, tmp_path: Path, note: Note) -> None:
    place = Place(tmp_path)
    write_course(tmp_path)
    assert place.run_whole(begin("whole")).code == 0
    wanted, hurt, number, calls = end_of(tmp_path / "whole"), Counter[str](), 0, 0
    while True:
        number += 1
        place.acks.unlink(missing_ok=True)
        ended = place.run(begin("killed"), Seam(number, fault))
        if ended.code == 0:
            break
        assert ended.code == -signal.SIGKILL, ended.said
        kind = ended.hurt.split(" ")[0]
        calls += 1
        if fault == "kill" or kind == "write":
            hurt[kind] += 1
            acked = place.acked()
            newest = assert_safe(run_in(tmp_path, "killed") / "checkpoints", acked)
            resumed = place.run(go_on(tmp_path, "killed"))
            assert resumed.code == 0, f"after a kill at {ended.hurt}: {resumed.said}"
            assert newest < 0 or f"resumed from step {newest}," in resumed.said
            assert end_of(run_in(tmp_path, "killed")) == wanted, ended.hurt
        clear(tmp_path, "killed")
    assert hurt["write"] > 10
    note(kills=hurt.total(), of=dict(hurt), calls_of_a_run=calls, same_sha256=hurt.total(), lost_acknowledged=0)


def test_a_run_killed_at_random_moments(tmp_path: Path, note: Note) -> None:
    """Each run is killed again and again until it reaches its end; saves are under way most of the time."""
    seed = int(os.environ.get("TORTURE_SEED", time.time_ns() % 10**6))
    draws, place = random.Random(seed), Place(tmp_path)
    write_course(tmp_path, epochs=16, every=2)
    assert place.run_whole(begin("whole")).code == 0
    began = time.perf_counter()
    assert place.run(begin("again")).code == 0
    longest_s, wanted = time.perf_counter() - began, end_of(tmp_path / "whole")
    kills = runs = most = 0
    lags: Counter[int] = Counter()
    while kills < NUM_KILLS:
        place.acks.unlink(missing_ok=True)
        of_this = 0
        while True:
            pid = place.fork(go_on(tmp_path, "killed"))
            # within a moment that is still less than the whole takes: some come to their end
            time.sleep(draws.uniform(0, longest_s * 0.8) if kills < NUM_KILLS else longest_s)
            if kills < NUM_KILLS:
                os.kill(pid, signal.SIGKILL)
            ended = place.wait(pid)
            if ended.code == 0:
                break
            assert ended.code == -signal.SIGKILL, f"seed {seed}: {ended.said}"
            kills, of_this = kills + 1, of_this + 1
            acked = place.acked()
            newest = assert_safe(run_in(tmp_path, "killed") / "checkpoints", acked)
            lags[newest - max(acked, default=newest)] += 1
        assert end_of(run_in(tmp_path, "killed")) == wanted, f"seed {seed}"
        runs, most = runs + 1, max(most, of_this)
        clear(tmp_path, "killed")
    note(kills=kills, runs=runs, most_kills_of_a_run=most, steps_above_acknowledged=dict(sorted(lags.items())),
         same_sha256=runs, lost_acknowledged=0, seed=seed)  # fmt: skip
