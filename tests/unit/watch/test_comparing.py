"""What a comparison promises: every difference is found, nothing else is, and a curve keeps its spikes."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from made_runs import append, changed, make_run, scalars

from torchkeep.errors import RunFolderError, SettingsError
from torchkeep.watch.comparing import MAX_POINTS, Comparison, Curve, compare, show_comparison
from torchkeep.watch.console import Console

DIFF = """diff --git a/train.py b/train.py
index 12..34 100644
--- a/train.py
+++ b/train.py
@@ -1,2 +1,3 @@
 x = 1
+y = 2
+z = 3
-w = 4"""


def keys(comparison: Comparison) -> dict[str, list[str]]:
    return {section: [row.key for row in rows] for section, rows in comparison.differences.items() if rows}


def test_equal_runs_do_not_differ(tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_run(tmp_path / name, accuracies=(0.5, math.nan, 0.7))
    append(tmp_path / "b", {"kind": "timing", "step": 30, "values": {"train/samples_per_s": 3.0}})
    found = compare([tmp_path / "a", tmp_path / "b"])
    assert keys(found) == {}
    (parting,) = found.partings
    assert (parting.run, parting.tag, parting.step, parting.num_equal) == ("b", None, 30, 9)
    assert found.best("best.valid/accuracy") == []


def test_what_differs_is_found(tmp_path: Path) -> None:
    environment = {"python": "3.11", "gpu": None, "packages": {"torch": "2.13"}}
    decision = {"name": "best", "value": "valid/accuracy (max)"}
    a = make_run(tmp_path / "a", environment=environment, code={"commit": "aa" * 20, "diff": "", "untracked": {}})
    b = make_run(
        tmp_path / "b", settings=changed(optimizer__learning_rate=0.1, train__clip_norm=1.0), device="cuda",
        accuracies=(0.5, 0.8, 0.7), environment={"python": "3.12", "gpu": "H100", "packages": {"torch": "2.14"}},
        code={"commit": "bb" * 20, "diff": DIFF, "untracked": {"new.py": "ab"}},
        decisions=[decision, {"name": "threads", "value": 2}], data={"fingerprints": {"train": "bb"}},
    )  # fmt: skip
    append(b, {"kind": "run_start", "environment": {"lock": ["torch==2.14", "numpy==2.4"]}})
    found = compare([a, b])
    assert keys(found) == {
        "settings": ["optimizer.learning_rate", "train.clip_norm"],
        "code": ["commit", "changes in train.py", "untracked new.py"],
        "data": ["fingerprints.train"],
        "packages": ["torch", "numpy"],
        "hardware": ["python", "gpu", "device"],
        "decisions": ["threads"],
    }
    assert found.differences["settings"][0].values == {"a": 1e-3, "b": 0.1}
    assert found.differences["settings"][1].values == {"b": 1.0}
    (parting,) = found.partings
    assert (parting.step, parting.tag, parting.values) == (20, "valid/accuracy", (0.9, 0.8))
    assert found.metrics["best.valid/accuracy"] == {"a": 0.9, "b": 0.8}
    assert found.best("best.valid/accuracy") == ["a"]
    assert found.best("last.train/loss") == []
    held = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert held["curves"]["valid/accuracy"]["b"] == [[10, 0.5], [20, 0.8], [30, 0.7]]


def test_runs_part_where_both_have_a_number(tmp_path: Path) -> None:
    # one logs each step, one each third and more tags; one went through two attempts, of which the first went astray
    for name in ("dense", "sparse", "resumed", "other"):
        append(tmp_path / name, {"kind": "attempt_start", "from_step": 0})
    for step in range(1, 31):
        append(tmp_path / "dense", scalars(step, train__loss=1 / step))
        append(tmp_path / "other", scalars(step + 100, train__loss=0.0))
        if step % 3 == 0:
            append(tmp_path / "sparse", scalars(step, train__extra=5.0), scalars(step, train__loss=1 / step))
        if step <= 20:
            append(tmp_path / "resumed", scalars(step, train__loss=1 / step if step <= 10 else 7.0))
    append(tmp_path / "resumed", {"kind": "attempt_start", "attempt": 1, "step": 10, "from_step": 10})
    append(tmp_path / "resumed", *(scalars(step, attempt=1, train__loss=1 / step) for step in range(11, 25)))
    append(tmp_path / "resumed", scalars(25, attempt=1, train__loss=math.nan))
    runs = [tmp_path / name for name in ("dense", "sparse", "resumed", "other")]
    said = {
        parting.run: (parting.step, parting.num_equal, parting.tag and parting.values)
        for parting in compare(runs).partings
    }
    assert {run: said[run] for run in ("sparse", "other")} == {"sparse": (30, 10, None), "other": (0, 0, None)}
    step, num_equal, values = said["resumed"]
    assert (step, num_equal, values and values[0]) == (25, 24, 1 / 25)


def test_a_curve_of_any_length_keeps_its_spikes() -> None:
    curve, spikes = Curve(), {7: 99.0, 123_456: -99.0, 299_999: 98.0}
    for step in range(300_000):
        curve.add(step, math.nan if step == 200_000 else spikes.get(step, math.sin(step)))
    points = dict(curve.points())
    assert len(points) <= MAX_POINTS
    assert all(points[step] == value for step, value in spikes.items())
    assert math.isnan(points[200_000])
    assert list(points) == sorted(points)
    gaps = [b - a for a, b in zip(points, list(points)[1:], strict=False)]
    assert max(gaps) < 300_000 / 100  # thinned evenly, however often
    for few in ([], [(3, 1.0)], [(3, 1.0)] * 5):
        curve = Curve()
        for point in few:
            curve.add(*point)
        assert curve.points() == few


MEASURE = """
import resource, sys
from pathlib import Path
from torchkeep.watch.comparing import compare
def compared(name):
    found = compare([Path(sys.argv[1]) / name / run for run in ("a", "b")])
    print(found.partings[0].num_equal, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
compared("short")
compared("long")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the greatest memory is read in Linux's units")
def test_a_long_record_is_read_in_bounded_memory(tmp_path: Path) -> None:
    for name, num_steps in [("short", 10_000), ("long", 100_000)]:
        for run in ("a", "b"):
            append(tmp_path / name / run, *(scalars(step, train__loss=1.0, a=2.0) for step in range(num_steps)))
    done = subprocess.run([sys.executable, "-c", MEASURE, tmp_path], capture_output=True, text=True, check=True)
    (short, before), (long, after) = ([int(number) for number in line.split()] for line in done.stdout.splitlines())
    assert (short, long) == (20_000, 200_000)
    assert after - before < 80 << 10  # kB; as objects the long records take 200 MB


def test_labels_are_unique(tmp_path: Path) -> None:
    a, b = make_run(tmp_path / "x" / "run"), make_run(tmp_path / "y" / "run")
    assert list(compare([a, b]).runs) == [str(a), str(b)]
    assert list(compare([a, a]).runs) == [f"{a} #1", f"{a} #2"]


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    a = make_run(tmp_path / "a")
    with pytest.raises(SettingsError, match="needs two"):
        compare([a])
    with pytest.raises(RunFolderError, match="not the folder of a run"):
        compare([a, tmp_path])
    b = make_run(tmp_path / "b")
    (b / "run.json").write_text("{")
    with pytest.raises(RunFolderError, match=r"run\.json cannot be read"):
        compare([a, b])
    lines = (a / "records.jsonl").read_text().splitlines(keepends=True)
    (a / "records.jsonl").write_text("".join([*lines[:2], "{\n", *lines[2:]]))
    with pytest.raises(RunFolderError, match=r"records\.jsonl, line"):
        compare([a, make_run(tmp_path / "c")])


def shown(comparison: Comparison, encoding: str) -> str:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding)
    show_comparison(Console(file=file), comparison)
    file.flush()
    return raw.getvalue().decode(encoding)


def test_it_is_shown_in_a_terminal_of_any_kind(tmp_path: Path) -> None:
    a = make_run(tmp_path / "a", accuracies=(0.1, 0.5, 0.9))
    b = make_run(tmp_path / "b", accuracies=(0.1, math.nan, 0.2), code={"commit": "bb" * 20, "diff": DIFF})
    text = shown(compare([a, b]), "utf-8")
    assert "best.valid/accuracy  0.9000 *  0.2000" in text
    assert ["changes", "in", "train.py", "-", "+2", "-1"] in [line.split() for line in text.splitlines()]
    assert "a and b part at step 20: valid/accuracy 0.5 and nan" in text
    assert "the same in all: settings, data, packages, hardware, decisions" in text
    lines = text[text.index("valid/accuracy  0.1000 to 0.9000") :].splitlines()
    assert [line.split() for line in lines[1:3]] == [["a", "▁▅█", "0.9000"], ["b", "▁", "▂", "0.2000"]]
    plain = shown(compare([a, b]), "ascii")
    assert "_=@" in plain
    assert "?" not in plain
