"""Monitoring: what a number costs the trainer, what it costs a whole training, pictures, a kill, and reading it back.

One thread for arithmetic; TensorBoard's own writers, Weights & Biases, Lightning and HF Trainer log the same beside it.

    python bench/monitor.py [--rounds 5] [--seconds 8] [--only log,tiny,kinds,kill,read,runs]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measure import RESULTS, interleave, machine_facts, pairs, print_bars, summary, write_result
from monitored import WORKS

HERE = Path(__file__).parent
BARS = {
    "log: us a scalar, 20 at once": (2.0, False),
    "log: us a scalar, one at once": (2.0, False),
    "tiny step: rate with 20 scalars a step, of off": (0.9, True),
    "kill -9: seconds lost": (1.0, False),
    "kill -9: acknowledged records lost": (0.0, False),
    "runs: seconds a query of 10,000": (0.1, False),
}


def timed(call: Callable[[], Any], times: int) -> float:
    """Seconds a call."""
    begun = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - begun) / times


# --- 1: one number


def log(rounds: int) -> dict[str, Any]:
    """µs on the trainer's thread, per scalar."""
    import torch
    from torch.utils.tensorboard import SummaryWriter

    import torchkeep as tk

    values = {f"train/value_{number}": 0.5 + number for number in range(20)}
    tensor = torch.tensor(0.5)
    with tempfile.TemporaryDirectory() as place:
        monitor = tk.Monitor(f"{place}/ours")
        other = SummaryWriter(f"{place}/theirs")
        step = iter(range(1 << 60))
        works: dict[str, Callable[[], float]] = {
            "torchkeep, 20 at once": lambda: timed(lambda: monitor.log(next(step), **values), 2000) / 20,
            "torchkeep, one at once": lambda: timed(lambda: monitor.log(next(step), loss=0.5), 5000),
            "torchkeep, a tensor": lambda: timed(lambda: monitor.log(next(step), loss=tensor), 5000),
            "SummaryWriter.add_scalar": lambda: timed(lambda: other.add_scalar("loss", 0.5, next(step)), 2000),
        }
        wandb_run = _wandb(place)
        if wandb_run is not None:
            works["wandb.log offline, 20 at once"] = lambda: timed(lambda: wandb_run.log(values), 500) / 20
        times = {name: [value * 1e6 for value in found] for name, found in interleave(works, rounds).items()}
        monitor.close()
        other.close()
        if wandb_run is not None:
            wandb_run.finish()
    return {name: summary(found) for name, found in times.items()}


def _wandb(place: str) -> Any:
    try:
        import wandb
    except ImportError:
        return None
    os.environ |= {"WANDB_SILENT": "true"}
    return wandb.init(mode="offline", dir=place, project="bench", settings=wandb.Settings(console="off"))


# --- 2: a whole training


def in_process(work: str, seconds: float) -> float:
    """Run a work in a fresh process with one thread; µs a step."""
    done = subprocess.run(
        [sys.executable, str(HERE / "monitored.py"), work, str(seconds)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{work}: {done.stderr[-2000:]}")
    return float(json.loads(done.stdout.splitlines()[-1])["us_per_step"])


def tiny(rounds: int, seconds: float) -> dict[str, Any]:
    """The tiny step of bench/step.py, 20 scalars logged in each."""
    times = interleave({name: (lambda name=name: in_process(name, seconds)) for name in WORKS}, rounds)
    rate = {name: [off / on for off, on in zip(times["torchkeep off"], found, strict=True)]
            for name, found in times.items()}  # fmt: skip
    return {
        "us_per_step": {name: summary(found) for name, found in times.items()},
        "rate_of_off": {name: summary(found) for name, found in rate.items()},
    }


# --- 3: expensive kinds


def kinds(rounds: int) -> dict[str, Any]:
    """ms a call, until the file is written, and ms of it on the caller's thread."""
    import numpy as np
    import torch
    from torch.utils.tensorboard import SummaryWriter

    import torchkeep as tk

    weights = [torch.randn(1_000_000) for _ in range(10)]
    image = torch.randint(0, 256, (3, 256, 512), dtype=torch.uint8)
    corners = np.random.default_rng(0).random((10_000, 3), np.float32)
    faces = np.random.default_rng(1).integers(0, 10_000, (20_000, 3))
    caller: dict[str, list[float]] = {"histogram of 10 M": [], "image": [], "mesh": []}
    with tempfile.TemporaryDirectory() as place:
        monitor, other = tk.Monitor(f"{place}/ours"), SummaryWriter(f"{place}/theirs")
        step = iter(range(1 << 60))

        def ours(name: str, call: Callable[[int], Any]) -> float:
            begun = time.perf_counter()
            call(next(step))
            caller[name].append((time.perf_counter() - begun) * 1e3)
            monitor.recorder.flush()
            return (time.perf_counter() - begun) * 1e3

        def theirs(call: Callable[[int], Any]) -> float:
            begun = time.perf_counter()
            call(next(step))
            other.flush()
            return (time.perf_counter() - begun) * 1e3

        def all_ours(at: int) -> None:
            for number, tensor in enumerate(weights):
                monitor.histogram(at, f"w{number}", tensor)

        def all_theirs(at: int) -> None:
            for number, tensor in enumerate(weights):
                other.add_histogram(f"w{number}", tensor, at)

        works = {
            "histogram of 10 M": lambda: ours("histogram of 10 M", all_ours),
            "histogram of 10 M, SummaryWriter": lambda: theirs(all_theirs),
            "image": lambda: ours("image", lambda at: monitor.image(at, "i", image)),
            "image, SummaryWriter": lambda: theirs(lambda at: other.add_image("i", image, at)),
            "mesh": lambda: ours("mesh", lambda at: monitor.mesh(at, "m", corners, faces)),
            "mesh, SummaryWriter": lambda: theirs(
                lambda at: other.add_mesh(
                    "m", torch.from_numpy(corners)[None], faces=torch.from_numpy(faces)[None], global_step=at
                )
            ),
        }
        times = interleave(works, rounds)
        monitor.close()
        other.close()
    ratios = {name: pairs(times[name], {f"{name}, SummaryWriter": times[f"{name}, SummaryWriter"]}) for name in caller}
    return {
        "ms": {name: summary(found) for name, found in times.items()},
        "ms_on_the_callers_thread": {name: summary(found) for name, found in caller.items()},
        "of_summary_writer": {name: next(iter(found.values())) for name, found in ratios.items()},
    }


# --- 4: a kill


def kill(rounds: int) -> dict[str, Any]:
    """kill -9 at a random moment: seconds of records lost, and acknowledged ones."""
    draws = random.Random(0)
    lost_s, lost_acknowledged = [], 0
    for _ in range(rounds * 4):
        with tempfile.TemporaryDirectory() as place:
            process = subprocess.Popen([sys.executable, str(HERE / "monitored.py"), "logging", place],
                                       stdout=subprocess.PIPE, text=True)  # fmt: skip
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(1 + 2 * draws.random())
            process.send_signal(signal.SIGKILL)
            killed = time.time()
            said = process.stdout.read().split()
            process.wait()
            lines = (Path(place) / "run" / "records.jsonl").read_bytes().splitlines()
            rows = [json.loads(line) for line in lines if line.startswith(b'{"kind":"scalars"') and line.endswith(b"}")]
            lost_s.append(killed - rows[-1]["time"])
            lost_acknowledged += max(0, int(said[-1] if said else 0) - rows[-1]["step"])
    return {"seconds_lost": summary(lost_s), "acknowledged_lost": lost_acknowledged}


# --- 5: reading


def read(rounds: int) -> dict[str, Any]:
    """A record of 10 million scalars as an Arrow table, in a fresh process: 20 in a line, and one in a line."""
    found: dict[str, Any] = {}
    for in_line in (20, 1):
        with tempfile.TemporaryDirectory() as place:
            _write_record(Path(place), 10_000_000 // in_line, in_line)
            rows = []
            for _ in range(max(1, min(3, rounds))):
                done = subprocess.run([sys.executable, str(HERE / "monitored.py"), "reading", place],
                                      capture_output=True, text=True, check=True)  # fmt: skip
                rows.append(json.loads(done.stdout))
            size = (Path(place) / "records.jsonl").stat().st_size
        found[f"{in_line} in a line"] = {
            "seconds": summary([row["seconds"] for row in rows]), "file_bytes": size,
            "table_bytes": rows[0]["table_bytes"], "peak_bytes": max(row["peak_bytes"] for row in rows),
        }  # fmt: skip
    return found


def _write_record(place: Path, lines: int, in_line: int) -> None:
    from torchkeep.watch.records import dump_record

    head = {"kind": "scalars", "attempt": 0, "rank": 0}
    with (place / "records.jsonl").open("wb") as file:
        for step in range(lines):
            values = {f"train/value_{number}": 0.123456789 + step * number for number in range(in_line)}
            at = {"seq": step, "step": step, "samples": 32 * step, "epoch": 0, "time": 1.7e9 + step}
            file.write(dump_record({**head, **at, "values": values}))


# --- 6: many runs


def runs(rounds: int) -> dict[str, Any]:
    """10,000 runs: what the verb does after its imports, with an index that is up to date."""
    with tempfile.TemporaryDirectory() as place:
        done = subprocess.run([sys.executable, str(HERE / "monitored.py"), "runs", place, str(rounds * 3)],
                              capture_output=True, text=True, check=False)  # fmt: skip
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        found = json.loads(done.stdout.splitlines()[-1])
    return {"first_s": found["first_s"], "query_s": summary(found["query_s"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--only", default="log,tiny,kinds,kill,read,runs")
    chosen = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    works: dict[str, Callable[[], dict[str, Any]]] = {
        "log": lambda: log(chosen.rounds * 3), "tiny": lambda: tiny(chosen.rounds, chosen.seconds),
        "kinds": lambda: kinds(chosen.rounds), "kill": lambda: kill(chosen.rounds),
        "read": lambda: read(chosen.rounds), "runs": lambda: runs(chosen.rounds),
    }  # fmt: skip
    kept = RESULTS / "monitor.json"
    result: dict[str, Any] = json.loads(kept.read_text())["parts"] if kept.exists() else {}
    for name in chosen.only.split(","):
        result[name] = {"machine": machine_facts(), **works[name]()}
        write_result("monitor", {"parts": result})
        print(json.dumps(_medians(result[name]), indent=1))
    print_bars(_judged(result), BARS)
    print(f"peak memory of this process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3:.0f} MB")


def _medians(found: Any) -> Any:
    if isinstance(found, dict) and "median" in found:
        return round(found["median"], 4)
    return {k: _medians(v) for k, v in found.items() if k != "machine"} if isinstance(found, dict) else found


def _judged(result: dict[str, Any]) -> dict[str, float]:
    found: dict[str, float] = {}
    if "log" in result:
        found["log: us a scalar, 20 at once"] = result["log"]["torchkeep, 20 at once"]["median"]
        found["log: us a scalar, one at once"] = result["log"]["torchkeep, one at once"]["median"]
    if "tiny" in result:
        found["tiny step: rate with 20 scalars a step, of off"] = result["tiny"]["rate_of_off"]["torchkeep on"][
            "median"
        ]
    if "kill" in result:
        found["kill -9: seconds lost"] = statistics.fmean([result["kill"]["seconds_lost"]["max"]])
        found["kill -9: acknowledged records lost"] = result["kill"]["acknowledged_lost"]
    if "runs" in result:
        found["runs: seconds a query of 10,000"] = result["runs"]["query_s"]["median"]
    return found


if __name__ == "__main__":
    main()
