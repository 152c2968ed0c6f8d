"""What the machine does meanwhile."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

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


def test_the_gpu_that_is_used_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    boards = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetUtilizationRates=lambda board: SimpleNamespace(gpu=50 if board == "GPU-1" else 0),
        nvmlDeviceGetTemperature=lambda board, where: 60,
        NVML_TEMPERATURE_GPU=0,
    )  # its power is not known: what fails last takes nothing away
    monkeypatch.setitem(sys.modules, "pynvml", boards)
    sensors = Sensors(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    assert not [tag for tag in sensors.read() if "gpu" in tag]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ("memory_allocated", "memory_reserved", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda device: 100 * device)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=device))
    found = sensors.read()
    assert found["system/gpu_memory_allocated_bytes"] == 100
    assert found["system/gpu_utilisation_fraction"] == 0.5
    assert "system/gpu_power_watts" not in found
