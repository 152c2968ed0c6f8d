"""What was measured of a model as one HTML page: no file beside it, no request, nothing of the data taken as markup."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping
from typing import Any

import cv2
import numpy as np

from ..data.contents import Rows, looked_at, reader_of
from ..errors import TorchkeepError
from ..watch.console import format_number
from ..watch.page import STYLE, clean, still_page, table
from ..watch.pictures import confusion_picture
from .measures import Interval, Measured, Worst

_TILE = 160  # pixels
_LETTERS = 400
_MOST_CLASSES = 100
_SIDE, _EDGE = 260, 36
_OWN_STYLE = """
.sheet{display:grid;gap:12px;grid-template-columns:repeat(auto-fill,minmax(150px,1fr))}
.sheet:has(p){grid-template-columns:repeat(auto-fill,minmax(min(100%,230px),1fr))}
.sheet p{white-space:pre-line;overflow-wrap:anywhere;font-size:13px}
.sheet img{width:100%;height:auto;border-radius:4px;image-rendering:auto;display:block}
.sheet figcaption{margin-top:6px;overflow-wrap:anywhere}.sheet b{color:var(--ink);font-weight:600}
.wide{background:#fff;border-radius:8px;padding:8px;max-width:100%;height:auto}
@media(max-width:600px){table{font-size:14px}th,td{padding:7px;min-width:0}}
.plot{max-width:380px}.plot rect{fill:var(--c)}.plot path{stroke:var(--muted);stroke-dasharray:4 4;fill:none}
"""


def report_page(measured: Measured, title: str, facts: Mapping[str, str], data: Any = None) -> str:
    """A whole HTML document of what was measured; ``data`` shows the worst errors as they look."""
    return still_page(title, STYLE + _OWN_STYLE, [
        *(f'<p class="muted">{clean(name)}: {clean(text)}</p>' for name, text in facts.items()),
        table("Metrics", ("metric", "value", "95 % interval"), list(_metrics(measured.metrics)), ' class="n"'),
        *_calibration(measured), *_classes(measured),
        *_worst(measured.worst, data, bool(measured.classes)), *_left_out(measured),
    ])  # fmt: skip


def _metrics(metrics: Mapping[str, Interval]) -> Iterator[tuple[str, str, str]]:
    for name, (value, low, high) in metrics.items():
        yield clean(name), format_number(value), interval_text(low, high)


def interval_text(low: float, high: float) -> str:
    """The ends of an interval in words; empty where none is known."""
    return f"{format_number(low)} to {format_number(high)}" if low < high else ""


def unanswered_text(count: int) -> str:
    """What is said of samples for which the model gives no number."""
    return f"{count:,} samples cannot be read, or their outputs are no numbers: they are left out."


def _left_out(measured: Measured) -> Iterator[str]:
    if measured.num_unanswered:
        rows = [(clean(name), clean(why)) for name, why in measured.unanswered.items()]
        yield table("Left out", ("sample", "why"), rows)
        yield f"<p>{clean(unanswered_text(measured.num_unanswered))}</p>"


def _calibration(measured: Measured) -> Iterator[str]:
    if not measured.bins:
        return
    found = measured.calibration
    said = "Probabilities are as the model says: no temperature was found for it."
    if found:
        said = (f"Logits are divided by the temperature {format_number(found['temperature'])}, found on the split "
                f"{found.get('split', '?')}: there the gap went from {format_number(found.get('ece_before', 0.0))} to "
                f"{format_number(found.get('ece_after', 0.0))}.")  # fmt: skip
        if "ece_here_before" in found:
            said += (f" On these data it goes from {format_number(found['ece_here_before'])} to "
                     f"{format_number(found['ece_here_after'])}.")  # fmt: skip
    yield f'<h2>Calibration</h2><p>{clean(said)}</p><p class="muted">Of the answers with such a probability, how many'
    yield f' are right; dashed: as many as promised.</p><figure class="plot">{_diagram(measured)}</figure>'


def _diagram(measured: Measured) -> str:
    """The reliability diagram as SVG, each bar as dark as many answers it stands for."""
    inner, width = _SIDE - 2 * _EDGE, (_SIDE - 2 * _EDGE) / len(measured.bins)
    most = max(count for count, _, _ in measured.bins) or 1
    bars = "".join(
        f'<rect x="{_EDGE + i * width + 1:.1f}" y="{_SIDE - _EDGE - share * inner:.1f}" width="{width - 2:.1f}" '
        f'height="{share * inner:.1f}" opacity="{0.25 + 0.75 * count / most:.2f}"><title>{count:,} answers of about '
        f"{p:.0%}: {share:.0%} are right</title></rect>"
        for i, (count, p, share) in enumerate(measured.bins) if count
    )  # fmt: skip
    ticks = "".join(
        f'<text class="tick" x="{_EDGE + at * inner:.1f}" y="{_SIDE - _EDGE + 16}" text-anchor="middle">{at:.0%}</text>'
        f'<text class="tick" x="{_EDGE - 6}" y="{_SIDE - _EDGE - at * inner + 4:.1f}" text-anchor="end">{at:.0%}</text>'
        for at in (0.0, 0.5, 1.0)
    )
    label = f'<text class="tick" x="{_SIDE / 2}" y="{_SIDE - 4}" text-anchor="middle">probability of the answer</text>'
    line = f'<path d="M{_EDGE} {_SIDE - _EDGE}L{_SIDE - _EDGE} {_EDGE}"/>'
    return (f'<svg class="c0" viewBox="0 0 {_SIDE} {_SIDE}" role="img" aria-label="Reliability diagram">{bars}{line}'
            f"{ticks}{label}</svg>")  # fmt: skip


def _classes(measured: Measured) -> Iterator[str]:
    if not measured.per_class:
        return
    rows = [(clean(name), *(format_number(row[key]) for key in ("precision", "recall", "f1")), f"{row['support']:,.0f}")
            for name, row in zip(measured.classes, measured.per_class, strict=False)][:_MOST_CLASSES]  # fmt: skip
    yield table("Classes", ("class", "precision", "recall", "f1", "samples"), rows, ' class="n"')
    if len(measured.per_class) > _MOST_CLASSES:
        yield f'<p class="muted">and {len(measured.per_class) - _MOST_CLASSES:,} more classes</p>'
    if measured.confusion:
        picture = base64.b64encode(confusion_picture(measured.classes, measured.confusion)).decode()
        yield f'<h2>Confusion</h2><img class="wide" alt="Confusion matrix" src="data:image/png;base64,{picture}">'


def _worst(worst: list[Worst], data: Any, is_sure: bool) -> Iterator[str]:
    if not worst:
        return
    held, places = looked_at(data) if data is not None else (None, np.empty(0, np.int64))
    yield f'<h2>The worst errors</h2><p class="muted">{"The surest first." if is_sure else "The largest first."}</p>'
    yield '<div class="sheet">'
    for row in worst:
        picture = _picture(held, int(places[row.index])) if row.index < len(places) else ""
        size = f"{row.size:.1%}" if is_sure else f"off by {format_number(row.size)}"
        yield (f"<figure>{picture}<figcaption><b>{clean(row.answer)}</b> {size}<br>truth {clean(row.truth)}<br>"
               f"{clean(row.name)}</figcaption></figure>")  # fmt: skip
    yield "</div>"


def _picture(held: Any, index: int) -> str:
    """A sample as it looks: an image, the log-mels of a recording, a text, the cells of a row; empty for others."""
    reader = held if isinstance(held, Rows) else reader_of(held)
    try:
        shown = reader.shown(index)
    except (TorchkeepError, AttributeError):
        return ""
    if isinstance(shown, str):
        cut = shown[:_LETTERS] + "…" * (len(shown) > _LETTERS)
        return "" if reader.kind == "samples" else f"<p>{clean(cut)}</p>"
    if reader.kind == "recordings":
        shown = cv2.applyColorMap(shown, cv2.COLORMAP_VIRIDIS)[..., ::-1]
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(_small(shown)).decode()}">'


def _small(pixels: np.ndarray[Any, Any]) -> bytes:
    """Pixels (H, W, C) as a JPEG of a tile's size."""
    from PIL import Image

    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else np.ascontiguousarray(pixels[..., :3]))
    if max(image.size) < _TILE // 2:  # a digit of 8 pixels
        image = image.resize((_TILE, max(1, _TILE * image.height // image.width)), Image.Resampling.NEAREST)
    image.thumbnail((_TILE * 2, _TILE * 2))
    file = io.BytesIO()
    image.convert("RGB").save(file, "JPEG", quality=85)
    return file.getvalue()
