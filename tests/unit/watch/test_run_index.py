"""What the index promises: it never says what the runs' folders do not, however they and it were changed."""

from __future__ import annotations

import math
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from made_runs import append, changed, make_run, scalars

from torchkeep.errors import SettingsError
from torchkeep.files import FolderLock
from torchkeep.folder import RunFolder
from torchkeep.watch.index import INDEX_FILE, RunIndex, csv_text


def rows_of(runs: Path, where: str = "", sort: str = "", most: int | None = None) -> list[dict[str, Any]]:
    index = RunIndex(runs)
    index.refresh()
    rows = index.query(where, sort, most)
    index.close()
    return rows


def names(runs: Path, where: str = "", sort: str = "", most: int | None = None) -> list[str]:
    return [row["name"] for row in rows_of(runs, where, sort, most)]


def test_a_row_holds_what_the_run_is(tmp_path: Path) -> None:
    make_run(tmp_path / "a", code={"commit": "3fa9" * 10}, metrics={"valid/accuracy": 0.7, "test/accuracy": math.nan})
    (row,) = rows_of(tmp_path)
    expected = {
        "name": "a", "status": "finished", "attempts": 1, "model": "convnet", "commit": "3fa9" * 10, "seed": 7,
        "best_metric": "valid/accuracy", "best": 0.9, "created": 1.79e9, "seconds": 30.0, "step": 30, "epoch": 3,
        "data": "data/train", "problem": None, "best.valid/accuracy": 0.9, "best.valid/loss": 1.0,
        "last.valid/accuracy": 0.7, "last.valid/loss": 2 / 3, "last.train/loss": 1 / 3, "fingerprint.train": "aa",
        "model.name": "convnet", "optimizer.learning_rate": 1e-3, "optimizer.betas": [0.9, 0.999],
        "train.deterministic": True,
    }  # fmt: skip
    assert {key: row[key] for key in expected} == expected
    assert math.isnan(row["last.test/accuracy"])
    assert "train.clip_norm" not in row


def test_what_changed_is_seen(tmp_path: Path) -> None:
    make_run(tmp_path / "a", created=1.0)
    make_run(tmp_path / "b", created=2.0, status=None)
    assert [(row["name"], row["status"]) for row in rows_of(tmp_path)] == [("a", "finished"), ("b", "killed")]
    append(tmp_path / "b", scalars(40, valid__loss=0.1, valid__accuracy=0.95))
    with closing(FolderLock(tmp_path / "b").acquire()):
        rows = rows_of(tmp_path)
        assert (rows[1]["status"], rows[1]["step"], rows[1]["best"]) == ("running", 40, 0.95)
    assert rows_of(tmp_path)[1]["status"] == "killed"
    shutil.rmtree(tmp_path / "a")
    make_run(tmp_path / "c", created=3.0)
    assert names(tmp_path) == ["b", "c"]
    shutil.rmtree(tmp_path / "c")
    make_run(tmp_path / "c", created=4.0, accuracies=(0.1, 0.2, 0.3, 0.2, 0.1))  # another run of that name
    assert rows_of(tmp_path)[1]["best"] == 0.3
    (tmp_path / "c" / "run.json").write_text("{")
    unreadable, _ = rows_of(tmp_path)
    assert (unreadable["status"], unreadable["problem"]) == ("unreadable", "run.json cannot be read")


@pytest.mark.parametrize("indexed_before", [0, 1, 2])
def test_what_an_attempt_takes_back_is_not_counted(tmp_path: Path, indexed_before: int) -> None:
    def look(place: int) -> None:
        if place < indexed_before:
            rows_of(tmp_path)

    make_run(tmp_path / "a", status=None, accuracies=(0.5, 0.6, 0.99))
    look(0)
    append(tmp_path / "a", {"kind": "attempt_start", "attempt": 1, "step": 20, "from_step": 20, "time": 5000.0})
    look(1)
    append(tmp_path / "a", scalars(30, attempt=1, time=5010.0, valid__loss=0.5, valid__accuracy=0.7))
    (row,) = rows_of(tmp_path)
    assert (row["best"], row["attempts"], row["seconds"]) == (0.7, 2, 40.0)
    assert row["last.train/loss"] == 1 / 2


def test_a_metric_of_which_less_is_better_and_runs_of_hand_loops(tmp_path: Path) -> None:
    best = [{"name": "best", "value": "valid/loss (min)"}]
    make_run(tmp_path / "a", decisions=best)
    append(tmp_path / "hand", {"kind": "attempt_start", "settings": {"depth": 3}}, {"kind": "run_start"})
    append(tmp_path / "hand", *(scalars(step, valid__score=score) for step, score in [(1, 2.0), (2, 5.0), (3, 4.0)]))
    (tmp_path / "no-run").mkdir()
    (tmp_path / "begun").mkdir()
    RunFolder(tmp_path / "begun").write_run({"created": 0.5, "decisions": [], "data": {}, "environment": {}})
    begun, hand, run = rows_of(tmp_path)
    assert (run["best_metric"], run["best"]) == ("valid/loss", 2 / 3)
    assert (hand["best_metric"], hand["best"], hand["last.valid/score"], hand["depth"]) == ("valid/score", 5.0, 4.0, 3)
    assert (begun["status"], begun["attempts"], begun["step"]) == ("killed", 0, 0)


CONDITIONS = {
    "valid/accuracy > .85 and model.name = convnet": "a",
    "valid/accuracy > .85": "ab",
    "last.valid/accuracy > .85": "",
    "best.valid/accuracy >= 0.9 AND (model.name = mlp or model.name = 'res net')": "b",
    "train/loss <= .34": "abcd",
    "learning_rate = 0.1": "b",
    "not learning_rate = 0.1": "acd",
    "optimizer.learning_rate == 1e-3": "ac",
    "learning_rate != 0.1": "acd",
    "clip_norm = none": "acd",
    "clip_norm != none": "b",
    "clip_norm > 0 or status = killed": "bd",
    "deterministic = true": "abcd",
    "deterministic != true": "",
    'model.name ~ "RES"': "c",
    "model = 'res net'": "c",
    '"valid/accuracy" < .6': "cd",
    "created >= 2026-11-28": "cd",
    "created = 2026-11-28": "c",
    "created != 2026-11-28": "abd",
    "created > 2026-11-28": "d",
    "created <= 2026-11-28": "abc",
    "created < '2026-11-28'": "ab",
    "created >= 2026-11-29T10:30": "d",
    "created > 2026-11-29T10:30": "",
    "test/accuracy = nan": "b",
    "name = b or name=a": "ab",
    "attempt = 1 and step = 30 and epoch = 3 and seconds > 10": "abcd",
    "commit ~ 3fa9": "a",
    "problem = none": "abcd",
    "betas ~ 0.999": "abcd",
    "not (name = a or not name != b)": "cd",
    "name > b": "cd",
    "name != \"a' OR '1'='1\"": "abcd",
}


@pytest.fixture
def four(tmp_path: Path) -> Path:
    from datetime import datetime

    day = datetime.fromisoformat("2026-11-28T12:00").timestamp()
    late = datetime.fromisoformat("2026-11-29T10:30").timestamp()
    make_run(tmp_path / "a", created=1.0, code={"commit": "3fa9" * 10})
    make_run(
        tmp_path / "b", created=2.0, metrics={"test/accuracy": math.nan},
        settings=changed(model__name="mlp", optimizer__learning_rate=0.1, train__clip_norm=1.0),
    )  # fmt: skip
    make_run(tmp_path / "c", created=day, settings=changed(model__name="res net"), accuracies=(0.5, 0.4, 0.1))
    make_run(
        tmp_path / "d", created=late, status=None, settings=changed(optimizer__learning_rate=None),
        accuracies=(0.1, math.nan, 0.2),
    )  # fmt: skip
    return tmp_path


def test_conditions(four: Path) -> None:
    index = RunIndex(four)
    index.refresh()
    found = {where: "".join(row["name"] for row in index.query(where)) for where in CONDITIONS}
    assert found == CONDITIONS


def test_order_and_number(four: Path) -> None:
    assert names(four, most=2) == ["c", "d"]
    assert names(four, sort="valid/accuracy") == list("dcab")
    assert names(four, sort="-valid/accuracy", most=2) == ["a", "b"]
    assert names(four, sort="learning_rate desc") == list("bacd")
    assert names(four, sort="learning_rate asc") == list("acbd")
    assert names(four, sort="test/accuracy desc") == list("bacd")
    assert names(four, sort="-name", where="name != b") == list("dca")
    assert names(four, most=0) == []


REFUSED = {
    "valid/accuracy >": ("the end", 16),
    "valid/accuracy > > .9": (">", 17),
    "valid/accuracy .9": (".9", 15),
    "(name = a": ("the end", 9),
    "name = a)": (")", 8),
    "name = a name = b": ("name", 9),
    "and": ("and", 0),
    "name = 'a": ("'a", 7),
    "created > yesterday": ("yesterday", 10),
    "created > 2026-13-01": ("2026-13-01", 10),
    "(" * 60 + "name = a": ("(" * 10 + "name", 50),
    "not " * 60 + "name = a": ("not", 200),
}


@pytest.mark.parametrize("where", REFUSED)
def test_a_condition_that_cannot_be_read_is_refused_at_its_place(four: Path, where: str) -> None:
    with pytest.raises(SettingsError, match="cannot be read") as caught:
        rows_of(four, where)
    got, place = REFUSED[where]
    assert caught.value.got == got
    line, marker = str(caught.value).splitlines()[1:3]
    assert marker.index("^") - line.index(where[:4]) == place


def test_an_unknown_key_is_told_its_neighbour(four: Path) -> None:
    with pytest.raises(SettingsError, match="no run here") as caught:
        rows_of(four, "valid/acuracy > .9")
    assert "'valid/accuracy'" in caught.value.fix
    with pytest.raises(SettingsError, match="no run here") as caught:
        rows_of(four, sort="learning_rat")
    assert "'learning_rate'" in caught.value.fix
    with pytest.raises(SettingsError, match="several settings") as caught:
        rows_of(four, "train = x or epochs = 3 or name = a")
    assert caught.value.expected == "one of data.train, fingerprint.train"


def test_a_damaged_or_foreign_index_is_built_anew(four: Path) -> None:
    whole = rows_of(four)
    path = four / INDEX_FILE
    good = path.read_bytes()
    with sqlite3.connect(four / "other.sqlite") as other:
        other.execute("CREATE TABLE run (x)")
        other.execute("PRAGMA user_version = 7")
    other.close()
    foreign = (four / "other.sqlite").read_bytes()
    pages = [good[:at] + bytes(4096) + good[at + 4096 :] for at in range(0, len(good), 4096)]
    for damaged in (b"", b"no database" * 100, good[: len(good) // 2], foreign, good[:200] + b"\xff" * 900, *pages):
        path.write_bytes(damaged)
        assert rows_of(four) == whole
    assert rows_of(four, "valid/accuracy > .85", "-name") == [whole[1], whole[0]]


def test_a_folder_that_cannot_be_written_is_indexed_in_memory(four: Path) -> None:
    whole = rows_of(four)
    (four / INDEX_FILE).unlink()
    (four / INDEX_FILE).mkdir()  # no file can be opened here, not even by root
    assert rows_of(four) == whole
    (four / INDEX_FILE).rmdir()
    index = RunIndex(four)
    index.refresh()
    with sqlite3.connect(four / INDEX_FILE) as other:  # a file that is read, but not written
        other.execute("PRAGMA journal_mode = DELETE")
    other.close()
    index._db.close()
    index._db = sqlite3.connect(f"file:{four / INDEX_FILE}?mode=ro", uri=True, isolation_level=None)
    append(four / "d", scalars(50, valid__loss=0.1, valid__accuracy=0.9))
    index.refresh()
    assert index.query()[-1]["best"] == 0.9
    index.close()


def test_no_file_is_left_where_there_are_no_runs(tmp_path: Path) -> None:
    assert rows_of(tmp_path, "anything > 3") == []
    assert rows_of(tmp_path / "nowhere") == []
    assert list(tmp_path.iterdir()) == []


WORKER = """
import sys
from contextlib import closing
from pathlib import Path
from torchkeep.watch.index import RunIndex
for _ in range(int(sys.argv[2])):
    index = RunIndex(Path(sys.argv[1]))
    index.refresh()
    found = [row["name"] for row in index.query(most=None)]
    assert len(found) == 40, len(found)
    index.close()
print("done")
"""


def test_several_processes_at_once_and_killed_ones(tmp_path: Path) -> None:
    for number in range(40):
        make_run(tmp_path / f"run-{number:02d}", created=float(number))

    def begin(times: int) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", WORKER, str(tmp_path), str(times)]
        return subprocess.Popen(command, stdout=subprocess.PIPE)

    lasting, killed = [begin(3), begin(3)], begin(10**6)
    for number in range(20):
        append(tmp_path / f"run-{number:02d}", scalars(100 + number, valid__accuracy=0.95, valid__loss=0.0))
        if number == 10:
            os.kill(killed.pid, signal.SIGKILL)
    assert [process.communicate()[0].strip() for process in lasting] == [b"done", b"done"]
    killed.communicate()
    assert len(names(tmp_path, "valid/accuracy = .95")) == 20


def test_names_of_any_kind(tmp_path: Path) -> None:
    make_run(tmp_path / "with 'quotes' & \"more\"; DROP TABLE run", created=1.0)
    make_run(tmp_path / "größe", created=2.0)
    os.rename(make_run(tmp_path / "c", created=3.0), os.fsencode(tmp_path) + b"/not-utf8-\xff")
    assert names(tmp_path) == ["with 'quotes' & \"more\"; DROP TABLE run", "größe", "not-utf8-?"]
    assert names(tmp_path, "name = größe") == ["größe"]
    assert names(tmp_path, "name = \"with 'quotes' & \"") == []
    append(tmp_path / "größe", scalars(50, **{"a tag (1) = x": 3.0}))
    assert names(tmp_path, '"a tag (1) = x" > 2') == ["größe"]


def test_rows_as_csv() -> None:
    text = csv_text([{"name": "a,b", "best": 0.5, "x": None}, {"name": "c", "y": [1, "two"], "z": True}])
    assert text.splitlines() == ["name,best,x,y,z", '"a,b",0.5,,,', 'c,,,"1, two",true']
    assert csv_text([]) == "\n"
