"""What the machine does meanwhile."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from torchkeep.watch.system import Sensors, System


def test_it_looks_now_and_then_and_ends_at_once(tmp_path: Path) -> None:
    rows: list[dict[str, float]] = []
    seen = threading.Event()

    def log(values: dict[str, float]) -> None:
        rows.append(values)
        seen.set()

    system = System(log, tmp_path, 0.02)
    assert seen.wait(20)
    system.close()
    system.close()
    count = len(rows)
    assert {"system/cpu_percent", "system/memory_bytes", "system/disk_free_bytes"} <= rows[0].keys()
    assert all(isinstance(value, int | float) for value in rows[0].values())
    assert len(rows) == count
    assert not [thread for thread in threading.enumerate() if thread.name == "torchkeep-system"]


def test_none_is_made_where_none_is_wanted(tmp_path: Path) -> None:
    System(lambda values: pytest.fail("asked"), tmp_path, 0).close()


def test_a_sensor_that_fails_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sensors = Sensors(tmp_path)

    def broken() -> None:
        raise OSError("gone")

    monkeypatch.setattr(sensors, "_machine", broken)
    found = sensors.read()
    assert "system/memory_bytes" in found
    assert "system/disk_free_bytes" not in found
