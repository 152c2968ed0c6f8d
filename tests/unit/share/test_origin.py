"""A package's origin: all that a reproduction needs, the same for the same run, and nothing of whose machine it was."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import torchkeep as tk
from torchkeep.errors import SettingsError
from torchkeep.folder import RunFolder
from torchkeep.keep.checkpoint import Checkpoints, Saved
from torchkeep.share.origin import MAX_POINTS, origin_of, parameters_of, read_origin
from torchkeep.share.reproduce import compared
from torchkeep.tensors import parse_json, tensor_sha256, to_json
from torchkeep.watch.records import dump_record

MODEL = """
from torch import nn


def build(num_classes):
    return nn.Sequential(nn.Linear(2, 4), nn.Linear(4, num_classes))
"""


def latest(run_dir: Path) -> tuple[RunFolder, Saved]:
    folder = RunFolder(run_dir)
    saved = Checkpoints(folder.checkpoints).latest()
    assert saved is not None
    return folder, saved


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A recipe whose data lie in the home, whose code lies in the working folder, and that names both as it can."""
    home, here = tmp_path / "home of annabel7", tmp_path / "work"
    home.mkdir()
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USERPROFILE", str(home))
    monkeypatch.setenv("XDG_STATE_HOME", str(home / "state"))
    monkeypatch.chdir(here)
    rows = "".join(f"{i % 7},{i / 2},{'big' if i * 7 % 11 > 5 else 'small'}\n" for i in range(24))
    (home / "rows.csv").write_text("a,b,kind\n" + rows)
    (here / "net.py").write_text(MODEL)
    data = {"train": str(home / "rows.csv"), "target": "kind", "batch_size": 8, "workers": 0}
    monitor = {"views": [], "wandb": {"entity": "annabel7"}, "log_every": 1}
    return {"name": "net", "data": data, "model": {"name": f"{here}/net.py:build"}, "train": {"epochs": 2},
            "monitor": monitor, "optimizer": {"learning_rate": 0.1}}  # fmt: skip


def test_nothing_of_the_machine_is_said(recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [
        "/usr/local/bin/torchkeep",
        f"{tmp_path}/desk/net.toml",
        f"--run-dir={tmp_path}/x",
        "--mirror=D:\\annabel7\\copies",
    ]
    monkeypatch.setattr("sys.argv", command)
    tk.train(recipe, run_dir="runs/net", quiet=True)
    said = origin_of(*latest(Path("runs/net")))
    text = to_json(said).decode()
    for secret in (str(tmp_path), str(Path.home()), str(Path.cwd()), "annabel7", "/usr/local"):
        assert secret not in text
    assert said["recipe"]["data"]["train"] == "rows.csv"
    assert said["recipe"]["model"]["name"] == "net.py:build"
    assert [row["path"] for row in said["code_files"]] == ["net.py"]
    assert said["command"][:3] == ["torchkeep", "net.toml", "--run-dir=x"]


def test_the_same_run_gives_the_same_bytes_and_they_are_read_again(recipe: Any) -> None:
    run = tk.train(recipe, run_dir="runs/net", quiet=True)
    said = origin_of(*latest(run.dir))
    data = to_json(said, indent=True)
    assert data == to_json(origin_of(*latest(run.dir)), indent=True)
    read = read_origin(parse_json(data), "here")
    assert read["checkpoint"]["sha256"] == run.sha256("last") == said["checkpoint"]["sha256"]
    assert (read["attempts"]["from_steps"], read["attempts"]["exact"]) == ([0], True)
    assert [step for step, _ in read["course"]["train/loss"]] == list(range(1, 7))
    assert compared(run.dir, read, said).is_same


def test_settings_of_a_later_attempt_are_named_and_those_of_one_that_saved_nothing_are_not_taken(recipe: Any) -> None:
    run = tk.train(recipe, run_dir="runs/net", quiet=True)
    tk.resume(run.dir, set=["optimizer.learning_rate=0.5"], quiet=True)  # nothing was left to train
    assert origin_of(*latest(run.dir))["attempts"]["from_steps"] == [0]
    tk.resume(run.dir, set=["train.epochs=3", "optimizer.learning_rate=0.2"], quiet=True)
    said = origin_of(*latest(run.dir))
    assert said["attempts"]["changed"] == ["optimizer.learning_rate", "train.epochs"]
    assert not said["attempts"]["exact"]
    assert said["recipe"]["optimizer"]["learning_rate"] == 0.2


def test_a_long_course_is_thinned_and_keeps_its_ends(recipe: Any) -> None:
    run = tk.train(recipe, run_dir="runs/net", quiet=True)
    folder, saved = latest(run.dir)
    with folder.records.open("ab") as file:
        for step in range(7, 7 + 3 * MAX_POINTS):
            at = {"attempt": 0, "rank": 0, "seq": 10**6 + step, "step": step, "samples": 0, "epoch": 2, "time": 0.0}
            loss = math.nan if step % 2 else step / 3
            row = {"kind": "scalars", **at, "values": {"train/loss": loss}}
            file.write(dump_record(row))
    points = origin_of(folder, saved)["course"]["train/loss"]
    everything = origin_of(folder, saved, None)["course"]["train/loss"]
    assert len(points) == MAX_POINTS
    assert len(everything) == 6 + 3 * MAX_POINTS
    assert (points[0], points[-1]) == (everything[0], everything[-1])
    gaps = [after[0] - before[0] for before, after in pairwise(points)]
    assert set(gaps) <= {3, 4}
    thin, full = origin_of(folder, saved), origin_of(folder, saved, None)
    assert compared(run.dir, thin, full).is_same  # what is no number is equal to itself


def test_a_moving_average_is_what_a_package_has(recipe: Any) -> None:
    run = tk.train(recipe | {"train": {"epochs": 2, "ema": 0.5}}, run_dir="runs/net", quiet=True)
    folder, saved = latest(run.dir)
    tensors = parameters_of(folder, saved)
    assert origin_of(folder, saved)["checkpoint"]["sha256"] == tensor_sha256(tensors)
    for name, tensor in run.model("last").state_dict().items():
        assert torch.equal(tensor, tensors[name])


def test_a_run_of_objects_has_its_settings_and_no_recipe(tmp_path: Path) -> None:
    data = tk.Arrays(x=torch.ones(8, 2), label=torch.arange(8) % 2)
    run = tk.fit(
        nn.Linear(2, 2), data, epochs=1, batch_size=4, run_dir=tmp_path / "own", monitor={"views": []}, quiet=True
    )
    said = read_origin(parse_json(to_json(origin_of(*latest(run.dir)))), "here")
    assert said["recipe"] is None
    assert said["objects"]["model"].endswith("Linear")
    assert (said["batch_size"], said["settings"]["train"]["epochs"]) == (4, 1)


def test_what_is_no_origin_is_refused(recipe: Any) -> None:
    run = tk.train(recipe, run_dir="runs/net", quiet=True)
    said = origin_of(*latest(run.dir))
    with pytest.raises(SettingsError, match="step"):
        read_origin(said | {"checkpoint": said["checkpoint"] | {"step": -1}}, "here")
