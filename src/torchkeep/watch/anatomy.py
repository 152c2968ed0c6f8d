"""A model's modules as a person sees them: a table that fits the terminal, a picture, and a page to fold and unfold."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..contracts import Json
from .console import Console, format_number, format_seconds
from .page import STYLE, clean, still_page
from .trainable import Row, families, share_text, tree_svg

_FEWEST_LINES, _PICTURE_LINES, _FACT_LINES, _MOST_NAMES = 12, 40, 8, 3
_GAP = 2
_HOLDERS = ("ModuleList", "ModuleDict", "ParameterList", "ParameterDict")
_ADDED = ("num_parameters", "num_learning", "num_shared", "num_buffers", "num_bytes", "forward_flops",
          "backward_flops", "forward_s", "backward_s", "time_fraction", "num_without_gradient")  # fmt: skip
_ORDER = ("module", "kind", "input", "output", "parameters", "learn", "shared", "buffers", "bytes", "FLOPs", "backward",
          "order", "gradient", "zeros", "time")  # fmt: skip
_KEPT_FIRST = ("module", "output", "parameters", "kind", "time", "learn", "gradient", "FLOPs", "zeros", "backward",
               "input", "shared", "order", "bytes", "buffers")  # fmt: skip
_WIDEST = {"module": 0.3, "kind": 0.18, "input": 0.22, "output": 0.22}  # of a terminal's columns
_IN_PICTURE = ("module", "kind", "output", "parameters", "learn", "FLOPs", "backward", "gradient", "zeros", "time")


# --- the tree


@dataclass
class _Part:
    """A module with those below it; ``count`` neighbours that are alike are one part, their numbers added."""

    row: Row
    below: list[_Part]
    count: int = 1

    @cached_property
    def form(self) -> Any:
        """What makes neighbours alike: kind, shapes, parameters, and the same of all that is below."""
        row = self.row
        same = ("type_name", "num_parameters", "num_learning", "num_calls", "inputs", "outputs", "num_without_gradient")
        return (*(row[key] for key in same), tuple((part.name, part.form) for part in self.below))

    @property
    def name(self) -> str:
        return str(self.row["name"].rpartition(".")[2])

    @property
    def is_called(self) -> bool:
        return bool(self.row["num_calls"]) or any(part.is_called for part in self.below)

    def lines(self, deepest: float = math.inf) -> Iterator[_Part]:
        yield self
        depth = self.row["depth"]
        is_wrapper = depth + 1 == deepest and len(self.below) == 1 and self.below[0].below  # which tells nothing new
        for part in self.below if depth < deepest and not is_wrapper else ():
            yield from part.lines(deepest)


def _tree(rows: Sequence[Row]) -> list[_Part]:
    return [_Part(row, _tree(below)) for row, below in families(rows)]


def _joined(parts: Iterable[_Part]) -> list[_Part]:
    """The same tree, where neighbours that are alike are told once."""
    runs: list[list[_Part]] = []
    for part in parts:
        if runs and runs[-1][0].form == part.form:
            runs[-1].append(part)
        else:
            runs.append([part])
    joined = [_added(run) for run in runs]
    return [_Part(part.row, _joined(part.below), part.count) for part in joined]


def _added(run: list[_Part]) -> _Part:
    """One part for several that are alike, their numbers added."""
    if len(run) == 1:
        return run[0]
    rows = [part.row for part in run]
    row = dict(rows[0]) | {key: _sum(row[key] for row in rows) for key in _ADDED}
    norms, zeros, orders = ([row[key] for row in rows if isinstance(row[key], int | float)]
                            for key in ("gradient_norm", "gradient_zeros", "backward_order"))  # fmt: skip
    row["gradient_norm"] = math.hypot(*norms) if norms else None
    row["gradient_zeros"] = sum(zeros) / len(zeros) if zeros else None
    row["backward_order"] = min(orders, default=None)
    if run[0].name != run[-1].name:
        row |= {"name": f"{rows[0]['name']} … {run[-1].name}", "type_name": f"{len(run)} × {row['type_name']}"}
    below = [_added([part.below[place] for part in run]) for place in range(len(run[0].below))]
    return _Part(row, below, sum(part.count for part in run))


def _sum(values: Iterable[Any]) -> Any:
    found = [value for value in values if value is not None]
    return sum(found) if found else None


@dataclass
class _Shown:
    """What is shown of a tree: the lines, and to which depth where not all is told."""

    lines: list[_Part]
    depth: int | None = None


def _fitted(rows: Sequence[Row], most: float, depth: int | None, everything: bool) -> _Shown:
    """The deepest tree that has at most ``most`` lines; the first level is always told."""
    whole = _tree(rows)
    if everything:
        return _Shown([line for part in whole for line in part.lines()])
    joined, deepest = _joined(whole), max(row["depth"] for row in rows)
    lines: list[_Part] = []
    limit = 0
    for limit in range(deepest, -1, -1) if depth is None else (depth,):
        lines = [line for part in joined for line in part.lines(limit)]
        if len(lines) <= most or limit <= 1:
            break
    return _Shown(lines, limit if limit < deepest else None)


# --- cells


def amount_text(value: float | None, unit: str = "") -> str:
    """Three digits with a prefix; empty for None.

    >>> [amount_text(x, "B") for x in (0, 999, 14_156_352, None)]
    ['0 B', '999 B', '14.2 MB', '']
    """
    if value is None:
        return ""
    power = min(5, int(math.log10(max(1.0, value * 1.0005)) // 3))
    size = value / 1000**power
    num_decimals = max(0, 2 - int(math.log10(size * 1.0005))) if power else 0
    return f"{size:.{num_decimals}f} {('', *'kMGTP')[power]}{unit}".rstrip()


def _cells(part: _Part) -> dict[str, str]:
    row = part.row
    return {
        "module": part.name if row["depth"] else row["name"],
        "kind": row["type_name"],
        "input": _form(row["inputs"]),
        "output": _output(part),
        "parameters": f"{row['num_parameters']:,}" if row["num_parameters"] else "",
        "learn": _learning(row),
        "shared": f"{row['num_shared']:,}" if row["num_shared"] else "",
        "buffers": f"{row['num_buffers']:,}" if row["num_buffers"] else "",
        "bytes": amount_text(row["num_bytes"] or None, "B"),
        "FLOPs": amount_text(row["forward_flops"] or None),
        "backward": amount_text(row["backward_flops"] or None),
        "order": str(row["backward_order"] or ""),
        "gradient": _gradient(row),
        "zeros": share_text(row["gradient_zeros"]),
        "time": share_text(row["time_fraction"]),
    }


def _form(text: str) -> str:
    return text.replace(" float32", "")


def _output(part: _Part) -> str:
    calls = part.row["num_calls"]
    if calls is None:
        return ""
    if not calls:
        return "" if part.is_called or part.row["type_name"] in _HOLDERS else "never called"
    return _form(part.row["outputs"]) + (f" ×{calls}" if calls > 1 else "")


def _learning(row: Row) -> str:
    if not row["num_parameters"]:
        return ""
    return "all" if row["num_learning"] == row["num_parameters"] else f"{row['num_learning']:,}"


def _gradient(row: Row) -> str:
    norm = row["gradient_norm"]
    if norm is None:
        return "none" if row["num_without_gradient"] else ""
    return norm if isinstance(norm, str) else format_number(float(norm))


def _columns(lines: Sequence[_Part]) -> dict[str, list[str]]:
    """The cells by the heads of their columns, without those that tell nothing."""
    cells = [_cells(line) for line in lines]
    columns = {head: [row[head] for row in cells] for head in _ORDER}
    is_told = {head: any(column) for head, column in columns.items()} | {"learn": set(columns["learn"]) - {"all", ""}}
    return {head: column for head, column in columns.items() if is_told[head]}


def _facts(payload: Json) -> list[str]:
    """The sums, and what should be known: what was never called, what got no gradient, why nothing went backward."""
    whole, parts = payload["rows"][0], _joined(_tree(payload["rows"]))
    facts = [f"{whole['num_parameters']:,} parameters, {whole['num_learning']:,} of them learn"
             + (f", {whole['num_shared']:,} are shared" if whole["num_shared"] else "")
             + (f"; {whole['num_buffers']:,} numbers in buffers" if whole["num_buffers"] else "")
             + f"; {amount_text(whole['num_bytes'], 'B')}"]  # fmt: skip
    costs = [f"{way} {_cost_text(whole, way)}" for way in ("forward", "backward") if whole[way + "_s"] is not None]
    losses = [f"{name} {value if isinstance(value, str) else format_number(value)}"
              for name, value in payload["losses"].items()]  # fmt: skip
    facts += ["; ".join([*costs, *losses])] if costs else []
    if whole["num_calls"] is not None:
        facts += _named("never called", [p for p in _unseen(parts) if p.row["type_name"] not in _HOLDERS or p.below])
    facts += _named("learns, but got no gradient", list(_without_gradient(parts)))
    return facts + [payload["note"]] * bool(payload["note"])


def _cost_text(row: Row, way: str) -> str:
    seconds, flops = row[f"{way}_s"], amount_text(row[f"{way}_flops"] or None, "FLOP")
    taken = f"{1000 * seconds:.3g} ms" if seconds < 1 else format_seconds(seconds)
    return f"{flops} in {taken}" if flops else taken


def _named(what: str, parts: list[_Part]) -> list[str]:
    names = ", ".join(part.row["name"] + f" ×{part.count}" * (part.count > 1) for part in parts[:_MOST_NAMES])
    more = f" and {len(parts) - _MOST_NAMES} more" if len(parts) > _MOST_NAMES else ""
    return [f"{what}: {names}{more}"] if parts else []


def _unseen(parts: Iterable[_Part]) -> Iterator[_Part]:
    for part in parts:
        if part.is_called:
            yield from _unseen(part.below)
        else:
            yield part


def _without_gradient(parts: Iterable[_Part]) -> Iterator[_Part]:
    """The largest parts of which nothing got a gradient, and what a module itself holds without one."""
    for part in parts:
        missing = part.row["num_without_gradient"] or 0
        if missing and (missing == part.row["num_learning"] or missing > _sum([
            0, *(p.row["num_without_gradient"] for p in part.below)])):  # fmt: skip
            yield part
        elif missing:
            yield from _without_gradient(part.below)


# --- the terminal


def show_anatomy(
    console: Console, payload: Json, *, depth: int | None = None, everything: bool = False,
    room: tuple[int, int] | None = None,
) -> None:  # fmt: skip
    """Print the tree with its sums; ``payload`` as ``Anatomy.to_json`` gives it.

    Where there is little room the tree is told less deep and columns are left out; ``depth`` or ``everything`` say how
    deep instead. ``room``: columns and lines, those of the console without it.
    """
    room = room or console.room
    facts = _facts(payload)
    most = math.inf if room is None else max(_FEWEST_LINES, room[1] - _FACT_LINES)
    shown = _fitted(payload["rows"], most, depth, everything)
    columns = _columns(shown.lines)
    columns["module"] = ["  " * part.row["depth"] + name
                         for part, name in zip(shown.lines, columns["module"], strict=True)]  # fmt: skip
    columns = {head: _aligned(head, column) for head, column in columns.items()}
    if room is not None:
        columns = _narrowed(columns, room[0])
    console.table([column[0] for column in columns.values()],
                  list(zip(*(column[1:] for column in columns.values()), strict=True)))  # fmt: skip
    for fact in facts:
        console.folded(re.split("(?<=[,;:]) ", fact), gap=" ")
    if shown.depth is not None:
        deepest = max(row["depth"] for row in payload["rows"])
        console.say(f"to depth {shown.depth} of {deepest}, {len(payload['rows']):,} modules in all (--depth N, --all)")


def _aligned(head: str, column: list[str]) -> list[str]:
    """The column under its head; numbers stand to the right."""
    cells = [head, *column]
    return cells if head in _WIDEST or head == "learn" else [cell.rjust(max(map(len, cells))) for cell in cells]


def _narrowed(columns: dict[str, list[str]], width: int) -> dict[str, list[str]]:
    """The columns that matter most, as many as there is room for."""
    cut = {head: [_cut(cell, int(width * _WIDEST[head])) if head in _WIDEST else cell for cell in column]
           for head, column in columns.items()}  # fmt: skip
    kept, left = set[str](), width + _GAP
    for head in (head for head in _KEPT_FIRST if head in cut):
        needed = max(map(len, cut[head])) + _GAP
        if needed <= left:
            kept.add(head)
            left -= needed
    return {head: column for head, column in cut.items() if head in kept}


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


# --- the picture


def anatomy_svg(payload: Json, *, depth: int | None = None, everything: bool = False) -> str:
    """The tree as one SVG that needs no network; a bar is a share of the parameters or of the time."""
    shown, facts = _fitted(payload["rows"], _PICTURE_LINES, depth, everything), _facts(payload)
    columns = {head: column for head, column in _columns(shown.lines).items() if head in _IN_PICTURE}
    rows = [{"depth": part.row["depth"], "num_parameters": part.row["num_parameters"], "is_cached": False,
             "learns": _state(part.row)} for part in shown.lines]  # fmt: skip
    whole = payload["rows"][0]
    bars = {"parameters": [row["num_parameters"] / max(1, whole["num_parameters"]) for row in rows],
            "time": [part.row["time_fraction"] for part in shown.lines]}  # fmt: skip
    told = ". ".join([*facts, *(f"{part.row['name']}: {_said(part.row)}" for part in shown.lines)])
    return tree_svg(whole["type_name"][:60], told, facts, rows, columns, bars)


def _state(row: Row) -> bool | str:
    return row["num_learning"] == row["num_parameters"] or ("partly" if row["num_learning"] else False)


# --- the page

_OWN_STYLE = """
details{border-top:1px solid var(--line)}.tree{background:var(--card);border:1px solid var(--line);
border-radius:8px;padding:0 0 6px;overflow:hidden;margin-top:16px}.tree>details{border:0}
.part{margin-left:14px;border-left:1px solid var(--line)}
.line{display:grid;grid-template-columns:minmax(0,1fr) 14em 7em 5em 5.5em 4.5em 5em 84px;gap:0 12px;
padding:4px 12px 4px 8px;align-items:center;font-size:13px;font-variant-numeric:tabular-nums}
.line>*{overflow-wrap:anywhere}.line .n{text-align:right;white-space:nowrap}
.name i{font-style:normal;color:var(--muted)}.name b{font-weight:600}
summary.line{list-style:none}summary .name::before{content:"▸";display:inline-block;width:14px;color:var(--muted)}
details[open]>summary .name::before{content:"▾"}summary::-webkit-details-marker{display:none}
.line:hover{background:var(--mark)}
.more{font-size:12px;color:var(--muted);padding:0 12px 5px 22px;overflow-wrap:anywhere}
.time{height:8px;width:84px;background:var(--line);border-radius:2px}.time rect{fill:var(--c)}
.head{color:var(--muted);border-bottom:1px solid var(--line)}.head:hover{background:none}
@media(max-width:960px){.line{display:flex;flex-wrap:wrap;gap:0 12px}.name{flex:1 0 100%}.head{display:none}
.line>[data-n]:not(:empty)::before{content:attr(data-n) " ";color:var(--muted)}.part{margin-left:8px}
.line>:not(.name){margin-left:14px}.line>span:empty{display:none}}
"""
_IN_PAGE = {"output": "", "parameters": "parameters", "FLOPs": "FLOPs", "gradient": "gradient", "zeros": "zeros",
            "time": "time"}  # fmt: skip


def anatomy_page(payload: Json, title: str) -> str:
    """The whole tree as one HTML document without a script: no file beside it, no request, names are text."""
    heads = "".join(f'<span class="n">{head}</span>' for head in list(_IN_PAGE)[1:])
    return still_page(title, STYLE + _OWN_STYLE, [
        *(f'<p class="muted">{clean(fact)}</p>' for fact in _facts(payload)),
        f'<div class="tree"><div class="line head"><span>module</span><span>output</span>{heads}<span></span></div>',
        *(text for part in _tree(payload["rows"]) for text in _folding(part)), "</div>",
    ])  # fmt: skip


def _folding(part: _Part) -> Iterator[str]:
    cells = _cells(part)
    name = f'<span class="name"><b>{clean(cells["module"])}</b> <i>{clean(cells["kind"])}</i></span>'
    numbers = "".join(f'<span{" class=n" if said else ""} data-n="{said}">{clean(cells[head])}</span>'
                      for head, said in _IN_PAGE.items())  # fmt: skip
    width = 100 * min(1.0, part.row["time_fraction"] or 0.0)
    bar = (f'<svg class="time c0" viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true">'
           f'<rect width="{width:.2f}" height="8"/></svg>')  # fmt: skip
    line, more = f"{name}{numbers}{bar}", f'<p class="more">{clean(_said(part.row))}</p>'
    is_open = "" if part.row["depth"] else " open"
    yield f'<details{is_open}><summary class="line">{line}</summary>{more}<div class="part">'
    for below in part.below:
        yield from _folding(below)
    yield "</div></details>"


def _said(row: Row) -> str:
    """All that is known of a module, in words."""
    calls = row["num_calls"]
    said = {
        "in": row["inputs"], "out": row["outputs"],
        "calls": "" if calls is None else str(calls),
        "learn": f"{row['num_learning']:,} of {row['num_parameters']:,}" if row["num_parameters"] else "",
        "shared": f"{row['num_shared']:,}" if row["num_shared"] else "",
        "buffers": f"{row['num_buffers']:,}" if row["num_buffers"] else "",
        "size": amount_text(row["num_bytes"] or None, "B"),
        **{way: _cost_text(row, way) for way in ("forward", "backward") if row[way + "_s"] is not None},
        "backward's place": str(row["backward_order"] or ""),
        "without gradient": f"{row['num_without_gradient']:,}" if row["num_without_gradient"] else "",
    }  # fmt: skip
    return "; ".join(f"{name} {text}" for name, text in said.items() if text)
