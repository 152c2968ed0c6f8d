"""What sets runs apart: results, settings, code, data, environment, decisions, and where their records part."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..contracts import Json
from ..errors import RunFolderError, SettingsError
from ..folder import RECORDS_FILE
from .console import Console, format_number, format_seconds
from .index import Course, Row, is_better, is_less_better, plain_text, read_course, read_facts, run_row, settings_of
from .records import DETERMINISTIC_KINDS, kept_batches, records_of

Points = list[tuple[int, float]]

MAX_POINTS = 1000
_NUM_SPANS = MAX_POINTS // 3  # the least, the greatest and one that is no number of each
_THIN_AT = 8 * MAX_POINTS
_SHOWN_CURVES, _SPARK_COLUMNS = 12, 48
_SPARKS, _ASCII_SPARKS = "▁▂▃▄▅▆▇█", "_.-~=*#@"
_HARDWARE = ("python", "platform", "processor", "cores", "gpu", "cuda")
_MAX_CELL = 60


@dataclass(frozen=True)
class Difference:
    """One thing that is not the same in all runs; a run that does not have it is left out of ``values``."""

    key: str
    values: dict[str, Json]


@dataclass(frozen=True)
class Parting:
    """Where a run's record leaves that of the first run: the step, the tag and both values.

    Without a tag they are equal wherever both have a number, up to ``step``.
    """

    run: str
    step: int
    num_equal: int
    tag: str | None = None
    values: tuple[float, float] | None = None


@dataclass(frozen=True)
class Comparison:
    """Runs beside each other, each under its name; ``curves`` by tag and run hold at most MAX_POINTS points each."""

    runs: dict[str, Row]
    metrics: dict[str, dict[str, float]]
    differences: dict[str, list[Difference]]
    partings: list[Parting]
    curves: dict[str, dict[str, Points]] = field(repr=False)

    def best(self, metric: str) -> list[str]:
        """The runs whose value of a metric is the best; none where nobody can say what is better, or all are equal."""
        tag, values = metric.partition(".")[2], self.metrics[metric]
        is_judged = is_less_better(tag) or tag.startswith(("valid/", "test/"))
        numbers = {run: value for run, value in values.items() if not math.isnan(value)}
        if not is_judged or len(numbers) < 2 or len(set(numbers.values())) < 2:
            return []
        return [run for run, value in numbers.items()
                if not any(is_better(tag, other, value) for other in numbers.values())]  # fmt: skip

    def to_json(self) -> Json:
        """Everything as JSON holds it; a number that is not finite as text."""
        from dataclasses import asdict

        return _strict(asdict(self))


def compare(runs: Sequence[Path]) -> Comparison:
    """Compare runs by what their folders hold; their code and data are not needed.

    Raises:  SettingsError for fewer than two, RunFolderError for a folder that is no run's, or a damaged record
    """
    if len(runs) < 2:
        raise SettingsError(
            "a comparison needs two runs", where="compare", got=f"{len(runs)} runs", expected="two or more folders",
            fix="torchkeep compare runs/a runs/b",
        )  # fmt: skip
    folders = dict(zip(_labels(runs), runs, strict=True))
    rows, parts = {}, {}
    for label, folder in folders.items():
        rows[label], parts[label] = _read(folder)
    metrics: dict[str, dict[str, float]] = {}
    for label, row in rows.items():
        for key, value in row.items():
            if key.startswith(("best.", "last.")) and isinstance(value, int | float):
                metrics.setdefault(key, {})[label] = value
    records = {label: folder / RECORDS_FILE for label, folder in folders.items()}
    first, *others = folders
    return Comparison(
        rows, dict(sorted(metrics.items(), key=lambda item: _importance(item[0].partition(".")[2]))),
        {name: _differing({label: part[name] for label, part in parts.items()}) for name in parts[first]},
        [_parting(label, records[first], records[label]) for label in others], _curves(records),
    )  # fmt: skip


def _labels(runs: Sequence[Path]) -> list[str]:
    """The folders' names, whole paths where two share one, with a number where a run is named twice."""
    names = [Path(run).absolute().name for run in runs]
    labels = [str(run) if names.count(name) > 1 else name for name, run in zip(names, runs, strict=True)]
    said = [f"{label} #{place + 1}" if labels.count(label) > 1 else label for place, label in enumerate(labels)]
    return [label.encode("utf-8", "replace").decode() for label in said]


def _read(folder: Path) -> tuple[Row, dict[str, Json]]:
    """A run's row, and by section what may differ, flat."""
    from ..settings import flatten  # loads pydantic, which the listing of runs does not need

    if not (folder / RECORDS_FILE).is_file():
        raise RunFolderError(
            "this is not the folder of a run", where=folder, got=f"no {RECORDS_FILE}",
            expected="a folder that a run or tk.Monitor has made", fix="torchkeep runs lists the runs",
        )  # fmt: skip
    row, course = run_row(folder)
    if row["status"] == "unreadable":
        read_facts(folder)
        read_course(folder / RECORDS_FILE, Course())  # says what is wrong, and where
        raise RunFolderError("this run cannot be compared", where=folder, got=row["problem"])
    start: Json = next(records_of(folder / RECORDS_FILE, "run_start"), {})
    facts = {**start, **read_facts(folder)}
    environment = {**facts.get("environment", {}), **start.get("environment", {})}
    lock = [line.partition("==")[::2] for line in environment.get("lock", [])]
    return row, {
        "settings": flatten(settings_of(facts, course)) | {"name": None, "seed": row["seed"]},
        "code": _code(facts.get("code") or {}),
        "data": flatten(facts.get("data") or {}),
        "packages": dict(lock) or environment.get("packages", {}),
        "hardware": {key: environment.get(key) for key in _HARDWARE} | {"device": facts.get("device")},
        "decisions": {made["name"]: made["value"] for made in _decisions(folder, facts)},
    }


def _decisions(folder: Path, facts: Json) -> Iterator[Json]:
    yield from facts.get("decisions", [])
    yield from records_of(folder / RECORDS_FILE, "decision")


def _code(code: Json) -> dict[str, Json]:
    """The commit, the uncommitted changes by file, and the untracked files by hash."""
    found: dict[str, Json] = {"commit": (code.get("commit") or "")[:12] or None}
    for part in ("\n" + (code.get("diff") or "")).split("\ndiff --git ")[1:]:
        head, _, text = part.partition("\n")
        found[f"changes in {head.rpartition(' b/')[2]}"] = text
    return found | {f"untracked {name}": digest for name, digest in (code.get("untracked") or {}).items()}


def _differing(flats: Mapping[str, dict[str, Json]]) -> list[Difference]:
    rows = []
    for key in dict.fromkeys(key for flat in flats.values() for key in flat):
        values = [flat.get(key) for flat in flats.values()]
        if any(value != values[0] for value in values):
            rows.append(Difference(key, {run: flat[key] for run, flat in flats.items() if flat.get(key) is not None}))
    return rows


# --- where two records part


def _parting(run: str, first: Path, other: Path) -> Parting:
    """The first step at which a tag that both have at it is not the same number. Bounded by a batch in memory."""
    mine, its = _steps(first), _steps(other)
    a, b = next(mine, None), next(its, None)
    num_equal, last = 0, 0
    while a and b:
        if a[0] == b[0]:
            shared = [tag for tag in a[1] if tag in b[1]]
            for tag in shared:
                if not _same(a[1][tag], b[1][tag]):
                    return Parting(run, a[0], num_equal, tag, (a[1][tag], b[1][tag]))
            num_equal, last = num_equal + len(shared), a[0] if shared else last
        before = a[0], b[0]
        a = next(mine, None) if before[0] <= before[1] else a
        b = next(its, None) if before[1] <= before[0] else b
    return Parting(run, last, num_equal)


def _same(a: Any, b: Any) -> bool:
    return bool(a == b or (a != a and b != b))


def _steps(path: Path) -> Iterator[tuple[int, dict[str, float]]]:
    """The deterministic numbers by step, in order; what a hand loop says of a step that it has left is passed over."""
    step, values = -1, dict[str, float]()
    for batch in kept_batches(path, DETERMINISTIC_KINDS):
        for record in batch:
            if record["step"] > step:
                if values:
                    yield step, values
                step, values = record["step"], {}
            if record["step"] == step:
                values |= record["values"]
    if values:
        yield step, values


# --- curves


class Curve:
    """A curve of any length in at most MAX_POINTS points: of each of equal spans of steps the least and the greatest
    value stay, so that a spike does, and one value that is no number.
    """

    def __init__(self) -> None:
        self._steps: list[int] = []
        self._values: list[float] = []

    def add(self, step: int, value: float) -> None:
        self._steps.append(step)
        self._values.append(value)
        if len(self._steps) >= _THIN_AT:
            self._thin()

    def points(self) -> Points:
        if len(self._steps) > MAX_POINTS:
            self._thin()
        return sorted(zip(self._steps, self._values, strict=True), key=lambda point: point[0])

    def _thin(self) -> None:
        import numpy as np

        steps, values = np.asarray(self._steps, np.int64), np.asarray(self._values, np.float64)
        spans = (steps - steps.min()) * _NUM_SPANS // max(1, int(steps.max() - steps.min()) + 1)
        # by span; within one numbers rise, and what is no number stands behind them
        finite = np.isfinite(values)
        order = np.lexsort((np.where(finite, values, np.inf), ~finite, spans))
        groups = spans[order] * 2 + ~finite[order]
        starts = np.flatnonzero(np.diff(groups, prepend=-1))
        ends = np.append(starts[1:], len(groups)) - 1
        kept = np.unique(order[np.concatenate([starts, ends[groups[ends] % 2 == 0]])])
        self._steps, self._values = steps[kept].tolist(), values[kept].tolist()


def _curves(records: Mapping[str, Path]) -> dict[str, dict[str, Points]]:
    found: dict[str, dict[str, Curve]] = {}
    for run, path in records.items():
        for batch in kept_batches(path, ("scalars", "timing")):
            for record in batch:
                for tag, value in record["values"].items():
                    curve = found.setdefault(tag, {}).get(run)
                    if curve is None:
                        curve = found[tag][run] = Curve()
                    curve.add(record["step"], value)
    return {tag: {run: curve.points() for run, curve in found[tag].items()} for tag in sorted(found, key=_importance)}


def _importance(tag: str) -> tuple[int, str]:
    """What was measured on held-out data first, then the training's loss and metrics, then the rest."""
    heads = ("valid/", "test/", "train/")
    return next((place for place, head in enumerate(heads) if tag.startswith(head)), len(heads)), tag


def _strict(value: Any) -> Json:
    if isinstance(value, dict):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


# --- in the terminal


def show_comparison(console: Console, comparison: Comparison) -> None:
    """Print tables of the runs, of their metrics (the best of each marked), of what differs, and small curves."""
    names = list(comparison.runs)
    facts = [(name, row["status"], str(row["attempts"]), f"{row['step']:,}", str(row["epoch"]),
              format_seconds(row["seconds"])) for name, row in comparison.runs.items()]  # fmt: skip
    console.table(("run", "status", "attempts", "step", "epoch", "time"), facts)
    console.say("")
    console.table(("metric", *names), [
        (metric, *(_number_text(values, name) + " *" * (name in comparison.best(metric)) for name in names))
        for metric, values in comparison.metrics.items()
        if not _is_detail(metric.partition(".")[2])
    ])  # fmt: skip
    for section, rows in comparison.differences.items():
        if rows:
            console.say("")
            console.table((section, *names), [(row.key, *(cell_text(row, name) for name in names)) for row in rows])
    console.say("")
    same = [section for section, rows in comparison.differences.items() if not rows]
    if same:
        console.say(f"the same in all: {', '.join(same)}")
    for parting in comparison.partings:
        console.say(parting_text(parting, names[0]))
    _show_curves(console, comparison)


def cell_text(row: Difference, run: str) -> str:
    """A value of what differs, on one short line."""
    value = row.values.get(run)
    if value is None:
        return "-"
    if row.key.startswith("changes in "):
        lines = [line for line in str(value).splitlines() if not line.startswith(("+++", "---"))]
        return " ".join(f"{sign}{sum(line.startswith(sign) for line in lines)}" for sign in "+-")
    text = " ".join(plain_text(value).split())
    return text if len(text) <= _MAX_CELL else f"{text[: _MAX_CELL - 3]}..."


def parting_text(parting: Parting, first: str) -> str:
    """Where two runs part, in words."""
    if parting.tag is not None and parting.values is not None:
        mine, its = parting.values
        return f"{first} and {parting.run} part at step {parting.step:,}: {parting.tag} {mine!r} and {its!r}"
    if not parting.num_equal:
        return f"{first} and {parting.run} have no number at a common step"
    return f"{first} and {parting.run}: no difference up to step {parting.step:,} ({parting.num_equal:,} numbers)"


def _is_detail(tag: str) -> bool:
    """Whether a number is one of many of its kind, or of the machine: a terminal leaves it to the page."""
    return tag.startswith(("system/", "loader/", "train/update_ratio/", "train/device_waits"))


def _number_text(values: Mapping[str, float], run: str) -> str:
    return format_number(values[run]) if run in values else "-"


def _show_curves(console: Console, comparison: Comparison) -> None:
    signs = _SPARKS if console._printable(_SPARKS) == _SPARKS else _ASCII_SPARKS
    several = {tag: curves for tag, curves in comparison.curves.items() if max(map(len, curves.values())) > 1}
    shown = {tag: curves for tag, curves in several.items() if not _is_detail(tag)}
    for tag, curves in list(shown.items())[:_SHOWN_CURVES]:
        finite = [value for line in curves.values() for _, value in line if math.isfinite(value)] or [0.0]
        span = min(finite), max(finite)
        steps = [step for line in curves.values() for step, _ in (line[0], line[-1])]
        columns = min(_SPARK_COLUMNS, max(map(len, curves.values())))
        console.say("")
        console.table((tag, " to ".join(map(format_number, span)), "last"), [
            (run, spark(line, (min(steps), max(steps)), span, columns, signs), format_number(line[-1][1]))
            for run, line in curves.items()
        ])  # fmt: skip
    if len(several) > (num_shown := min(len(shown), _SHOWN_CURVES)):
        console.say(f"and {len(several) - num_shown} more curves: --html shows all")


def spark(points: Points, steps: tuple[int, int], span: tuple[float, float], columns: int, signs: str) -> str:
    """A curve as a line of signs, each for the last number in its column; a gap where there is none."""
    line = [" "] * columns
    for step, value in points:
        if math.isfinite(value):
            part = (value - span[0]) / (span[1] - span[0]) if span[1] > span[0] else 0.5
            column = (step - steps[0]) * (columns - 1) // max(1, steps[1] - steps[0])
            line[column] = signs[round(part * (len(signs) - 1))]
    return "".join(line)
