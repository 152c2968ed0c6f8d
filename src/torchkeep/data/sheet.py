"""A contact sheet: some samples of each class, those that are bad, and how the splits' numbers lie."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..chance import ChanceKey, keyed_uniform
from ..errors import DataError
from .contents import Contents
from .drift import word_counts
from .readers import ClipReader
from .survey import Survey

_WIDTH, _MARGIN, _LABEL, _TILE, _GAP = 1200, 24, 160, 102, 8
_TILES = (_WIDTH - 2 * _MARGIN - _LABEL) // (_TILE + _GAP)
_PANEL, _PANEL_HEIGHT, _PANELS = 282, 150, 12
_CLASSES, _BARS, _WORDS, _BINS = 16, 80, 5, 40
_COLOURS = ("#4878d0", "#ee854a", "#3a9f5c", "#956cb4", "#8c613c")
_BAD, _INK, _PALE = "#d03030", "#202020", "#e8e8e8"


def contact_sheet(found: Survey, contents: Mapping[str, Contents]) -> bytes:
    """The sheet as a PNG."""
    colours = {name: _COLOURS[place % len(_COLOURS)] for place, name in enumerate(contents)}
    strips = [_head(found, colours)]
    if next(iter(contents.values())).kind in ("images", "recordings", "samples"):
        strips += [*_class_strips(found, contents, colours), *_bad_strips(found)]
    panels = [*_panels(found, contents, colours)][:_PANELS]
    strips += [_side_by_side(panels[start : start + 4]) for start in range(0, len(panels), 4)]
    sheet = Image.new("RGB", (_WIDTH, sum(strip.height for strip in strips) + 2 * _MARGIN), "white")
    top = _MARGIN
    for strip in strips:
        sheet.paste(strip, (_MARGIN, top))
        top += strip.height
    held = BytesIO()
    sheet.save(held, "PNG", optimize=True)
    return held.getvalue()


def _strip(height: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    made = Image.new("RGB", (_WIDTH - 2 * _MARGIN, height), "white")
    return made, ImageDraw.Draw(made)


def _write(draw: ImageDraw.ImageDraw, place: tuple[float, float], text: str, room: int, size: int = 13,
           colour: str = _INK) -> None:  # fmt: skip
    """Text, cut where it does not fit."""
    font = ImageFont.load_default(size)
    if font.getlength(text) > room:
        while text and font.getlength(text + "…") > room:
            text = text[:-1]
        text += "…"
    draw.text(place, text, colour, font)


def _head(found: Survey, colours: Mapping[str, str]) -> Image.Image:
    strip, draw = _strip(44)
    left = 0
    for name, split in found.splits.items():
        text = f"{name}: {split.num_samples:,} {split.kind}" + (f", {len(split.bad):,} bad" if split.bad else "")
        draw.rectangle((left, 5, left + 16, 21), colours[name])
        _write(draw, (left + 24, 2), text, 500, 17)
        left += 56 + int(ImageFont.load_default(17).getlength(text))
    return strip


def _class_strips(found: Survey, contents: Mapping[str, Contents], colours: Mapping[str, str]) -> Iterator[Image.Image]:
    places: dict[str, list[tuple[str, int]]] = {}
    for name, held in contents.items():
        for row, labels in enumerate(held.labels):
            for label in labels or ("",):
                places.setdefault(label, []).append((name, row))
    for label in sorted(places, key=lambda label: -len(places[label]))[:_CLASSES]:
        strip, draw = _strip(_TILE + _GAP)
        _write(draw, (0, 4), label or "no label", _LABEL - _GAP, 15)
        for line, (name, split) in enumerate(list(found.splits.items())[:3]):
            count = split.classes.get(label, 0) if label else split.num_read
            _write(draw, (0, 28 + 18 * line), f"{name} {count:,}", _LABEL - _GAP, 13, colours[name])
        draws = keyed_uniform(ChanceKey(), "survey/sheet", np.arange(len(places[label])))[:, 0]
        chosen = [places[label][place] for place in np.sort(np.argsort(draws)[:_TILES])]
        for column, (name, row) in enumerate(chosen):
            tile = _tile(contents[name], int(contents[name].positions[row]), colours[name])
            strip.paste(tile, (_LABEL + column * (_TILE + _GAP), 0))
        yield strip


def _tile(held: Contents, index: int, colour: str) -> Image.Image:
    """A sample within a square, its split's colour below it."""
    tile = Image.new("RGB", (_TILE, _TILE), _PALE)
    try:
        picture = held.reader.picture(index)
    except DataError:  # it could be read a moment ago
        picture = None
    if picture is not None:
        shown = _in_colour(picture) if isinstance(held.reader, ClipReader) else picture
        size = _TILE - 4
        scale = size / max(shown.shape[:2])
        wanted = (max(1, round(shown.shape[1] * scale)), max(1, round(shown.shape[0] * scale)))
        resized = cv2.resize(shown, wanted, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST)
        held_image = Image.fromarray(np.asarray(resized).squeeze()).convert("RGB")
        tile.paste(held_image, ((_TILE - wanted[0]) // 2, (size - wanted[1]) // 2))
    ImageDraw.Draw(tile).rectangle((0, _TILE - 4, _TILE, _TILE), colour)
    return tile


def _in_colour(mels: Any) -> Any:
    """Log-mels as a square, low bands at the bottom."""
    square = cv2.resize(mels[::-1, :, 0], (_TILE, _TILE), interpolation=cv2.INTER_LINEAR)
    return cv2.cvtColor(cv2.applyColorMap(square, cv2.COLORMAP_VIRIDIS), cv2.COLOR_BGR2RGB)


def _bad_strips(found: Survey) -> Iterator[Image.Image]:
    bad = [(name, sample) for name, split in found.splits.items() for sample in split.bad]
    if not bad:
        return
    strip, draw = _strip(_TILE + _GAP)
    _write(draw, (0, 4), f"{len(bad):,} bad", _LABEL - _GAP, 15, _BAD)
    for column, (name, sample) in enumerate(bad[:_TILES]):
        left = _LABEL + column * (_TILE + _GAP)
        draw.rectangle((left, 0, left + _TILE, _TILE), _PALE, _BAD, 2)
        for ends in ((left + 20, 12, left + _TILE - 20, _TILE - 40), (left + 20, _TILE - 40, left + _TILE - 20, 12)):
            draw.line(ends, _BAD, 3)
        _write(draw, (left + 5, _TILE - 34), sample.id.rpartition("/")[2], _TILE - 10, 11)
        _write(draw, (left + 5, _TILE - 20), sample.got or name, _TILE - 10, 11)
    yield strip


def _panels(found: Survey, contents: Mapping[str, Contents], colours: Mapping[str, str]) -> Iterator[Image.Image]:
    """Classes, then what is measured, what drifts first."""
    over = {drift.what: f"{drift.statistic} {drift.value:.2f}" for drift in reversed(found.drift) if drift.is_over}
    classes = {name: split.classes for name, split in found.splits.items()}
    if any(classes.values()):
        yield _bars("classes", classes, colours, over)
    names = dict.fromkeys(name for held in contents.values() for name in [*held.measures, *held.categories])
    for name in sorted(names, key=lambda name: name not in over):
        values = {split: held.measures[name] for split, held in contents.items() if name in held.measures}
        known = {split: held[np.isfinite(held)] for split, held in values.items()}
        if values and max(map(np.ptp, filter(len, known.values())), default=0) > 0:
            yield _histogram(name, known, colours, over)
        columns = {split: held.categories[name] for split, held in contents.items() if name in held.categories}
        words = {split: word_counts(column) for split, column in columns.items()}
        if len({word for counts in words.values() for word in counts}) > 1:
            yield _bars(name, words, colours, over, _WORDS)


def _panel(name: str, over: Mapping[str, str]) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    made = Image.new("RGB", (_PANEL, _PANEL_HEIGHT + 16), "white")
    draw = ImageDraw.Draw(made)
    said = f"{name}: {over[name]}" if name in over else name
    _write(draw, (0, 12), said, _PANEL, 13, _BAD if name in over else _INK)
    draw.line((0, _PANEL_HEIGHT - 8, _PANEL, _PANEL_HEIGHT - 8), "#a0a0a0")
    return made, draw


def _bars(
    name: str, counts: Mapping[str, Mapping[str, int]], colours: Mapping[str, str], over: Mapping[str, str],
    most: int = _BARS,
) -> Image.Image:  # fmt: skip
    """Shares of the most frequent classes or categories, a bar for each split."""
    panel, draw = _panel(name, over)
    shown = list(dict.fromkeys(word for found in counts.values() for word in list(found)[:most]))[:most]
    highest = max(found.get(word, 0) / max(sum(found.values()), 1) for found in counts.values() for word in shown)
    room, base = _PANEL / len(shown), _PANEL_HEIGHT - 8
    width = max(1.0, min(room * 0.8 / len(counts), 48))
    for place, word in enumerate(shown):
        for column, (split, found) in enumerate(counts.items()):
            left = place * room + column * width
            height = (base - 36) * found.get(word, 0) / max(sum(found.values()), 1) / highest
            draw.rectangle((left, base - height, left + width - 1, base), colours[split])
        if room > 24:
            _write(draw, (place * room, base + 3), word, int(room) - 4, 11)
    return panel


def _histogram(
    name: str, values: Mapping[str, np.ndarray[Any, Any]], colours: Mapping[str, str], over: Mapping[str, str]
) -> Image.Image:
    """Shares of 40 steps between the outermost half per cents: filled for the first split, lines for the others."""
    panel, draw = _panel(name, over)
    low, high = np.quantile(np.concatenate(list(values.values())), [0.005, 0.995]).tolist()
    edges = np.linspace(low, high if high > low else low + 1, _BINS + 1)
    shares = {split: np.histogram(held.clip(low, high), edges)[0] / max(len(held), 1) for split, held in values.items()}
    highest, base, step = max(held.max() for held in shares.values()) or 1, _PANEL_HEIGHT - 8, _PANEL / _BINS
    for order, (split, held) in enumerate(shares.items()):
        tops = base - (base - 36) * held / highest
        if not order:
            for place, top in enumerate(tops.tolist()):
                draw.rectangle((place * step, top, (place + 1) * step - 1, base), colours[split])
        else:
            corners = np.stack([np.arange(_BINS + 1).repeat(2)[1:-1] * step, tops.repeat(2)], 1)
            draw.line([tuple(corner) for corner in corners.tolist()], colours[split], 2)
    left, right = (f"{end:,.0f}" if abs(end) >= 1000 else f"{end:.4g}" for end in (low, high))
    _write(draw, (0, base + 3), left, 90, 11)
    _write(draw, (_PANEL - ImageFont.load_default(11).getlength(right), base + 3), right, 90, 11)
    return panel


def _side_by_side(panels: Sequence[Image.Image]) -> Image.Image:
    strip, _ = _strip(_PANEL_HEIGHT + 24)
    for column, panel in enumerate(panels):
        strip.paste(panel, (column * (_PANEL + _GAP), 8))
    return strip
