"""What a survey reads of one sample, by its kind: sizes, categories, its content's hash, and keys of near copies."""

from __future__ import annotations

from dataclasses import dataclass, field
from io import BytesIO
from pathlib import PurePath
from typing import Any

import cv2
import numpy as np
import xxhash
from PIL import Image
from torch import Tensor

from ..chance import ChanceKey
from ..errors import BadSampleError
from .audio import Clips, decode_audio
from .dataset import Indices
from .decode import Pixels, decode_image
from .duplicates import U64, gradient_hash, is_same_picture, is_same_text, letters_of, min_hash, shingles_of, thumb_of
from .images import IdxImages, Images
from .mel import log_mel
from .samples import TARGETS, absorb
from .text import Texts

_HEARD_S, _HEARD = 30, 0.02  # what is compared of a recording: from where it reaches this share of its peak
_SILENT = 1e-4
_MELS = 32
_GREYS_PER_LOG = 255 / 14  # log-mels reach from -14 to a little above 0
_FORMS = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".webp": "WEBP", ".bmp": "BMP", ".gif": "GIF"}


@dataclass
class Reading:
    """One sample: ``bands`` are keys of which near copies share one, ``bits`` hashes whose distance is theirs."""

    digest: bytes
    measures: dict[str, float] = field(default_factory=dict)
    categories: dict[str, str] = field(default_factory=dict)
    bands: U64 | None = None
    bits: U64 | None = None
    moments: np.ndarray[Any, Any] | None = None  # (2, C): mean and mean square of each channel
    notes: tuple[str, ...] = ()
    labels: tuple[str, ...] | None = None


class Reader:
    """The samples of a dataset by number: their names, labels, readings, and pictures to look at."""

    kind = "samples"

    def __init__(self, held: Any):
        self.held = held

    def id_of(self, index: int) -> str:
        return str(getattr(self.held, "id_of", "sample {}".format)(index))

    def labels_of(self, index: int) -> tuple[str, ...]:
        """The classes of a sample; none where numbers are predicted, or nothing."""
        kept = getattr(self.held, "_labels", None)
        if kept is None or kept.field.kind == "number":
            return ()
        place = slice(index, index + 1) if kept.offsets is None else slice(*kept.offsets[index : index + 2])
        return tuple(kept.field.classes[number] for number in kept.values[place].tolist())

    def read(self, index: int) -> Reading:
        """Raises:  BadSampleError"""
        raise NotImplementedError

    def picture(self, index: int) -> Pixels | None:
        """What a contact sheet shows of a sample, (H, W, C) uint8; None where nothing can be shown."""
        return None

    def signature(self, index: int) -> Any:
        """What near copies are compared by: a thumb."""
        picture = self.picture(index)
        return None if picture is None else thumb_of(grey_of(picture))

    def are_near(self, one: Any, other: Any) -> bool:
        """Whether two signatures are those of near copies."""
        return one is not None and other is not None and is_same_picture(one, other)

    def num_bytes(self, positions: Indices) -> int | None:
        blobs = getattr(self.held, "blobs", None) or getattr(self.held, "source", None)
        sizes = getattr(blobs, "sizes_bytes", None)
        return None if sizes is None else int(np.asarray(sizes)[positions].clip(0).sum())

    def where(self, index: int) -> str:
        """A sample by its source and name."""
        return f"{getattr(self.held, 'where', type(self.held).__name__)}: {self.id_of(index)}"

    def _targets(self, index: int) -> dict[str, float]:
        kept = getattr(self.held, "_labels", None)
        return {"target": kept.of(index)} if kept is not None and kept.field.kind == "number" else {}


class ImageReader(Reader):
    kind = "images"

    def read(self, index: int) -> Reading:
        if isinstance(self.held, IdxImages):
            return _of_pixels(self.held.decoded(index), self._targets(index))
        where = self.where(index)
        data = self.held.blobs.read(index, where)
        made = _of_pixels(decode_image(data, where, self.held.channels, self.held.bits), self._targets(index))
        with Image.open(BytesIO(data)) as opened:
            made.categories["form"] = f"{opened.format} {opened.mode}"
            if _FORMS.get(PurePath(self.id_of(index)).suffix.lower(), opened.format) != opened.format:
                made.notes = (*made.notes, "files whose ending names another format than theirs")
        if "mask" in self.held.schema:
            self.held.read(index, ChanceKey())  # raises where the mask cannot be used
        return made

    def picture(self, index: int) -> Pixels:
        pixels = self.held.decoded(index)
        return np.asarray(pixels if pixels.dtype == np.uint8 else pixels >> 8, np.uint8)


class ClipReader(Reader):
    kind = "recordings"

    def _wave(self, index: int) -> tuple[Any, int]:
        return decode_audio(self.held.blobs.read(index, self.where(index)), self.where(index))

    def read(self, index: int) -> Reading:
        wave, rate = self._wave(index)
        if self.held.channels not in ("mix", len(wave)):
            got = f"{len(wave)} channels where data.audio_channels is {self.held.channels}"
            raise BadSampleError("this recording has other channels than stated", got=got)
        moments = np.array([[wave.mean()], [np.square(wave).mean()]])
        level = float(np.sqrt(moments[1, 0]))
        measures = {"seconds": wave.shape[1] / rate, "level dB": 20 * float(np.log10(max(level, 1e-9)))}
        digest = xxhash.xxh3_128_digest(wave.tobytes() + f"{wave.shape}|{rate}".encode())
        categories = {"rate": f"{rate:,} Hz", "channels": str(len(wave))}
        made = Reading(digest, measures | self._targets(index), categories, moments=moments)
        if level < _SILENT:
            made.notes = ("silent recordings",)
        else:
            _add_gradients(made, _mels_of(wave, rate) * _GREYS_PER_LOG)
        return made

    def picture(self, index: int) -> Pixels:
        """Log-mels of what is heard, the loudest at 1: near copies look alike whatever their gain and lead."""
        mels = _mels_of(*self._wave(index))
        return np.asarray(np.clip((mels - mels.min()) * _GREYS_PER_LOG, 0, 255), np.uint8)[..., None]


class TextReader(Reader):
    kind = "texts"

    def _text(self, index: int) -> str:
        return str(self.held.source.texts(np.array([index]))[0])

    def read(self, index: int) -> Reading:
        text = self._text(index)
        num_tokens = len(self.held.tokenizer.encode_batch([text], None)[0])
        made = Reading(xxhash.xxh3_128_digest(text.encode("utf-8", "surrogatepass")))
        made.measures = {"characters": len(text), "tokens": num_tokens} | self._targets(index)
        made.bands = min_hash(letters_of(text))
        if not text.strip():
            made.notes, made.bands = ("empty texts",), None
        if num_tokens > self.held.max_length:
            made.notes = (f"texts longer than data.max_length = {self.held.max_length} tokens, which are cut",)
        return made

    def signature(self, index: int) -> Any:
        return shingles_of(letters_of(self._text(index)))

    def are_near(self, one: Any, other: Any) -> bool:
        return is_same_text(one, other)


class SampleReader(Reader):
    """Any dataset whose samples are dicts or tuples: what is found in them decides."""

    def _sample(self, index: int) -> dict[str, Any]:
        sample = getattr(self.held, "named", dict)(self.held.read(index, ChanceKey()))
        return {name: value for name, value in sample.items() if name not in ("id", "index")}

    def read(self, index: int) -> Reading:
        sample = self._sample(index)
        digest = xxhash.xxh3_128()
        absorb(digest, {name: value for name, value in sample.items() if name not in TARGETS})
        pixels = _pixels_in(sample)
        made = Reading(b"") if pixels is None else _of_pixels(pixels, {})
        made.digest, made.labels = digest.digest(), ()
        for name, value in sample.items():
            self._look_at(name, value, made)
        return made

    def _look_at(self, name: str, value: Any, made: Reading) -> None:
        if isinstance(value, Tensor):
            value = value.numpy()
        if isinstance(value, np.ndarray | np.generic) and value.size == 1:
            value = value.item()
        if name in TARGETS and isinstance(value, int | str):
            classes = self.held.schema[name].classes
            made.labels = (classes[value] if classes and isinstance(value, int) else str(value),)
        elif isinstance(value, int | float):
            made.measures[name] = float(value)
        elif isinstance(value, str):
            made.measures[f"{name}: characters"] = len(value)
        elif isinstance(value, np.ndarray) and value.dtype.kind in "biuf" and name != "image":
            made.measures[f"{name}: mean"] = float(value.mean(dtype=np.float64))

    def picture(self, index: int) -> Pixels | None:
        return _pixels_in(self._sample(index))

    def num_bytes(self, positions: Indices) -> int | None:
        columns = getattr(self.held, "columns", None)
        return sum(column[:1].nbytes for column in columns.values()) * len(positions) if columns else None


def reader_of(held: Any) -> Reader:
    """The reader for a dataset's kind."""
    readers = ((Images, ImageReader), (Clips, ClipReader), (Texts, TextReader))
    return next((reader(held) for kind, reader in readers if isinstance(held, kind)), None) or SampleReader(held)


def grey_of(pixels: Pixels) -> Pixels:
    """Shapes:  (H, W, C) → (H, W) float32, white is 255"""
    held = pixels[..., 0] if pixels.shape[2] == 1 else cv2.cvtColor(pixels[..., :3], cv2.COLOR_RGB2GRAY)
    return np.asarray(held, np.float32) / (1 if held.dtype == np.uint8 else 257)


def _of_pixels(pixels: Pixels, targets: dict[str, float]) -> Reading:
    """What any image tells, (H, W, C)."""
    pixels = np.ascontiguousarray(pixels)
    height, width = pixels.shape[:2]
    white = np.iinfo(pixels.dtype).max
    mean, deviation = (part.reshape(-1) / white for part in cv2.meanStdDev(pixels))
    made = Reading(
        xxhash.xxh3_128_digest(pixels.tobytes() + f"{pixels.shape}|{white}".encode()),
        {"width": width, "height": height, "brightness": float(mean.mean()), "contrast": float(deviation.mean())},
        {"size": f"{width} × {height}"},
        moments=np.stack([mean, mean**2 + deviation**2]),
        notes=("images of one colour",) if deviation.max() == 0 else (),
    )
    made.measures |= targets
    _add_gradients(made, grey_of(pixels))
    return made


def _add_gradients(made: Reading, grey: Pixels) -> None:
    found = gradient_hash(grey)
    if found is not None:
        made.bits, made.bands = found


def _pixels_in(sample: dict[str, Any]) -> Pixels | None:
    """The image of a sample, channels last."""
    value = sample.get("image", sample.get("input"))
    held = value.numpy() if isinstance(value, Tensor) else value
    if not isinstance(held, np.ndarray) or held.dtype != np.uint8 or held.ndim != 3:
        return None
    last = held.transpose(1, 2, 0) if held.shape[0] in (1, 3, 4) else held
    return np.ascontiguousarray(last) if last.shape[2] in (1, 3, 4) else None


def _mels_of(wave: Any, rate: int) -> Any:
    """Log-mels of what is heard, at most half a minute. Shapes: (C, T) → (32, T')."""
    mono = wave.mean(0)
    loud = np.flatnonzero(np.abs(mono) >= _HEARD * np.abs(mono).max())
    heard = mono[loud[0] : loud[-1] + 1][: _HEARD_S * rate]
    return log_mel(heard[None] / max(float(np.abs(heard).max()), 1e-9), rate, _MELS)[0]
