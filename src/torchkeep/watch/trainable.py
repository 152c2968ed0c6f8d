"""A picture of what learns: the module tree with what is frozen, its shares, the frontier, the cache and its gain."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Iterator, Sequence
from html import escape

from ..contracts import Json
from .console import Console

Row = dict[str, Json]

_INK, _MUTED, _LINE, _TRACK, _TINT = "#1b1f24", "#59636e", "#d1d9e0", "#e6eaef", "#eaf3fb"
_LEARNS, _FROZEN, _FROZEN_FILL = "#b93c00", "#3b6ea5", "#8db5de"  # told apart by lightness too, as by the marker
_EM, _LETTER = 13, 7.9  # monospaced: no letter of the fonts named below is wider than 0.602 em
_ROW, _LEADING, _EDGE, _GAP, _BAR, _INDENT = 26, 20, 24, 28, 90, 18
_FONTS = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', 'Liberation Mono', monospace"
_HEADS = ("module", "kind", "state", "parameters", "share", "time")
_TEXTS = (*_HEADS[:3], "input", "output")
_WORDS = {True: "learns", False: "frozen", "partly": "learns in part"}
_FILLS = {True: _LEARNS, False: _FROZEN_FILL, "partly": "#98a2ad"}
_HALF = (
    f'<circle r="5" fill="none" stroke="{_LEARNS}" stroke-width="2"/><path d="M0-5a5 5 0 0 0 0 10z" fill="{_LEARNS}"/>'
)
_SQUARE = f'<rect x="-4.5" y="-4.5" width="9" height="9" fill="#ffffff" stroke="{_FROZEN}" stroke-width="2"/>'
_MARKS = {True: f'<circle r="6" fill="{_LEARNS}"/>', False: _SQUARE, "partly": _HALF}


# --- folding


def folded(rows: Sequence[Row], most: int = 24) -> list[Row]:
    """The rows of the shortest tree that tells the same: neighbours of equal state become one line.

    A part that is alike throughout is told by its own line. Where more than ``most`` lines are left, the deepest parts
    are told by their parents, and at last what is beyond ``most`` by one line.
    """
    result = list(rows)
    for limit in range(max((row["depth"] for row in rows), default=0), 0, -1):
        result = _fold(rows, limit)
        if len(result) <= most:
            break
    if len(result) <= 2 and 2 < len(shallow := [row for row in rows if row["depth"] <= 1]) <= most:
        return shallow  # all is alike: its parts tell more than one line
    return result if len(result) <= most else [*result[: most - 1], _joined(result[most - 1 :])]


def _fold(rows: Sequence[Row], limit: int) -> list[Row]:
    result: list[Row] = []
    run: list[Row] = []
    for row, below in families(rows):
        is_leaf = row["depth"] >= limit or (row["depth"] > 0 and all(_alike(row, other) for other in below))
        if run and not (is_leaf and all(_alike(row, other) for other in run)):
            result.append(_joined(run))
            run = []
        if is_leaf:
            run.append(row)
        else:
            result += [row, *_fold(below, limit)]
    return [*result, _joined(run)] if run else result


def families(rows: Sequence[Row]) -> Iterator[tuple[Row, Sequence[Row]]]:
    """Each row of the highest level with all rows below it."""
    start = 0
    while start < len(rows):
        depths = [row["depth"] for row in rows[start + 1 :]]
        end = next((start + 1 + n for n, depth in enumerate(depths) if depth <= rows[start]["depth"]), len(rows))
        yield rows[start], rows[start + 1 : end]
        start = end


def _alike(a: Row, b: Row) -> bool:
    has_both = a["num_parameters"] and b["num_parameters"]  # a part without parameters fits any state
    state = ("is_cached", "learns", "rate_scale") if has_both else ("is_cached",)
    return all(a[key] == b[key] for key in state)


def _joined(run: Sequence[Row]) -> Row:
    if len(run) == 1:
        return run[0]
    told = [row for row in run if row["num_parameters"]] or run
    times = [row["time_fraction"] for row in run if row["time_fraction"] is not None]
    return {
        "name": f"{run[0]['name']} … {run[-1]['name']}",
        "kind": f"{len(run)} × {run[0]['kind']}" if len({row["kind"] for row in run}) == 1 else f"{len(run)} modules",
        "depth": min(row["depth"] for row in run),
        "num_parameters": sum(row["num_parameters"] for row in run),
        "learns": told[0]["learns"] if len({row["learns"] for row in told}) == 1 else "partly",
        "rate_scale": told[0]["rate_scale"] if len({row["rate_scale"] for row in told}) == 1 else None,
        "time_fraction": sum(times) if times else None,
        "is_cached": all(row["is_cached"] for row in run),
    }


# --- words


def state_of(row: Row) -> str:
    """What happens to a part, in words."""
    word = _WORDS[row["learns"]] if row["num_parameters"] else "no parameters"
    rate = f", rate × {row['rate_scale']:.3g}" if row["learns"] and row["rate_scale"] not in (None, 1) else ""
    return word + rate + (", computed once" if row["is_cached"] else "")


def _columns(rows: Sequence[Row], total: int) -> dict[str, list[str]]:
    """The cells by the heads of their columns, without a column that would be empty."""
    cells = [
        (row["name"], row["kind"], state_of(row), f"{row['num_parameters']:,}",
         share_text(row["num_parameters"] / total), share_text(row["time_fraction"]))
        for row in rows
    ]  # fmt: skip
    return {head: column for head, *column in zip(_HEADS, *cells, strict=True) if any(column)}


def share_text(part: float | None) -> str:
    """A fraction as per cent; empty for None."""
    return "" if part is None else "<0.1 %" if 0 < part < 0.001 else f"{100 * part:.1f} %"


def _facts(payload: Json) -> list[str]:
    """How much learns, the frontier, the cache and the gain, or why there is none."""
    total, learning = _num_parameters(payload["rows"]), _num_learning(payload["rows"])
    facts = [f"{learning:,} of {total:,} parameters learn ({share_text(learning / max(1, total))})"]
    facts += [f"frontier: {', '.join(payload['frontier'])}"] if payload["frontier"] else []
    if payload["cache_bytes"] is not None:
        views = payload["views"] or 1
        facts.append(f"cache: {payload['cache_bytes'] / 1e6:,.1f} MB, {views} view{'s' * (views > 1)} of each sample")
    gains = [(word, payload[f"{word}_speedup"]) for word in ("expected", "measured")]
    said = [f"{word} {value:.3g} ×" for word, value in gains if value is not None]
    facts += [f"speed-up: {', '.join(said)}"] if said else []
    return facts + ([payload["note"]] if payload["note"] else [])


def _num_parameters(rows: Sequence[Row]) -> int:
    return sum(row["num_parameters"] for row, _ in families(rows))


def _num_learning(rows: Sequence[Row]) -> int:
    return sum(
        _num_learning(below) if row["learns"] == "partly" else row["num_parameters"] * bool(row["learns"])
        for row, below in families(rows)
    )


def show_trainable(console: Console, payload: Json) -> None:
    """Print the map: a line for each part that differs from its neighbours, then frontier, cache and gain."""
    rows = folded(payload["rows"])
    columns = _columns(rows, max(1, _num_parameters(rows)))
    columns["module"] = ["  " * row["depth"] + row["name"] for row in rows]
    console.table(list(columns), list(zip(*columns.values(), strict=True)))
    for fact in _facts(payload):
        console.say(fact)


# --- the picture


def trainable_svg(payload: Json, width: float = 960) -> str:
    """The map as one SVG that needs no network; columns are as wide as their texts, so that none is cut.

    Units:   ``width`` in pixels, the least; long names make it wider
    """
    rows = folded(payload["rows"])
    total = max(1, _num_parameters(rows))
    columns, facts = _columns(rows, total), _facts(payload)
    last_kept = max((place for place, row in enumerate(rows) if row["is_cached"]), default=-1)
    title = f"What learns in {rows[0]['kind'][:60]}" if rows and not rows[0]["depth"] else "What learns"
    told = ". ".join([*facts, *(f"{row['name']}: {state_of(row)}" for row in rows)])
    bars = {"share": [row["num_parameters"] / total for row in rows], "time": [row["time_fraction"] for row in rows]}
    return tree_svg(title, told, facts, rows, columns, bars, width, rule=last_kept if payload["frontier"] else -1)


def tree_svg(
    title: str, told: str, facts: Sequence[str], rows: Sequence[Row], columns: dict[str, list[str]],
    bars: dict[str, list[float | None]], width: float = 960, rule: int = -1,
) -> str:  # fmt: skip
    """A tree as an SVG: a line for each row, bars beside the cells of some columns, the first fact above, others below.

    Of ``rows`` it takes ``depth``, ``num_parameters``, ``learns`` and ``is_cached``; ``told`` is for who cannot see it.
    Behind the row ``rule`` a line is drawn, and the second fact stands there.
    """
    facts = list(facts)
    places, bar, width = _places(columns, [row["depth"] for row in rows], width, bars.keys())
    parts = [_text(_EDGE, 40, title, _INK, 'font-size="18" font-weight="600"')]
    y = _paragraph(parts, 64, facts.pop(0), width) + 16
    parts += [_text(places[head], y - 10, head, _MUTED, _anchor(head)) for head in columns]
    for place, row in enumerate(rows):
        parts += _tree(row, y)
        for head, cells in columns.items():
            x = places[head] + (row["depth"] * _INDENT if head == "module" else 0)
            parts.append(_text(x, y + 17.5, cells[place], _MUTED if head == "kind" else _INK, _anchor(head)))
            part = bars[head][place] if head in bars and cells[place] else None
            if part is not None:
                parts += _bar(places[head] + 8, y + 8, bar, min(1.0, part), _FILLS[row["learns"]])
        y += _ROW
        if place == rule:
            parts.append(f'<path d="M0 {y}H{width:.1f}" stroke="{_FROZEN}" stroke-width="2" stroke-dasharray="7 4"/>')
            y = _paragraph(parts, y + 18, facts.pop(0), width, _FROZEN) - 14
    y += 30
    for fact in facts:
        y = _paragraph(parts, y, fact, width)
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" width="{width:.0f}" height="{y:.0f}" '
        f'viewBox="0 0 {width:.0f} {y:.0f}" font-family="{_FONTS}" font-size="{_EM}">',
        f"<title>{_clean(title)}</title>", f"<desc>{_clean(told)}</desc>",
        '<rect width="100%" height="100%" fill="#ffffff"/>', *parts, "</svg>\n",
    ])  # fmt: skip


def _anchor(head: str) -> str:
    return "" if head in _TEXTS else 'text-anchor="end"'


def _places(
    columns: dict[str, list[str]], depths: list[int], least: float, barred: Collection[str]
) -> tuple[dict[str, float], float, float]:
    """Where each column's texts begin, or end where they are numbers; the length of a bar; the picture's width."""
    widths = {head: max(map(_width, [head, *cells])) for head, cells in columns.items()}
    indented = [depth * _INDENT + _width(name) for depth, name in zip(depths, columns.get("module", []), strict=True)]
    widths["module"] = _INDENT + max([_width("module"), *indented])
    num_bars = sum(head in barred for head in widths)
    natural = 2 * _EDGE + sum(widths.values()) + _GAP * (len(widths) - 1) + num_bars * (8 + _BAR)
    bar = _BAR + max(0.0, least - natural) / max(1, num_bars)
    places, x = {}, float(_EDGE)
    for head, room in widths.items():
        places[head] = x + (_INDENT if head == "module" else 0 if head in _TEXTS else room)
        x += room + _GAP + (8 + bar if head in barred else 0)
    return places, bar, max(least, natural)


def _tree(row: Row, y: float) -> list[str]:
    """What stands before a name: a full circle learns, a half one in part, a hollow square is frozen, a dot is none."""
    tint = f'<rect y="{y}" width="100%" height="{_ROW}" fill="{_TINT}"/>'
    lefts = [_EDGE + level * _INDENT + 5 for level in range(row["depth"] + 1)]
    guides = [f'<path d="M{x} {y}v{_ROW}" stroke="{_LINE}"/>' for x in lefts[:-1]]
    mark = _MARKS[row["learns"]] if row["num_parameters"] else f'<circle r="2" fill="{_MUTED}"/>'
    return [*[tint] * row["is_cached"], *guides, f'<g transform="translate({lefts[-1]} {y + _ROW / 2})">{mark}</g>']


def _bar(x: float, y: float, width: float, part: float, fill: str) -> list[str]:
    sizes = [(width, _TRACK), (max(1.5, part * width) if part else 0, fill)]
    box = f'<rect x="{x:.1f}" y="{y}" height="10" rx="1.5"'
    return [f'{box} width="{size:.1f}" fill="{colour}"/>' for size, colour in sizes]


def _paragraph(parts: list[str], y: float, text: str, width: float, colour: str = _MUTED) -> float:
    """Add the lines of a text; where the next begins."""
    room = int((width - 2 * _EDGE) / _LETTER)
    num_wide = sum(not letter.isascii() for letter in text)  # each may take the room of two
    lines = textwrap.wrap(text, max(room // 2, room - num_wide))
    parts += [_text(_EDGE, y + place * _LEADING, line, colour) for place, line in enumerate(lines)]
    return y + len(lines) * _LEADING + 2


def _text(x: float, y: float, text: str, colour: str, style: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" {style}>{_clean(text)}</text>'


def _width(text: str) -> float:
    """Pixels that a text takes at most: what is no ASCII may come from a font with letters twice as wide."""
    return _LETTER * sum(1 if letter.isascii() else 2 for letter in text)


def _clean(text: str) -> str:
    return escape("".join(letter if letter.isprintable() else "?" for letter in text), quote=False)
