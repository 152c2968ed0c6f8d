"""What a person sees while it trains.

A terminal gets one line that is drawn anew, by whoever calls ``progress``: no thread redraws it. A notebook gets the
same line as one output that is replaced, without any widget. A file or a cluster's log gets plain lines, seldom.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import IO, TYPE_CHECKING, Any

from ..contracts import Decision, Json
from ..errors import printable

if TYPE_CHECKING:
    from rich.live import Live
    from rich.text import Text

_PLAIN_EVERY_S = 10.0
_EPOCH_LINE_EVERY_S = 1 / 3
_PLAIN_COLUMNS = 120
_WIDE_COLUMNS = 90
_MIN_BAR_COLUMNS = 8
_MAX_BAR_COLUMNS = 40
_GAP = "  "


class Console:
    """Everything that is printed. ``quiet`` leaves the warnings; ``file`` takes the place of standard output."""

    def __init__(self, quiet: bool = False, file: IO[str] | None = None):
        from rich.console import Console as RichConsole

        self.quiet = quiet
        options: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False}
        self._in_notebook = file is None and RichConsole().is_jupyter
        self._rich = RichConsole(file=file, force_jupyter=False, **options)
        self._is_live = _can_redraw(self._rich)
        if not self._is_live:
            self._rich.width = max(self._rich.width, _PLAIN_COLUMNS)
        self._live: Live | _NotebookLine | None = None
        self._total_steps = self._epochs = 0
        self._marks: deque[tuple[float, int]] = deque(maxlen=120)  # 30 s at four calls a second
        self._plain_s = self._epoch_line_s = -math.inf

    @property
    def room(self) -> tuple[int, int] | None:
        """Columns and lines of the terminal; None where a file takes whatever comes."""
        return (self._rich.width, self._rich.height) if self._is_live else None

    # --- lines

    def say(self, text: str) -> None:
        """One line of plain text."""
        if not self.quiet:
            self._line(text)

    def warn(self, text: str) -> None:
        """Something that the person should know, shown even where quiet."""
        self._line(f"warning: {text}", style="yellow")

    def decisions(self, rows: Sequence[Decision]) -> None:
        """Every automatic choice: setting, value, reason, override."""
        if self.quiet or not rows:
            return
        texts = [(row.name, _json_text(row.value), row.reason, row.override) for row in rows]
        if self._rich.width >= _WIDE_COLUMNS:
            self.table(("setting", "value", "reason", "override"), texts)
            return
        for name, value, reason, override in texts:
            self._line(f"{name} = {value}", style="bold")
            self.folded(reason.split(), indent="    ", gap=" ")
            self._line(f"    override: {override}")

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A plain table. Only a terminal that is too narrow folds it; a file gets whole lines."""
        if self.quiet:
            return
        lines = _columns([columns, *rows])
        if self._is_live and max(map(_cells, lines)) > self._rich.width:
            self._print_folded_table(columns, rows)
            return
        self._line(lines[0], style="bold")
        if len(lines) > 1:
            self._line("\n".join(lines[1:]))

    def _print_folded_table(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        from rich.table import Table

        table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
        for column in columns:
            table.add_column(self._printable(column), overflow="fold")
        for row in rows:
            table.add_row(*map(self._printable, row))
        self._rich.print(table)

    # --- while it trains

    def start(self, total_steps: int, first_step: int, steps_per_epoch: int, epochs: int) -> None:
        """Begin to show progress. ``first_step`` is the step of the checkpoint where the run was resumed, else 0."""
        self._total_steps, self._epochs = total_steps, epochs
        now = time.monotonic()
        self._marks.clear()
        self._marks.append((now, first_step))
        self._plain_s, self._epoch_line_s = now, -math.inf
        if self.quiet:
            return
        if first_step:
            self._line(f"going on from step {first_step:,} of {total_steps:,}")
        else:
            self._line(f"{_count(epochs, 'epoch')} of {_count(steps_per_epoch, 'step')}, {total_steps:,} in all")
        if self._is_live or self._in_notebook:
            self._start_live()

    def _start_live(self) -> None:
        self._stop_live()
        if self._in_notebook:
            self._live = _NotebookLine()
            return
        from rich.live import Live

        self._live = Live("", console=self._rich, auto_refresh=False, transient=True, redirect_stderr=False)
        self._live.start()

    def _stop_live(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def progress(self, step: int, epoch: int, samples_per_s: float, values: Mapping[str, float]) -> None:
        """Draw where the run is now; the caller decides how often. ``epoch`` counts from 0."""
        if self.quiet:
            return
        now = time.monotonic()
        self._marks.append((now, step))
        parts = self._progress_parts(step, epoch, samples_per_s, values)
        if self._live is not None:
            self._live.update(self._bar_line(step, parts), refresh=True)
        elif now - self._plain_s >= _PLAIN_EVERY_S:
            self._plain_s = now
            self._line(_GAP.join(text for _, text in parts))

    def _progress_parts(
        self, step: int, epoch: int, samples_per_s: float, values: Mapping[str, float]
    ) -> list[tuple[str, str]]:
        parts = [
            ("epoch", f"epoch {min(epoch + 1, self._epochs)}/{self._epochs}"),
            ("steps", f"{step:,}/{self._total_steps:,}"),
            ("rate", f"{format_number(round(samples_per_s) if samples_per_s >= 10 else samples_per_s)} samples/s"),
            *(("value", f"{tag.removeprefix('train/')} {format_number(value)}") for tag, value in values.items()),
        ]
        left_s = self._left_s(step)
        return parts if left_s is None else [*parts, ("left", f"{format_seconds(left_s)} left")]

    def _left_s(self, step: int) -> float | None:
        first_s, first_step = self._marks[0]
        last_s, last_step = self._marks[-1]
        if last_step <= first_step:
            return None
        return (self._total_steps - step) * (last_s - first_s) / (last_step - first_step)

    def _bar_line(self, step: int, parts: list[tuple[str, str]]) -> Text:
        """Epoch, bar and the rest on one line. What matters least goes first where the terminal is narrow."""
        from rich.text import Text

        room = self._rich.width - 1
        parts = _fitting(parts, room - _MIN_BAR_COLUMNS - len(_GAP))
        columns = min(_MAX_BAR_COLUMNS, room - _line_columns(parts) - len(_GAP))
        first, *rest = [self._printable(text) for _, text in parts]
        bar: list[tuple[str, str]] = []
        if columns >= _MIN_BAR_COLUMNS:
            done = min(columns, columns * step // max(1, self._total_steps))
            full, empty = "#-" if self._rich.options.ascii_only else "━─"
            bar = [(_GAP, ""), (full * done, "green"), (empty * (columns - done), "bright_black")]
        return Text.assemble(first, *bar, *(_GAP + text for text in rest), no_wrap=True, overflow="crop")

    def epoch(
        self, epoch: int, epochs: int, values: Mapping[str, float], elapsed_s: float, is_best: bool = False
    ) -> None:
        """One line that stays, for the epoch that has just ended (counted from 0). Fast epochs are thinned."""
        now = time.monotonic()
        is_last = epoch + 1 >= epochs
        if self.quiet or (now - self._epoch_line_s < _EPOCH_LINE_EVERY_S and not is_last):
            return
        self._epoch_line_s = self._plain_s = now
        number = f"epoch {epoch + 1:>{len(str(epochs))}}/{epochs}"
        metrics = [f"{tag} {format_number(value)}" for tag, value in values.items()]
        self.folded([number, *metrics, format_seconds(elapsed_s), *(["best"] if is_best else [])])

    # --- the end

    def summary(self, title: str, rows: Sequence[tuple[str, str]], next_commands: Sequence[str]) -> None:
        """What came of the run, and the commands to type next, whole and each on its own line."""
        self._stop_live()
        if self.quiet:
            return
        self._line("")
        self._line(title, style="bold")
        widest = max((_cells(name) for name, _ in rows), default=0)
        for name, value in rows:
            self._line(f"  {name}{' ' * (widest - _cells(name))}  {value}")
        if next_commands:
            self._line("")
            self._line("next:", style="bold")
        for command in next_commands:
            self._line(f"  {command}", style="cyan")

    def close(self) -> None:
        """Take the bar away and give the cursor back. May be called more than once."""
        self._stop_live()

    # --- printing

    def _line(self, text: str, style: str | None = None) -> None:
        # soft_wrap: the terminal may wrap what it shows, but a path or a command stays one piece when it is copied
        self._rich.print(self._printable(text), style=style, soft_wrap=True)

    def folded(self, parts: Sequence[str], indent: str = "", gap: str = _GAP) -> None:
        """Parts on one line, or on more where a terminal is too narrow; a part is never cut."""
        if self.quiet:
            return
        room = self._rich.width if self._is_live else 10**6
        line = indent + "".join(parts[:1])
        for part in parts[1:]:
            if _cells(line) + len(gap) + _cells(part) > room:
                self._line(line)
                line = "    " + part
            else:
                line += gap + part
        self._line(line)

    def _printable(self, text: str) -> str:
        """What the terminal's code page can show: a class named in Greek must not stop a run on Windows."""
        encoding, text = self._rich.encoding, printable(text)
        try:
            return text.encode(encoding, "replace").decode(encoding)
        except LookupError:
            return text.encode("ascii", "replace").decode("ascii")


class _NotebookLine:
    """One output of a notebook's cell, replaced at each update; what rich's own bar there needs widgets for."""

    def __init__(self) -> None:
        self._handle: Any = None

    def update(self, line: Text, refresh: bool = True) -> None:
        from IPython.display import display

        shown = {"text/plain": line.plain}
        if self._handle is None:
            self._handle = display(shown, raw=True, display_id=True)
        elif refresh:
            self._handle.update(shown, raw=True)

    def stop(self) -> None:
        if self._handle is not None:
            self._handle.update({"text/plain": ""}, raw=True)


def _can_redraw(console: Any) -> bool:
    # FORCE_COLOR, as build servers set it, makes rich take a log for a terminal: the file itself must say so
    is_terminal = getattr(console.file, "isatty", lambda: False)()
    return bool(is_terminal and console.is_terminal and not console.is_dumb_terminal)


def _fitting(parts: list[tuple[str, str]], room: int) -> list[tuple[str, str]]:
    """Drop parts until they fit: all values but the first, the rate, the steps, the value, the time left."""
    parts = list(parts)
    for name, keep in (("value", 1), ("rate", 0), ("steps", 0), ("value", 0), ("left", 0)):
        while _line_columns(parts) > room and sum(part[0] == name for part in parts) > keep:
            last = max(place for place, part in enumerate(parts) if part[0] == name)
            del parts[last]
    return parts


def _line_columns(parts: list[tuple[str, str]]) -> int:
    return sum(_cells(text) for _, text in parts) + len(_GAP) * (len(parts) - 1)


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(_cells, column)) for column in zip(*rows, strict=True)]
    return [
        _GAP.join(text + " " * (width - _cells(text)) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _cells(text: str) -> int:
    """Columns that the text takes in a terminal."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)


def _json_text(value: Json) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(_json_text, value))
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    return str(value)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def format_number(value: float) -> str:
    """Four significant digits; thousands with commas.

    >>> [format_number(x) for x in (0.5, 12.3456, 1234.5, 1e-5, 10000, 0.0)]
    ['0.5000', '12.35', '1,234', '1.000e-05', '10,000', '0']
    """
    if isinstance(value, int) or value == 0:
        return f"{value:,.0f}"
    if not math.isfinite(value):
        return str(value)
    size = abs(float(f"{value:.3e}"))
    if size < 1e-4 or size >= 1e12:
        return f"{value:.3e}"
    if size >= 1000:
        return f"{value:,.0f}"
    return f"{value:.{3 - math.floor(math.log10(size))}f}"


def format_seconds(seconds: float) -> str:
    """
    >>> [format_seconds(s) for s in (0.04, 12.34, 245, 7500)]
    ['0.04 s', '12.3 s', '4 min 05 s', '2 h 05 min']
    """
    if seconds < 0.1:
        return f"{seconds:.2f} s"
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours:,} h {minutes:02d} min"
