"""Checkpoints: what a save takes from training, a durable save, a load, memory, and the way back to the first step.

Each part is a process of its own on two cores, with one thread for arithmetic where none is said. Its works take turns,
so that the i-th values of two works are a pair. The state of stall, durable, load and memory: 60 float32 tensors, 100
million parameters, with AdamW's moments 1.2 GB. Every write is awaited, and the disk settled, before the next work
begins; files are read from the system's cache.

    python bench/checkpoint.py [--rounds 11] [--only stall,durable,load,memory,training,resume] [--folder DIR] [--quick]

stall: until a save without waiting returns, against a copy to memory that was touched before, and DCP's async_save.
durable: written, hashed and synced, against safetensors with an fsync of file and folder.  load: verified, against
torch.load.  training: steps with a save every 20 steps against steps without.  resume: 10 million rows of 64 bytes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from subprocess import DEVNULL
from typing import Any

from feeding import NUM_CORES, ROWS_A_BATCH, make_rows, mapped_rows
from measure import RESULTS, ROOT, between, interleave, machine_facts, pairs, print_bars, summary, write_result
from works import answer_of

STATE = (832, 12)  # width and blocks
# name: width and layers of the MLP, batch size, saves a segment
TRAININGS = {
    "40 MB, batch 32": (912, 4, 32, 3),
    "40 MB, batch 256": (912, 4, 256, 3),
    "1.2 GB, batch 64": (3536, 8, 64, 1),
}
JUDGED = "1.2 GB"  # the bars are of this state; where a step takes less than its share of the disk, saves must wait
SAVE_EVERY = 20
SETTLED_S = 0.2  # a file that was removed is discarded on the disk a while after the sync
ROWS = 10_000_000
POSITIONS = (0.0, 0.1, 0.5, 0.9, 0.999)
RUN_BATCH = 4096
RECIPE = f"""name = "rows"
[data]
train = "rows/image.npy"
batch_size = {RUN_BATCH}
[model]
name = "mlp"
[train]
epochs = 1
[checkpoint]
every = 200
[monitor]
views = []
log_every = 1
"""
WAIT_S = 120

OURS, COPY, SAFETENSORS, TORCH, DCP = "torchkeep", "copy_", "safetensors", "torch", "DCP"
KEPT = "DCP, stager kept"
PLAIN, SAVING = "no saves", "torchkeep"
PARTS = ("stall", "durable", "load", "memory", "training", "resume")

# (figure, bar, whether the figure must be at least the bar)
BARS: dict[str, tuple[float, bool]] = {
    "stall: times copy_": (1.5, False),
    "stall: times async_save": (1.0, False),
    "durable save: times safetensors": (1.2, False),
    "load: times torch.load": (1.5, False),
    "memory of an asynchronous save, copies of the state": (1.05, False),
    "rate with saves, 1 thread, of that without": (0.97, True),
    "rate with saves, 2 threads, of that without": (0.90, True),
    "seek in 1e7 rows, the worst position, s": (2.0, False),
    "torchkeep resume to the first step, beyond imports, s": (2.0, False),
}


def make_state(width: int, blocks: int) -> dict[str, Any]:
    """Parameters in a transformer's shapes, five a block, (12 width + 1) width in all, and AdamW's moments of them."""
    import torch

    sizes = {"qkv": (3, 1), "out": (1, 1), "up": (4, 1), "down": (1, 4)}
    shapes: dict[str, tuple[int, ...]] = {name: (width * a, width * b) for name, (a, b) in sizes.items()}
    shapes["norm"] = (width,)
    parameters = {
        f"{block}.{name}": torch.nn.Parameter(torch.randn(shape))
        for block in range(blocks)
        for name, shape in shapes.items()
    }
    optimizer = torch.optim.AdamW(parameters.values())
    for p in parameters.values():  # no step: what its gradients took would be counted as free
        optimizer.state[p] = {"step": torch.ones(()), "exp_avg": torch.randn_like(p.detach()),
                              "exp_avg_sq": torch.rand_like(p.detach())}  # fmt: skip
    model = {name: parameter.detach() for name, parameter in parameters.items()}
    return {"model": model, "optimizer": optimizer.state_dict()}


def flat(state: dict[str, Any]) -> dict[str, Any]:
    """The same tensors by name."""
    from torchkeep.tensors import pack

    tensors: dict[str, Any] = pack(state)[1]
    return tensors


def size_bytes(state: dict[str, Any]) -> int:
    return sum(tensor.nbytes for tensor in flat(state).values())


def took_s(work: Callable[[], Any], after: Callable[[Any], object]) -> float:
    """Seconds of ``work``; what comes after it, up to a disk that is idle, is not counted."""
    begun = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - begun
    after(result)
    del result
    os.sync()
    time.sleep(SETTLED_S)
    return seconds


def turns(works: dict[str, Callable[[], float]], rounds: int, **facts: Any) -> dict[str, Any]:
    """Interleaved rounds after one that is not counted: seconds of each work, and what ours are times the others'."""
    interleave(works, 1)
    found = interleave(works, rounds)
    return {
        **facts,
        "seconds": {name: summary(values) for name, values in found.items()},
        "times": {name: pairs(found[name], found) for name in found if name.startswith(OURS)},
        "again": {
            name: summary([a / b for a, b in zip(found[name], found[name.removesuffix(" again")], strict=True)])
            for name in found
            if name.endswith(" again")
        },
    }


def dcp_save(state: dict[str, Any], path: Path, stager: Any = None) -> Any:
    from torch.distributed.checkpoint.state_dict_saver import async_save

    return async_save(state, checkpoint_id=path, no_dist=True, async_stager=stager)


def kept_stager() -> Any:
    """DCP's stager as its manual keeps it, so that its memory is made once. Pinned memory it has only with CUDA."""
    from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

    return DefaultStager(StagingOptions(False, False, False, False))


def written(future: Any, path: Path) -> None:
    future.result()
    shutil.rmtree(path)


# The parts, each in a process of its own


def stall(rounds: int, quick: bool, folder: Path) -> dict[str, Any]:
    import torch

    import torchkeep as tk

    state = make_state(*_state_shape(quick))
    sources = list(flat(state).values())
    room = [torch.zeros_like(source) for source in sources]
    checkpoints, stager, steps = tk.Checkpoints(folder / "ours", keep_last=1), kept_stager(), itertools.count(1)
    checkpoints.reserve(state)

    def copy() -> float:
        with torch.no_grad():
            return took_s(partial(torch._foreach_copy_, room, sources), bool)

    def dcp(kept: Any) -> float:
        path = folder / "dcp"
        return took_s(partial(dcp_save, state, path, kept), partial(written, path=path))

    works: dict[str, Callable[[], float]] = {
        OURS: lambda: took_s(lambda: checkpoints.save(next(steps), state, wait=False), lambda _: checkpoints.join()),
        COPY: copy,
        f"{COPY} again": copy,
        DCP: partial(dcp, None),
        KEPT: partial(dcp, stager),
    }
    return turns(works, rounds, state_bytes=size_bytes(state), tensors=len(sources), threads=torch.get_num_threads())


def durable(rounds: int, quick: bool, folder: Path) -> dict[str, Any]:
    import safetensors.torch
    import torch
    from torch.distributed.checkpoint.state_dict_saver import save as save_dcp

    import torchkeep as tk
    from torchkeep.files import sync_file, sync_folder

    state = make_state(*_state_shape(quick))
    tensors = flat(state)

    def synced(write: Callable[[Path], object]) -> None:
        path = folder / "one" / "state"
        path.parent.mkdir()
        write(path)
        with path.open("rb+") as file:
            sync_file(file)
        sync_folder(path.parent)

    def turn(work: Callable[[], object]) -> float:
        return took_s(work, lambda _: shutil.rmtree(folder / "one"))

    peer = partial(turn, partial(synced, lambda path: safetensors.torch.save_file(tensors, path)))
    works: dict[str, Callable[[], float]] = {
        OURS: partial(turn, lambda: tk.Checkpoints(folder / "one").save(1, state)),
        SAFETENSORS: peer,
        f"{SAFETENSORS} again": peer,
        TORCH: partial(turn, partial(synced, lambda path: torch.save(state, path))),
        DCP: partial(turn, lambda: save_dcp(state, checkpoint_id=folder / "one", no_dist=True)),
    }
    return turns(works, rounds, state_bytes=size_bytes(state))


def load(rounds: int, quick: bool, folder: Path) -> dict[str, Any]:
    import safetensors.torch
    import torch

    import torchkeep as tk

    state = make_state(*_state_shape(quick))
    checkpoints = tk.Checkpoints(folder / "ours")
    path = checkpoints.save(1, state)
    torch.save(state, folder / "state.pt")
    safetensors.torch.save_file(flat(state), folder / "state.safetensors")
    reads: dict[str, Callable[[], Any]] = {
        OURS: partial(checkpoints.load, path),
        TORCH: partial(torch.load, folder / "state.pt", mmap=False, weights_only=True),
        SAFETENSORS: partial(safetensors.torch.load_file, folder / "state.safetensors"),
    }
    for name, read in reads.items():
        found, held = flat(read()), flat(state)
        assert all(torch.equal(found[key], held[key]) for key in held), name
    works: dict[str, Callable[[], float]] = {name: partial(took_s, read, bool) for name, read in reads.items()}
    works[f"{TORCH} again"] = works[TORCH]
    state_bytes = size_bytes(state)
    del state, found, held
    return turns(works, rounds, state_bytes=state_bytes)


def memory(work: str, quick: bool, folder: Path) -> dict[str, Any]:
    """What a process takes at most, beyond itself with its state, while it saves twice without waiting."""
    import torchkeep as tk

    small = make_state(8, 1)
    checkpoints = tk.Checkpoints(folder / "small")
    checkpoints.save(1, small)  # what is imported or made at the first save is not the state's
    dcp_save(small, folder / "dcp").result()
    state, stager = make_state(*_state_shape(quick)), kept_stager()
    state_bytes = size_bytes(state)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the high-water mark begins anew, proc(5)
    before = status_bytes("VmRSS")
    checkpoints = tk.Checkpoints(folder / "ours", keep_last=1)
    if work == OURS:
        checkpoints.reserve(state)
    for step in (1, 2):
        if work.startswith(OURS):
            checkpoints.save(step, state, wait=work != OURS)
            checkpoints.join()
        else:
            dcp_save(state, folder / f"dcp-{step}", stager if work == KEPT else None).result()
    return {"extra_bytes": status_bytes("VmHWM") - before, "state_bytes": state_bytes}


def status_bytes(key: str) -> int:
    """A figure of /proc/self/status."""
    rows = dict(line.partition(":")[::2] for line in Path("/proc/self/status").read_text().splitlines())
    return int(rows[key].split()[0]) * 1024


def training(name: str, rounds: int, folder: Path) -> dict[str, Any]:
    """Segments of steps that begin with a save, have one every 20 steps, and end when the last one is written.

    So each save pays for its own write, as in a run where the next save waits for it.
    """
    import torch

    import torchkeep as tk

    width, layers, batch, saves = TRAININGS[name]
    blocks = [layer for _ in range(layers) for layer in (torch.nn.Linear(width, width), torch.nn.ReLU())]
    model = torch.nn.Sequential(*blocks)
    # a rate of 0 keeps every segment the same work: parameters that shrink end as denormal numbers, which are slow
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    rows = torch.randn(batch, width)

    def step() -> None:
        optimizer.zero_grad()
        model(rows).square().mean().backward()
        optimizer.step()

    def state() -> dict[str, Any]:
        return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}

    def segment(save: Callable[[int], object], end: Callable[[], object]) -> float:
        os.sync()
        begun = time.perf_counter()
        for number in range(saves):
            save(number)
            for _ in range(SAVE_EVERY):
                step()
        end()
        return time.perf_counter() - begun

    step()
    checkpoints, numbers, under_way = tk.Checkpoints(folder / "ours", keep_last=1), itertools.count(1), list[Any]()
    checkpoints.reserve(state())
    stager = kept_stager()

    def dcp(number: int) -> None:
        waited(under_way, folder)
        under_way.append(dcp_save(state(), folder / "dcp", stager))

    works: dict[str, Callable[[], float]] = {
        SAVING: partial(segment, lambda _: checkpoints.save(next(numbers), state(), wait=False), checkpoints.join),
        PLAIN: partial(segment, bool, bool),
        f"{PLAIN} again": partial(segment, bool, bool),
        KEPT: partial(segment, dcp, partial(waited, under_way, folder)),
    }
    found = turns(works, rounds, state_bytes=size_bytes(state()), threads=torch.get_num_threads())
    plain, steps = found["seconds"][PLAIN], saves * SAVE_EVERY
    found["step_s"] = plain["median"] / steps
    found["written_bytes_s"] = found["state_bytes"] * saves / found["seconds"][SAVING]["median"]
    found["rate_of_plain"] = {
        name: summary([a / b for a, b in zip(plain["values"], row["values"], strict=True)])
        for name, row in found["seconds"].items()
        if name != PLAIN
    }
    return found


def waited(under_way: list[Any], folder: Path) -> None:
    while under_way:
        written(under_way.pop(), folder / "dcp")


def seek(rounds: int, folder: Path) -> dict[str, Any]:
    """Seconds from a state to the first batch, at each position of the rows, in a loader that is new each time."""
    import torchkeep as tk

    dataset = tk.Arrays(**mapped_rows(folder))
    found: dict[str, Any] = {}
    for position, round_idx in itertools.product(POSITIONS, range(rounds)):
        loader = tk.Loader(dataset, ROWS_A_BATCH, shuffle=True)
        state = loader.state_dict() | {"epoch": round_idx, "delivered": int(len(loader) * position)}
        begun = time.perf_counter()
        loader.load_state_dict(state)
        batch = next(batches := iter(loader))
        found.setdefault(str(position), []).append(time.perf_counter() - begun)
        assert len(batch["index"]) == ROWS_A_BATCH
        batches.close()
    return {"rows": len(dataset), "seconds": {position: summary(values) for position, values in found.items()}}


# A run that is preempted at nine tenths of its epoch, and resumed


def begin_run(folder: Path) -> int:
    """Train until nine tenths of the epoch are done; the step that is saved then."""
    import numpy as np

    (folder / "rows").mkdir()
    rows = mapped_rows(folder)
    np.save(folder / "rows" / "image.npy", rows["row"].reshape(-1, 8, 8))
    np.save(folder / "rows" / "label.npy", rows["label"])
    (folder / "recipe.toml").write_text(RECIPE, encoding="utf-8")
    words = ["train", str(folder / "recipe.toml"), "--run-dir", str(folder / "run")]
    goal = len(rows["label"]) // RUN_BATCH * 9 // 10
    process, _ = started(words, folder / "run", lambda record: record["step"] >= goal)
    process.send_signal(signal.SIGTERM)
    if process.wait() != 75:
        sys.exit(f"the run ended with {process.returncode} when it was preempted")
    return max(int(path.name.removeprefix("step-")) for path in (folder / "run" / "checkpoints").glob("step-*"))


def started(words: list[str], run: Path, is_there: Callable[[Any], bool]) -> tuple[subprocess.Popen[bytes], float]:
    """A torchkeep process, and the seconds from its start to the first record that is looked for, by its time."""
    path = run / "records.jsonl"
    start = path.stat().st_size if path.exists() else 0
    begun = time.time()
    process = subprocess.Popen([sys.executable, "-m", "torchkeep", *words], stdout=DEVNULL, stderr=DEVNULL)
    while time.time() < begun + WAIT_S and process.poll() is None:
        lines = path.read_bytes()[start:].split(b"\n")[:-1] if path.exists() else []
        records = [json.loads(line) for line in lines]
        found = next((record for record in records if is_there(record)), None)
        if found:
            return process, found["time"] - begun
        time.sleep(0.05)
    process.kill()
    sys.exit(f"torchkeep {' '.join(words)} never came to the step that was awaited")


def resumed_s(folder: Path, step: int) -> float:
    run = folder / "again"
    shutil.copytree(folder / "run", run)
    process, seconds = started(["resume", str(run)], run, lambda record: record["step"] > step)
    process.kill()
    process.wait()
    shutil.rmtree(run)
    return seconds


def imported_s() -> float:
    """A process that imports what a resume does, and ends."""
    begun = time.perf_counter()
    code = "import torchkeep.cli, torchkeep.api, torchkeep.training.loop, torchkeep.training.prepare"
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - begun


def resume(rounds: int, quick: bool, folder: Path) -> dict[str, Any]:
    make_rows(ROWS // 10 if quick else ROWS, folder)
    found: dict[str, Any] = {"seek": in_process("seek", rounds, folder)}
    step = begin_run(folder)
    seconds = interleave({"resume": partial(resumed_s, folder, step), "imports": imported_s}, rounds)
    beyond = [a - b for a, b in zip(seconds["resume"], seconds["imports"], strict=True)]
    return found | {"step": step, **{name: summary(values) for name, values in (seconds | {"beyond": beyond}).items()}}


# The table


def print_turns(part: str, found: dict[str, Any]) -> None:
    size = f"{found['state_bytes'] / 1e6:,.0f} MB"
    print(f"\n{part + ', ' + size:<30} {'ms':>9} {'95 %':>17} {'MAD':>8}   torchkeep takes, times it (95 %)")
    for name, row in found["seconds"].items():
        low, high = (f"{value * 1e3:,.0f}" for value in row["median_95"])
        said = between(found["times"][OURS][name]) if name in found["times"][OURS] else ""
        if name in found["again"]:
            said += f"   A/A {between(found['again'][name])}"
        print(f"{name:<30} {row['median'] * 1e3:>9,.1f} {low + '-' + high:>17} {row['mad'] * 1e3:>8,.1f}   {said}")


def print_training(found: dict[str, Any]) -> None:
    print(f"\n{'a save every 20 steps':<26} {'ms/step':>8} {'MB/s':>6}   rate of that without saves (95 %)")
    for name, row in found.items():
        rates = "   ".join(f"{work}: {between(rate)}" for work, rate in row["rate_of_plain"].items())
        print(f"{name:<26} {row['step_s'] * 1e3:>8.1f} {row['written_bytes_s'] / 1e6:>6.0f}   {rates}")


def print_memory(found: dict[str, Any]) -> None:
    print("\nmemory at most while saving, copies of the state beyond the state itself")
    for name, row in found.items():
        print(f"{name:<30} {row['extra_bytes'] / row['state_bytes']:>9.3f}")


def print_resume(found: dict[str, Any]) -> None:
    print(f"\nfrom a state to the first batch of {found['seek']['rows']:,} rows, ms")
    for position, row in found["seek"]["seconds"].items():
        print(f"{'at ' + position:<30} {row['median'] * 1e3:>9.2f} (at most {row['max'] * 1e3:.2f})")
    print(f"torchkeep resume at step {found['step']}, until the first step is done, s")
    for name in ("resume", "imports", "beyond"):
        print(f"{name:<30} {between(found[name])}")


def against_bars(result: dict[str, Any]) -> dict[str, float]:
    found: dict[str, float] = {}
    if "stall" in result:
        times = {name: row["median"] for name, row in result["stall"]["times"][OURS].items()}
        found["stall: times copy_"] = times[COPY]
        found["stall: times async_save"] = max(times[DCP], times[KEPT])
    if "durable" in result:
        times = {name: row["median"] for name, row in result["durable"]["times"][OURS].items()}
        found["durable save: times safetensors"] = times[SAFETENSORS]
    if "load" in result:
        found["load: times torch.load"] = result["load"]["times"][OURS][TORCH]["median"]
    if "memory" in result:
        row = result["memory"][OURS]
        found["memory of an asynchronous save, copies of the state"] = row["extra_bytes"] / row["state_bytes"]
    for threads in (1, 2) if "training" in result else ():
        for kind, row in result["training"].items():
            if row["threads"] == threads and kind.startswith(JUDGED):
                name = f"rate with saves, {threads} thread{'s' * (threads > 1)}, of that without"
                found[name] = row["rate_of_plain"][SAVING]["median"]
    if "resume" in result:
        worst = max(row["median"] for row in result["resume"]["seek"]["seconds"].values())
        found["seek in 1e7 rows, the worst position, s"] = worst
        found["torchkeep resume to the first step, beyond imports, s"] = result["resume"]["beyond"]["median"]
    return found


# The whole of it


def _state_shape(quick: bool) -> tuple[int, int]:
    return (STATE[0] // 4, STATE[1]) if quick else STATE


def in_process(part: str, *words: Any, threads: int = 1) -> Any:
    return answer_of(__file__, [part, *map(str, words)], {"OMP_NUM_THREADS": str(threads)})


def measured(part: str, rounds: int, quick: bool, place: Path | None) -> Any:
    def fresh(part: str, *words: Any, threads: int = 1) -> Any:
        with tempfile.TemporaryDirectory(prefix="torchkeep-bench-", dir=place) as name:
            return in_process(part, *words, name, threads=threads)

    if part == "memory":
        works = (OURS, f"{OURS}, waiting", DCP, KEPT)
        return {work: fresh(part, work, int(quick)) for work in works}
    if part == "training":
        kinds, rounds = list(TRAININGS)[: 1 if quick else None], max(rounds // 2, 2)
        return {f"{kind}, {threads} thread{'s' * (threads > 1)}": fresh(part, kind, rounds, threads=threads)
                for kind in kinds for threads in (1, 2)}  # fmt: skip
    if part == "resume":
        with tempfile.TemporaryDirectory(prefix="torchkeep-bench-", dir=place) as name:
            return resume(rounds, quick, Path(name))
    return fresh(part, rounds, int(quick))


PRINTED = {"memory": print_memory, "training": print_training, "resume": print_resume}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--folder", type=Path, help="on the disk that is measured; needs 6 GB")
    parser.add_argument("--quick", action="store_true", help="three rounds, a small state, nothing is kept")
    parser.add_argument("--work", nargs="+", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.work:
        part, *given, folder = chosen.work
        words = [int(word) if word.isdigit() else word for word in given]
        print(json.dumps(globals()[part](*words, Path(folder))))
        return
    rounds, parts = min(chosen.rounds, 3) if chosen.quick else chosen.rounds, chosen.only.split(",")
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:NUM_CORES])
    facts = machine_facts()
    print(
        f"{facts['cpu']}, {NUM_CORES} cores, load {facts['load_1min']}, torch {facts['versions']['torch']}", flush=True
    )
    kept = RESULTS / "checkpoint.json"
    known: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))["parts"] if kept.exists() else {}
    result: dict[str, Any] = {}
    for part in parts:
        result[part] = measured(part, rounds, chosen.quick, chosen.folder)
        PRINTED.get(part, partial(print_turns, part))(result[part])
        sys.stdout.flush()
        known[part] = {"machine": facts, "found": result[part]}
        if not chosen.quick:  # each part is a run of its own, and keeps what it was measured on
            found = against_bars({name: row["found"] for name, row in known.items()})
            write_result("checkpoint", {"cores": NUM_CORES, "bars": BARS, "against_bars": found, "parts": known})
    print_bars(against_bars(result), BARS)
    if not chosen.quick:
        print(f"\nwritten to {kept.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
