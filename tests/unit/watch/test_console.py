"""What is printed, to a terminal of several widths and to a file."""

from __future__ import annotations

import io
import math
import re
import sys
from types import SimpleNamespace

import pytest

from torchkeep.contracts import Decision
from torchkeep.watch import console as module
from torchkeep.watch.console import Console, format_number, format_seconds

DECISIONS = [
    Decision("data.workers", 2, "2 cores; decoding takes 3.1 ms a sample", "data.workers=N"),
    Decision("train.capture", None, "compiling pays off after 100,000 steps; this run has 2,814", "train.capture=on"),
]
COMMAND = "torchkeep package runs/a-run-with-a-rather-long-name --output some/where/a-run-with-a-rather-long-name.tkp"


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class OldTerminal(io.TextIOWrapper):
    def isatty(self) -> bool:
        return True


def terminal(monkeypatch: pytest.MonkeyPatch, columns: int) -> tuple[Console, io.StringIO]:
    monkeypatch.setenv("COLUMNS", str(columns))
    file = Terminal()
    return Console(file=file), file


def use(console: Console) -> None:
    console.decisions(DECISIONS)
    console.table(("name", "status"), [("digits", "finished"), ("bees", "killed")])
    console.start(total_steps=2814, first_step=0, steps_per_epoch=938, epochs=3)
    for step in (100, 1000, 2000):
        console.progress(step, step // 938, 12345.6, {"train/loss": 0.25})
    console.epoch(2, 3, {"train/loss": 0.123, "valid/loss": 0.0987, "valid/accuracy": 1.0}, 245.0, is_best=True)
    console.warn("the last batch has 3 samples")
    console.close()
    console.summary("digits finished", [("best", "0.9876"), ("time", "4 min 05 s")], [COMMAND])
    console.close()


def without_codes(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def test_a_file_gets_plain_lines() -> None:
    file = io.StringIO()
    use(Console(file=file))
    text = file.getvalue()
    assert "\x1b" not in text
    assert "\r" not in text
    assert "samples/s" not in text  # less than 10 s have gone by
    lines = text.splitlines()
    assert "epoch 3/3  train/loss 0.1230  valid/loss 0.09870  valid/accuracy 1.000  4 min 05 s  best" in lines
    assert "  " + COMMAND in lines
    assert any(line.split("  ")[0] == "data.workers" and line.endswith("data.workers=N") for line in lines)


def test_a_file_gets_progress_every_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    console = Console(file=file)
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    console.start(total_steps=1000, first_step=0, steps_per_epoch=1000, epochs=1)
    for step in range(1, 101):
        now[0] += 0.25
        console.progress(step, 0, 64.0, {"train/loss": 0.5})
    lines = [line for line in file.getvalue().splitlines() if line.startswith("epoch 1/1")]
    assert len(lines) == 2
    assert lines[0] == "epoch 1/1  40/1,000  64 samples/s  loss 0.5000  4 min 00 s left"


@pytest.mark.parametrize("columns", [20, 40, 60, 80, 100, 200])
def test_a_terminal_shows_a_bar_that_fits(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    console, file = terminal(monkeypatch, columns)
    use(console)
    text = without_codes(file.getvalue())
    drawn = [line for line in re.split(r"[\r\n]", text) if line.startswith("epoch 2/3")]
    assert drawn
    assert all(len(line.rstrip()) < columns for line in drawn)
    assert columns < 40 or "━" in drawn[0]
    assert columns < 60 or "loss 0.2500" in drawn[0]
    assert columns < 100 or "12,346 samples/s" in drawn[0]
    assert file.getvalue().count("\x1b[?25h") == 1  # the cursor is back
    assert "  " + COMMAND in text.splitlines()


def test_a_thousand_fast_epochs_do_not_flood(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    console = Console(file=file)
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    console.start(total_steps=1000, first_step=0, steps_per_epoch=1, epochs=1000)
    for epoch in range(1000):
        now[0] += 0.01
        console.epoch(epoch, 1000, {"train/loss": 1.0}, 0.01)
    lines = [line for line in file.getvalue().splitlines() if line.startswith("epoch ")]
    assert 20 <= len(lines) <= 32
    assert lines[0].startswith("epoch    1/1000")
    assert lines[-1].startswith("epoch 1000/1000")


def test_quiet_shows_warnings_only() -> None:
    file = io.StringIO()
    use(Console(quiet=True, file=file))
    assert file.getvalue() == "warning: the last batch has 3 samples\n"


def test_a_code_page_without_a_sign_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    raw = io.BytesIO()
    file = OldTerminal(raw, encoding="cp1252", write_through=True)
    console = Console(file=file)
    use(console)
    console.say("class μέλισσα [not markup] :bee:")
    text = without_codes(raw.getvalue().decode("cp1252"))
    assert "class ??????? [not markup] :bee:" in text
    assert "###" in text
    assert text.isascii()


def test_a_log_with_colours_forced_is_not_redrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    file = io.StringIO()
    use(Console(file=file))
    assert "\r" not in file.getvalue()
    assert "\x1b[?25" not in file.getvalue()


def test_a_narrow_terminal_folds_a_table_and_a_file_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [("a-run-with-a-long-name-" * 3, "finished")]
    console, file = terminal(monkeypatch, 40)
    console.table(("name", "status"), rows)
    assert all(len(line) <= 40 for line in without_codes(file.getvalue()).splitlines())
    file = io.StringIO()
    Console(file=file).table(("name", "status"), rows)
    assert file.getvalue().splitlines()[1] == rows[0][0] + "  finished"


def test_a_resumed_run_says_where_it_goes_on() -> None:
    file = io.StringIO()
    console = Console(file=file)
    console.start(total_steps=1000, first_step=400, steps_per_epoch=100, epochs=10)
    assert file.getvalue() == "going on from step 400 of 1,000\n"


def test_a_notebook_gets_lines_and_one_output_that_is_replaced(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import rich.console

    shown: list[str] = []

    class Handle:
        def update(self, data: dict[str, str], raw: bool) -> None:
            shown.append(data["text/plain"])

    def display(data: dict[str, str], raw: bool, display_id: bool) -> Handle:
        shown.append(data["text/plain"])
        return Handle()

    monkeypatch.setattr(rich.console, "_is_jupyter", lambda: True)
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(display=display))
    use(Console())
    assert any("epoch 3/3" in line for line in capsys.readouterr().out.splitlines())
    assert any("steps" in line or "samples/s" in line for line in shown)
    assert shown[-1] == ""  # the bar is taken away at the end


def test_numbers() -> None:
    wanted = {0.5: "0.5000", 12.3456: "12.35", 999.96: "1,000", 1234.5: "1,234", 1e-5: "1.000e-05", -0.25: "-0.2500"}
    assert {value: format_number(value) for value in wanted} == wanted
    assert [format_number(x) for x in (0.0, 10000, 9.99996, 1e15, math.nan, -math.inf, 0.00012345)] == [
        *("0", "10,000", "10.00", "1.000e+15", "nan", "-inf", "0.0001234")
    ]


def test_times() -> None:
    times = {0.004: "0.00 s", 0.04: "0.04 s", 12.34: "12.3 s", 59.97: "1 min 00 s", 245: "4 min 05 s"}
    times |= {3599.7: "1 h 00 min", 7500: "2 h 05 min"}
    assert {seconds: format_seconds(seconds) for seconds in times} == times
