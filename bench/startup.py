"""How long a person waits: for ``--help``, for ``import torchkeep``, for the first step of the digits recipe.

Beside them stand a bare Python and ``import torch``, which no training can avoid. Each is a process of its own, warm:
one round that is not counted comes first. Rounds are interleaved.

    python bench/startup.py [--rounds 15]

The first step is timed from the run's own record: from the moment before the process is started to the ``time`` of
the record of kind ``attempt_start`` (data read, model built, everything ready), and to that of the first record with
``step`` 1 or more (the first optimiser update done; ``monitor.log_every=1`` makes it write one).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from measure import ROOT, interleave, machine_facts, summary, write_result

PROCESSES = {
    "python -c pass": ["-c", "pass"],
    "import torchkeep": ["-c", "import torchkeep"],
    "torchkeep --help": ["-m", "torchkeep", "--help"],
    "import torch": ["-c", "import torch"],
}
RECIPE = ROOT / "examples" / "digits" / "recipe.toml"
TO_ATTEMPT = "digits: start of the attempt"
TO_STEP = "digits: first step done"
HELP_BOUND_S = 0.12


def run_s(arguments: list[str]) -> float:
    """Wall-clock seconds of one Python process from start to end."""
    began = time.perf_counter()
    run(arguments)
    return time.perf_counter() - began


def run(arguments: list[str]) -> None:
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"python {' '.join(arguments)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")


def train_once() -> dict[str, float]:
    """Seconds from before the process starts until the attempt's start and until the first step, by the record."""
    with tempfile.TemporaryDirectory() as folder:
        settings = ["--set", "train.epochs=1", "--set", "monitor.log_every=1", "--run-dir", str(Path(folder) / "run")]
        began = time.time()
        run(["-m", "torchkeep", "train", str(RECIPE), *settings])
        records = read_records(Path(folder))
    start = next(record for record in records if record["kind"] == "attempt_start")
    first = next(record for record in records if record.get("step", 0) >= 1)
    return {TO_ATTEMPT: start["time"] - began, TO_STEP: first["time"] - began}


def read_records(folder: Path) -> list[dict[str, Any]]:
    (path,) = folder.rglob("records.jsonl")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def measure(rounds: int) -> dict[str, list[float]]:
    attempts_s: list[float] = []

    def first_step_s() -> float:
        found = train_once()
        attempts_s.append(found[TO_ATTEMPT])
        return found[TO_STEP]

    works: dict[str, Callable[[], float]] = {name: partial(run_s, PROCESSES[name]) for name in PROCESSES}
    works[TO_STEP] = first_step_s
    interleave(works, 1)  # warm: files in the system's cache, compiled modules written
    attempts_s.clear()
    found = interleave(works, rounds)
    return {**{name: found[name] for name in PROCESSES}, TO_ATTEMPT: attempts_s, TO_STEP: found[TO_STEP]}


def print_table(results: dict[str, dict[str, Any]]) -> None:
    facts = machine_facts()
    print(f"{facts['cpu']}, {facts['cores_usable']} cores, {facts['system']}, load {facts['load_1min']}")
    print(f"Python {facts['python']}, torch {facts['versions'].get('torch')}, {facts['date']}\n")
    print(f"{'seconds':<30} {'median':>8} {'min':>8} {'max':>8} {'MAD':>8}")
    for name, row in results.items():
        print(f"{name:<30} {row['median']:>8.3f} {row['min']:>8.3f} {row['max']:>8.3f} {row['mad']:>8.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    results = {name: summary(values) for name, values in measure(rounds).items()}
    print_table(results)
    path = write_result("startup", {"unit": "s", "help_bound_s": HELP_BOUND_S, "results": results})
    print(f"\nwritten to {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
