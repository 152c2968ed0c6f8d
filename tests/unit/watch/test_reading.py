"""A record as a table: what counts, once, with what was taken back marked."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from torchkeep import read_run
from torchkeep.errors import RunFolderError
from torchkeep.watch.recorder import Recorder
from torchkeep.watch.records import kept_records, records_of


def attempt(folder: Path, number: int, first: int, last: int) -> None:
    recorder = Recorder(folder / "records.jsonl", attempt=number)
    recorder.log("attempt_start", step=first, samples=0, epoch=0, from_step=first)
    for step in range(first + 1, last + 1):
        values: dict[str, Any] = {"train/loss": 1 / step}
        if step % 3 == 0:
            values |= {"valid/loss": math.nan if step == 6 else 2.0 * step, "n": step}
        recorder.log("scalars", step=step, samples=8 * step, epoch=step // 3, values=values)
        recorder.log("timing", step=step, samples=0, epoch=0, values={"train/samples_per_s": 5})
    recorder.close()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    attempt(tmp_path, 0, 0, 8)
    attempt(tmp_path, 1, 4, 10)
    return tmp_path


def test_the_table_holds_each_number_once(run: Path) -> None:
    table = read_run(run).scalars()
    rows = table.to_pylist()
    assert [row["step"] for row in rows if row["tag"] == "train/loss"] == list(range(1, 11))
    shared = ("step", "epoch", "samples", "attempt", "time")
    wanted = [
        {"tag": tag, "value": value, **{key: record[key] for key in shared}}
        for record in kept_records(run / "records.jsonl", ["scalars"])
        for tag, value in record["values"].items()
    ]
    assert [{**row, "value": repr(row["value"])} for row in rows] == [
        {**row, "value": repr(float(row["value"]))} for row in wanted
    ]
    assert [row["attempt"] for row in rows if row["tag"] == "train/loss"] == [0] * 4 + [1] * 6
    assert table.column_names == ["tag", "value", "step", "epoch", "samples", "attempt", "time"]


def test_tags_and_kinds_are_chosen(run: Path) -> None:
    record = read_run(run)
    assert set(record.scalars(["n"])["tag"].to_pylist()) == {"n"}
    assert record.scalars(["none such"]).num_rows == 0
    assert set(record.scalars(kinds=["timing"])["tag"].to_pylist()) == {"train/samples_per_s"}


def test_chunks_are_one_table(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchkeep.watch import reading, records

    whole = read_run(run).scalars().to_pydict()
    monkeypatch.setattr(reading, "_CHUNK_ROWS", 3)
    monkeypatch.setattr(records, "_BATCH_BYTES", 100)
    monkeypatch.setattr(records, "_BLOCK_BYTES", 64)
    assert repr(read_run(run).scalars().to_pydict()) == repr(whole)


def test_what_was_taken_back_is_marked_not_lost(run: Path) -> None:
    rows = list(read_run(run).records(["scalars"], superseded=True))
    assert [row["step"] for row in rows if row["superseded"]] == [5, 6, 7, 8]
    assert len(rows) == 8 + 6
    assert [row["step"] for row in read_run(run) if row["kind"] == "scalars"] == list(range(1, 11))


@pytest.mark.parametrize("block", [32, 100, 1 << 20])
def test_records_of_one_kind_are_found_wherever_blocks_end(
    run: Path, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchkeep.watch import records

    monkeypatch.setattr(records, "_BLOCK_BYTES", block)
    assert [row["from_step"] for row in records_of(run / "records.jsonl", "attempt_start")] == [0, 4]
    assert len(list(records_of(run / "records.jsonl", "timing"))) == 8 + 6


def test_a_folder_without_a_record(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="no record"):
        read_run(tmp_path)
