"""A contact sheet: some samples of each class, those that are bad, and how the splits' columns lie."""

from __future__ import annotations

from collections.abc import Iterator
from io import BytesIO
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from ..chance import ChanceKey, keyed_uniform
from .contents import Member, Split, word_counts
from .survey import Survey

_WIDTH, _MARGIN, _LABEL, _TILE, _GAP = 1200, 24, 160, 102, 8
_TILES = (_WIDTH - 2 * _MARGIN - _LABEL) // (_TILE + _GAP)
_PANEL, _PANEL_HEIGHT, _PANELS = 282, 150, 12
_CLASSES, _BARS, _WORDS, _BINS = 16, 80, 5, 24
_COLOURS = ("#4878d0", "#ee854a", "#3a9f5c", "#956cb4", "#8c613c")
_BAD, _INK, _PALE = "#d03030", "#202020", "#e8e8e8"


def contact_sheet(found: Survey) -> bytes:
    """The sheet as a PNG."""
    colours = {name: _COLOURS[place % len(_COLOURS)] for place, name in enumerate(found.splits)}
    strips = [_head(found, colours), *_class_strips(found, colours), *_bad_strip(found)]
    panels = [_panel(*panel, colours) for panel in _shares(found)][:_PANELS]
    for start in range(0, len(panels), 4):
        strip, _ = _blank(_WIDTH - 2 * _MARGIN, _PANEL_HEIGHT + 24)
        for column, panel in enumerate(panels[start : start + 4]):
            strip.paste(panel, (column * (_PANEL + _GAP), 8))
        strips.append(strip)
    sheet, top = Image.new("RGB", (_WIDTH, sum(strip.height for strip in strips) + 2 * _MARGIN), "white"), _MARGIN
    for strip in strips:
        sheet.paste(strip, (_MARGIN, top))
        top += strip.height
    held = BytesIO()
    sheet.save(held, "PNG", optimize=True)
    return held.getvalue()


def _blank(width: int, height: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    made = Image.new("RGB", (width, height), "white")
    return made, ImageDraw.Draw(made)


def _write(draw: Any, place: tuple[float, float], text: str, room: float, size: int = 13, colour: str = _INK) -> float:
    """Text, cut where it does not fit; its width."""
    font = ImageFont.load_default(size)
    if font.getlength(text) > room:
        while text and font.getlength(text + "…") > room:
            text = text[:-1]
        text += "…"
    draw.text(place, text, colour, font)
    return font.getlength(text)


def _head(found: Survey, colours: dict[str, str]) -> Image.Image:
    strip, draw = _blank(_WIDTH - 2 * _MARGIN, 44)
    left = 0.0
    for name, split in found.splits.items():
        text = f"{name}: {split.num_samples:,} {split.kind}" + (f", {len(split.bad):,} bad" if split.bad else "")
        draw.rectangle((left, 5, left + 16, 21), colours[name])
        left += 56 + _write(draw, (left + 24, 2), text, 500, 17)
    return strip


def _class_strips(found: Survey, colours: dict[str, str]) -> Iterator[Image.Image]:
    """The most frequent classes of what can be shown, a strip of samples each, a bar of its split's colour below."""
    places: dict[str, list[Member]] = {}
    for split in found.splits.values():
        for member in split.members if split.kind not in ("texts", "rows") else ():
            for label in member.labels or ("",):
                places.setdefault(label, []).append(member)
    for label in sorted(places, key=lambda label: -len(places[label]))[:_CLASSES]:
        strip, draw = _blank(_WIDTH - 2 * _MARGIN, _TILE + _GAP)
        _write(draw, (0, 4), label or "no label", _LABEL - _GAP, 15)
        for line, (name, split) in enumerate(list(found.splits.items())[:4]):
            count = split.classes[label] if label else len(split.members)
            _write(draw, (0, 28 + 18 * line), f"{name} {count:,}", _LABEL - _GAP, 13, colours[name])
        draws = keyed_uniform(ChanceKey(), "survey/sheet", np.arange(len(places[label])))[:, 0]
        for column, place in enumerate(np.sort(np.argsort(draws)[:_TILES]).tolist()):
            member, left = places[label][place], _LABEL + column * (_TILE + _GAP)
            strip.paste(_tile(found.splits[member.split], member.index), (left, 0))
            draw.rectangle((left, _TILE - 4, left + _TILE - 1, _TILE), colours[member.split])
        yield strip


def _tile(split: Split, index: int) -> Image.Image:
    """A sample within a square; log-mels in colour, low bands at the bottom."""
    picture = split.reader.picture(index)
    if picture is None:
        return Image.new("RGB", (_TILE, _TILE - 4), _PALE)
    if split.kind == "recordings":
        square = cv2.resize(picture[::-1, :, 0], (_TILE, _TILE))
        picture = cv2.applyColorMap(square, cv2.COLORMAP_VIRIDIS)[..., ::-1]
    way = Image.Resampling.BOX if max(picture.shape[:2]) > _TILE else Image.Resampling.NEAREST
    image = Image.fromarray(np.ascontiguousarray(picture).squeeze(2) if picture.shape[2] == 1 else picture[..., :3])
    return ImageOps.pad(image.convert("RGB"), (_TILE, _TILE - 4), way, _PALE)


def _bad_strip(found: Survey) -> Iterator[Image.Image]:
    bad = [sample for split in found.splits.values() for sample in split.bad]
    if bad:
        strip, draw = _blank(_WIDTH - 2 * _MARGIN, _TILE + _GAP)
        _write(draw, (0, 4), f"{len(bad):,} bad", _LABEL - _GAP, 15, _BAD)
        for column, sample in enumerate(bad[:_TILES]):
            left = _LABEL + column * (_TILE + _GAP)
            draw.rectangle((left, 0, left + _TILE - 1, _TILE), _PALE, _BAD, 2)
            for line, text in enumerate((sample.split, sample.id.rpartition("/")[2], str(sample.got))):
                _write(draw, (left + 6, 24 + 18 * line), text, _TILE - 12, 11)
        yield strip


def _shares(found: Survey) -> Iterator[tuple[str, str, list[str], dict[str, Any]]]:
    """Title, colour, words below and shares by split of classes and columns, those that drift first."""
    over = {drift.what: f"{drift.what}: {drift.statistic} {drift.value:.2f}" for drift in found.drift if drift.is_over}
    held: dict[str, dict[str, Any]] = {"classes": {name: split.classes for name, split in found.splits.items()}}
    for split, name in ((split, name) for split, read in found.splits.items() for name in read.columns):
        column = found.splits[split].columns[name]
        is_number = isinstance(column, np.ndarray)
        held.setdefault(name, {})[split] = column[np.isfinite(column)] if is_number else word_counts(column)
    for name in sorted(held, key=lambda name: (name != "classes", name not in over)):
        parts = {split: part for split, part in held[name].items() if len(part)}
        if all(isinstance(part, np.ndarray) for part in parts.values()):
            values = np.concatenate([*parts.values(), np.empty(0)])
            low, high = np.quantile(values, [0.005, 0.995]).tolist() if len(values) else (0.0, 0.0)
            edges = np.linspace(low, high, _BINS + 1)
            words = [f"{edge:,.0f}" if abs(edge) >= 1000 else f"{edge:.3g}" for edge in edges.tolist()]
            counts = {split: np.histogram(part.clip(low, high), edges)[0] for split, part in parts.items() if low < high}
        else:
            most, texts = _BARS if name == "classes" else _WORDS, {s: p for s, p in parts.items() if isinstance(p, dict)}
            words = list(dict.fromkeys(word for part in texts.values() for word in list(part)[:most]))[:most]
            counts = {split: np.array([part[word] for word in words]) for split, part in texts.items() if words[1:]}
        if counts:
            shares = {split: part / max(len(parts[split]), 1) for split, part in counts.items()}
            yield over.get(name, name), _BAD if name in over else _INK, words, shares


def _panel(title: str, ink: str, words: list[str], shares: dict[str, Any], colours: dict[str, str]) -> Image.Image:
    """A group of bars for each word, or each step of a number, a bar for each split."""
    panel, draw = _blank(_PANEL, _PANEL_HEIGHT + 16)
    _write(draw, (0, 12), title, _PANEL, 13, ink)
    base, room = _PANEL_HEIGHT - 8, _PANEL / len(next(iter(shares.values())))
    width = min(room * 0.85 / len(shares), 48)
    for column, (split, heights) in enumerate(shares.items()):
        for place, height in enumerate((heights / max(heights.max(), 1e-9) * (base - 36)).tolist()):
            left = place * room + column * width
            draw.rectangle((left, base - height, left + max(width - 1, 0), base), colours[split])
    draw.line((0, base, _PANEL, base), "#a0a0a0")
    for place in range(0, len(words), 1 if room > 24 else 8):
        _write(draw, (place * room, base + 3), words[place], max(room, 60) - 4, 11)
    return panel
