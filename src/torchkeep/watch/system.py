"""What the machine does meanwhile: processor, memory, disk, network, GPU, looked at now and then by a thread."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


class System:
    """Hands a row of numbers to ``log`` every so many seconds; none where ``every_s`` is 0. Never raises."""

    def __init__(self, log: Callable[[dict[str, float]], Any], folder: Path, every_s: float = 10.0):
        self._log, self._every_s = log, every_s
        self._ending = threading.Event()
        self._thread: threading.Thread | None = None
        if every_s > 0:
            self._thread = threading.Thread(target=self._run, args=(folder,), name="torchkeep-system", daemon=True)
            self._thread.start()

    def _run(self, folder: Path) -> None:
        with contextlib.suppress(Exception):
            sensors = Sensors(folder)
            while not self._ending.wait(self._every_s):
                self._log(sensors.read())

    def close(self) -> None:
        """End at once. May be called more than once."""
        self._ending.set()
        if self._thread is not None:
            self._thread.join()


class Sensors:
    """Reads what can be read here; a sensor that fails is left out."""

    def __init__(self, folder: Path):
        import psutil

        self._psutil, self._folder = psutil, folder
        self._process = psutil.Process()
        self._process.cpu_percent()
        psutil.cpu_percent()
        self._then = time.monotonic()
        self._counters: dict[str, float] = dict(self._sums())
        self._limit = _memory_limit()
        self._board: Any = None

    def read(self) -> dict[str, float]:
        """Numbers by tag: percent of one core, bytes, bytes a second, fractions, °C, W."""
        found: dict[str, float] = {}
        for sensor in (self._own, self._machine, self._rates, self._gpu):
            with contextlib.suppress(Exception):
                found.update(sensor())
        return {f"system/{name}": value for name, value in found.items()}

    def _own(self) -> Iterator[tuple[str, float]]:
        process = self._process
        yield "cpu_percent", process.cpu_percent()
        children = 0
        with contextlib.suppress(self._psutil.Error):
            children = sum(child.memory_info().rss for child in process.children(recursive=True))
        memory = process.memory_info().rss + children
        yield "memory_bytes", memory
        if self._limit:
            yield "memory_of_limit_fraction", memory / self._limit
        yield "threads", process.num_threads()

    def _machine(self) -> Iterator[tuple[str, float]]:
        yield "machine_cpu_percent", self._psutil.cpu_percent()
        yield "machine_memory_fraction", self._psutil.virtual_memory().percent / 100
        yield "disk_free_bytes", self._psutil.disk_usage(str(self._folder)).free

    def _sums(self) -> Iterator[tuple[str, float]]:
        with contextlib.suppress(Exception):
            disk: Any = self._psutil.disk_io_counters()
            yield "disk_read_bytes_per_s", disk.read_bytes
            yield "disk_write_bytes_per_s", disk.write_bytes
        with contextlib.suppress(Exception):
            network = self._psutil.net_io_counters()
            yield "network_sent_bytes_per_s", network.bytes_sent
            yield "network_received_bytes_per_s", network.bytes_recv

    def _rates(self) -> Iterator[tuple[str, float]]:
        now, sums = time.monotonic(), dict(self._sums())
        passed, before = max(1e-3, now - self._then), self._counters
        self._then, self._counters = now, sums
        for name, value in sums.items():
            yield name, max(0.0, value - before.get(name, value)) / passed

    def _gpu(self) -> Iterator[tuple[str, float]]:
        torch = sys.modules.get("torch")
        if torch is None or not torch.cuda.is_initialized():
            return
        device = max(range(torch.cuda.device_count()), key=torch.cuda.memory_reserved)  # this thread has chosen none
        yield "gpu_memory_allocated_bytes", torch.cuda.memory_allocated(device)
        yield "gpu_memory_reserved_bytes", torch.cuda.memory_reserved(device)
        yield "gpu_memory_peak_bytes", torch.cuda.max_memory_allocated(device)
        import pynvml as nvml

        if self._board is None:
            nvml.nvmlInit()
            self._board = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        board = self._board
        yield "gpu_utilisation_fraction", nvml.nvmlDeviceGetUtilizationRates(board).gpu / 100
        yield "gpu_temperature_celsius", nvml.nvmlDeviceGetTemperature(board, nvml.NVML_TEMPERATURE_GPU)
        yield "gpu_power_watts", nvml.nvmlDeviceGetPowerUsage(board) / 1000


def _memory_limit() -> int | None:
    """Of the container, where it has one that is below the machine's memory."""
    for path in _LIMITS:
        with contextlib.suppress(OSError, ValueError):
            limit = int(path.read_text())
            whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
            return limit if limit < whole else None
    return None
