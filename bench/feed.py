"""Images and rows to the training loop: rates, CPU, memory, the first batch, and what becomes of them as data grow.

Every work is a process of its own with one thread for arithmetic, on two cores. Rates: it stays up and measures itself
when it is asked, one at a time, in rotating order; peers get the best of their numbers of workers, tried before the
first round, with workers that stay. Before any time is taken all works of a kind must give the same number of samples,
labels and pixels. The rest is measured in processes that are started anew for each value. Files are read from the
system's cache. The real data are those of ../shared/data.

    python bench/feed.py [--rounds 11] [--seconds 1.0] [--only images,memory,first,growth] [--quick]

images: hymenoptera, random-resized crop to 224 and flip, uint8, batches of 32.  memory: Fashion-MNIST, batches of 256.
first: the first batch of 100,000 files, and memory over 20 epochs with 1,000,000 files and 8 workers.
growth: 1e4 to 1e7 samples, rows of 64 bytes with a label, mapped from .npy files, batches of 256.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import tempfile
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import feeding
from feeding import DATALOADER, DATALOADER_ALONE, HYMENOPTERA, INDEX_SELECT, KINDS, MANY_WORKERS, NUM_CORES
from measure import RESULTS, ROOT, between, interleave, machine_facts, pairs, print_bars, summary, write_result
from works import ONE_THREAD, LeftOut, Work, answer_of, folder_samples, serve

NEEDED = {"images": HYMENOPTERA, "memory": feeding.FASHION, "first": HYMENOPTERA}
PEERS = ("pillow", "simplejpeg", "opencv-python-headless")

# (figure, bar, whether the figure must be at least the bar)
BARS: dict[str, tuple[float, bool]] = {
    "images: times DataLoader": (2.2, True),
    "images from cache: times DataLoader": (12.0, True),
    "images: CPU of DataLoader's": (0.5, False),
    "rows in memory: times DataLoader": (10.0, True),
    "rows in memory: times index_select": (0.6, True),
    "first batch of many files, s": (0.3, False),
    "memory grown since epoch 3, threads, MB": (10.0, False),
    "memory grown since epoch 3, processes, MB": (10.0, False),
    "memory grown since epoch 3, threaded_process, MB": (10.0, False),
    "order at 90 % of 1e7 samples, ms": (10.0, False),
}


def feed_rates(kind: str, chosen: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All works of a kind, checked against one another, then timed in turn."""
    begun = {name: Work(__file__, [kind, name, str(folder)], ONE_THREAD) for name in KINDS[kind]["works"]}
    works = {name: work for name, work in begun.items() if "content" in work.facts}
    try:
        check_equal(kind, works)
        rates = interleave({name: partial(work.rate, chosen.seconds) for name, work in works.items()}, chosen.rounds)
    finally:
        for work in begun.values():
            work.close()
    cpu_s = {name: work.cpu_s for name, work in works.items()}
    return {
        "unit": KINDS[kind]["unit"],
        "left_out": {name: work.facts["left_out"] for name, work in begun.items() if name not in works},
        "content": works["torchkeep"].facts["content"],
        "ways": {name: {key: work.facts[key] for key in ("way", "tried_s")} for name, work in works.items()},
        "rates": {name: summary(found) for name, found in rates.items()},
        "cpu_s_of_1000": {name: summary(found) for name, found in cpu_s.items()},
        "rate_to": {name: pairs(rates[name], rates) for name in rates if name.startswith("torchkeep")},
        "cpu_to": {"torchkeep": pairs(cpu_s["torchkeep"], cpu_s)},
    }


def check_equal(kind: str, works: dict[str, Work]) -> None:
    first = works["torchkeep"].facts["content"]
    for name, work in works.items():
        for key, value in work.facts["content"].items():
            near = 0.05 if key.startswith("about") else 0  # crops are drawn apart
            if abs(value - first[key]) > near * first[key]:
                sys.exit(f"{kind}: {name!r} gives other content: {key} is {value}, not {first[key]}")


# Processes started anew


def one_shots(works: dict[str, list[Any]], rounds: int, folder: Path) -> dict[str, dict[str, Any]]:
    """What each work says, a process a round, in rotating order: for each figure its summary."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in works}

    def once(name: str) -> float:
        found[name].append(in_process(*works[name], folder))
        return 0.0

    interleave({name: partial(once, name) for name in works}, rounds)
    return {
        name: rows[0] if "left_out" in rows[0] else {key: summary([row[key] for row in rows]) for key in rows[0]}
        for name, rows in found.items()
    }


def in_process(*words: Any) -> Any:
    environment = {**ONE_THREAD, "XDG_CACHE_HOME": str(Path(words[-1]) / "cache")}
    return answer_of(__file__, ["once", *map(str, words)], environment)


def first_batches(chosen: argparse.Namespace, folder: Path) -> dict[str, Any]:
    files = [Path(path).read_bytes() for path, _ in folder_samples(HYMENOPTERA)]
    count = 10_000 if chosen.quick else 100_000
    feeding.make_files(folder, files, count)
    listed = in_process("listed_s", folder)["s"]
    works = {"torchkeep": ["first_torchkeep"], DATALOADER: ["first_dataloader"]}
    return {"files": count, "listed_s": listed, **one_shots(works, chosen.rounds, folder)}


def memory_growth(chosen: argparse.Namespace, folder: Path) -> dict[str, Any]:
    count, epochs = (100_000, 6) if chosen.quick else (1_000_000, 20)
    feeding.make_files(folder, feeding.small_files(), count)
    in_process("listed_s", folder)
    backends = ("threads", "processes", "threaded_process")
    found = {f"torchkeep, {name}": in_process("epochs_torchkeep", name, epochs, folder) for name in backends}
    found[f"{DATALOADER}, a list of paths"] = in_process("epochs_dataloader", MANY_WORKERS, epochs, folder)
    return {"files": count, "epochs": epochs, "workers": MANY_WORKERS, "works": found}


def growth(chosen: argparse.Namespace, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for exponent in (4, 5, 6) if chosen.quick else (4, 5, 6, 7):
        feeding.make_rows(10**exponent, folder)
        works = {"torchkeep": ["growth_torchkeep", chosen.seconds], DATALOADER: ["growth_dataloader", chosen.seconds]}
        found[f"1e{exponent}"] = one_shots(works, chosen.rounds, folder)
    return {"row_bytes": feeding.ROW_BYTES, "batch_size": feeding.ROWS_A_BATCH, "sizes": found}


def plot_growth(result: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    panels = {
        "samples_s": ("samples a second", 1.0),
        "memory_bytes": ("memory, MB", 1e-6),
        "first_s": ("first batch, ms", 1e3),
        "seek_order_s": ("order at 90 %, ms", 1e3),
    }
    figure = Figure(figsize=(9, 6), layout="constrained")
    for axes, (key, (title, scale)) in zip(figure.subplots(2, 2).flat, panels.items(), strict=True):
        for name in ("torchkeep", DATALOADER):
            rows = {float(size): row[name][key]["median"] for size, row in result["sizes"].items() if key in row[name]}
            if rows:
                axes.loglog(list(rows), [value * scale for value in rows.values()], marker="o", label=name)
        axes.set(title=title, xlabel="samples")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)


# The table


def print_feeds(kind: str, result: dict[str, Any]) -> None:
    print(f"\n{kind:<36} {result['unit']:>10} {'MAD':>8} {'CPU s/1000':>11}   torchkeep is (95 %)")
    ratios = result["rate_to"]["torchkeep"]
    for name, row in result["rates"].items():
        said = f"{between(ratios[name])} x" if name in ratios else ""
        cpu_s, way = result["cpu_s_of_1000"][name]["median"], result["ways"][name]["way"]
        print(f"{name:<36} {row['median']:>10,.0f} {row['mad']:>8,.0f} {cpu_s:>11.3g}   {said:<24} {way}")
    for name, why in result["left_out"].items():
        print(f"{name:<36} left out: {why}")


def print_first(result: dict[str, Any]) -> None:
    first, memory = result["first"], result["memory"]
    print(f"\nfirst batch of {first['files']:,} files, s (listed once in {first['listed_s']:.2f} s)")
    for name in ("torchkeep", DATALOADER):
        print(f"{name:<36} {between(first[name]['s'])}")
    print(f"\n{memory['files']:,} files, {memory['workers']} workers, MB (PSS) after epoch 1, 3 and {memory['epochs']}")
    for name, row in memory["works"].items():
        held = "".join(f"{row['pss_bytes'][i] / 1e6:>9.1f}" for i in (0, 2, -1)) if "pss_bytes" in row else ""
        print(f"{name:<36} {held or 'left out: ' + row['left_out']}")


def print_growth(result: dict[str, Any]) -> None:
    print(
        f"\n{'growth':<20} {'samples/s':>12} {'MB':>8} {'first ms':>9} {'state ms':>9} {'order ms':>9} {'batch ms':>9}"
    )
    for size, row in result["sizes"].items():
        for name, found in row.items():
            scales = {"samples_s": 1, "memory_bytes": 1e-6, "first_s": 1e3, "seek_state_s": 1e3, "seek_order_s": 1e3,
                      "seek_batch_s": 1e3}  # fmt: skip
            said = [f"{found[key]['median'] * scale:,.2f}" if key in found else "" for key, scale in scales.items()]
            print(f"{size:<8} {name:<11} {said[0]:>12} {said[1]:>8} " + " ".join(f"{one:>9}" for one in said[2:]))


def least_to(ratios: dict[str, Any]) -> float:
    """The ratio to the better of the DataLoaders: which that is changes with what else the machine does."""
    return min(float(ratios[name]["median"]) for name in (DATALOADER, DATALOADER_ALONE))


def against_bars(result: dict[str, Any]) -> dict[str, float]:
    """The figures that have a bar, as far as they were measured."""
    found: dict[str, float] = {}
    if "images" in result:
        to = result["images"]["rate_to"]
        found["images: times DataLoader"] = least_to(to["torchkeep"])
        if "torchkeep, cache in memory" in to:
            cached = least_to(to["torchkeep, cache in memory"])
            found["images from cache: times DataLoader"] = cached
        cpu_to = result["images"]["cpu_to"]["torchkeep"]
        found["images: CPU of DataLoader's"] = max(cpu_to[name]["median"] for name in (DATALOADER, DATALOADER_ALONE))
    if "memory" in result:
        to = result["memory"]["rate_to"]["torchkeep"]
        found["rows in memory: times DataLoader"] = to[DATALOADER]["median"]
        found["rows in memory: times index_select"] = to[INDEX_SELECT]["median"]
    if "first" in result:
        found["first batch of many files, s"] = result["first"]["first"]["torchkeep"]["s"]["median"]
        for name, row in result["first"]["memory"]["works"].items():
            if "growth_bytes" in row and name.startswith("torchkeep, "):
                found[f"memory grown since epoch 3, {name[11:]}, MB"] = row["growth_bytes"] / 1e6
    if "1e7" in result.get("growth", {}).get("sizes", {}):
        order = result["growth"]["sizes"]["1e7"]["torchkeep"]["seek_order_s"]["median"]
        found["order at 90 % of 1e7 samples, ms"] = order * 1e3
    return found


def measure(chosen: argparse.Namespace, kinds: list[str]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for kind in kinds:
        with tempfile.TemporaryDirectory(prefix="torchkeep-bench-") as name, tempfile.TemporaryDirectory() as other:
            if kind == "first":
                result[kind] = {
                    "first": first_batches(chosen, Path(name)),
                    "memory": memory_growth(chosen, Path(other)),
                }
                print_first(result[kind])
            elif kind == "growth":
                result[kind] = growth(chosen, Path(name))
                print_growth(result[kind])
            else:
                result[kind] = feed_rates(kind, chosen, Path(name))
                print_feeds(kind, result[kind])
            if kind == "images":
                result[kind]["decoded_apart"] = in_process("decoded_differences", Path(name))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each work in each round")
    parser.add_argument("--only", default="images,memory,first,growth")
    parser.add_argument("--quick", action="store_true", help="three short rounds, fewer files, nothing is written")
    parser.add_argument("--work", nargs="+", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.work:
        run_work(*chosen.work)
        return
    if chosen.quick:
        chosen.rounds, chosen.seconds = min(chosen.rounds, 3), min(chosen.seconds, 0.3)
    kinds = []
    for kind in chosen.only.split(","):
        if kind in NEEDED and not NEEDED[kind].exists():
            print(f"{kind}: left out, because {NEEDED[kind]} is missing")
        else:
            kinds.append(kind)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:NUM_CORES])
    facts = machine_facts()
    print(f"{facts['cpu']}, {NUM_CORES} cores, load {facts['load_1min']}, torch {facts['versions']['torch']}")
    result = measure(chosen, kinds)
    print_bars(against_bars(result), BARS)
    if chosen.quick or kinds != ["images", "memory", "first", "growth"]:
        print(f"\nnothing is written to {RESULTS.relative_to(ROOT)}: this was not the whole of it")
        return
    peers = {name: metadata.version(name) for name in PEERS}
    kept = {"seconds": chosen.seconds, "cores": NUM_CORES, "peers": peers, "bars": BARS, "found": against_bars(result)}
    path = write_result("feed", {**kept, **result})
    if importlib.util.find_spec("matplotlib"):
        plot_growth(result["growth"], RESULTS / "feed-growth.png")
    print(f"\nwritten to {path.relative_to(ROOT)}")


def run_work(kind: str, work: str, *arguments: str) -> None:
    if kind in KINDS:
        serve(partial(KINDS[kind]["works"][work], Path(arguments[0])), KINDS[kind]["content"])
        return
    *given, folder = arguments
    made = [float(word) if "." in word else int(word) if word.isdigit() else word for word in given]
    try:
        said = getattr(feeding, work)(*made, Path(folder))
    except LeftOut as why:
        said = {"left_out": str(why)}
    print(json.dumps(said))


if __name__ == "__main__":
    main()
