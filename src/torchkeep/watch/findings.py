"""What a survey has found, as tables to read."""

from __future__ import annotations

from collections.abc import Sequence

from ..contracts import Json
from .console import Console, format_number

_CLASSES, _ROWS, _GROUPS, _MEMBERS, _BAD = 20, 24, 5, 3, 10
_CELL = 36


def show_survey(console: Console, found: Json) -> None:
    """Print a survey in its JSON form: what matters most comes last, where the eye is."""
    splits = found["splits"]
    rows = [
        (name, f"{split['num_samples']:,} {split['kind']}", _share_read(split), _bytes(split["num_bytes"]),
         f"{len(split['classes']):,}", f"{len(split['bad']):,}")
        for name, split in splits.items()
    ]  # fmt: skip
    console.table(("split", "holds", "read", "size", "classes", "bad"), rows)
    _classes(console, splits)
    _numbers(console, splits)
    _categories(console, splits)
    for name, split in splits.items():
        if split["mean"]:
            mean, std = (", ".join(f"{value:.4f}" for value in split[key]) for key in ("mean", "std"))
            console.say(f"{name}: mean = [{mean}]  std = [{std}]")
    _drift(console, found["drift"])
    _copies(console, found)
    _bad(console, splits)
    _problems(console, found["problems"])


def _share_read(split: Json) -> str:
    return "all" if split["num_read"] == split["num_samples"] else f"{split['num_read']:,}"


def _table(console: Console, columns: Sequence[str], rows: Sequence[Sequence[str]], limit: int) -> None:
    if rows:
        console.say("")
        console.table(columns, [[_cut(cell) for cell in row] for row in rows[:limit]])
    if len(rows) > limit:
        console.say(f"… and {len(rows) - limit:,} more; --json holds all")


def _classes(console: Console, splits: Json) -> None:
    names = dict.fromkeys(label for split in splits.values() for label in split["classes"])
    rows = [(label or "(empty)", *(f"{s['classes'].get(label, 0):,}" for s in splits.values())) for label in names]
    _table(console, ("class", *splits), rows, _CLASSES)


def _numbers(console: Console, splits: Json) -> None:
    names = dict.fromkeys(name for split in splits.values() for name in split["measures"])
    keys = ("min", "median", "max", "mean", "std")
    rows = [
        (name, split, *(_number(held["measures"][name][key]) for key in keys), f"{held['measures'][name]['missing']:,}")
        for name in names for split, held in splits.items() if name in held["measures"]
    ]  # fmt: skip
    _table(console, ("number", "split", *keys, "missing"), rows, _ROWS)


def _categories(console: Console, splits: Json) -> None:
    names = dict.fromkeys(name for split in splits.values() for name in split["categories"])
    held = [(name, split, splits[split]["categories"].get(name)) for name in names for split in splits]
    rows = [
        (name, split, f"{words['values']:,}", f"{words['missing']:,}", _most_frequent(words["top"]))
        for name, split, words in held if words is not None
    ]  # fmt: skip
    _table(console, ("category", "split", "values", "missing", "most frequent"), rows, _ROWS)


def _most_frequent(top: Json) -> str:
    """As many of them as a cell holds, the first always."""
    text = ""
    for word, count in top.items():
        more = f"{', ' * bool(text)}{_cut(word)} {count:,}"
        if text and len(text + more) > _CELL:
            break
        text += more
    return text


def _drift(console: Console, drift: Json) -> None:
    over = [row for row in drift if row["is_over"]]
    rows = [(r["split"], r["what"], r["statistic"], f"{r['value']:.3f}", f"{r['bound']:.3f}") for r in over]
    _table(console, ("drift in", "of", "statistic", "value", "bound"), rows, _ROWS)
    if drift and not over:
        worst = drift[0]
        console.say("")
        console.say(f"no drift: the nearest to its bound is {worst['what']} in {worst['split']}, "
                    f"{worst['statistic']} {worst['value']:.3f} of {worst['bound']:.3f}")  # fmt: skip


def _copies(console: Console, found: Json) -> None:
    for name, counts in found["leaks"].items():
        if any(counts.values()):
            first, total = next(iter(found["splits"])), found["splits"][name]["num_read"]
            said = " and ".join(f"{count:,} ({kind})" for kind, count in counts.items() if count)
            console.say("")
            console.warn(f"leak: {first} holds copies of {said} of the {total:,} samples of {name}")
    for kind in ("exact", "near"):
        groups = [group for group in found["copies"] if group["kind"] == kind]
        groups.sort(key=lambda group: (not group["is_conflict"], not group["is_leak"]))
        if groups:
            several = sum(group["is_conflict"] for group in groups)
            console.say("")
            console.say(
                f"{kind} copies: {len(groups):,} group{'s' * (len(groups) > 1)}, {several:,} with several labels"
            )
        for group in groups[:_GROUPS]:
            members = [_member(member) for member in group["samples"]]
            console.say("  " + " = ".join(members[:_MEMBERS]) + " …" * (len(members) > _MEMBERS))


def _member(member: Json) -> str:
    return f"{member['split']}: {member['id']}" + (f" ({', '.join(member['labels'])})" if member["labels"] else "")


def _bad(console: Console, splits: Json) -> None:
    rows = [f"  {name}: {bad['id']}: {bad['what']}, {bad['got']}" for name, s in splits.items() for bad in s["bad"]]
    if rows:
        console.say("")
        console.say(f"samples that cannot be read: {len(rows):,}" + (", among them" if len(rows) > _BAD else ""))
    for row in rows[:_BAD]:
        console.say(row)


def _problems(console: Console, problems: Json) -> None:
    console.say("")
    if not problems:
        console.say("labels and samples: no problems")
    for row in problems:
        console.warn(f"{row['split']}: {row['what']}" + (f": {row['which']}" if row["which"] else ""))
        if row["fix"]:
            console.say(f"         fix: {row['fix']}")


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == round(value) and abs(value) < 1e12 else format_number(value)


def _bytes(size: int | None) -> str:
    return "" if size is None else f"{size / 1e6:,.1f} MB" if size >= 1e5 else f"{size:,} bytes"


def _cut(cell: str) -> str:
    return cell if len(cell) <= _CELL + 6 else cell[: _CELL - 1] + "…"
