"""Checkpoints: found whole or set aside, kept by rule, read without the code that wrote them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from torchkeep.errors import CheckpointError
from torchkeep.files import DurableFolder
from torchkeep.keep.checkpoint import Checkpoints, CheckpointSettings, find_damage
from torchkeep.keep.stopping import EarlyStopping, better_mode
from torchkeep.settings import check


def state_of(value: float) -> dict[str, object]:
    return {"model": {"w": torch.full((2, 2), value)}, "optimizer": {"state": {0: {"m": torch.ones(3)}}}, "clock": 1}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


def test_a_hand_written_loop_saves_and_goes_on(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, checkpoints = nn.Linear(4, 2), Checkpoints(tmp_path, metric="valid/accuracy")
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    checkpoints.save(1, {"model": model.state_dict(), "optimizer": optimizer.state_dict()}, {"valid/accuracy": 0.5})

    again = nn.Linear(4, 2)
    other = torch.optim.AdamW(again.parameters())
    saved = Checkpoints(tmp_path).latest()
    assert saved is not None
    state = Checkpoints(tmp_path).load(saved)
    again.load_state_dict(state["model"])
    other.load_state_dict(state["optimizer"])
    assert saved.metrics == {"valid/accuracy": 0.5}
    assert torch.equal(again.weight, model.weight)
    for one, two in zip(optimizer.state.values(), other.state.values(), strict=True):
        assert torch.equal(one["exp_avg"], two["exp_avg"])
        assert torch.equal(one["step"], two["step"])


def test_the_last_and_the_best_stay_and_the_rest_goes(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=2, keep_best=1, metric="valid/accuracy", mode="max")
    for step, accuracy in enumerate([0.1, 0.9, 0.3, 0.9, 0.2, 0.5], start=1):
        checkpoints.save(step, state_of(step), {"valid/accuracy": accuracy})
    assert names(tmp_path) == ["step-00000002", "step-00000005", "step-00000006"]  # of equals the earlier
    best, latest = checkpoints.best(), checkpoints.latest()
    assert best is not None
    assert latest is not None
    assert (best.step, latest.step) == (2, 6)
    assert checkpoints.hint("best")["folder"] == "step-00000002"


def test_a_checkpoint_without_the_metric_or_with_nan_is_never_the_best(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=5, metric="valid/loss", mode="min")
    checkpoints.save(1, state_of(1), {"valid/loss": 2.0})
    checkpoints.save(2, state_of(2), {"valid/loss": float("nan")})
    checkpoints.save(3, state_of(3), {})
    best = checkpoints.best()
    assert best is not None
    assert best.step == 1


def test_what_is_held_is_written_before_the_next_save(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=1, metric="valid/accuracy", mode="max")
    live = torch.zeros(3)
    checkpoints.hold(1, {"model": {"w": live}}, {"valid/accuracy": 0.7})
    live.fill_(9.0)  # what is held is a copy
    assert not (tmp_path / "step-00000001").exists()
    checkpoints.save(2, {"model": {"w": live}}, {"valid/accuracy": 0.6})
    best = checkpoints.best()
    assert best is not None
    assert best.step == 1
    assert torch.equal(checkpoints.load(best)["model"]["w"], torch.zeros(3))


def test_nothing_damaged_is_ever_loaded(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    path = checkpoints.save(1, state_of(1))
    (path / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoints.load(path)
    assert find_damage(path)
    assert checkpoints.latest() is None


def test_a_manifest_cannot_name_files_elsewhere(tmp_path: Path) -> None:
    path = Checkpoints(tmp_path).save(1, state_of(1))
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text.replace("state.json", "../state.json"))
    assert "no plain file name" in find_damage(path)


def test_early_stopping_waits_for_patience_and_remembers(tmp_path: Path) -> None:
    stopper = EarlyStopping(metric="valid/loss", patience=2)
    values = [1.0, 0.8, 0.9, 0.85]
    assert [stopper.update({"valid/loss": value}) for value in values] == [False, False, False, True]
    half = EarlyStopping(metric="valid/loss", patience=2)
    for value in values[:3]:
        half.update({"valid/loss": value})
    other = EarlyStopping(metric="valid/loss", patience=2)
    other.load_state_dict(half.state_dict())
    assert other.update({"valid/loss": values[3]})
    assert EarlyStopping(metric="valid/loss", patience=1).update({"valid/loss": float("nan")})


@pytest.mark.parametrize(("metric", "mode"), [("valid/loss", "min"), ("valid/accuracy", "max")])
def test_the_direction_is_known_from_the_name(metric: str, mode: str) -> None:
    assert better_mode(metric) == mode


@pytest.mark.parametrize(
    ("every", "seconds"), [("epoch", None), (10, None), ("90s", 90.0), ("10m", 600.0), ("2h", 7200.0)]
)
def test_a_period_is_an_epoch_steps_or_a_time(every: str | int, seconds: float | None) -> None:
    assert check(CheckpointSettings, {"every": every}, "test").period_s() == seconds


def test_a_reader_does_not_disturb_the_one_who_writes(tmp_path: Path) -> None:
    Checkpoints(tmp_path).save(1, state_of(1), {})
    with DurableFolder(tmp_path / "step-00000002") as folder:
        folder.write("state.json", b"{}")
        reader = Checkpoints(tmp_path)
        assert reader.latest() is not None
        assert reader.best() is not None
    assert (tmp_path / "step-00000002" / "manifest.json").exists()


def test_what_is_acknowledged_is_what_was_given(tmp_path: Path) -> None:
    Checkpoints(tmp_path).save(100, state_of(0), {})
    again = Checkpoints(tmp_path)
    path = again.save(100, state_of(7), {})
    assert float(again.load(path)["model"]["w"][0, 0]) == 7
    with pytest.raises(CheckpointError, match="later checkpoint"):
        again.save(10, state_of(1), {})
    assert names(tmp_path) == ["step-00000100"]


def test_a_course_that_went_back_over_a_damaged_one_saves_on(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    for step in (100, 200):
        checkpoints.save(step, state_of(step), {})
    (tmp_path / "step-00000200" / "state.json").write_text("{")
    other = Checkpoints(tmp_path)
    other.save(150, state_of(150), {})
    latest = other.latest()
    assert latest is not None
    assert latest.step == 150


def test_the_k_best_of_those_held_are_written(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=1, keep_best=2, metric="valid/accuracy", mode="max")
    for step, accuracy in enumerate([0.1, 0.5, 0.9], start=1):
        checkpoints.hold(step, state_of(step), {"valid/accuracy": accuracy})
    checkpoints.save(4, state_of(4), {"valid/accuracy": 0.2})
    assert names(tmp_path) == ["step-00000002", "step-00000003", "step-00000004"]


def test_nothing_to_load_is_said() -> None:
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        Checkpoints("nowhere").load(Checkpoints("nowhere").latest())
