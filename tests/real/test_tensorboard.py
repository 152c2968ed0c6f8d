"""A real TensorBoard server, with both of its readers, on a run of two attempts that overlap."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from torchkeep.watch.records import Recorder, next_attempt
from torchkeep.watch.tensorboard import TensorBoardView

START_S = 60
STEPS = {"train/loss": list(range(1, 16)), "valid/accuracy": [5, 10, 15]}


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


@pytest.fixture(scope="module", params=["true", "false"], ids=["rust", "python"])
def server(request: pytest.FixtureRequest, runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log = tmp_path_factory.mktemp("log") / "tensorboard.log"
    options = ["--host=127.0.0.1", "--port=0", f"--load_fast={request.param}", "--logdir", str(runs)]
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tensorboard.main", *options], stdout=file, stderr=file
        )
    try:
        yield _address(process, log)
    finally:
        process.terminate()
        process.wait(20)


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        text = log.read_text()
        if "http://127.0.0.1:" in text:
            return "http://" + text.partition("http://")[2].split("/")[0]
        time.sleep(0.2)
    raise TimeoutError(log.read_text())


def ask(server: str, path: str, **query: str) -> Any:
    with urllib.request.urlopen(f"{server}/{path}?{urllib.parse.urlencode(query)}", timeout=20) as answer:
        return json.load(answer)


def test_it_shows_every_step_once(server: str) -> None:
    run = "digits/tensorboard"
    deadline = time.monotonic() + START_S
    while not STEPS.keys() <= (tags := ask(server, "data/plugin/scalars/tags")).get(run, {}).keys():
        assert time.monotonic() < deadline, tags
        time.sleep(0.3)
    while True:
        rows = {tag: ask(server, "data/plugin/scalars/scalars", run=run, tag=tag) for tag in STEPS}
        if all(len(rows[tag]) >= len(STEPS[tag]) for tag in STEPS) or time.monotonic() > deadline:
            break
        time.sleep(0.3)
    assert {tag: [row[1] for row in rows[tag]] for tag in STEPS} == STEPS
    assert [row[2] for row in rows["train/loss"]] == pytest.approx([1 / step for step in STEPS["train/loss"]])
    assert [row[2] for row in rows["valid/accuracy"]] == pytest.approx([0.25, 0.5, 0.75])
