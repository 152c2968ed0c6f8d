"""A comparison of runs as one HTML file that opens without a network. The curves are there without JavaScript too."""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from html import escape

import orjson

from ..errors import printable
from .comparing import Comparison, Difference, Points, cell_text, parting_text
from .console import format_number, format_seconds
from .index import plain_text

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 400, 220, 54, 20, 10, 26
_DASHES = ("", "7 4", "2 3.5", "12 4 2 4", "14 5", "6 3 2 3 2 3")
_NUM_COLOURS = 8  # Okabe and Ito's, made darker on white and lighter on black: each has a contrast of 3 at least
_LIGHT = ("#0072b2", "#c75000", "#00805d", "#a8488f", "#7a6200", "#444b54", "#5b4fc7", "#b3003c")
_DARK = ("#56b4e9", "#ff9f5c", "#3fd1a2", "#e39ac6", "#f0e442", "#c8ced6", "#aaa2ff", "#ff7d9d")


def _palette(colours: Sequence[str]) -> str:
    return "".join(f".c{place}{{--c:{colour}}}" for place, colour in enumerate(colours))


STYLE = (
    """
:root{color-scheme:light dark;--page:#f6f7f8;--card:#fff;--ink:#1b1f24;--muted:#59636e;--line:#d5dbe1;--mark:#e7f1fa}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,"Segoe UI",Roboto,"Noto Sans",sans-serif}
main{max-width:1320px;margin:auto;padding:28px 20px 60px}
h1{font-size:24px;line-height:1.25;margin:0 0 4px}h2{font-size:17px;margin:36px 0 10px}
h3{font-size:14px;margin:0;overflow-wrap:anywhere}
p{margin:4px 0}.muted,th,figcaption,.tick{color:var(--muted)}
.scroll,figure,.bar{background:var(--card);border:1px solid var(--line);border-radius:8px}
.scroll{overflow-x:auto;margin:0 0 14px}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{text-align:left;vertical-align:top;padding:7px 14px;border-top:1px solid var(--line);overflow-wrap:anywhere;
min-width:7em;max-width:26em}
tr:first-child>*{border-top:0}th{font-weight:500}td.n{text-align:right;white-space:nowrap}thead th.n{text-align:right}
thead th:first-child,.part th{color:var(--ink);font-weight:600}
thead th{overflow-wrap:normal;white-space:nowrap;max-width:22em;overflow:hidden;text-overflow:ellipsis}
tbody th{position:sticky;left:0;background:var(--card);overflow-wrap:break-word}
.part th{background:var(--page)}
.best{font-weight:650;background:var(--mark);border-radius:4px;padding:1px 6px;margin-right:-6px}
.sr{position:absolute;clip-path:inset(50%);width:1px;height:1px;overflow:hidden}
pre{margin:8px 0 0;font-size:12px;overflow-x:auto;max-width:70ch}
summary{cursor:pointer}
.bar{display:none;flex-wrap:wrap;gap:6px 20px;align-items:center;padding:9px 14px;margin-bottom:12px}
@media(min-width:700px){.bar{position:sticky;top:8px;z-index:1}.bar .how{margin-left:auto}}
.how{display:flex;flex-wrap:wrap;gap:6px 20px}
.js .bar{display:flex}.bar label{display:flex;gap:7px;align-items:center;overflow-wrap:anywhere}
.curves{display:grid;gap:12px;grid-template-columns:repeat(auto-fill,minmax(min(100%,360px),1fr))}
figure{margin:0;padding:12px 14px}
figcaption{font-size:13px}figure>svg{display:block;width:100%;height:auto;margin-top:6px;touch-action:pan-y;border-radius:4px}
:focus-visible{outline:2px solid var(--muted);outline-offset:2px}
.tick{font-size:11px;fill:var(--muted)}.grid{stroke:var(--line)}.log{display:none}
.logged .log{display:inline}.logged .lin{display:none}
.l{fill:none;stroke:var(--c);stroke-width:1.8;stroke-linejoin:round;stroke-linecap:round}
svg [hidden]{display:none}.raw{stroke-width:1;opacity:.3}
.dot{fill:var(--c);stroke:var(--card)}.cursor{stroke:var(--muted)}
.key{list-style:none;margin:6px 0 0;padding:0}.key li{display:flex;gap:8px;align-items:center}
.key b{font-weight:400;flex:1;overflow:hidden;text-overflow:ellipsis;white-space:nowrap}.key .off{opacity:.4}
.swatch{flex:none;width:30px;height:10px}output{font-variant-numeric:tabular-nums}
"""
    + _palette(_LIGHT)
    + "@media(prefers-color-scheme:dark){:root{--page:#101317;--card:#181c21;--ink:#e8ebee;--muted:#a3adb8;"
    + "--line:#323a43;--mark:#1d3650}"
    + _palette(_DARK)
    + "}"
)
_SCRIPT = """
'use strict';
const $=(q,e=document)=>[...e.querySelectorAll(q)],root=document.documentElement,off=new Set();
const data=JSON.parse(document.getElementById('data').textContent);
const say=v=>{if(typeof v!=='number'||!v)return String(v);const a=Math.abs(v);
  return a<1e-4||a>=1e12?v.toExponential(3):a>=1000?Math.round(v).toLocaleString('en'):v.toPrecision(4)};
let logged=false,smooth=0;
root.classList.add('js');
const charts=$('figure').map((figure,i)=>{
  const svg=$('svg',figure)[0],chart=data.charts[i];
  const {left,right,top,bottom,width,x0,x1,y0,y1,l0,l1,lines}=chart;
  const x=s=>x1>x0?left+(s-x0)/(x1-x0)*(right-left):(left+right)/2;
  const y=v=>{const[a,b,t]=logged?[l0,l1,v>0?Math.log10(v):NaN]:[y0,y1,v];return bottom-(t-a)/(b-a)*(bottom-top)};
  const path=points=>{let d='',pen='M';for(const[s,v]of points){const h=typeof v==='number'?y(v):NaN;
    if(isFinite(h)){d+=pen+x(s).toFixed(1)+' '+h.toFixed(1)+(pen==='M'?'h0':'');pen='L'}else pen='M'}return d};
  const smoothed=points=>{let m=null;return points.map(([s,v])=>{
    if(typeof v!=='number')return[s,v];m=m===null?v:smooth*m+(1-smooth)*v;return[s,m]})};
  let shown=lines,at=null;
  const keys=$('.key li',figure),note=$('figcaption',figure)[0],still=note.textContent;
  const draw=()=>{shown=lines.map(l=>smooth?smoothed(l):l);lines.forEach((l,k)=>{
    const hide=off.has(data.runs[i][k]);keys[k].classList.toggle('off',hide);
    $('.raw',svg)[k].setAttribute('d',smooth&&!hide?path(l):'');
    $('.main',svg)[k].setAttribute('d',hide?'':path(shown[k]))});point(at)};
  const point=step=>{at=step;const cursor=$('.cursor',svg)[0];cursor.toggleAttribute('hidden',step===null);
    if(step!==null){cursor.setAttribute('x1',x(step));cursor.setAttribute('x2',x(step))}
    note.textContent=step===null?still:'step '+step.toLocaleString('en');
    lines.forEach((l,k)=>{let p=shown[k][l.length-1];
      if(step!==null)p=shown[k].reduce((a,b)=>Math.abs(b[0]-step)<Math.abs(a[0]-step)?b:a);
      $('output',keys[k])[0].textContent=say(p[1])+(step!==null&&p[0]!==step?' @ '+p[0].toLocaleString('en'):'');
      const dot=$('.dot',svg)[k],h=typeof p[1]==='number'?y(p[1]):NaN;
      const gone=step===null||off.has(data.runs[i][k])||!isFinite(h);
      dot.toggleAttribute('hidden',gone);if(!gone){dot.setAttribute('cx',x(p[0]));dot.setAttribute('cy',h)}})};
  const steps=[...new Set(lines.flat().map(p=>p[0]))].sort((a,b)=>a-b);
  const near=s=>steps.reduce((a,b)=>Math.abs(b-s)<Math.abs(a-s)?b:a);
  for(const kind of['pointermove','pointerdown'])svg.addEventListener(kind,e=>{const r=svg.getBoundingClientRect();
    point(near(x0+((e.clientX-r.left)/r.width*width-left)/(right-left)*(x1-x0)))});
  svg.addEventListener('pointerleave',e=>{if(e.pointerType==='mouse')point(null)});
  svg.addEventListener('blur',()=>point(null));
  svg.addEventListener('keydown',e=>{const way={ArrowLeft:-1,ArrowRight:1}[e.key];if(e.key==='Escape')point(null);
    if(!way)return;e.preventDefault();const k=at===null?(way>0?-1:steps.length):steps.indexOf(at);
    point(steps[Math.max(0,Math.min(steps.length-1,k+way))])});
  return draw});
const drawAll=()=>charts.forEach(draw=>draw());
$('.bar [name=run]').forEach((box,k)=>box.addEventListener('change',()=>{
  box.checked?off.delete(k):off.add(k);drawAll()}));
$('[name=log]')[0].addEventListener('change',e=>{
  logged=e.target.checked;root.classList.toggle('logged',logged);drawAll()});
$('[name=smooth]')[0].addEventListener('input',e=>{smooth=Number(e.target.value);drawAll()});
"""


def comparison_page(comparison: Comparison) -> str:
    """The comparison as a whole HTML document: no file beside it, no request, nothing of the runs taken as markup."""
    names = list(comparison.runs)
    charts = [_Chart(tag, curves, names) for tag, curves in comparison.curves.items()]
    held = {"charts": [chart.axes | {"lines": chart.lines} for chart in charts],
            "runs": [[names.index(run) for run in chart.curves] for chart in charts]}  # fmt: skip
    data = orjson.dumps(held).decode().replace("<", "\\u003c")
    title = f"{len(names)} runs compared"
    style, script = style_hash(STYLE), style_hash(_SCRIPT)
    policy = f"default-src 'none'; img-src data:; style-src {style}; script-src {script}; base-uri 'none'"
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        f'<title>{title}: {clean(", ".join(names))}</title>',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}"><link rel="icon" href="data:,">',
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{STYLE}</style></head>',
        f"<body><main><h1>{title}</h1>", _runs(comparison), "<h2>Where the records part</h2>",
        *(f"<p>{clean(parting_text(parting, names[0]))}</p>" for parting in comparison.partings),
        "<h2>Curves</h2>", *_controls(names), '<div class="curves">', *(chart.html() for chart in charts), "</div>",
        _metrics(comparison), *_differences(comparison),
        f'</main><script type="application/json" id="data">{data}</script><script>{_SCRIPT}</script></body></html>\n',
    ]  # fmt: skip
    return "\n".join(parts)


def still_page(title: str, style: str, body: Iterable[str]) -> str:
    """A whole HTML document without a script; ``style`` and ``body`` are HTML's already, ``title`` is text."""
    policy = f"default-src 'none'; img-src data:; style-src {style_hash(style)}; base-uri 'none'"
    return "\n".join([
        '<!doctype html><html lang="en"><head><meta charset="utf-8">', f"<title>{clean(title)}</title>",
        f'<meta http-equiv="Content-Security-Policy" content="{policy}"><link rel="icon" href="data:,">',
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{style}</style></head>',
        f"<body><main><h1>{clean(title)}</h1>", *body, "</main></body></html>\n",
    ])  # fmt: skip


def style_hash(text: str) -> str:
    """What a policy names an embedded style or script by."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def clean(text: str) -> str:
    """A text as HTML: nothing in it is markup, and no sign turns its lines around."""
    return escape(printable(text))


def _key(text: str) -> str:
    """A tag or a setting, which may be broken where it has joints."""
    return re.sub(r"([/._])", r"\1<wbr>", clean(text))


# --- tables


def table(label: str, head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """Rows of cells that are HTML already, the first of each its head; a row of one cell begins a part."""
    body = [
        f'<tr><th scope="row">{name}</th>{"".join(f"<td{kind}>{cell}</td>" for cell in cells)}</tr>'
        if cells else f'<tr class="part"><th scope="rowgroup" colspan="{len(head)}">{name}</th></tr>'
        for name, *cells in rows
    ]  # fmt: skip
    heads = "".join(f'<th scope="col"{kind if place else ""}>{name}</th>' for place, name in enumerate(head))
    return (
        f'<h2>{label}</h2><div class="scroll" tabindex="0" role="region" aria-label="{label}"><table><thead><tr>{heads}'
        f"</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def _runs(comparison: Comparison) -> str:
    return table("Runs", ("run", "status", "model", "attempts", "step", "epoch", "time"), [
        (f"{_swatch(place)} {_key(name)}", clean(row["status"]), clean(str(row["model"] or "")),
         str(row["attempts"]), f"{row['step']:,}", str(row["epoch"]), format_seconds(row["seconds"]))
        for place, (name, row) in enumerate(comparison.runs.items())
    ])  # fmt: skip


def _metrics(comparison: Comparison) -> str:
    rows = []
    for metric, values in comparison.metrics.items():
        best = comparison.best(metric)
        rows.append([_key(metric)])
        for name in comparison.runs:
            cell = format_number(values[name]) if name in values else "–"
            rows[-1].append(
                f'<span class="best">{cell}<span class="sr"> (best)</span></span>' if name in best else cell
            )
    return table("Metrics", ["metric", *map(clean, comparison.runs)], rows, ' class="n"')


def _differences(comparison: Comparison) -> Iterator[str]:
    rows: list[list[str]] = []
    for section, found in comparison.differences.items():
        cells = ([_key(row.key), *(_cell(row, name) for name in comparison.runs)] for row in found)
        rows += [[section], *cells] if found else []
    if rows:
        yield table("What differs", ["", *map(clean, comparison.runs)], rows)
    same = [section for section, found in comparison.differences.items() if not found]
    if same:
        yield f"<p>The same in all: {', '.join(same)}.</p>"


def _cell(row: Difference, name: str) -> str:
    value = row.values.get(name)
    if value is None or not row.key.startswith("changes in "):
        return "–" if value is None else clean(plain_text(value))
    return f"<details><summary>{cell_text(row, name)} lines</summary><pre>{clean(str(value))}</pre></details>"


# --- curves


def _stroke(place: int) -> str:
    """The look of a run's line: colours and dashes go round at different speeds, so that 24 runs differ."""
    dash = _DASHES[(place + place // _NUM_COLOURS) % len(_DASHES)]
    return f'class="l c{place % _NUM_COLOURS} main"' + (f' stroke-dasharray="{dash}"' if dash else "")


def _swatch(place: int) -> str:
    return f'<svg class="swatch" aria-hidden="true" viewBox="0 0 30 10"><path {_stroke(place)} d="M2 5H28"/></svg>'


def _controls(names: Sequence[str]) -> Iterator[str]:
    yield '<div class="bar" role="group" aria-label="how the curves are shown">'
    for place, name in enumerate(names):
        yield f'<label><input type="checkbox" name="run" checked>{_swatch(place)}{clean(name)}</label>'
    yield '<span class="how"><label><input type="checkbox" name="log">log scale</label>'
    yield '<label>smoothing <input type="range" name="smooth" min="0" max="0.98" step="0.02" value="0"></label>'
    yield "</span></div>"


class _Chart:
    """One tag's curves: the same axes for the picture here and for the script."""

    def __init__(self, tag: str, curves: dict[str, Points], names: Sequence[str]):
        self.tag, self.curves = tag, curves
        self._places = [names.index(run) for run in curves]
        self.lines = [[(step, _number(value)) for step, value in line] for line in curves.values()]
        points = [point for line in curves.values() for point in line]
        finite = [value for _, value in points if math.isfinite(value)] or [0.0]
        low, high = _widened(min(finite), max(finite))
        logs = [math.log10(value) for value in finite if value > 0] or [0.0]
        log_low, log_high = _widened(min(logs), max(logs))
        self.axes = {
            "left": _LEFT, "right": _WIDTH - _RIGHT, "top": _TOP, "bottom": _HEIGHT - _BOTTOM, "width": _WIDTH,
            "x0": min(step for step, _ in points), "x1": max(step for step, _ in points), "y0": low, "y1": high,
            "l0": log_low, "l1": log_high,
        }  # fmt: skip

    def html(self) -> str:
        last = max(step for line in self.curves.values() for step, _ in line)
        keys = "".join(
            f'<li>{_swatch(place)}<b title="{clean(run)}">{clean(run)}</b>'
            f"<output>{format_number(line[-1][1])}</output></li>"
            for place, (run, line) in zip(self._places, self.curves.items(), strict=True)
        )
        return (
            f'<figure><h3>{clean(self.tag)}</h3><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" tabindex="0" '
            f'aria-label="{clean(self.tag)} by step; arrow keys read the values">{"".join(self._picture())}</svg>'
            f'<figcaption>last value, up to step {last:,}</figcaption><ul class="key">{keys}</ul></figure>'
        )

    def _picture(self) -> Iterator[str]:
        axes = self.axes
        for kind, low, high in (("lin", axes["y0"], axes["y1"]), ("log", axes["l0"], axes["l1"])):
            yield f'<g class="{kind}">'
            for at in _ticks(low, high):
                y = self._y(at, low, high)
                text = format_tick(at if kind == "lin" else 10**at)
                yield f'<path class="grid" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/>'
                yield f'<text class="tick" x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{text}</text>'
            yield "</g>"
        for at in _ticks(axes["x0"], axes["x1"], least=1):
            x = f'x="{self._x(at):.1f}" y="{_HEIGHT - 8}" text-anchor="middle"'
            yield f'<text class="tick" {x}>{at:,.0f}</text>'
        yield f'<line class="cursor" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}" hidden/>'
        for place, line in zip(self._places, self.curves.values(), strict=True):
            colour = f"c{place % _NUM_COLOURS}"
            yield f'<path class="l raw {colour}"/><path {_stroke(place)} d="{self._path(line)}"/>'
            yield f'<path class="l {colour}" d="{self._crosses(line)}"/><circle class="dot {colour}" r="4" hidden/>'

    def _x(self, step: float) -> float:
        first, last = self.axes["x0"], self.axes["x1"]
        room = _WIDTH - _RIGHT - _LEFT
        return _LEFT + room * ((step - first) / (last - first) if last > first else 0.5)

    def _y(self, value: float, low: float, high: float) -> float:
        return _HEIGHT - _BOTTOM - (value - low) / (high - low) * (_HEIGHT - _BOTTOM - _TOP)

    def _path(self, line: Points) -> str:
        parts, pen = [], "M"
        for step, value in line:
            if math.isfinite(value):
                y = self._y(value, self.axes["y0"], self.axes["y1"])
                parts.append(f"{pen}{self._x(step):.1f} {y:.1f}{'h0' if pen == 'M' else ''}")
            pen = "L" if math.isfinite(value) else "M"
        return "".join(parts)

    def _crosses(self, line: Points) -> str:
        """A cross at the foot for each value that is no number."""
        bad = (self._x(step) for step, value in line if not math.isfinite(value))
        return "".join(f"M{x - 3:.1f} {_HEIGHT - _BOTTOM - 8}l6 6m0-6l-6 6" for x in bad)


def _number(value: float) -> float | str:
    return float(f"{value:.6g}") if math.isfinite(value) else str(value)


def _widened(low: float, high: float) -> tuple[float, float]:
    margin = (high - low) * 0.04 or abs(high) * 0.1 or 1.0
    return low - margin, high + margin


def _ticks(low: float, high: float, least: float = 0.0) -> list[float]:
    """Three to six round numbers within a span."""
    rough = max((high - low) / 6, least) or 1.0
    unit = 10 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
    return [place * step for place in range(math.ceil(low / step), math.floor(high / step) + 1)]


def format_tick(value: float) -> str:
    """A short number for an axis."""
    if 1000 <= abs(value) < 1e6:
        return f"{value:,.0f}"
    return f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e")
