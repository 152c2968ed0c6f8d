"""What a training shows of itself: within its budget, without changing a bit, the same after a resume."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import torchkeep as tk
from torchkeep.training import watching
from torchkeep.training.watching import Due


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 16), nn.ReLU(), nn.Linear(16, 3))


def data(count: int = 40) -> tk.Arrays:
    drawn = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (count, 3, 4, 4), dtype=torch.uint8, generator=drawn)
    return tk.Arrays(image=images, label=torch.randint(0, 3, (count,), generator=drawn))


def fit(folder: Path, monitor: dict[str, Any], epochs: int = 3, **more: Any) -> tk.Run:
    return tk.fit(
        net(), data(), data(12), metrics=["accuracy"], epochs=epochs, batch_size=8, run_dir=folder, quiet=True,
        monitor={"views": [], **monitor}, loss="cross_entropy", **more,
    )  # fmt: skip


QUIET = {"graph": False, "histograms": "off", "images": 0, "system_every_s": 0}


def test_what_is_watched_changes_no_bit(tmp_path: Path) -> None:
    loud = fit(tmp_path / "loud", {"histograms": 2, "images": 4, "log_every": 1, "profile": 2, "system_every_s": 0.05})
    assert loud.sha256() == fit(tmp_path / "still", QUIET).sha256()


def test_what_a_run_shows_without_being_asked(tmp_path: Path) -> None:
    fit(tmp_path / "run", {"system_every_s": 0.01})
    record = tk.read_run(tmp_path / "run")
    rows = list(record)
    counts = Counter(row["kind"] for row in rows)
    assert counts["graph"] == 1
    assert not [row for row in rows if row["kind"] == "alert"]
    tags = {row["tag"] for row in rows if row["kind"] == "histogram"}
    assert {"weights/1.weight", "gradients/3.bias"} <= tags
    assert any(tag.startswith("activations/") for tag in tags)
    shown = next(row for row in rows if row["kind"] == "prediction")
    assert (shown["tag"], len(shown["rows"])) == ("valid/prediction", 12)
    assert record.media(shown).startswith(b"\x89PNG")
    confusion = next(row for row in rows if row["kind"] == "confusion")
    assert sum(map(sum, confusion["counts"])) == 12
    assert {row["tag"] for row in rows if row["kind"] == "pr_curve"} == {f"valid/pr_curve/{k}" for k in range(3)}
    assert {row["name"] for row in rows if row["kind"] == "decision"} >= {"histograms", "pictures"}
    assert any("system/memory_bytes" in row["values"] for row in rows if row["kind"] == "system")
    start = next(row for row in rows if row["kind"] == "run_start")
    assert any(line.startswith("torch==") for line in start["environment"]["lock"])
    (end,) = [row for row in rows if row["kind"] == "run_end"]
    assert {row["name"] for row in end["artifacts"]} == {"best", "last"}
    assert end["device_waits"] == 0


def test_the_trained_steps_say_how_far_they_went(tmp_path: Path) -> None:
    fit(tmp_path / "run", {**QUIET, "log_every": 5}, epochs=20)
    found = tk.read_run(tmp_path / "run").scalars().to_pylist()
    by_tag = Counter(row["tag"] for row in found)
    assert by_tag["train/gradient_norm"] == by_tag["train/update_ratio/1"] == by_tag["train/update_ratio/3"] == 2
    assert {row["step"] for row in found if row["tag"] == "train/gradient_norm"} == {50, 100}


def test_log_points_are_of_their_steps_however_they_are_read(tmp_path: Path) -> None:
    fit(tmp_path / "run", {**QUIET, "log_every": 1})
    table = tk.read_run(tmp_path / "run").scalars(["train/loss"])
    assert table["step"].to_pylist() == list(range(1, 16))


def test_a_resumed_run_keeps_its_periods_and_shows_no_graph_again(tmp_path: Path) -> None:
    class Stop(Exception):  # noqa: N818
        pass

    class Breaks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.calls = net(), 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.training and self.breaks_at and self.calls >= self.breaks_at:
                raise Stop
            self.calls += self.training
            return self.inner(x)

        breaks_at = 0

    def run(breaks_at: int) -> Any:
        model = Breaks()
        model.breaks_at = breaks_at
        return tk.fit(
            model, data(), data(12), epochs=4, batch_size=8, run_dir=tmp_path / "run", quiet=True, resume="auto",
            loss="cross_entropy", monitor={"views": []}, checkpoint={"every": 5},
        )  # fmt: skip

    with pytest.raises(Stop):
        run(12)
    run(0)
    rows = list(tk.read_run(tmp_path / "run").records(superseded=True))
    assert {row["attempt"] for row in rows} == {0, 1}
    counts = Counter((row["kind"], row.get("name")) for row in rows)
    assert counts["graph", None] == 1
    assert counts["decision", "histograms"] == 1


def test_a_period_is_set_once_by_what_it_costs() -> None:
    due = Due("histograms", "monitor.histograms", "auto", 100, None)
    due.goes_on_from(0)
    assert not due.is_due(99)
    assert due.is_due(100)
    made = due.done(100, cost_s=1.0, step_s=0.01)  # 1 s is 1 % of 100 s: 10,000 steps
    assert made is not None
    assert (made.name, made.value, due.period) == ("histograms", 10_000, 10_000)
    assert not due.is_due(9_999)
    assert due.is_due(10_000)
    assert due.done(10_000, cost_s=50.0, step_s=0.01) is None
    assert due.period == 10_000
    again = Due("histograms", "monitor.histograms", "auto", 100, 10_000)
    again.goes_on_from(12_345)
    assert not again.is_due(19_999)
    assert Due("histograms", "", 7, 100, 10_000).period == 7
    assert Due("histograms", "", "epoch", 100, 10_000).period == 100


def test_a_trace_is_taken_of_the_steps_that_were_asked_for(tmp_path: Path) -> None:
    fit(tmp_path / "run", {**QUIET, "profile": 3})
    record = tk.read_run(tmp_path / "run")
    (row,) = [row for row in record if row["kind"] == "profile"]
    assert row["last_step"] - row["first_step"] == 2
    assert b"aten::" in record.media(row)


def test_a_planted_fault_is_an_alert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    monkeypatch.setattr("torchkeep.training.loop._RATE_EVERY_S", 0.0)
    monkeypatch.setattr("torchkeep.training.loop._TICK_S", 0.0)
    fit(tmp_path / "run", QUIET, preflight="off")
    alerts = [row for row in tk.read_run(tmp_path / "run") if row["kind"] == "alert"]
    assert any("disk" in row["text"] for row in alerts)


def test_what_cannot_be_shown_never_ends_a_training(tmp_path: Path) -> None:
    drawn = torch.Generator().manual_seed(1)
    volumes = torch.randn(8, 1, 4, 6, 6, generator=drawn)
    data = tk.Arrays(input=volumes, label=torch.randint(0, 3, (8, 4, 6, 6), generator=drawn))

    def run(name: str, monitor: dict[str, Any]) -> tk.Run:
        torch.manual_seed(0)
        model = nn.Conv3d(1, 3, 3, padding=1)
        return tk.fit(
            model, data, data, loss=nn.CrossEntropyLoss(), epochs=3, batch_size=4, run_dir=tmp_path / name,
            quiet=True, monitor={"views": [], **monitor},
        )  # fmt: skip

    shown = run("shown", {})
    assert shown.sha256() == run("still", QUIET).sha256()
    alerts = [row for row in tk.read_run(shown.dir) if row["kind"] == "alert" and row["name"] == "pictures"]
    assert len(alerts) == 1
    assert "cannot be shown" in alerts[0]["text"]


def test_a_trace_that_the_end_cuts_short_is_recorded(tmp_path: Path) -> None:
    fit(tmp_path / "run", {**QUIET, "profile": 500})
    (row,) = [row for row in tk.read_run(tmp_path / "run") if row["kind"] == "profile"]
    assert (row["first_step"], row["last_step"]) == (11, 15)
