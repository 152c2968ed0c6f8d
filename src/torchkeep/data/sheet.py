"""A contact sheet: some samples of each class, and those that are bad."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from io import BytesIO
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from ..chance import ChanceKey, keyed_uniform
from .contents import Member, Split
from .survey import Survey

_WIDTH, _MARGIN, _LABEL, _TILE, _GAP, _BAR = 1200, 24, 160, 102, 8, 4
_TILES = (_WIDTH - 2 * _MARGIN - _LABEL) // (_TILE + _GAP)
_CLASSES, _ROWS, _LETTERS, _LINES = 24, 8, 16, 7
_COLOURS = ("#4878d0", "#ee854a", "#3a9f5c", "#956cb4", "#8c613c")
_BAD, _INK, _PALE = "#d03030", "#202020", "#f2f2f2"


def contact_sheet(found: Survey) -> bytes:
    """The sheet as a PNG."""
    colours = {name: _COLOURS[place % len(_COLOURS)] for place, name in enumerate(found.splits)}
    strips = [_head(found, colours), *_class_strips(found, colours), *_bad_strip(found)]
    sheet = Image.new("RGB", (_WIDTH, sum(strip.height for strip in strips) + 2 * _MARGIN), "white")
    top = _MARGIN
    for strip in strips:
        sheet.paste(strip, (_MARGIN, top))
        top += strip.height
    held = BytesIO()
    sheet.save(held, "PNG", optimize=True)
    return held.getvalue()


def _strip(height: int = _TILE + _GAP) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    made = Image.new("RGB", (_WIDTH - 2 * _MARGIN, height), "white")
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
    strip, draw = _strip(44)
    left = 0.0
    for name, split in found.splits.items():
        text = f"{name}: {split.num_samples:,} {split.kind}" + (f", {len(split.bad):,} bad" if split.bad else "")
        draw.rectangle((left, 5, left + 16, 21), colours[name])
        left += 56 + _write(draw, (left + 24, 2), text, 500, 17)
    return strip


def _class_strips(found: Survey, colours: dict[str, str]) -> Iterator[Image.Image]:
    """The most frequent classes, a strip each: samples by keyed chance, with a bar of their split's colour."""
    members: dict[str, list[Member]] = {}
    for member in (member for split in found.splits.values() for member in split.members):
        for label in member.labels or ("",):
            members.setdefault(label, []).append(member)
    rows = max(1, _ROWS // max(len(members), 1))
    for label in sorted(members, key=lambda label: -len(members[label]))[:_CLASSES]:
        strip, draw = _strip(min(rows, -(-len(members[label]) // _TILES)) * (_TILE + _GAP))
        _write(draw, (0, 4), label or "no label", _LABEL - _GAP, 15)
        for line, name in enumerate(list(found.splits)[:4]):
            count = sum(member.split == name for member in members[label])
            _write(draw, (0, 28 + 18 * line), f"{name} {count:,}", _LABEL - _GAP, 13, colours[name])
        draws = keyed_uniform(ChanceKey(), "survey/sheet", np.arange(len(members[label])))[:, 0]
        for number, place in enumerate(np.sort(np.argsort(draws)[: rows * _TILES]).tolist()):
            member, (row, column) = members[label][place], divmod(number, _TILES)
            left, top = _LABEL + column * (_TILE + _GAP), row * (_TILE + _GAP)
            strip.paste(_tile(found.splits[member.split], member.index), (left, top))
            draw.rectangle((left, top + _TILE - _BAR, left + _TILE - 1, top + _TILE - 1), colours[member.split])
        yield strip


def _tile(split: Split, index: int) -> Image.Image:
    """A sample as a picture, or its first words."""
    shown, size = split.reader.shown(index), (_TILE, _TILE - _BAR)
    if isinstance(shown, str):
        tile = Image.new("RGB", size, _PALE)
        for number, line in enumerate(
            [part for row in shown.splitlines() for part in textwrap.wrap(row, _LETTERS)][:_LINES]
        ):
            _write(ImageDraw.Draw(tile), (5, 4 + 13 * number), line, _TILE - 10, 11)
        return tile
    if split.kind == "recordings":
        shown = cv2.applyColorMap(shown, cv2.COLORMAP_VIRIDIS)[..., ::-1]
    image = Image.fromarray(shown[..., 0] if shown.shape[2] == 1 else np.ascontiguousarray(shown[..., :3]))
    way = Image.Resampling.BOX if max(image.size) > _TILE else Image.Resampling.NEAREST
    return ImageOps.fit(image.convert("RGB"), size, way)


def _bad_strip(found: Survey) -> Iterator[Image.Image]:
    bad = [sample for split in found.splits.values() for sample in split.bad]
    if bad:
        strip, draw = _strip()
        _write(draw, (0, 4), f"{len(bad):,} bad", _LABEL - _GAP, 15, _BAD)
        for column, sample in enumerate(bad[:_TILES]):
            left = _LABEL + column * (_TILE + _GAP)
            draw.rectangle((left, 0, left + _TILE - 1, _TILE - 1), _PALE, _BAD, 2)
            for line, text in enumerate((sample.split, sample.id.rpartition("/")[2], str(sample.got))):
                _write(draw, (left + 7, 20 + 20 * line), text, _TILE - 14, 11)
        yield strip
