"""A real TensorBoard server, with both of its readers, on a run of two attempts that overlap."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from board import ask, serving, until

from torchkeep.watch.recorder import Recorder
from torchkeep.watch.records import next_attempt
from torchkeep.watch.tensorboard import TensorBoardView

STEPS = {"train/loss": list(range(1, 16)), "valid/accuracy": [5, 10, 15]}
RUN = "digits/tensorboard"


def train(folder: Path, first: int, last: int) -> None:
    path = folder / "records.jsonl"
    attempt = next_attempt(path)
    view = TensorBoardView(folder / "tensorboard", attempt)
    recorder = Recorder(path, attempt=attempt, views=[view])
    recorder.log("attempt_start", step=first, samples=0, epoch=0, from_step=first)
    for step in range(first + 1, last + 1):
        recorder.log("scalars", step=step, samples=step, epoch=0, values={"train/loss": 1 / step})
        if step % 5 == 0:
            recorder.log("scalars", step=step, samples=step, epoch=0, values={"valid/accuracy": step / 20})
    recorder.close()
    assert recorder.view_errors == 0


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    (folder / "digits").mkdir()
    train(folder / "digits", 0, 12)
    train(folder / "digits", 10, 15)
    return folder


@pytest.fixture(scope="module", params=[True, False], ids=["rust", "python"])
def server(request: pytest.FixtureRequest, runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(runs, tmp_path_factory.mktemp("log") / "tensorboard.log", fast=request.param) as address:
        yield address


def test_it_shows_every_step_once(server: str) -> None:
    until(lambda: STEPS.keys() <= ask(server, "plugin/scalars/tags").get(RUN, {}).keys())
    rows = until(lambda: all_rows(server))
    assert {tag: [row[1] for row in rows[tag]] for tag in STEPS} == STEPS
    assert [row[2] for row in rows["train/loss"]] == pytest.approx([1 / step for step in STEPS["train/loss"]])
    assert [row[2] for row in rows["valid/accuracy"]] == pytest.approx([0.25, 0.5, 0.75])


def all_rows(server: str) -> dict[str, list[list[float]]] | None:
    """The points of every tag, once the last of each is there."""
    rows = {tag: ask(server, "plugin/scalars/scalars", run=RUN, tag=tag) for tag in STEPS}
    return rows if all(rows[tag][-1][1] == steps[-1] for tag, steps in STEPS.items()) else None
