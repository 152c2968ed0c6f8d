"""The verbs that look back at runs, on real ones: runs, compare, sync, and records as JSON lines."""

from __future__ import annotations

import csv
import io
import json
from typing import Any

import pytest


@pytest.fixture
def two(desk: Any) -> Any:
    """Two runs that differ in one setting, and one that is not like them."""
    desk.write_table()
    for run, changes in (("a", ()), ("b", ("optimizer.learning_rate=0.1",)), ("c", ("train.epochs=1",))):
        words = [word for change in changes for word in ("--set", change)]
        said = desk.say("train", "table.toml", "--run-dir", f"runs/{run}", "--quiet", *words)
        assert said.code == 0, said.err
    return desk


def test_runs_are_filtered_and_sorted(two: Any) -> None:
    said = two.say("runs", "--json", "--where", "train.epochs = 2 and status = finished", "--sort", "-learning_rate")
    assert said.code == 0, said.err
    rows = [json.loads(line) for line in said.out.splitlines()]
    assert [row["name"] for row in rows] == ["b", "a"]
    assert rows[0]["model"] == "mlp"
    assert rows[0]["best.valid/accuracy"] is not None
    table = list(csv.DictReader(io.StringIO(two.say("runs", "--csv").out)))
    assert [row["name"] for row in table] == ["a", "b", "c"]
    assert "c" in two.say("runs").out
    nothing = two.say("runs", "--where", "valid/accuracy > 2")
    assert (nothing.code, "no runs" in nothing.out) == (0, True)


def test_a_condition_that_cannot_be_read_is_pointed_at(two: Any) -> None:
    said = two.say("runs", "--where", "valid/acuracy > .9")
    assert said.code == 2
    assert "valid/accuracy" in said.err
    assert two.say("runs", "nowhere").code == 2


def test_runs_are_compared_in_the_terminal_and_on_a_page(two: Any) -> None:
    said = two.say("compare", "runs/a", "runs/b", "--html", "page.html")
    assert said.code == 0, said.err
    assert "optimizer.learning_rate" in said.out
    assert "part at step" in said.out
    page = (two.folder / "page.html").read_text(encoding="utf-8")
    assert "<svg" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    found = json.loads(two.say("compare", "runs/a", "runs/c", "--json").out)
    assert found["runs"].keys() == {"a", "c"}
    assert two.say("compare", "runs/a", "runs/none").code == 2


def test_tensorboard_is_made_again_from_the_record(two: Any) -> None:
    assert not (two.folder / "runs/a/tensorboard").exists()
    said = two.say("sync", "runs/a", "--to", "tensorboard")
    assert said.code == 0, said.err
    assert "records of runs/a are at tensorboard" in said.out
    assert list((two.folder / "runs/a/tensorboard").glob("events.*"))
    assert two.say("sync", "runs/none", "--to", "tensorboard").code == 2


def test_records_are_lines_of_json_and_nothing_else(desk: Any) -> None:
    desk.write_table()
    said = desk.type("train", "table.toml", "--log", "json")
    assert said.code == 0, said.err
    rows = [json.loads(line) for line in said.out.splitlines()]
    assert {"attempt_start", "scalars", "run_end"} <= {row["kind"] for row in rows}
    assert [row["seq"] for row in rows] == list(range(len(rows)))
    assert rows == desk.records("runs/table")
    assert "epoch 2/2" in said.err


def test_a_view_whose_package_is_missing_is_said_before_anything_is_written(
    desk: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: None)
    desk.write_table()
    said = desk.say("train", "table.toml", "--set", 'monitor.views=["wandb"]')
    assert said.code == 2
    assert "torchkeep[wandb]" in said.err
    assert desk.runs() == []
