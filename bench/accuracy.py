"""What the recipes in examples/ reach on real data: each from the command line, with seeds 0, 1 and 2.

    python bench/accuracy.py [--only adult sst2] [--seeds 0 1 2]

Settings were chosen on a part of the training data; the test split is measured once, at each run's end, with the
checkpoint that was best on the validation part. Times are of the whole command, start-up and evaluations included.
Beside banking77 stands TF-IDF with logistic regression of scikit-learn, where that is installed. What is missing of
the data is said and left out.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measure import ROOT, write_result

DATA = ROOT / "../shared/data"


@dataclass(frozen=True)
class Example:
    """A recipe, the metric of its bar, the bar, and what it needs of the data."""

    metric: str
    bar: float | None
    needs: str


EXAMPLES = {
    "adult": Example("test/accuracy", 0.855, "tabular/adult"),
    "california-housing": Example("test/r2", 0.80, "tabular/california-housing"),
    "titanic": Example("valid/accuracy", None, "tabular/titanic"),
    "banking77": Example("test/accuracy", 0.88, "text/banking77"),
    "sst2": Example("test/accuracy", 0.80, "text/sst2-sentences"),
    "spoken-digits": Example("test/accuracy", 0.955, "spoken-digits"),
    "fashion-mnist": Example("test/accuracy", 0.92, "fashion-mnist"),
    "hymenoptera": Example("test/accuracy", None, "hymenoptera"),
}


def run_once(name: str, seed: int) -> dict[str, Any]:
    """The metrics at the end of one run, and the seconds of the whole command."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "run"
        words = ["train", f"examples/{name}/recipe.toml", "--set", f"seed={seed}", "--run-dir", str(place), "--quiet"]
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "torchkeep", *words], cwd=ROOT, capture_output=True, text=True, check=False
        )
        took_s = time.perf_counter() - began
        if done.returncode:
            sys.exit(f"{name}, seed {seed}, ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        rows = [json.loads(line) for line in (place / "records.jsonl").read_text(encoding="utf-8").splitlines()]
        best = json.loads((place / "checkpoints" / "best.json").read_text(encoding="utf-8"))
    end = next(row for row in rows if row["kind"] == "run_end")
    return {"seed": seed, "seconds": round(took_s, 1), "metrics": end["metrics"], "best": best}


def measure(name: str, seeds: list[int]) -> dict[str, Any]:
    example = EXAMPLES[name]
    runs = [run_once(name, seed) for seed in seeds]
    values = [run["metrics"][example.metric] for run in runs]
    mean, seconds = statistics.mean(values), statistics.mean(run["seconds"] for run in runs)
    bar = f"bar {example.bar}" if example.bar else "no bar"
    print(
        f"{name:<20} {example.metric:<15} {mean:.4f} ({min(values):.4f} to {max(values):.4f})  {bar}  {seconds:.0f} s"
    )
    return {
        "metric": example.metric,
        "bar": example.bar,
        "mean": mean,
        "values": values,
        "seconds": seconds,
        "runs": runs,
    }


def baseline() -> dict[str, Any] | None:
    """TF-IDF of words and pairs of words, and logistic regression, on banking77."""
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
    except ImportError:
        print("banking77's TF-IDF row is left out: scikit-learn is not installed (pip install -e '.[bench]')")
        return None
    train, test = (read_rows(DATA / "text/banking77" / f"{split}.csv") for split in ("train", "test"))
    began = time.perf_counter()
    made = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(C=30, max_iter=1000)
    )
    made.fit(*train)
    accuracy = float(made.score(*test))
    seconds = time.perf_counter() - began
    print(f"{'  TF-IDF + logistic':<20} {'test/accuracy':<15} {accuracy:.4f}  {seconds:.0f} s")
    return {"metric": "test/accuracy", "value": accuracy, "seconds": seconds}


def read_rows(path: Path) -> tuple[list[str], list[str]]:
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return [row["text"] for row in rows], [row["category"] for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=list(EXAMPLES), default=list(EXAMPLES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    chosen = parser.parse_args()
    path = ROOT / "bench" / "results" / "accuracy.json"
    kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["results"] if path.exists() else {}
    for name in chosen.only:
        if not (DATA / EXAMPLES[name].needs).exists():
            print(f"{name} is left out: {EXAMPLES[name].needs} is not there beside the repository")
            continue
        kept[name] = measure(name, chosen.seeds)
        if name == "banking77":
            kept["banking77, TF-IDF + logistic regression"] = baseline()
        write_result("accuracy", {"results": kept})
    print(f"\nwritten to {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
