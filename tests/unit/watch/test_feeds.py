"""What feeds the views: nothing is lost while one is away, and no view holds up another, nor the end."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from torchkeep.watch import feeds
from torchkeep.watch.feeds import Unreachable
from torchkeep.watch.media import MediaStore
from torchkeep.watch.recorder import Recorder
from torchkeep.watch.records import Record, read_records

WAIT_S = 20.0


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeds, "_PAUSES_S", (0.05,))


class Shown:
    """A view of a server that can go away."""

    name = "shown"
    close_timeout_s = WAIT_S

    def __init__(self) -> None:
        self.seen: list[Record] = []
        self.is_there = True
        self.is_closed = False
        self.refuses: set[int] = set()

    def write(self, records: list[Record], media: MediaStore) -> None:
        if not self.is_there:
            raise Unreachable("connection refused")
        if any(record["step"] in self.refuses for record in records):
            raise ValueError("cannot be shown")
        known = {(record["attempt"], record["seq"]) for record in self.seen}
        self.seen += [record for record in records if (record["attempt"], record["seq"]) not in known]

    def flush(self) -> None: ...

    def close(self) -> None:
        self.is_closed = True

    def abandon(self) -> None:
        self.is_closed = True

    def steps(self) -> list[int]:
        return [record["step"] for record in self.seen if record["kind"] == "scalars"]


def log(recorder: Recorder, steps: range) -> None:
    for step in steps:
        recorder.log("scalars", step=step, samples=step, epoch=0, values={"train/loss": 1.0})
    recorder.flush()


def until(what: Any) -> None:
    deadline = time.monotonic() + WAIT_S
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_view_that_was_away_is_given_all_of_it(tmp_path: Path) -> None:
    alerts: list[str] = []
    away, other = Shown(), Shown()
    recorder = Recorder(tmp_path / "r", attempt=0, views=[away, other], on_alert=alerts.append)
    log(recorder, range(10))
    until(lambda: away.steps() == list(range(10)))
    away.is_there = False
    log(recorder, range(10, 5000))
    until(lambda: len(other.steps()) == 5000)
    assert away.steps() == list(range(10))
    away.is_there = True
    until(lambda: len(away.steps()) == 5000)
    recorder.close()
    assert away.steps() == list(range(5000))
    assert alerts == ["shown failed and the training goes on: Unreachable: connection refused", "shown is back"]
    assert away.is_closed


def test_a_record_that_cannot_be_shown_is_left_out_alone(tmp_path: Path) -> None:
    view = Shown()
    view.refuses = {7}
    recorder = Recorder(tmp_path / "r", attempt=0, views=[view])
    log(recorder, range(20))
    recorder.close()
    assert view.steps() == [step for step in range(20) if step != 7]
    assert recorder.view_errors == 1


def test_a_view_that_never_comes_back_is_said_at_the_end(tmp_path: Path) -> None:
    alerts: list[str] = []
    view = Shown()
    view.is_there = False
    recorder = Recorder(tmp_path / "r", attempt=0, views=[view], on_alert=alerts.append)
    log(recorder, range(5))
    recorder.close()
    assert view.seen == []
    assert alerts[-1] == "shown has not taken all of the record: torchkeep sync sends the rest later"
    assert len([r for r in read_records(tmp_path / "r") if r["kind"] == "scalars"]) == 5


def test_a_view_that_hangs_is_left_behind(tmp_path: Path) -> None:
    alerts: list[str] = []
    hangs = threading.Event()
    view = Shown()
    view.close_timeout_s = 0.3
    view.write = lambda records, media: hangs.wait(WAIT_S)  # type: ignore[method-assign,assignment,return-value]
    recorder = Recorder(tmp_path / "r", attempt=0, views=[view], on_alert=alerts.append)
    log(recorder, range(5))
    recorder.close()
    assert alerts == ["shown did not end within 0.3 s and is left behind"]
    assert view.is_closed
    hangs.set()


def test_a_view_that_takes_nothing_at_all_is_given_up(tmp_path: Path) -> None:
    view = Shown()
    view.refuses = set(range(10_000))
    alerts: list[str] = []
    recorder = Recorder(tmp_path / "r", attempt=0, views=[view], on_alert=alerts.append)
    log(recorder, range(2000))
    recorder.close()
    assert recorder.view_errors < 300
    assert alerts[-1] == "shown takes none of 100 records and is given up"


def test_what_cannot_be_drawn_becomes_an_alert(tmp_path: Path) -> None:
    class Broken:
        def settle(self, media: MediaStore) -> dict[str, Any]:
            raise ZeroDivisionError("no pixels")

    class Drawn:
        def settle(self, media: MediaStore) -> dict[str, Any]:
            return {"media": media.put(b"12", ".png")}

    recorder = Recorder(tmp_path / "r", attempt=0)
    recorder.log("image", step=1, samples=1, epoch=0, tag="a", late=Broken())
    recorder.log("image", step=2, samples=2, epoch=0, tag="b", late=Drawn())
    recorder.close()
    first, second = read_records(tmp_path / "r")
    assert (first["kind"], first["text"]) == ("alert", "image 'a' could not be drawn: ZeroDivisionError: no pixels")
    assert (second["kind"], second["tag"]) == ("image", "b")
    assert MediaStore(tmp_path).read(second["media"]) == b"12"
