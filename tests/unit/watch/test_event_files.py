"""What TensorBoard's own reader makes of our event files."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from torchkeep.watch.tensorboard import TensorBoardView, crc32c, event_files, high_water, read_events


def scalars(step: int, **values: float) -> dict[str, Any]:
    tags = {name.replace("_", "/"): value for name, value in values.items()}
    return {"kind": "scalars", "attempt": 0, "step": step, "time": 1000.0 + step, "values": tags}


def show(folder: Path, attempt: int, records: list[dict[str, Any]]) -> None:
    view = TensorBoardView(folder, attempt)
    view.write(records)
    view.flush()
    view.close()


def seen(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """By tag what TensorBoard's own reader finds."""
    program = """
        import json, sys
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        found = EventAccumulator(sys.argv[1])
        found.Reload()
        print(json.dumps({tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}))
    """
    # in a process of its own: TensorBoard's reader warns of things that are not ours
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(program), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    import json

    return {tag: [tuple(row) for row in rows] for tag, rows in json.loads(done.stdout).items()}


def test_crc_is_castagnolis() -> None:
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(b"") == 0
    # RFC 3720, B.4
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"\xff" * 32) == 0x62A8AB43
    assert crc32c(bytes(range(32))) == 0x46DD794E


def test_crc_is_tensorboards_at_every_length() -> None:
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import crc32c as theirs

    for size in [*range(40), 1023, 1024, 1025, 1026, 1027, 1028, 1029, 2047, 2049, 5000]:
        data = os.urandom(size)
        assert crc32c(data) == theirs(data), size


def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    records = [scalars(step, train_loss=1 / step, valid_loss=2.0) for step in (1, 2, 4)]
    timing = {**scalars(4, samples_per_s=10.0), "kind": "timing"}
    show(tmp_path, 0, [*records, timing, {"kind": "alert", "step": 4, "time": 0.0, "text": "x"}])
    found = seen(tmp_path)
    assert found["valid/loss"] == [(1, 2.0), (2, 2.0), (4, 2.0)]
    assert found["train/loss"] == [(1, 1.0), (2, 0.5), (4, 0.25)]
    assert found["samples/per/s"] == [(4, 10.0)]


def test_one_event_a_record_with_its_plugin_named_once(tmp_path: Path) -> None:
    show(tmp_path, 0, [scalars(step, a=1.0, b=2.0) for step in (1, 2)])
    (path,) = event_files(tmp_path)
    version, first, second = read_events(path)
    assert version.file_version == "brain.Event:2"
    assert [value.metadata.plugin_data.plugin_name for value in first.summary.value] == ["scalars", "scalars"]
    assert not any(value.HasField("metadata") for value in second.summary.value)
    assert second.wall_time == 1002.0


def test_numbers_that_are_not_finite_are_shown(tmp_path: Path) -> None:
    show(tmp_path, 0, [scalars(1, a=math.nan, b=math.inf, c=1e300)])
    found = seen(tmp_path)
    assert math.isnan(found["a"][0][1])
    assert found["b"][0][1] == found["c"][0][1] == math.inf


def test_a_resumed_run_shows_nothing_twice(tmp_path: Path) -> None:
    show(tmp_path, 0, [scalars(step, a=float(step)) for step in range(1, 8)])
    show(tmp_path, 1, [scalars(step, a=float(step), b=0.0) for step in range(5, 11)])
    assert high_water(tmp_path) == {"a": 10, "b": 10}
    found = seen(tmp_path)
    assert [step for step, _ in found["a"]] == list(range(1, 11))
    assert [step for step, _ in found["b"]] == list(range(5, 11))
    assert len(event_files(tmp_path)) == 2


def test_attempts_within_one_second_are_read_in_order(tmp_path: Path) -> None:
    for attempt in range(4):
        show(tmp_path, attempt, [scalars(attempt + 1, a=1.0)])
    assert [path.name.rpartition(".")[2] for path in event_files(tmp_path)] == ["0", "1", "2", "3"]
    assert [step for step, _ in seen(tmp_path)["a"]] == [1, 2, 3, 4]


def test_a_run_that_shows_nothing_makes_no_file(tmp_path: Path) -> None:
    show(tmp_path / "tensorboard", 0, [{"kind": "alert", "step": 0, "time": 0.0}])
    assert not (tmp_path / "tensorboard").exists()


@pytest.mark.parametrize("lost", [1, 5, 20, 30])
def test_a_torn_tail_is_shown_again_by_the_next_attempt(tmp_path: Path, lost: int) -> None:
    records = [scalars(step, a=float(step)) for step in range(1, 6)]
    show(tmp_path, 0, records)
    (path,) = event_files(tmp_path)
    os.truncate(path, path.stat().st_size - lost)
    show(tmp_path, 1, records)
    assert seen(tmp_path)["a"] == [(step, float(step)) for step in range(1, 6)]


def test_damage_in_the_middle_ends_the_reading_there(tmp_path: Path) -> None:
    show(tmp_path, 0, [scalars(step, a=float(step)) for step in range(1, 6)])
    (path,) = event_files(tmp_path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)
    assert 0 < high_water(tmp_path)["a"] < 5
    path.write_bytes(data[: len(data) // 2] + bytes(100))
    assert 0 < high_water(tmp_path)["a"] < 5


@pytest.mark.skipif(sys.platform == "win32", reason="a limit on a file's size is set by the resource module")
def test_a_full_disk_leaves_no_torn_event(tmp_path: Path) -> None:
    program = """
        import pathlib, resource, signal, sys
        from torchkeep.errors import StorageError
        from torchkeep.watch.tensorboard import TensorBoardView
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, hard))
        view = TensorBoardView(pathlib.Path(sys.argv[1]), 0)
        def records(first):
            return [{"kind": "scalars", "step": s, "time": 0.0, "values": {"a": 1.0}} for s in range(first, first + 5)]
        view.write(records(1))
        try:
            view.write(records(6))
        except StorageError:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
            view.write(records(6))
            print("overcome")
        view.close()
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "overcome\n"
    assert [step for step, _ in seen(tmp_path)["a"]] == list(range(1, 11))
