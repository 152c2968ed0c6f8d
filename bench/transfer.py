"""Transfer: a pretrained model on new data, with its frozen part computed once, against loops that compute it anew.

Each part is a process of its own, or several, on two cores with two threads. Its works take turns, so that the i-th
values of two works are a pair. Photographs: 244 to train on and 153 to validate with, MobileNetV2 of ImageNet.

    python bench/transfer.py [--only rows,again,partly,nothing,break-even,verb] [--by-hand 1] [--rounds 3] [--quick]

rows: frozen features and a new head, 20 epochs, each validated: loops over a DataLoader, Lightning, features cached by
hand, and torchkeep. --by-hand says with how many seeds the first of them is trained; what no bar is of has 5 epochs.
again: at another rate, on what the first run kept.  partly: features[:14] frozen, beside FIELD's formula.  nothing:
everything learns.  break-even: without the cache, with it, and where "auto" chooses.  verb: torchkeep transfer, for
photographs and for texts.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from measure import RESULTS, ROOT, between, machine_facts, pairs, print_bars, summary, write_result
from works import answer_of

NUM_CORES = 2
DATA = ROOT.parent / "shared" / "data"
MODEL = ROOT.parent / "shared" / "models" / "mobilenet_v2.py"
SEEDS = (0, 1, 2)
EPOCHS = 20
RATE, OTHER_RATE = 1e-3, 3e-3
SHORT = 5  # epochs of the works by hand that no bar is of
TEXTS_A_CLASS = 10

CROPS, FIXED, LIGHTNING = "hand loop, random crops", "hand loop, fixed view", "Lightning, random crops"
CACHED, ONE, FOUR = "features cached by hand", "torchkeep, K = 1", "torchkeep, K = 4"
AGAIN = f"{CACHED} again"
PARTS = ("rows", "again", "partly", "nothing", "break-even", "verb")
SCRIPT = str(Path(__file__).with_name("transferring.py"))

# (figure, bar, whether the figure must be at least the bar)
BARS: dict[str, tuple[float, bool]] = {
    "K = 1: times as fast as the hand loop": (30, True),
    "K = 1: time, of features cached by hand": (1.15, False),
    "K = 4: times as fast as the hand loop": (12, True),
    "K = 1: best accuracy beyond the hand loop's": (0, True),
    "K = 4: best accuracy beyond the hand loop's": (0, True),
    "again at another rate, s after imports": (2, False),
    "everything learns: time, of that without the search": (1.02, False),
    "break-even: the worst time of auto, of off": (1.05, False),
    "transfer: accuracy beyond the hand loop's": (0, True),
}


def work(part: str, *words: Any, folder: str, threads: int = NUM_CORES) -> Any:
    """What a work says that is a process of its own, with a cache of its own in its folder."""
    environment = {"OMP_NUM_THREADS": str(threads), "TORCHKEEP_CACHE": f"{folder}/cache"}
    return answer_of(SCRIPT, [part, *map(str, words), folder], environment)


def fresh(part: str, *words: Any, threads: int = NUM_CORES) -> Any:
    with tempfile.TemporaryDirectory(prefix="torchkeep-bench-") as folder:
        return work(part, *words, folder=folder, threads=threads)


# The parts


def rows(epochs: int, rounds: int, by_hand: int) -> dict[str, Any]:
    """Every work with the seeds it has time for; the first of a round is another one each time."""
    works: dict[str, tuple[int, list[Any], list[Any]]] = {  # rounds, words before seed and epochs, words after them
        CROPS: (by_hand, ["hand", "random"], []),
        FIXED: (1, ["hand", "fixed"], []),
        LIGHTNING: (1, ["lightning"], []),
        CACHED: (rounds, ["cached"], []),
        ONE: (rounds, ["ours", 1], [RATE]),
        FOUR: (min(rounds, len(SEEDS)), ["ours", 4], [RATE]),
        AGAIN: (rounds, ["cached"], []),
    }
    found: dict[str, list[dict[str, Any]]] = {}
    for round_idx in range(rounds):
        names = [name for name, (count, _, _) in works.items() if round_idx < count and not lacks(name)]
        first, seed = round_idx % len(names), SEEDS[round_idx % len(SEEDS)]
        for name in names[first:] + names[:first]:
            _, before, after = works[name]
            count = min(epochs, SHORT) if name in (FIXED, LIGHTNING) else epochs
            found.setdefault(name, []).append(fresh(*before, seed, count, *after) | {"seed": seed, "epochs": count})
    seconds = {name: [row["seconds"] for row in its] for name, its in found.items()}
    paired = {name: seconds[name] for name in (CACHED, ONE, AGAIN)}
    return {
        "epochs": epochs,
        "works": found,
        "left_out": {name: why for name in works if (why := lacks(name))},
        "seconds": {name: summary(its) for name, its in seconds.items()},
        "best": {name: best_of(its) for name, its in found.items()},
        "times": pairs(paired[ONE], paired),
        "again": pairs(paired[AGAIN], {CACHED: paired[CACHED]})[CACHED],
    }


def lacks(name: str) -> str:
    is_there = name != LIGHTNING or importlib.util.find_spec("lightning")
    return "" if is_there else "lightning is not installed (pip install -e '.[bench]')"


def best_of(its: list[dict[str, Any]]) -> dict[str, Any]:
    """The best accuracy, by seed."""
    by_seed = {row["seed"]: row["best"] for row in its}
    values = list(by_seed.values())
    return {"seeds": by_seed, "mean": statistics.mean(values), "least": min(values), "greatest": max(values)}


def again(epochs: int, rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="torchkeep-bench-") as folder:
        first = work("ours", 1, 0, epochs, RATE, folder=folder)
        later = [work("ours", 1, 0, epochs, OTHER_RATE * (1 + place / 10), folder=folder) for place in range(rounds)]
    return {"first_s": first["seconds"], "seconds": summary([row["seconds"] for row in later]), "works": later}


def partly(epochs: int, rounds: int) -> dict[str, Any]:
    found = fresh("partly", epochs, rounds)
    piece, count = found["per_sample_s"], found["epochs"]
    d, p, s, t, k, w, r = (piece[name] for name in "dpstkwr")
    speedup = [off / on for off, on in zip(found["seconds"]["off"], found["seconds"]["on"], strict=True)]
    return found | {
        "speedup": summary(speedup),
        "formula": count * (d + p + 3 * s) / (d + p + w + count * (r + 3 * s)),
        "formula_trained": count * (d + p + t) / (d + p + w + count * (r + k)),
    }


def nothing(epochs: int, rounds: int) -> dict[str, Any]:
    found = fresh("nothing", epochs, rounds, threads=1)
    return {
        kind: {"seconds": summary(seconds["auto"]), "times": pairs(seconds["auto"], seconds),
               "again": pairs(seconds["off again"], {"off": seconds["off"]})["off"]}
        for kind, seconds in found.items()
    }  # fmt: skip


def break_even(quick: bool) -> dict[str, Any]:
    sizes, lengths = ([64], [1, 2]) if quick else ([64, 244], [1, 2, 4, 20])
    cells = fresh("break_even", json.dumps(sizes), json.dumps(lengths), 96, 3)
    for cell in cells:
        medians = {cache: statistics.median(values) for cache, values in cell["seconds"].items()}
        cell["medians"] = medians
        cell["auto_of_off"] = medians["auto"] / medians["off"]
        cell["auto_of_best"] = medians["auto"] / min(medians["off"], medians["on"])
    worst = max(cells, key=lambda cell: cell["auto_of_off"])
    return {"image_size": 96, "cells": cells, "worst": worst["auto_of_off"]}


def verb(quick: bool) -> dict[str, Any]:
    """The command line on photographs; and on few texts, beside the same model from nothing with as many epochs."""
    few = ["--set", "train.epochs=1"] if quick else []
    with tempfile.TemporaryDirectory(prefix="torchkeep-bench-") as folder:
        weights = str(DATA / "weights" / "mobilenet_v2.pth")
        words = [str(DATA / "hymenoptera"), "--model", f"{MODEL}:build", "--weights", weights]
        found: dict[str, Any] = {"photographs": transferred(words + few, folder)}
        content = work("make_texts", TEXTS_A_CLASS, folder=folder)
        before = work("trained_text", "reviews", 1 if quick else 3, folder=folder)
        scratch = work("trained_text", "questions", 1 if quick else 8, folder=folder)
        words = ["questions.csv", "--valid", str(DATA / "text/banking77/test.csv"), "--set", "data.label=category",
                 "--set", "data.tokenizer=tokenizer.json", "--set", "data.max_length=64",
                 "--set", "model.args={ width = 128, depth = 2 }", "--set", f"optimizer.learning_rate={RATE}",
                 "--model", "transformer", "--weights", "reviews", *few]  # fmt: skip
        found["texts"] = transferred(words, folder) | {"before": before, "scratch": scratch, **content}
    return found


def transferred(words: list[str], folder: str) -> dict[str, Any]:
    """Seconds of the whole command, what it measured on validation, and what of it was kept."""
    place = tempfile.mkdtemp(dir=folder)
    environment = {**os.environ, "OMP_NUM_THREADS": str(NUM_CORES), "TORCHKEEP_CACHE": f"{place}/cache"}
    command = [sys.executable, "-m", "torchkeep", "transfer", *words, "--run-dir", f"{place}/run"]
    begun = time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - begun
    if done.returncode:
        sys.exit(f"torchkeep transfer ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    best = json.loads(Path(place, "run", "checkpoints", "best.json").read_text(encoding="utf-8"))
    said = done.stdout.rpartition("on the validation split")[2].strip().splitlines()
    return {
        "seconds": seconds,
        "best": best["metrics"]["valid/accuracy"],
        "said": [" ".join(row.split()) for row in said],
    }


# The table


def print_rows(found: dict[str, Any]) -> None:
    print(f"\n{'frozen features':<28} {'epochs':>6} {'s':>22} {'seeds':>6}   best accuracy, mean (all)")
    for name, row in found["seconds"].items():
        best = found["best"][name]
        said = f"{best['mean']:.4f} ({best['least']:.4f}-{best['greatest']:.4f})"
        print(f"{name:<28} {found['works'][name][0]['epochs']:>6} {between(row):>22} {len(best['seeds']):>6}   {said}")
    for name, why in found["left_out"].items():
        print(f"{name:<28} left out: {why}")
    print(f"{ONE} takes, times {CACHED}: {between(found['times'][CACHED])}   A/A {between(found['again'])}")


def print_again(found: dict[str, Any]) -> None:
    print(f"\nat another rate, on what the first run kept in {found['first_s']:.2f} s: {between(found['seconds'])} s")


def print_partly(found: dict[str, Any]) -> None:
    seconds = {name: statistics.median(values) for name, values in found["seconds"].items()}
    print(
        f"\nfeatures[:14] frozen, {found['epochs']} epochs: {seconds['off']:.1f} s whole, {seconds['on']:.1f} s cached"
    )
    print(f"measured {between(found['speedup'])} × as fast; formula {found['formula']:.2f}, "
          f"with the suffix as it trains {found['formula_trained']:.2f}")  # fmt: skip
    print("ms a sample: " + ", ".join(f"{name} {found['per_sample_s'][name] * 1e3:.2f}" for name in "dpstkwr"))


def print_nothing(found: dict[str, Any]) -> None:
    print('\neverything learns: time with "auto", of that with "off"')
    for kind, row in found.items():
        said = f"{between(row['times']['off'])}   A/A {between(row['again'])}"
        print(f"{kind:<28} {row['seconds']['median']:>6.2f} s   {said}")


def print_break_even(found: dict[str, Any]) -> None:
    print(
        f"\n{'images of 96 pixels, s':<24} {'off':>7} {'on':>7} {'auto':>7} {'auto/off':>9} {'MB kept':>8}   auto chose"
    )
    for cell in found["cells"]:
        name = f"N {cell['samples']}, E {cell['epochs']}, K {cell['views']}"
        times = " ".join(f"{cell['medians'][cache]:>7.2f}" for cache in ("off", "on", "auto"))
        kept = cell["seen"]["on"]["cache_bytes"] / 1e6
        print(f"{name:<24} {times} {cell['auto_of_off']:>9.3f} {kept:>8.2f}   {cell['seen']['auto']['choice'][:60]}")


def print_verb(found: dict[str, Any]) -> None:
    print(f"\n{'torchkeep transfer':<28} {'s, all of it':>12}   best accuracy")
    texts = found["texts"]
    named = {"photographs": found["photographs"], f"{texts['questions']} questions": texts,
             "the same from nothing": texts["scratch"], "reviews, trained on before": texts["before"]}  # fmt: skip
    for name, row in named.items():
        print(f"{name:<28} {row['seconds']:>12.1f}   {row['best']:.4f}")
        for said in row.get("said", []):
            print(f"    {said}")


PRINTED = {"rows": print_rows, "again": print_again, "partly": print_partly, "nothing": print_nothing,
           "break-even": print_break_even, "verb": print_verb}  # fmt: skip


def against_bars(result: dict[str, Any]) -> dict[str, float]:
    found: dict[str, float] = {}
    if "rows" in result:
        rows = result["rows"]
        median = {name: row["median"] for name, row in rows["seconds"].items()}
        for name in (ONE, FOUR):
            said = name.removeprefix("torchkeep, ")
            found[f"{said}: times as fast as the hand loop"] = median[CROPS] / median[name]
            found[f"{said}: best accuracy beyond the hand loop's"] = (
                rows["best"][name]["mean"] - rows["best"][CROPS]["mean"]
            )
        found["K = 1: time, of features cached by hand"] = rows["times"][CACHED]["median"]
    if "again" in result:
        found["again at another rate, s after imports"] = result["again"]["seconds"]["median"]
    if "nothing" in result:
        worst = max(row["times"]["off"]["median"] for row in result["nothing"].values())
        found["everything learns: time, of that without the search"] = worst
    if "break-even" in result:
        found["break-even: the worst time of auto, of off"] = result["break-even"]["worst"]
    if "rows" in result and "verb" in result:
        beyond = result["verb"]["photographs"]["best"] - result["rows"]["best"][CROPS]["mean"]
        found["transfer: accuracy beyond the hand loop's"] = beyond
    return {name: round(value, 6) for name, value in found.items()}  # equal hits differ by their type's rounding


# The whole of it


def measured(part: str, chosen: argparse.Namespace) -> Any:
    quick, rounds = chosen.quick, chosen.rounds
    return {
        "rows": partial(rows, 2 if quick else EPOCHS, rounds, chosen.by_hand),
        "again": partial(again, 2 if quick else EPOCHS, min(rounds, 3)),
        "partly": partial(partly, 1 if quick else 3, 1 if quick else 2),
        "nothing": partial(nothing, 5 if quick else 40, 2 * rounds + 1),
        "break-even": partial(break_even, quick),
        "verb": partial(verb, quick),
    }[part]()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--by-hand", type=int, default=1, help="seeds of the hand loop, about six minutes each")
    parser.add_argument("--quick", action="store_true", help="two rounds of two epochs, nothing is kept")
    chosen = parser.parse_args()
    if not MODEL.exists() or not DATA.exists():
        sys.exit(f"left out: {MODEL if DATA.exists() else DATA} is missing")
    if chosen.quick:
        chosen.rounds = min(chosen.rounds, 2)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:NUM_CORES])
    facts = machine_facts()
    for name in ("pillow", *(["lightning"] if not lacks(LIGHTNING) else [])):
        facts["versions"][name] = metadata.version(name)
    print(
        f"{facts['cpu']}, {NUM_CORES} cores, load {facts['load_1min']}, torch {facts['versions']['torch']}", flush=True
    )
    kept = RESULTS / "transfer.json"
    known: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))["parts"] if kept.exists() else {}
    result: dict[str, Any] = {} if chosen.quick else {name: row["found"] for name, row in known.items()}
    for part in chosen.only.split(","):
        result[part] = measured(part, chosen)
        PRINTED[part](result[part])
        sys.stdout.flush()
        known[part] = {"machine": facts, "found": result[part]}
        if not chosen.quick:  # each part is a run of its own, and keeps what it was measured on
            write_result(
                "transfer", {"cores": NUM_CORES, "bars": BARS, "against_bars": against_bars(result), "parts": known}
            )
    print_bars(against_bars(result), BARS)
    if not chosen.quick:
        print(f"\nwritten to {kept.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
