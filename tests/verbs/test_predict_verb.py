"""Predictions on the command line, from a run and from its package: any input, any form, and a job that was killed."""

from __future__ import annotations

import csv
import io
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import torchkeep as tk

DIGITS = Path(__file__).parents[2] / "examples" / "digits"
NUM_PICTURES = 40


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the digits, trained a little."""
    place = tmp_path_factory.mktemp("digits") / "run"
    edits = ["train.epochs=1", "monitor.views=[]", "data.workers=0", "train.threads=1"]
    tk.train(DIGITS / "recipe.toml", set=edits, run_dir=place, quiet=True)
    return place


@pytest.fixture
def pictures(desk: Any) -> Any:
    """A desk with some of the digits as files, in a folder."""
    for number, cell in enumerate(pq.read_table(DIGITS / "test.parquet")["image"].to_pylist()[:NUM_PICTURES]):
        path = desk.folder / "pictures" / f"{number:02}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(cell if isinstance(cell, bytes) else cell["bytes"])
    return desk


def table_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_files_in_every_form_with_the_likeliest_classes(pictures: Any, run: Path) -> None:
    pictures.write("broken.png", "no image")
    words = ("predict", run, "pictures", "broken.png", "--top", "3")
    said = pictures.say(*words)
    assert said.code == 3
    assert "1 inputs could not be read; their rows say why" in said.err
    rows = table_of(said.out)
    assert [row["input"] for row in rows] == [*(f"pictures/{i:02}.png" for i in range(NUM_PICTURES)), "broken.png"]
    assert "cannot be decoded" in rows[-1]["error"]
    for row in rows[:-1]:
        sure = [float(row[name]) for name in ("probability", "probability_2", "probability_3")]
        assert sure == sorted(sure, reverse=True)
        assert len({row["label"], row["label_2"], row["label_3"]} & set("0123456789")) == 3
    for form in ("jsonl", "parquet", "csv"):
        assert pictures.say(*words, "-o", f"out.{form}").code == 3
    assert Path("out.csv").read_text() == said.out
    lines = Path("out.jsonl").read_text()
    assert pictures.say(*words, "--format", "jsonl").out == lines
    written = [json.loads(line) for line in lines.splitlines()]
    assert [row["top"][1]["label"] for row in written[:-1]] == [row["label_2"] for row in rows[:-1]]
    assert pq.read_table("out.parquet")["top"].to_pylist() == [row.get("top") for row in written]
    assert pictures.files() & {".out.csv.part", ".out.jsonl.part", ".out.parquet.part"} == set()
    for more in (("--workers", "0"), ("--workers", "3")):
        assert pictures.say(*words, *more).out == said.out


def test_what_cannot_be_asked_for(pictures: Any, run: Path) -> None:
    for words, fragment in [
        (("--format", "parquet"), "Parquet needs a file"),
        (("--top", "0"), "--top"),
        (("--workers", "x"), "--workers"),
        (("--device", "tpu:9"), "this device is not there"),
        (("lost.png",), "there is no such input"),
    ]:
        said = pictures.say("predict", run, "pictures", *words)
        assert (said.code, said.out) == (2, "")
        assert fragment in said.err


def test_standard_input_names_files(pictures: Any, run: Path) -> None:
    names = "pictures/03.png\npictures/01.png\n"
    done = subprocess.run([sys.executable, "-m", "torchkeep", "predict", run, "-", "pictures/00.png"], check=False,
                          cwd=pictures.folder, input=names, capture_output=True, text=True, timeout=120)  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert [row["input"] for row in table_of(done.stdout)] == [*names.split(), "pictures/00.png"]


def test_standard_input_is_a_table_for_a_model_of_one(desk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.write_table()
    assert desk.say("train", "table.toml", "--quiet").code == 0
    expected = table_of(desk.say("predict", "runs/table", "rows.csv").out)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(Path("rows.csv").read_bytes())))
    rows = table_of(desk.say("predict", "runs/table", "-").out)
    assert [row["input"] for row in rows] == [f"row {i}" for i in range(40)]
    assert [row["probability"] for row in rows] == [row["probability"] for row in expected]


def test_a_package_says_the_labels_of_its_run(pictures: Any, run: Path) -> None:
    assert pictures.say("package", run, "-o", "digits.tkp").code == 0
    of_run, of_package = (
        table_of(pictures.say("predict", source, "pictures").out) for source in (run, "digits.tkp")
    )  # fmt: skip
    assert [row["label"] for row in of_package] == [row["label"] for row in of_run]
    found = tk.Predictor("digits.tkp")(sorted(Path("pictures").iterdir()))
    wanted = [float(row["probability"]) for row in of_package]
    assert [said.probability for said in found] == pytest.approx(wanted, abs=1e-5)


_TIMES = 60  # the pictures again and again: a job that is still under way when it is ended


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGINT])
def test_a_job_that_was_killed_goes_on_to_the_same_bytes(pictures: Any, run: Path, ending: signal.Signals) -> None:
    words = ("predict", run, *["pictures"] * _TIMES, "--batch-size", "1", "-o")
    job = pictures.start(*words, "out.csv")
    pictures.wait_for(".out.csv.part", job)
    part = pictures.folder / ".out.csv.part"
    while job.poll() is None and len(part.read_bytes().splitlines()) < 20:
        time.sleep(0.01)
    job.send_signal(ending)
    _, err = job.communicate(timeout=60)
    assert job.returncode == (130 if ending == signal.SIGINT else -ending)
    assert "Traceback" not in err
    assert ("the same command goes on behind them" in err) == (ending == signal.SIGINT)
    assert not Path("out.csv").exists()
    again = pictures.say(*words, "out.csv")
    assert again.code == 0
    assert "rows were finished before" in again.err
    assert pictures.say(*words, "whole.csv").code == 0
    assert Path("out.csv").read_bytes() == Path("whole.csv").read_bytes()
    assert len(table_of(Path("out.csv").read_text())) == _TIMES * NUM_PICTURES
    assert not part.exists()
