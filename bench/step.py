"""The tiny step: MLP 64-128-10, batch 32, digits in memory, one thread, against loops written by hand.

Ours goes through ``tk.fit`` with records, console, TensorBoard scalars and checkpoints on. The expert's loop indexes
tensors in memory and updates with the fused AdamW; the hand loop feeds from a DataLoader. Every work is a process of
its own; a round runs each once, in rotating order; the expert's loop runs twice in a round as an A/A control.

    python bench/step.py [--seconds 20] [--rounds 15]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measure import interleave, summary, write_result

BATCH = 32
WORKS = {"expert": "expert", "expert again (A/A)": "expert", "DataLoader": "loader", "torchkeep": "torchkeep"}


def digits() -> tuple[Any, Any]:
    """The training digits of examples/digits as float32 (N, 64) and int64 (N,), in memory."""
    import torch

    from torchkeep import ImageTable

    table = ImageTable(Path(__file__).parent.parent / "examples" / "digits" / "train.parquet", channels=1)
    images = torch.stack([table[i]["image"] for i in range(len(table))])
    return images.flatten(1).float() / 255, torch.as_tensor(table.labels)


def make_model() -> Any:
    from torch import nn

    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


def expert(seconds: float) -> dict[str, float]:
    """Tensors indexed in memory, fused AdamW, the loss read every 50 steps."""
    import torch
    from torch.nn import functional

    x, y = digits()
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    step, begun, end = 0, time.perf_counter(), time.perf_counter() + seconds
    total = torch.zeros(())
    while time.perf_counter() < end:
        order = torch.randperm(len(x))
        for i in range(0, len(x), BATCH):
            rows = order[i : i + BATCH]
            loss = functional.cross_entropy(model(x[rows]), y[rows])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            total += loss.detach()
            step += 1
            if step % 50 == 0:
                total.item()
                total.zero_()
    return {"us_per_step": (time.perf_counter() - begun) / step * 1e6, "steps": step}


def loader(seconds: float) -> dict[str, float]:
    """What most people write: a DataLoader over a TensorDataset, the loss read every 50 steps."""
    import torch
    from torch.nn import functional
    from torch.utils.data import DataLoader, TensorDataset

    feed = DataLoader(TensorDataset(*digits()), batch_size=BATCH, shuffle=True)
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    step, begun, end = 0, time.perf_counter(), time.perf_counter() + seconds
    while time.perf_counter() < end:
        for x, y in feed:
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            step += 1
            if step % 50 == 0:
                loss.item()
    return {"us_per_step": (time.perf_counter() - begun) / step * 1e6, "steps": step}


def torchkeep(seconds: float) -> dict[str, float]:
    """``tk.fit`` with everything on. Steady state is from one second after the first log point to the last."""
    import torchkeep as tk

    x, y = digits()
    steps_per_epoch = -(-len(x) // BATCH)
    epochs = max(2, round(seconds / 400e-6 / steps_per_epoch))
    begun = time.time()
    with tempfile.TemporaryDirectory() as folder:
        run = tk.fit(
            make_model(),
            tk.Arrays(input=x, label=y),
            loss="cross_entropy",
            epochs=epochs,
            batch_size=BATCH,
            learning_rate=1e-3,
            run_dir=f"{folder}/run",
            monitor={"views": ["tensorboard"]},
            settings={"optimizer": {"decay": "all"}},
        )
        ended = time.time()
        rows = [json.loads(line) for line in (run.dir / "records.jsonl").read_text().splitlines()]
        logged = [row for row in rows if row["kind"] == "scalars"]
        first = next(row for row in logged if row["time"] > logged[0]["time"] + 1)
        last = logged[-1]
        saves = len(list((run.dir / "checkpoints").glob("step-*")))
        events = sum(path.stat().st_size for path in (run.dir / "tensorboard").iterdir())
    span, steps = last["time"] - first["time"], last["step"] - first["step"]
    return {
        "us_per_step": span / steps * 1e6,
        "steps": steps,
        "steady_s": span,
        "start_s": logged[0]["time"] - begun,
        "whole_fit_us_per_step": (ended - begun) / last["step"] * 1e6,
        "checkpoints_kept": saves,
        "event_bytes": events,
        "records": len(rows),
    }


def in_process(work: str, seconds: float, details: list[dict[str, float]]) -> float:
    """Run a work in a fresh process with one thread; µs a step."""
    done = subprocess.run(
        [sys.executable, __file__, "--work", work, "--seconds", str(seconds)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    result = json.loads(done.stdout.splitlines()[-1])
    details.append({"work": work, **result})
    return float(result["us_per_step"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=21.0)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--work", choices=sorted(set(WORKS.values())))
    chosen = parser.parse_args()
    if chosen.work:
        result = globals()[chosen.work](chosen.seconds)
        print(json.dumps(result))
        return
    details: list[dict[str, float]] = []
    works = {name: (lambda work=work: in_process(work, chosen.seconds, details)) for name, work in WORKS.items()}
    times = interleave(works, chosen.rounds)
    ratios = {
        name: [one / other for one, other in zip(times[name], times["expert"], strict=True)]
        for name in WORKS
        if name != "expert"
    }
    result = {
        "work": "MLP 64-128-10, batch 32, 1,442 digits in memory, float32, AdamW, one thread",
        "seconds": chosen.seconds,
        "us_per_step": {name: summary(values) for name, values in times.items()},
        "ratio_to_expert": {name: summary(values) for name, values in ratios.items()},
        "rounds": times,
        "details": details,
    }
    write_result("step", result)
    for name in WORKS:
        row = result["us_per_step"][name]
        ratio = result["ratio_to_expert"].get(name, {}).get("median", 1.0)
        print(f"{name:<20} {row['median']:8.1f} µs/step   {ratio:5.3f} x the expert's loop")


if __name__ == "__main__":
    main()
