"""What a survey or a preflight has found, as tables to read."""

from __future__ import annotations

from collections.abc import Sequence

from ..contracts import Json
from .console import Console, format_number, format_seconds

_ROWS, _GROUPS, _MEMBERS, _CELL = 20, 5, 3, 60


def show_survey(console: Console, found: Json) -> None:
    """Print a survey in its JSON form: what matters most comes last, where the eye is."""
    splits = found["splits"]
    held: list[tuple[str, ...]] = [
        (name, f"{split['num_samples']:,} {split['kind']}", _bytes(split["num_bytes"]), f"{len(split['classes']):,}",
         f"{len(split['bad']):,}")
        for name, split in splits.items()
    ]  # fmt: skip
    _table(console, ("split", "holds", "size", "classes", "bad"), held)
    labels = dict.fromkeys(label for split in splits.values() for label in split["classes"])
    counts = [(label or "(empty)", *(f"{s['classes'].get(label, 0):,}" for s in splits.values())) for label in labels]
    _table(console, ("class", *splits), counts)
    keys = ("min", "median", "max", "mean", "std", "missing")
    numbers = [(*row, *(_number(of[key]) for key in keys)) for *row, of in _columns(splits, "mean")]
    _table(console, ("number", "split", *keys), numbers)
    texts = [
        (*row, f"{of['values']:,}", f"{of['missing']:,}", _counts(of["top"])) for *row, of in _columns(splits, "top")
    ]
    _table(console, ("category", "split", "values", "missing", "most frequent"), texts)
    for name, split in splits.items():
        if split["mean"]:
            mean, std = (", ".join(f"{value:.4f}" for value in split[key]) for key in ("mean", "std"))
            console.say(f"{name}: mean = [{mean}]  std = [{std}]")
    over = [row for row in found["drift"] if row["is_over"]]
    drift = [(row["split"], row["what"], _number(row["value"]), _number(row["bound"])) for row in over]
    _table(console, ("drift in", "of", "distance", "bound"), drift)
    _show_copies(console, found)
    bad = [(name, row["id"], f"{row['what']}, {row['got']}") for name, split in splits.items() for row in split["bad"]]
    _table(console, ("bad in", "sample", "because"), bad)
    for row in found["problems"]:
        console.warn(": ".join(filter(None, (row["split"], row["what"], row["which"]))))
        if row["fix"]:
            console.say(f"         fix: {row['fix']}")
    if not found["problems"] and not bad:
        console.say("labels and samples: no problems")


def show_preflight(console: Console, findings: Sequence[Json], brief: bool = False) -> None:
    """Print the findings of a preflight: a line for each check, or ``brief``, by name; then what is to be done."""
    if brief:
        _show_names(console, findings)
    else:
        words = {"passed": "in order", "skipped": "not looked at"}
        rows = [(row["check"], words.get(row["verdict"], row["verdict"]), row["found"]) for row in findings]
        console.table(("check", "", "found"), rows)
    for row in findings:
        if row["verdict"] in ("warning", "error"):
            console.warn(f"{row['check']}: {row['found']}; expected: {row['expected']}")
            console.say(f"         fix: {row['fix']}")


def _show_names(console: Console, findings: Sequence[Json]) -> None:
    seconds = sum(row["seconds"] for row in findings)
    passed = [row["check"] for row in findings if row["verdict"] == "passed"]
    if passed:
        console.folded(["preflight in order:", *(f"{name}," for name in passed[:-1]), passed[-1],
                        f"({format_seconds(seconds)})"], gap=" ")  # fmt: skip
    for why in dict.fromkeys(row["found"] for row in findings if row["verdict"] == "skipped"):
        names = [row["check"] for row in findings if row["verdict"] == "skipped" and row["found"] == why]
        console.say(f"preflight left out: {', '.join(names)} ({why})")


def _columns(splits: Json, key: str) -> list[tuple[str, str, Json]]:
    """Name, split and content of the columns that tell this, those of one name together."""
    found = [(name, place, of) for place, split in splits.items() for name, of in split["columns"].items() if key in of]
    names = [name for name, _, _ in found]
    return sorted(found, key=lambda row: names.index(row[0]))


def _show_copies(console: Console, found: Json) -> None:
    first = next(iter(found["splits"]))
    for name, counts in found["leaks"].items():
        if any(counts.values()):
            said = " and ".join(f"{count:,} ({kind})" for kind, count in counts.items() if count)
            total = found["splits"][name]["num_samples"]
            console.warn(f"leak: {first} holds copies of {said} of the {total:,} samples of {name}")
    groups = sorted(found["copies"], key=lambda group: (not group["is_conflict"], not group["is_leak"]))
    if groups:
        several = sum(group["is_conflict"] for group in groups)
        console.say(f"copies: {len(groups):,} group{'s' * (len(groups) > 1)}, {several:,} with several labels")
    for group in groups[:_GROUPS]:
        samples = [f"{row['split']}: {row['id']} ({', '.join(row['labels'])})" for row in group["samples"][:_MEMBERS]]
        sign = " = " if group["kind"] == "exact" else " ≈ "
        console.say(f"  {sign.join(samples)}{' …' * (len(group['samples']) > _MEMBERS)}")
    if groups:
        console.say("")


def _table(console: Console, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    if rows:
        console.table(columns, [[_cut(cell) for cell in row] for row in rows[:_ROWS]])
        console.say(f"… and {len(rows) - _ROWS:,} more; --json holds all\n" if len(rows) > _ROWS else "")


def _counts(found: Json) -> str:
    return ", ".join(f"{word} {count:,}" for word, count in found.items())


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == round(value) and abs(value) < 1e12 else format_number(value)


def _bytes(size: int | None) -> str:
    return "" if size is None else f"{size / 1e6:,.1f} MB" if size >= 1e5 else f"{size:,} bytes"


def _cut(cell: str) -> str:
    return cell if len(cell) <= _CELL else cell[: _CELL - 1] + "…"
