"""A monitor in a loop of one's own: every kind, bad input said at the call, and going on after a kill."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import torchkeep as tk
from torchkeep.errors import RunFolderError, SettingsError, TorchkeepError
from torchkeep.watch.reading import RunRecord
from torchkeep.watch.records import canonical


def kinds(folder: Path) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for record in tk.read_run(folder):
        found.setdefault(record["kind"], []).append(record)
    return found


def test_every_kind_is_recorded(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure()
    figure.add_subplot().plot([1, 2])
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    with tk.Monitor(tmp_path / "run", config={"learning_rate": 0.1}) as monitor:
        monitor.log(
            1, epoch=0, samples=32, **{"train/loss": torch.tensor(0.5, requires_grad=True), "n": 3, "x": np.float32(2)}
        )
        monitor.histogram(1, "w", torch.randn(100))
        monitor.image(1, "i", torch.zeros(3, 8, 8))
        monitor.prediction(1, "p", torch.zeros(2, 3, 8, 8), torch.tensor([0, 1]), torch.randn(2, 2), classes=["a", "b"])
        monitor.mesh(1, "m", [[0, 0, 0], [1, 0, 0], [0, 1, 0]], [[0, 1, 2]])
        monitor.text(1, "t", "**bold**")
        monitor.audio(1, "a", torch.zeros(800), 8000)
        monitor.figure(1, "f", figure)
        monitor.confusion(1, "c", torch.eye(2, dtype=torch.int64), ["a", "b"])
        monitor.pr_curve(1, "pr", [0, 1, 1], [0.1, 0.9, 0.4])
        monitor.graph(model, torch.zeros(1, 4))
        monitor.alert("mine", "look at this")
    found = kinds(tmp_path / "run")
    assert {kind: len(rows) for kind, rows in found.items()} == dict.fromkeys(
        ["attempt_start", "run_start", "scalars", "histogram", "image", "prediction", "mesh", "text", "audio", "figure",
         "confusion", "pr_curve", "graph", "alert", "run_end"], 1,
    )  # fmt: skip
    assert found["scalars"][0]["values"] == {"train/loss": 0.5, "n": 3, "x": 2.0}
    assert {"step": 1, "samples": 32, "epoch": 0}.items() <= found["scalars"][0].items()
    record = tk.read_run(tmp_path / "run")
    assert all(record.media(rows[0]) for kind, rows in found.items() if rows[0].get("media"))
    assert list((tmp_path / "run" / "tensorboard").glob("*tfevents*"))
    assert found["run_end"][0]["status"] == "finished"


def test_a_loop_that_was_killed_goes_on_at_its_checkpoint(tmp_path: Path) -> None:
    def loop(folder: Path, first: int, last: int) -> None:
        with tk.Monitor(folder, views=[], from_step=first) as monitor:
            for step in range(first + 1, last + 1):
                monitor.log(step, loss=1 / step)

    loop(tmp_path / "whole", 0, 20)
    loop(tmp_path / "torn", 0, 13)
    loop(tmp_path / "torn", 10, 20)
    assert canonical(tmp_path / "torn" / "records.jsonl") == canonical(tmp_path / "whole" / "records.jsonl")


def test_without_a_step_it_goes_on_behind_the_last(tmp_path: Path) -> None:
    for first in (1, 6):
        with tk.Monitor(tmp_path / "run", views=[]) as monitor:
            for step in range(first, first + 5):
                monitor.log(step, loss=1.0)
    assert RunRecord(tmp_path / "run" / "records.jsonl").scalars()["step"].to_pylist() == list(range(1, 11))


def test_two_processes_never_write_one_record(tmp_path: Path) -> None:
    with tk.Monitor(tmp_path / "run", views=[]), pytest.raises(RunFolderError):
        tk.Monitor(tmp_path / "run", views=[])


def test_watched_parameters_are_shown_each_so_many_steps(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    model(torch.ones(1, 2)).sum().backward()
    with tk.Monitor(tmp_path / "run", views=[]) as monitor:
        monitor.watch(model, every=5)
        for step in range(1, 11):
            monitor.log(step, loss=0.0)
    tags = [(row["step"], row["tag"]) for row in kinds(tmp_path / "run")["histogram"]]
    assert {tag for _, tag in tags} == {"weights/weight", "weights/bias", "gradients/weight", "gradients/bias"}
    assert {step for step, _ in tags} == {5, 10}


def test_what_is_no_number_is_said_at_the_call(tmp_path: Path) -> None:
    with tk.Monitor(tmp_path / "run", views=[]) as monitor:
        for value in ("high", torch.zeros(3), None):
            with pytest.raises(SettingsError, match="no number"):
                monitor.log(1, loss=value)
        monitor.log(2, **{"any\nthing ü/": math.inf, "nan": math.nan, "": -math.inf, "true": True})
    (record,) = kinds(tmp_path / "run")["scalars"]
    assert record["values"]["any\nthing ü/"] == math.inf
    assert math.isnan(record["values"]["nan"])


def test_an_unknown_view_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(TorchkeepError):
        tk.Monitor(tmp_path / "run", views=["board"])  # type: ignore[list-item]
    assert not (tmp_path / "run").exists()


def test_a_failed_loop_says_so(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), tk.Monitor(tmp_path / "run", views=[]):
        _ = 1 / 0
    assert kinds(tmp_path / "run")["run_end"][0]["status"] == "failed"


def test_the_writer_of_tensorboard_can_be_exchanged(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    with tk.SummaryWriter(str(tmp_path / "run")) as writer:
        writer.add_scalar("loss", 0.5, 3)
        writer.add_scalar("loss", torch.tensor(0.25), global_step=4)
        writer.add_scalars("both", {"a": 1, "b": 2}, 4)
        writer.add_histogram("w", np.arange(10.0), 4)
        writer.add_image("i", np.zeros((3, 4, 4), np.uint8), 4)
        writer.add_images("is", torch.zeros(2, 3, 4, 4), 4)
        writer.add_figure("f", Figure(), 4, close=False)
        writer.add_text("t", "text", 4)
        writer.add_audio("a", torch.zeros(1, 100), 4, sample_rate=8000)
        writer.add_graph(nn.Linear(2, 1), torch.zeros(1, 2))
        writer.add_pr_curve("pr", torch.tensor([0, 1]), torch.tensor([0.2, 0.8]), 4)
        writer.add_mesh("m", torch.zeros(1, 3, 3), faces=torch.tensor([[[0, 1, 2]]]), global_step=4)
        writer.add_hparams({"lr": 0.1}, {"hparam/loss": 0.2})
        writer.flush()
    found = kinds(tmp_path / "run")
    assert [(row["step"], row["values"]) for row in found["scalars"]] == [
        (3, {"loss": 0.5}), (4, {"loss": 0.25}), (4, {"both/a": 1, "both/b": 2}), (4, {"hparam/loss": 0.2}),
    ]  # fmt: skip
    assert "alert" not in found
    assert {"histogram", "image", "figure", "text", "audio", "graph", "pr_curve", "mesh"} <= found.keys()
