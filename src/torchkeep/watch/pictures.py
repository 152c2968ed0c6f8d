"""Pictures of any type and range, predictions beside the truth, confusion matrices and figures, as PNG."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, Literal

import numpy as np

from ..contracts import Json
from ..errors import DataError
from .kept import Kept, numbers
from .media import Late, MediaStore, Medium

_MOST_VALUES = 1 << 24  # 64 MB of float32
_MOST_CELLS, _MOST_SIDE, _KEPT_SIDE = 64, 4096, 1024  # pictures of a batch; pixels along a side, alone and in a cell
_SIDE, _GAP, _LINE, _SIZE = 192, 12, 18, 13  # pixels: of a cell, between cells, of a line of text, of a letter
_MOST_NUMBERED, _MOST_CLASSES, _MOST_LEGEND = 30, 2000, 24
_INK, _MUTED, _PAPER, _GREY = (27, 31, 36), (89, 99, 110), (255, 255, 255), (230, 234, 239)
_RIGHT, _WRONG, _MAGENTA = (42, 100, 160), (196, 64, 0), (255, 0, 255)
_FONTS = ("DejaVuSans.ttf", "Arial Unicode.ttf", "arial.ttf")  # Pillow's own has letters of English only
_CLASSES = ((90, 96, 104), (228, 87, 46), (46, 134, 193), (244, 185, 66), (39, 158, 104), (142, 84, 190),
            (233, 122, 170), (120, 190, 220), (150, 100, 60), (170, 200, 60))  # fmt: skip

Array = np.ndarray[Any, Any]
Color = tuple[int, int, int]


# --- pictures as they are


def image(x: Any, caption: str = "") -> Late:
    """A picture, or a batch of pictures as a grid. What had to be changed to show it is told by the caption.

    Shapes:  x (H, W), (C, H, W), (H, W, C), (B, C, H, W) or (B, H, W, C); of more than four channels the first three
    Units:   uint8; integers or floats of any range: 0 … 1, 0 … 255 for integers, else from the least to the largest
    Raises:  DataError for another shape, or for what is no real number
    """
    values = numbers(x, "image")
    shape = tuple(values.shape)
    if not 2 <= len(shape) <= 4 or 0 in shape:
        raise _unlike("this is no picture", "image", shape, "(H, W), (C, H, W) or (H, W, C), with B before it or not")
    is_first = len(shape) == 2 or _is_channels_first(shape[-3:])
    values, notes = _thinned(values, len(shape) - (2 if is_first else 3), _MOST_SIDE)
    if len(shape) == 4:
        most = max(1, min(_MOST_CELLS, _MOST_VALUES // math.prod(values.shape[1:])))
        values = values[:most]
        notes += [f"{most} of {shape[0]:,}"] if most < shape[0] else []
    return _Image(Kept(values), str(caption), notes)


def _unlike(what: str, where: str, got: object, expected: str) -> DataError:
    return DataError(what, where=where, got=f"shape {got}" if isinstance(got, tuple) else str(got), expected=expected)


def _thinned(values: Any, axis: int, most: int) -> tuple[Any, list[str]]:
    """So few pixels that they can be kept, where rows are along ``axis`` and columns behind it; and what that means."""
    height, width = values.shape[axis : axis + 2]
    step = -(-max(height, width) // most)
    every = (*[slice(None)] * axis, slice(None, None, step), slice(None, None, step))
    return (values[every], [f"of {width:,} × {height:,} pixels one in {step} each way"]) if step > 1 else (values, [])


def _is_channels_first(shape: tuple[int, ...]) -> bool:
    first, _, last = shape
    return first in (1, 3) or (last not in (1, 3) and (first in (2, 4) or (last > 4 and first <= last)))


@dataclass(frozen=True)
class _Image:
    kept: Kept
    caption: str
    notes: list[str]

    def settle(self, media: MediaStore) -> dict[str, Json]:
        pictures, notes = _rgb(self.kept.array())
        canvas = pictures[0] if len(pictures) == 1 else _grid(pictures)
        return _png_payload(canvas, media) | {"caption": "; ".join(filter(None, (self.caption, *self.notes, *notes)))}


def _grid(pictures: Array) -> Array:
    columns = math.ceil(len(pictures) ** 0.5)
    height, width, depth = pictures.shape[1:]
    lines = -(-len(pictures) // columns)
    canvas = np.full((lines * (height + 2) - 2, columns * (width + 2) - 2, depth), 255, np.uint8)
    for place, picture in enumerate(pictures):
        top, left = place // columns * (height + 2), place % columns * (width + 2)
        canvas[top : top + height, left : left + width] = picture
    return canvas


def _rgb(values: Array) -> tuple[Array, list[str]]:
    """Pictures (B, H, W, 3), or (B, H, W, 4) with their opacity, and what is to be said of them."""
    while values.ndim < 4:  # first C, then B
        values = values[None]
    if _is_channels_first(values.shape[1:]):
        values = np.moveaxis(values, 1, -1)
    num = values.shape[-1]
    has_opacity = num == 4 and (values.dtype == np.uint8 or bool(((values >= 0) & (values <= 1)).all()))
    values = values[..., : 4 if has_opacity else 3]
    lost = ~np.isfinite(values).all(-1)
    shown, note = _eight_bit(values)
    notes = [note] if note else []
    if num == 1:
        shown = np.repeat(shown, 3, -1)
    elif num == 2:
        shown = np.concatenate([shown, np.zeros_like(shown[..., :1])], -1)
        notes.append("channels 1 and 2 as red and green")
    elif num > 3 and not has_opacity:
        notes.append(f"channels 1 to 3 of {num}")
    if lost.any():
        shown[lost] = (*_MAGENTA, 255)[: shown.shape[-1]]
        notes.append(f"{int(lost.sum()):,} pixels that are not finite in magenta")
    return shown, notes


def _eight_bit(values: Array) -> tuple[Array, str]:
    kind = values.dtype.kind
    if values.dtype == np.uint8 or kind == "b":
        return (values.copy() if kind == "u" else values * np.uint8(255)), ""
    finite = values[np.isfinite(values)] if kind == "f" else values
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    if low >= 0 and high <= (1 if kind == "f" else 255):
        low, high = 0.0, 1.0 if kind == "f" else 255.0
    elif kind == "f" and low >= -1 and high <= 1:
        low, high = -1.0, 1.0
    note = "" if low == 0 and high in (1, 255) else f"black is {low:.4g}, white {high:.4g}"
    if low == high:
        return np.full(values.shape, 128, np.uint8), f"all is {low:.4g}"
    wide: Any = values.astype(np.float64 if max(-low, high) > 1e30 else np.float32)
    part = (wide / 2 - low / 2) / (high / 2 - low / 2)  # halved: the distance of two floats may be none
    return (np.nan_to_num(part, nan=0, posinf=1, neginf=0).clip(0, 1) * 255).round().astype(np.uint8), note


def _png_payload(canvas: Array, media: MediaStore) -> dict[str, Json]:
    return {"media": media.put(_png(canvas), ".png"), "width": canvas.shape[1], "height": canvas.shape[0]}


def _png(canvas: Array) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    # as fast as OpenCV, whose import takes ten times as long; level 3 gains 3 % of the size for half as much time again
    Image.fromarray(np.ascontiguousarray(canvas)).save(file, "PNG", compress_level=1)
    return file.getvalue()


def figure(drawn: Any) -> Late:
    """A figure of matplotlib, drawn now and left open.

    Raises:  DataError where it cannot be drawn
    """
    whole = getattr(drawn, "figure", None) or drawn  # of axes their figure
    file = io.BytesIO()
    try:
        whole.savefig(file, format="png")  # by Agg, whatever the figure is shown with
    except Exception as error:  # of an artist that the caller has written
        got = f"{type(error).__name__}: {error}"
        raise _unlike("this figure cannot be drawn", "figure", got, "a figure of matplotlib") from None
    png = file.getvalue()
    width, height = (int.from_bytes(png[place : place + 4], "big") for place in (16, 20))
    return Medium(png, ".png", {"width": width, "height": height})


# --- predictions


def prediction(
    inputs: Any, truth: Any, output: Any, *, classes: Sequence[str] = (), ids: Sequence[Any] = (),
    confidence: Literal["softmax", "given"] = "softmax", mean: Any = None, std: Any = None, most: int = 16,
) -> Late:  # fmt: skip
    """What a model makes of samples beside the truth: a picture of each with both, and a row of text.

    ``inputs`` are pictures, texts, numbers or None; ``mean`` and ``std`` undo what they were normalised by. ``output``
    are logits, with confidence "given" probabilities. Classes of pixels are drawn over the pictures.

    Shapes:  inputs (B, C, H, W) or (B, H, W); truth (B,) classes or numbers, (B, K) of 0 and 1, (B, H, W) classes of
             pixels, or (B, C, H, W) pictures; output (B, K), (B, K, H, W), of two classes (B,) or (B, 1), else as truth
    Raises:  DataError where they do not fit together
    """
    shown, true, found = (
        _few(values, most, name) for name, values in (("inputs", inputs), ("truth", truth), ("output", output))
    )
    given = [values for values in (shown, true, found) if values is not None]
    sizes = [tuple(values.shape) if hasattr(values, "ndim") else (len(values),) for values in given]
    if true is None or found is None or len({size[0] for size in sizes}) > 1 or any(0 in size for size in sizes):
        raise _unlike("samples, truth and output do not fit together", "prediction", f"shapes {sizes}", "B ≥ 1 of each")
    true, found = _planes(true, found)
    shown, mean, std = _thin_inputs(shown, mean, std)
    names = [getattr(name, "item", lambda name=name: name)() for name in list(ids)[: len(true)]]
    kept = [Kept(values) if hasattr(values, "ndim") else values for values in (shown, true, found, mean, std)]
    return _Prediction(tuple(kept), tuple(map(str, classes or ())), names, confidence == "given")


def _few(values: Any, most: int, where: str) -> Any:
    """The first samples: None, a list of texts, a tensor or an array."""
    if values is None:
        return None
    if isinstance(values, list | tuple) and values and all(isinstance(value, str) for value in values):
        return list(values[:most])
    made = numbers(values, f"prediction, {where}")
    if not made.ndim:
        raise _unlike("samples, truth and output do not fit together", f"prediction, {where}", (), "(B, …)")
    return made[:most]


def _thin_inputs(inputs: Any, mean: Any, std: Any) -> tuple[Any, Any, Any]:
    """Inputs that are pictures as (B, C, H, W) or (B, H, W, C), with what they were normalised by."""
    if getattr(inputs, "ndim", 0) not in (3, 4):
        return inputs, None, None
    pictures = inputs[:, None] if inputs.ndim == 3 else inputs
    norm = [
        None if part is None else numbers(part, "prediction, mean and std").reshape(-1, 1, 1) for part in (mean, std)
    ]
    if any(part is not None and len(part) not in (1, pictures.shape[1]) for part in norm):
        got = (
            f"{[None if part is None else len(part) for part in norm]} numbers for pictures {tuple(pictures.shape[1:])}"
        )
        raise _unlike("mean and std do not fit the pictures", "prediction", got, "a number, or one for each channel")
    axis = 2 if _is_channels_first(tuple(pictures.shape[1:])) else 1
    return _thinned(pictures, axis, _KEPT_SIDE)[0], *norm


def _planes(true: Any, found: Any) -> tuple[Any, Any]:
    """Truth and output; of pixels' logits their classes, taken where they are: logits are many times as large."""
    if getattr(true, "ndim", 0) < 3:
        return true, found
    have, got = getattr(found, "ndim", 0), f"truth {tuple(true.shape)}, output {tuple(getattr(found, 'shape', ()))}"
    if "float" not in str(true.dtype):
        true = true[:, 0] if true.ndim == 4 and true.shape[1] == 1 else true
        if have == 4 and found.shape[1] > 1:
            found = (found * 1).argmax(1)  # truths too have a largest
        elif have >= 3:
            found = found[:, 0] if have == 4 else found
            found = found > 0 if "float" in str(found.dtype) else found
    if not 3 <= true.ndim == getattr(found, "ndim", 0) <= 4 or 0 in (*true.shape, *found.shape):
        raise _unlike("the output is no picture as the truth is", "prediction", got, "(B, H, W) and (B, K, H, W)")
    return _thinned(true, true.ndim - 2, _KEPT_SIDE)[0], _thinned(found, found.ndim - 2, _KEPT_SIDE)[0]


@dataclass
class _Said:
    """What is said of one sample."""

    truth: str
    output: str
    confidence: float | None = None
    is_right: bool | None = None


@dataclass(frozen=True)
class _Prediction:
    kept: tuple[Any, ...]
    classes: tuple[str, ...]
    ids: list[Any]
    is_given: bool

    def settle(self, media: MediaStore) -> dict[str, Json]:
        inputs, true, found, mean, std = (part.array() if isinstance(part, Kept) else part for part in self.kept)
        is_picture = isinstance(inputs, np.ndarray) and inputs.ndim == 4
        columns = {"input": _small(_undone(inputs, mean, std))} if is_picture else {}
        texts = [None] * len(true) if is_picture or inputs is None else list(map(_written, inputs))
        legend: dict[str, Color] = {}
        if isinstance(true, np.ndarray) and true.ndim >= 3:
            said = [_Said(self._summary(a), self._summary(b)) for a, b in zip(true, found, strict=True)]
            planes, legend = self._drawn_planes(columns.get("input", [None] * len(true)), true, found)
            columns |= planes
        else:
            said = list(self._judged(true, found))
        payload: dict[str, Json] = {"media": None, "width": 0, "height": 0}
        if columns:
            payload = _png_payload(_sheet(columns, said, legend), media)
        names = [*self.ids, *range(len(self.ids), len(said))]
        rows = zip(names, texts, said, strict=True)
        return payload | {"rows": [{"sample": name, "input": text, **asdict(one)} for name, text, one in rows]}

    def _name(self, number: Any) -> str:
        place = int(number)
        return self.classes[place] if 0 <= place < len(self.classes) else str(place)

    def _names(self, row: Array) -> str:
        return ", ".join(map(self._name, np.flatnonzero(row))) or "none"

    def _judged(self, true: Any, found: Any) -> Iterable[_Said]:
        """What is said of each sample, by what truth and output are."""
        if isinstance(true, list) or isinstance(found, list):
            return [_Said(str(a), str(b), None, str(a) == str(b)) for a, b in zip(true, found, strict=True)]
        true, found = (part[:, 0] if part.ndim == 2 and part.shape[1] == 1 else part for part in (true, found))
        has_bits, is_given = bool(np.isin(true, (0, 1)).all()), self.is_given
        if true.ndim == 1 and found.ndim == 1 and found.dtype.kind == "f" and has_bits:  # a logit of two classes
            part = found.astype(np.float64) if is_given else 0.5 + 0.5 * np.tanh(found.astype(np.float64) / 2)
            found, is_given = np.stack([1 - part, part], 1), True
        elif true.ndim == 2 and has_bits and (true.sum(1) == 1).all():
            true = true.argmax(1)
        pairs = zip(true, found, strict=True)
        if true.ndim == 1 and found.ndim == 2 and _is_whole(true):
            return map(self._class_said, true, _shares(found, is_given))
        if true.ndim == 1 and found.ndim == 1 and found.dtype.kind != "f" and _is_whole(true):
            return [_Said(self._name(a), self._name(b), None, bool(a == b) if a >= 0 else None) for a, b in pairs]
        if true.ndim == 2 and true.shape == found.shape and has_bits:
            pairs = zip(true > 0, found > (0.5 if is_given else 0), strict=True)
            return [_Said(self._names(a), self._names(b), None, bool((a == b).all())) for a, b in pairs]
        return [_Said(_written(a), _written(b)) for a, b in pairs]

    def _class_said(self, true: Any, shares: Array) -> _Said:
        if not np.isfinite(shares).all():
            return _Said(self._name(true), "NaN", None, False)
        best = int(shares.argmax())
        return _Said(self._name(true), self._name(best), float(shares[best]), bool(best == true) if true >= 0 else None)

    def _summary(self, plane: Array) -> str:
        """The largest classes of a mask with their shares; the mean of a picture."""
        if plane.dtype.kind == "f":
            return f"mean {plane.mean(dtype=np.float64):.4g}"
        found, counts = np.unique(plane, return_counts=True)
        largest = np.argsort(-counts, kind="stable")[:3]
        return ", ".join(f"{self._name(found[place])} {100 * counts[place] / plane.size:.0f} %" for place in largest)

    def _drawn_planes(
        self, pictures: Sequence[Array | None], true: Array, found: Array
    ) -> tuple[dict[str, list[Array]], dict[str, Color]]:
        """Truth and output as pictures, and which colour stands for which class."""
        if true.dtype.kind == "f":
            if true.shape != found.shape:
                return {"truth": _small(true), "output": _small(found)}, {}
            both = _small(np.concatenate([true, found]))  # together: in one range
            return {"truth": both[: len(true)], "output": both[len(true) :]}, {}
        present = np.unique(np.concatenate([np.unique(true), np.unique(found)]).astype(np.int64))
        # others are ignored; of two classes the first is the background
        kept = present[(present >= 0) & ((present < len(self.classes)) if self.classes else (present != 255))]
        kept = kept[kept > 0] if kept.max(initial=0) <= 1 else kept
        hues = {int(number): _hue(int(number)) for number in kept}
        planes = {
            name: [_overlaid(picture, mask, hues) for picture, mask in zip(pictures, masks, strict=True)]
            for name, masks in (("truth", true), ("output", found))
        }
        return planes, {self._name(number): hue for number, hue in hues.items()}


def _undone(inputs: Array, mean: Array | None, std: Array | None) -> Array:
    """The pictures before they were normalised; what rounding leaves beyond 0 … 1 is cut off."""
    if inputs.dtype.kind != "f" or (mean is None and std is None):
        return inputs
    return np.asarray((inputs * (1 if std is None else std) + (0 if mean is None else mean)).clip(0, 1))


def _is_whole(values: Array) -> bool:
    return values.dtype.kind != "f" or bool((np.isfinite(values) & (values == np.floor(values))).all())


def _shares(found: Array, is_given: bool) -> Array:
    """Probabilities (B, K)."""
    if is_given:
        return found
    with np.errstate(invalid="ignore", over="ignore"):  # of infinite logits
        powers = np.exp(found - found.max(1, keepdims=True).astype(np.float64))
    return np.asarray(powers / powers.sum(1, keepdims=True))


def _written(value: Any) -> str:
    if isinstance(value, str):
        return value[:2000]
    if np.ndim(value) == 0:
        return f"{float(value):.4g}"
    flat = np.ravel(value)
    return f"[{', '.join(f'{float(number):.4g}' for number in flat[:8])}{', …' if flat.size > 8 else ''}]"


# --- drawing


def _small(pictures: Array) -> list[Array]:
    """Pictures (H, W, 3) as large as a cell; those that are smaller by a whole factor, so that pixels stay square."""
    from PIL import Image

    shown = _rgb(pictures if pictures.ndim == 4 else pictures[:, None])[0][..., :3]
    height, width = shown.shape[1:3]
    factor = _SIDE / max(height, width)
    factor = float(int(factor)) if factor > 1 else factor
    size = max(1, round(width * factor)), max(1, round(height * factor))
    resample = Image.Resampling.NEAREST if factor >= 1 else Image.Resampling.BOX
    return [np.asarray(Image.fromarray(picture).resize(size, resample)) for picture in shown]


def _hue(number: int) -> Color:
    """A colour for a class: ten that are told apart by lightness too, then ever other hues."""
    import colorsys

    if number < len(_CLASSES):
        return _CLASSES[number]
    red, green, blue = colorsys.hsv_to_rgb(number * 0.618034 % 1, 0.5 + number % 3 * 0.2, 0.6 + number % 2 * 0.3)
    return int(red * 255), int(green * 255), int(blue * 255)


def _overlaid(picture: Array | None, mask: Array, hues: dict[int, Color]) -> Array:
    height, width = mask.shape
    if picture is None:
        factor = _SIDE / max(height, width)
        picture = np.full((max(1, int(height * factor)), max(1, int(width * factor)), 3), 255, np.uint8)
    rows, columns = (np.arange(to) * of // to for to, of in zip(picture.shape[:2], mask.shape, strict=True))
    mixed = picture.copy()
    if hues:
        near, known = mask[np.ix_(rows, columns)].astype(np.int64), np.array([*hues])
        place = np.searchsorted(known, near).clip(max=len(known) - 1)
        is_known = known[place] == near
        mixed[is_known] = 0.4 * mixed[is_known] + 0.6 * np.array([*hues.values()])[place[is_known]]
    return mixed


@cache
def _font() -> Any:
    from PIL import ImageFont

    for name in _FONTS:
        try:
            return ImageFont.truetype(name, _SIZE)
        except OSError:
            continue
    return ImageFont.load_default(_SIZE)


def _cut(text: str, room: float) -> str:
    """As much of a text as fits; what cannot be drawn as "?"."""
    text = "".join(letter if letter.isprintable() else "?" for letter in text[:200])
    if _font().getlength(text) <= room:
        return text
    while text and _font().getlength(text + "…") > room:
        text = text[:-1]
    return text + "…"


def _sheet(columns: dict[str, list[Array]], said: list[_Said], legend: dict[str, Color]) -> Array:
    """All samples: side by side the pictures of each, below them truth and output in words or the classes' colours."""
    from PIL import Image, ImageDraw

    first = next(iter(columns.values()))
    has_words = len(columns) == 1
    height, width = first[0].shape[:2]
    room = max(_SIDE if has_words else width, width)
    cell_width = len(columns) * (room + 4) - 4 + _GAP
    cell_height = height + (2 * _LINE + 6 if has_words else 0) + _GAP
    across = max(1, min(len(first), max(math.ceil(len(first) ** 0.5), 1) if has_words else 2))
    top = _GAP if has_words else _GAP + _LINE
    lines = _legend_lines(legend, across * cell_width - _GAP)
    bottom = top + -(-len(first) // across) * cell_height
    sheet = Image.new("RGB", (across * cell_width + _GAP, bottom + _LINE * len(lines) + 4), _PAPER)
    pen = ImageDraw.Draw(sheet)
    for place, one in enumerate(said):
        left, y = _GAP + place % across * cell_width, top + place // across * cell_height
        for number, (name, pictures) in enumerate(columns.items()):
            x = left + number * (room + 4)
            sheet.paste(Image.fromarray(pictures[place]), (x, y))
            if not has_words and place < across:
                pen.text((x, y - _LINE), name, _MUTED, _font())
        if has_words:
            _write_words(pen, left, y + height + 4, room, one)
            if one.is_right is False:
                pen.rectangle((left - 3, y - 3, left + width + 2, y + height + 2), outline=_WRONG, width=3)
    for line, entries in enumerate(lines):
        for x, name, hue in entries:
            y = bottom + line * _LINE
            pen.rectangle((_GAP + x, y + 2, _GAP + x + 11, y + 13), fill=hue)
            pen.text((_GAP + x + 17, y), name, _INK, _font())
    return np.asarray(sheet)


def _write_words(pen: Any, left: int, y: int, room: int, said: _Said) -> None:
    """Mark and truth; below them arrow, output and confidence. The mark tells what the colour does."""
    color = {True: _RIGHT, False: _WRONG, None: _INK}[said.is_right]
    x, middle = left + 18, y + _SIZE // 2 + 2
    if said.is_right is not None:
        check, cross = ((0, 0), (4, 4), (11, -5)), ((1, -5), (10, 4), (5.5, -0.5), (10, -5), (1, 4))
        pen.line([(left + a, middle + b) for a, b in (check if said.is_right else cross)], color, 2)
    pen.text((x, y), _cut(said.truth, room - 18), color, _font())
    y, middle = y + _LINE, middle + _LINE
    pen.line(
        [(left, middle), (left + 11, middle), (left + 7, middle - 4), (left + 11, middle), (left + 7, middle + 4)],
        _MUTED,
    )
    percent = "" if said.confidence is None else f"{100 * said.confidence:.0f} %"
    length = _font().getlength(percent)
    pen.text((left + room - length, y), percent, _MUTED, _font())
    pen.text((x, y), _cut(said.output, room - 24 - length), color, _font())


def _legend_lines(legend: dict[str, Color], room: int) -> list[list[tuple[int, str, Color]]]:
    """Lines of (where it begins, name, colour)."""
    lines: list[list[tuple[int, str, Color]]] = [[]] if legend else []
    x = 0
    rest = len(legend) - _MOST_LEGEND
    entries = [*legend.items()][:_MOST_LEGEND] + ([(f"and {rest} more", _PAPER)] if rest > 0 else [])
    for name, hue in entries:
        shown = _cut(name, min(160, room - 18))
        width = 34 + math.ceil(_font().getlength(shown))
        if x and x + width > room:
            lines.append([])
            x = 0
        lines[-1].append((x, shown, hue))
        x += width
    return lines


# --- confusion


def confusion_picture(classes: Sequence[str], counts: Sequence[Sequence[float]]) -> bytes:
    """A confusion matrix as PNG: of each row, the truth, how much went where; numbers up to 30 classes.

    Shapes:  counts (K, K), rows truth, columns output
    Raises:  DataError for another shape
    """
    from PIL import Image, ImageDraw

    cells = np.nan_to_num(Kept(numbers(counts, "confusion")).array().astype(np.float64)).clip(0)
    cells = cells if cells.size else np.zeros((0, 0))
    num = cells.shape[0] if cells.ndim else 0
    if cells.shape != (num, num):
        raise _unlike("this is no confusion matrix", "confusion", cells.shape, "(K, K)")
    parts = cells / np.maximum(cells.sum(1, keepdims=True), 1e-300)
    ends = np.where(np.eye(num, dtype=bool)[..., None], np.array(_RIGHT), np.array(_WRONG))
    hues = np.round(255 + (ends - 255) * parts[..., None] ** 0.6).astype(np.uint8)  # few mistakes can be seen too
    side = 46 if num <= _MOST_NUMBERED else max(1, 900 // num)
    shown = min(num * side, _MOST_CLASSES)
    names = [_cut(str(name), 150) for name in [*classes, *range(len(classes), num)][:num]] if side >= _LINE - 4 else []
    edge = _LINE + 8 + max((math.ceil(_font().getlength(name)) for name in names), default=0) + 8
    size = (edge + max(shown, 80) + _GAP, edge + max(shown, 80) + _GAP)
    sheet = Image.new("RGB", size, _PAPER)
    pen = ImageDraw.Draw(sheet)
    if num:
        resample = Image.Resampling.NEAREST if shown >= num else Image.Resampling.BOX
        sheet.paste(Image.fromarray(hues).resize((shown, shown), resample), (edge, edge))
        pen.rectangle((edge - 1, edge - 1, edge + shown, edge + shown), outline=_GREY)
    pen.text((edge, 4), "output", _MUTED, _font())
    _write_upright(sheet, "truth", 4, edge, _MUTED)
    for place, name in enumerate(names):
        middle = edge + place * side + side // 2
        pen.text((edge - 8, middle), name, _INK, _font(), anchor="rm")
        _write_upright(sheet, name, middle - _SIZE // 2 - 2, edge - 8, _INK, ends_there=True)
    if num <= _MOST_NUMBERED:
        for row, column in np.argwhere(cells > 0):
            color = _PAPER if parts[row, column] > 0.45 else _INK
            at = edge + column * side + side // 2, edge + row * side + side // 2
            pen.text(at, _brief(cells[row, column]), color, _font(), anchor="mm")
    return _png(np.asarray(sheet))


def _write_upright(sheet: Any, text: str, x: int, y: int, color: Color, ends_there: bool = False) -> None:
    """A text that is read from below; ``y`` is its upper end, or where it begins."""
    from PIL import Image, ImageDraw

    length = math.ceil(_font().getlength(text)) + 1
    strip = Image.new("RGB", (length, _LINE), _PAPER)
    ImageDraw.Draw(strip).text((0, 1), text, color, _font())
    sheet.paste(strip.transpose(Image.Transpose.ROTATE_90), (x, y - length if ends_there else y))


def _brief(number: float) -> str:
    """A count in few letters: 23.7k."""
    for least, unit, letter in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if number >= least:
            return f"{float(f'{number / unit:.3g}'):g}{letter}"
    return f"{number:.4g}"
