"""Ctrl-C and SIGTERM: saved at a step's end, and the rest of the run is the one that was never stopped."""

from __future__ import annotations

import signal
import sys
from typing import Any

import pytest

from torchkeep.keep.checkpoint import find_damage

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_signal_saves_at_a_step_and_the_resumed_run_is_the_same_run(
    slow: Any, ended: Any, number: signal.Signals, code: int
) -> None:
    process = slow.start("train", "slow.toml")
    slow.wait_for("runs/slow/checkpoints/step-00000008", process)
    process.send_signal(number)
    said = ended(process)
    assert said.code == code
    assert "Traceback" not in said.err
    assert "torchkeep resume" in said.err
    assert "runs/slow" in said.err

    step = slow.last_step("runs/slow")
    assert 8 <= step < 24
    assert all(not find_damage(path) for path in slow.checkpoints("runs/slow").steps())
    end = slow.records("runs/slow")[-1]
    assert (end["kind"], end["status"], end["step"]) == ("run_end", "interrupted", step)
    assert f"step {step}" in said.err

    resumed = slow.say("resume", "runs/slow")
    assert resumed.code == 0
    assert f"resumed from step {step}" in resumed.out
    assert slow.say("train", "slow.toml", "--quiet").code == 0
    assert slow.last_step("runs/slow") == slow.last_step("runs/slow-2") == 24
    assert slow.parameters("runs/slow") == slow.parameters("runs/slow-2")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_signal_in_the_test_at_the_end_ends_it_and_a_resume_measures_it(
    slow: Any, ended: Any, number: signal.Signals, code: int
) -> None:
    slow.write("test.csv", "a,b,colour,kind\n" + "1e6,1e6,red,big\n" * 4)
    waits = (
        "import pathlib, time, torch\n\nFIRST = pathlib.Path('testing')\n" + slow.folder.joinpath("slow.py").read_text()
    )
    looks = "        if (numbers > 1e3).any() and not FIRST.exists():\n"
    looks += "            FIRST.touch()\n            time.sleep(60)\n"
    slow.write("slow.py", waits.replace("        return self.layers", looks + "        return self.layers"))
    process = slow.start("train", "slow.toml", "--set", "data.test=test.csv", "--set", "train.epochs=1")
    slow.wait_for("testing", process)
    process.send_signal(number)
    said = ended(process)
    assert said.code == code
    assert "Traceback" not in said.err
    assert "torchkeep resume" in said.err
    assert slow.records("runs/slow")[-1]["status"] == "interrupted"
    assert slow.say("resume", "runs/slow").code == 0
    assert "test/accuracy" in slow.records("runs/slow")[-1]["metrics"]


def test_a_kill_before_the_run_is_written_leaves_its_name_free(desk: Any) -> None:
    desk.write_table()
    (desk.folder / "runs" / "table").mkdir(parents=True)
    (desk.folder / "runs" / "table" / ".lock").write_text("pid 1 on another-host")
    assert desk.say("train", "table.toml", "--resume", "auto").code == 0
    assert desk.runs() == ["table"]


def test_a_kill_loses_only_what_came_after_the_last_checkpoint(slow: Any, ended: Any) -> None:
    process = slow.start("train", "slow.toml", "--quiet")
    slow.wait_for("runs/slow/checkpoints/step-00000008", process)
    process.kill()
    assert ended(process).code == -signal.SIGKILL
    assert '"status": "killed"' in slow.say("runs", "--json").out
    assert slow.say("train", "slow.toml", "--resume", "auto", "--quiet").code == 0
    assert slow.say("train", "slow.toml", "--quiet").code == 0
    assert slow.parameters("runs/slow") == slow.parameters("runs/slow-2")
