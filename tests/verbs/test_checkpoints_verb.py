"""``checkpoints`` and ``verify``, a second place for them, and what a resume says before it goes on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import torchkeep as tk
from torchkeep.errors import NonFiniteLossError
from torchkeep.keep.mirror import Mirror
from torchkeep.training.step import Stepper

MORE = ("--set", "checkpoint.every=2", "--quiet")


def trained(desk: Any, run: str = "runs/table", *more: str) -> None:
    desk.write_table()
    said = desk.say("train", "table.toml", "--run-dir", run, *MORE, *more)
    assert said.code == 0, said.err


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_what_is_saved_is_listed_and_checked(desk: Any) -> None:
    trained(desk)
    rows = [json.loads(line) for line in desk.say("checkpoints", "runs/table", "--json").out.splitlines()]
    assert [row["name"] for row in rows] == [path.name for path in desk.checkpoints("runs/table").steps()]
    assert rows[-1]["epoch"] == 2
    assert rows[-1]["metrics"]["valid/accuracy"] >= 0
    assert all(row["size_bytes"] > 1000 and row["is_exact"] and not row["damage"] for row in rows)
    table = desk.say("verify", "runs/table")
    assert (table.code, table.out.count("whole")) == (0, len(rows))
    flip(desk.checkpoints("runs/table").steps()[-1] / "model.safetensors")
    said = desk.say("verify", "runs/table")
    assert said.code == 1
    assert "model.safetensors has other content than was written" in " ".join(said.out.split())
    assert desk.say("verify", "nowhere").code == 2


def test_a_stretch_that_is_trained_again_ends_in_the_same_bits(desk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trained(desk)
    before = {path: path.read_bytes() for path in (desk.folder / "runs").rglob("*") if path.is_file()}
    said = desk.say("verify", "runs/table", "--replay")
    assert said.code == 0, said.err
    assert "trained again: the same bits in" in said.out
    assert before == {path: path.read_bytes() for path in (desk.folder / "runs").rglob("*") if path.is_file()}
    real = Stepper.__call__

    def tampered(self: Stepper, *given: Any, **named: Any) -> Any:
        result = real(self, *given, **named)
        with torch.no_grad():
            next(self.model.parameters()).view(-1)[0] += 1e-6
        return result

    monkeypatch.setattr(Stepper, "__call__", tampered)
    said = desk.say("verify", "runs/table", "--replay", "--json")
    assert said.code == 1
    assert json.loads(said.out.splitlines()[-1])["differs"]


def test_one_checkpoint_is_no_stretch(desk: Any) -> None:
    trained(desk, "runs/table", "--set", "checkpoint.keep_last=1", "--set", "checkpoint.keep_best=0")
    said = desk.say("verify", "runs/table", "--replay")
    assert said.code == 2
    assert "there is no stretch to train again" in said.err
    assert "checkpoint.keep_last" in said.err


def test_a_run_that_is_lost_is_found_in_its_mirror(desk: Any) -> None:
    trained(desk, "runs/whole")
    wanted = desk.parameters("runs/whole")
    trained(desk, "runs/table", "--set", "train.max_steps=4", "--mirror", "drive")
    names = sorted(path.name for path in desk.checkpoints("runs/table").steps())
    assert sorted(path.name for path in (desk.folder / "drive/table/checkpoints").iterdir()) == names
    assert desk.records("runs/table") == desk.records("drive/table")
    shutil.rmtree(desk.folder / "runs/table")
    command = ("train", "table.toml", "--run-dir", "runs/table", *MORE[:2], "--resume", "auto", "--mirror", "drive")
    said = desk.say(*command)
    assert said.code == 0, said.err
    assert "found in the mirror" in said.out
    assert "resumed from step 4" in said.out
    assert "resume    best-effort: train.max_steps was 4 and is None now" in said.out
    assert desk.last_step("runs/table") == desk.last_step("runs/whole")
    assert desk.parameters("runs/table") == wanted  # a constant rate does not know how many steps there are
    assert desk.last_step("drive/table") == desk.last_step("runs/table")


def test_a_copy_that_was_cut_is_not_taken_from_a_mirror(desk: Any) -> None:
    trained(desk, "runs/table", "--mirror", "drive")
    last = desk.checkpoints("drive/table").steps()[-1]
    flip(last / "model.safetensors")
    shutil.rmtree(desk.folder / "runs/table")
    said = desk.say(
        "train", "table.toml", "--run-dir", "runs/table", *MORE[:2], "--resume", "auto", "--mirror", "drive"
    )
    assert said.code == 0, said.err
    assert f"checkpoint {last.name} is damaged" in said.out
    assert desk.last_step("runs/table") == int(last.name[5:])


def test_a_mirror_that_cannot_be_written_stops_nothing(desk: Any) -> None:
    desk.write_table()
    desk.write("drive", "a file stands where the mirror should be")
    said = desk.say("train", "table.toml", "--run-dir", "runs/table", *MORE[:2], "--mirror", "drive")
    assert said.code == 0, said.err
    assert "could not be written" in said.out


def test_an_empty_mirror_changes_nothing(desk: Any) -> None:
    desk.write_table()
    said = desk.say("train", "table.toml", "--run-dir", "runs/table", *MORE, "--resume", "auto", "--mirror", "drive")
    assert said.code == 0, said.err
    assert desk.runs() == ["table"]
    assert not Mirror(desk.folder / "runs/table", desk.folder / "elsewhere").fetch()


def test_other_data_are_an_error_unless_they_may_change(desk: Any) -> None:
    trained(desk, "runs/table", "--set", "train.max_steps=3")
    desk.write_table(48)
    command = ("resume", "runs/table", "--set", "train.max_steps=1000")
    refused = desk.say(*command)
    assert refused.code == 2
    assert "--allow-change data" in refused.err
    said = desk.say(*command, "--allow-change", "data")
    assert said.code == 0, said.err
    assert "the data of train, valid are others" in said.out
    end = desk.records("runs/table")[-1]
    assert (end["status"], end["epoch"]) == ("finished", 2)
    # 3 of the first epoch's 4 steps as it was, then that epoch anew and the second one, of 36 rows each
    assert desk.last_step("runs/table") == 3 + 5 + 5


def test_a_resume_says_what_is_restored_and_that_it_is_exact(desk: Any) -> None:
    trained(desk)
    said = desk.say("resume", "runs/table")
    assert said.code == 0, said.err
    assert "restored  parameters, optimiser, random states" in said.out
    assert "resume    exact" in said.out


def test_more_epochs_stretch_the_schedule_and_say_so(desk: Any) -> None:
    trained(desk, "runs/table", "--set", "optimizer.schedule=cosine")
    said = desk.say("resume", "runs/table", "--set", "train.epochs=4")
    assert said.code == 0, said.err
    assert "the schedule is stretched to 16 steps from here on" in " ".join(said.out.split())
    assert desk.last_step("runs/table") == 16


def rows(size: int = 24) -> Any:
    return tk.Arrays(input=torch.randn(size, 4), label=torch.arange(size) % 2)


def test_a_step_that_fails_is_followed_by_a_save_that_says_so(tmp_path: Path) -> None:
    calls = 0

    def failing(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise torch.OutOfMemoryError("no memory is left")
        return torch.nn.functional.cross_entropy(output, target)

    def fit(folder: Path, **settings: Any) -> Any:
        model = torch.nn.Linear(4, 2)
        return tk.fit(model, rows(), loss=failing, epochs=2, batch_size=4, run_dir=folder, preflight="off",
                      quiet=True, **settings)  # fmt: skip

    with pytest.raises(torch.OutOfMemoryError) as caught:
        fit(tmp_path / "saved")
    assert "samples" in "".join(caught.value.__notes__)
    assert "best-effort" in "".join(caught.value.__notes__)
    saved = tk.Checkpoints(tmp_path / "saved" / "checkpoints").latest()
    assert saved is not None
    assert (saved.step > 0, saved.is_exact) == (True, False)
    calls = 0
    with pytest.raises(torch.OutOfMemoryError):
        fit(tmp_path / "left", checkpoint={"on_error": "leave"})
    left = tk.Checkpoints(tmp_path / "left" / "checkpoints").latest()
    assert left is not None
    assert left.step == 0


def test_a_loss_that_is_no_number_is_never_saved(tmp_path: Path) -> None:
    def broken(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return output.sum() * float("nan")

    with pytest.raises(NonFiniteLossError):
        tk.fit(torch.nn.Linear(4, 2), rows(), loss=broken, epochs=1, batch_size=4, run_dir=tmp_path / "nan",
               preflight="off", quiet=True)  # fmt: skip
    saved = tk.Checkpoints(tmp_path / "nan" / "checkpoints").latest()
    assert saved is not None
    assert saved.step == 0


def test_a_stopper_warms_up_and_gives_the_best_back(tmp_path: Path) -> None:
    stopper = tk.EarlyStopping("loss", patience=1, warmup=2)
    assert [stopper.update({"loss": value}) for value in (1.0, 2.0, 2.0)] == [False, False, True]
    torch.manual_seed(0)
    data, model = rows(), torch.nn.Linear(4, 2)
    run = tk.fit(
        model, data, data, epochs=4, batch_size=4, learning_rate=3.0, run_dir=tmp_path / "best", quiet=True,
        early_stopping={"patience": 9, "restore_best": True, "metric": "valid/loss"},
        checkpoint={"metric": "valid/loss"},
    )  # fmt: skip
    best = run.model("best").state_dict()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in best.items())
