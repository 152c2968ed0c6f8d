"""What every benchmark shares: the machine, interleaved rounds, robust figures, and the file that keeps them."""

from __future__ import annotations

import json
import os
import platform
import random
import statistics
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
PACKAGES = ("torchkeep", "torch", "numpy", "pydantic", "click", "rich", "safetensors", "pyarrow", "tensorboard")
RESAMPLES = 10_000


def machine_facts() -> dict[str, Any]:
    """What a figure depends on: processor, cores, load, memory, system, versions, commit and date."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "cores_usable": _cores_usable(),
        "load_1min": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "memory_bytes": _memory_bytes(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
        "commit": _commit(),
    }


def _cpu_model() -> str:
    if sys.platform == "darwin":
        return _said("sysctl", "-n", "machdep.cpu.brand_string") or platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _cores_usable() -> int | None:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _memory_bytes() -> int | None:
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit measured, with "+changes" where the source differs from it."""
    commit = _said("git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD")
    changed = _said("git", "-C", str(ROOT), "status", "--porcelain", "--", "src", "bench/*.py", "pyproject.toml")
    return f"{commit}{'+changes' if changed else ''}" if commit else None


def _said(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def interleave(works: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Let each work measure itself once a round; each round begins with another, so that none has the warm place.

    The i-th values of two works come from one round: their ratio is a pair.
    """
    names = list(works)
    found: dict[str, list[float]] = {name: [] for name in names}
    for round_idx in range(rounds):
        first = round_idx % len(names)
        for name in names[first:] + names[:first]:
            found[name].append(works[name]())
    return found


def summary(values: list[float]) -> dict[str, Any]:
    """Median, its 95 % interval by the percentile bootstrap, median absolute deviation, least and greatest.

    Source:  Efron & Tibshirani 1993, "An introduction to the bootstrap", chapter 13
    """
    median = statistics.median(values)
    low, high = _median_interval(values)
    return {
        "rounds": len(values),
        "median": median,
        "median_95": [low, high],
        "mad": statistics.median(abs(value - median) for value in values),
        "min": min(values),
        "max": max(values),
        "values": list(values),
    }


def _median_interval(values: list[float]) -> tuple[float, float]:
    draws = random.Random(0)  # the same values give the same interval
    medians = sorted(statistics.median(draws.choices(values, k=len(values))) for _ in range(RESAMPLES))
    return medians[int(0.025 * RESAMPLES)], medians[int(0.975 * RESAMPLES)]


def pairs(ours: list[float], found: dict[str, list[float]]) -> dict[str, dict[str, Any]]:
    """The ratio to each work, a pair from each round."""
    others = {name: its for name, its in found.items() if its is not ours}
    return {name: summary([a / b for a, b in zip(ours, its, strict=True)]) for name, its in others.items()}


def between(row: dict[str, Any]) -> str:
    return f"{row['median']:.2f} ({row['median_95'][0]:.2f}-{row['median_95'][1]:.2f})"


def print_bars(found: dict[str, float], bars: dict[str, tuple[float, bool]]) -> None:
    """Each figure beside its bar: the value, and whether the figure must be at least that."""
    print()
    for name, (bar, is_least) in bars.items():
        if name not in found:
            print(f"{name:<55} {'not measured':>12}")
            continue
        is_met = found[name] >= bar if is_least else found[name] <= bar
        sign = "at least" if is_least else "at most"
        print(f"{name:<55} {found[name]:>12.3f}   {sign} {bar:<6g} {'ok' if is_met else 'below the bar'}")


def write_result(name: str, result: dict[str, Any]) -> Path:
    """Keep a result, with the machine that it was measured on, as bench/results/NAME.json."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    kept = {"benchmark": name, "machine": machine_facts(), **result}
    path.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return path
