"""What a save promises: nothing retried after a failed sync, nothing lost in silence, nothing needed deleted."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from torchkeep.errors import StorageError
from torchkeep.files import AppendFile
from torchkeep.keep import checkpoint
from torchkeep.keep.checkpoint import Checkpoints, find_damage


def state_of(value: float) -> dict[str, object]:
    return {"model": {"w": torch.full((64,), value)}, "optimizer": {"m": torch.full((64,), -value)}, "clock": 1}


def value_of(checkpoints: Checkpoints, step: int) -> float:
    return float(checkpoints.load(checkpoints.folder / f"step-{step:08d}")["model"]["w"][0])


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


class Syncs:
    """os.fsync, which fails at the ``number``-th call."""

    def __init__(self, number: int = 0):
        self.number, self.calls, self._fsync = number, 0, os.fsync

    def __call__(self, handle: int) -> None:
        self.calls += 1
        if self.calls == self.number:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        self._fsync(handle)


def syncs_of_a_save(folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    checkpoints, counted = Checkpoints(folder), Syncs()
    checkpoints.save(1, state_of(1))
    monkeypatch.setattr(os, "fsync", counted)
    checkpoints.save(2, state_of(2))
    return counted.calls


@pytest.mark.parametrize("wait", [True, False])
def test_a_failed_sync_is_never_retried_and_the_attempt_is_abandoned(
    wait: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    total = syncs_of_a_save(tmp_path / "counted", monkeypatch)
    assert total > 9  # three files, the manifest, the folder, its parent, and two of each hint
    for number in range(1, total + 1):
        said: list[str] = []
        checkpoints = Checkpoints(tmp_path / str(number), warn=said.append)
        monkeypatch.setattr(os, "fsync", failing := Syncs())
        checkpoints.save(1, state_of(1))
        failing.calls, failing.number = 0, number
        refused = pytest.raises(StorageError, match=f"errno {errno.EIO}") if number <= total - 4 else nullcontext()
        with refused:
            checkpoints.save(2, state_of(2), wait=wait)
            checkpoints.join()
        if number <= total - 4:
            assert failing.calls == number  # not one sync more
        else:  # of a hint: the checkpoint itself is durable
            assert "could not be written" in said[0]
        assert failing.calls <= total
        assert not [name for name in names(checkpoints.folder) if name.startswith(".")]
        assert all(not find_damage(path) for path in checkpoints.steps())
        assert value_of(checkpoints, 1) == 1
        checkpoints.save(3, state_of(3))  # from new files
        assert value_of(checkpoints, 3) == 3


def test_a_record_whose_sync_failed_is_not_called_durable_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system marks the page clean when a sync fails: a second one would say that all is well."""
    file = AppendFile(tmp_path / "lines")
    monkeypatch.setattr(os, "fsync", failing := Syncs(1))
    file.append(b"one\n")
    with pytest.raises(StorageError):
        file.sync()
    with pytest.raises(StorageError):
        file.sync()
    assert failing.calls == 1
    file.close()


@pytest.mark.parametrize("told", ["check", "join", "save", "release"])
def test_what_goes_wrong_in_the_background_is_told_once(
    told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state_of(1))
    monkeypatch.setattr(os, "fsync", Syncs(1))
    checkpoints.save(2, state_of(2), wait=False)
    while checkpoints.is_busy:
        threading.Event().wait(0.001)
    calls: dict[str, Callable[[], object]] = {
        "check": checkpoints.check, "join": checkpoints.join, "release": checkpoints.release,
        "save": lambda: checkpoints.save(3, state_of(3)),
    }  # fmt: skip
    with pytest.raises(StorageError):
        calls[told]()
    checkpoints.check()  # told once
    assert names(tmp_path) == {"step-00000001", "last.json", "best.json"}
    checkpoints.save(4, state_of(4), wait=False)
    checkpoints.join()
    assert value_of(checkpoints, 4) == 4


def test_a_save_waits_for_the_one_under_way_and_keeps_the_state_of_its_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints, go_on, order = Checkpoints(tmp_path, keep_last=9), threading.Event(), []
    made = checkpoint.make_folder

    def held_up(folder: Path) -> None:
        order.append("begun")
        assert go_on.wait(30)
        made(folder)

    monkeypatch.setattr(checkpoint, "make_folder", held_up)
    checkpoints.after_visible = lambda path: order.append(path.name)
    live = state_of(1)
    checkpoints.save(1, live, wait=False)
    live["model"]["w"].fill_(2)  # type: ignore[index]
    assert checkpoints.is_busy
    assert not checkpoints.steps()
    second = threading.Thread(target=lambda: checkpoints.save(2, live))
    second.start()
    second.join(0.1)
    assert second.is_alive()
    assert order in (["begun"], [])  # the second has not begun
    go_on.set()
    second.join()
    assert order == ["begun", "step-00000001", "begun", "step-00000002"]
    assert (value_of(checkpoints, 1), value_of(checkpoints, 2)) == (1, 2)


def test_a_part_of_a_state_may_be_anything_that_json_holds(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    for step, clock in enumerate([1, [1], "1", None, {"epoch": 7}], start=1):
        checkpoints.save(step, {"model": {"w": torch.ones(1)}, "clock": clock})
        assert checkpoints.rows()[-1].epoch == (7 if isinstance(clock, dict) else None)


STRANGERS = ["step-", "step-1", "step-00000001x", "xstep-00000001", "damaged-step-00000001-1", "notes", ".git"]


def test_retention_deletes_nothing_but_checkpoints_that_no_rule_keeps(tmp_path: Path) -> None:
    for name in STRANGERS:
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "mine").write_text("mine")
    (tmp_path / "step-00000000.txt").write_text("mine")
    outside = tmp_path.parent / f"{tmp_path.name}-outside"
    outside.mkdir()
    (outside / "mine").write_text("mine")
    rules = {"keep_last": 2, "keep_best": 2, "metric": "loss", "keep_every": 5}
    first = Checkpoints(tmp_path, **rules)  # type: ignore[arg-type]
    losses = {4: 0.1, 7: 0.2}
    for step in range(1, 13):
        first.save(step, state_of(step), {"loss": losses.get(step, 1.0)})
    kept = {4, 7, 5, 10, 11, 12}  # the best, the first from 5 and from 10, the last

    second = Checkpoints(tmp_path, **rules)  # type: ignore[arg-type]
    taken = second.take_up()
    assert taken is not None
    assert taken[0].step == 12
    for step in range(13, 40):
        second.save(step, state_of(step), {"loss": 1.0}, wait=False)
    second.join()
    kept = {4, 7, 5, 10, 12, 15, 20, 25, 30, 35, 38, 39}  # 12 is where this course came from
    assert {int(path.name[5:]) for path in second.steps()} == kept
    assert all(value_of(second, step) == step for step in kept)
    for name in STRANGERS:
        assert (tmp_path / name / "mine").read_text() == "mine"
    assert names(tmp_path) == {*STRANGERS, "step-00000000.txt", "last.json", "best.json",
                               *(f"step-{step:08d}" for step in kept)}  # fmt: skip
    assert (outside / "mine").read_text() == "mine"


def test_the_only_good_one_stays_until_another_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=1, keep_best=0)
    checkpoints.save(1, state_of(1))
    syncs = Syncs()
    monkeypatch.setattr(os, "fsync", syncs)
    for step in range(2, 9):
        syncs.number = syncs.calls + step - 1  # each fails a little later
        with pytest.raises(StorageError):
            checkpoints.save(step, state_of(step))
        latest = checkpoints.latest()
        assert latest is not None
        if latest.step > 1:
            break  # the last sync of all failed, that of a name which is seen by now
        assert value_of(checkpoints, 1) == 1


def test_one_of_the_same_step_stays_where_its_successor_cannot_appear(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state_of(1))
    rename = os.rename

    def refuse(source: object, target: object) -> None:
        if str(target).endswith("step-00000001") and str(source).endswith(".tmp"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        rename(source, target)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(StorageError):
        checkpoints.save(1, state_of(2))
    assert value_of(checkpoints, 1) == 1


def test_a_copy_under_the_name_of_another_step_is_found(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    path = checkpoints.save(1, {"model": {"w": torch.ones(2)}})
    shutil.copytree(path, tmp_path / "step-00000002")
    assert find_damage(tmp_path / "step-00000002") == "it holds step 1"
    saved = Checkpoints(tmp_path).latest()
    assert saved is not None
    assert saved.step == 1
    assert [row.damage for row in checkpoints.rows()] == ["", "it holds step 1"]
    taken = Checkpoints(tmp_path).take_up()
    assert taken is not None
    assert taken[0].step == 1
    assert (tmp_path / "damaged-step-00000002-1").is_dir()
