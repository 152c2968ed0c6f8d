"""What a survey reads of one sample, by its kind: values, its content's digest, and a hash that near copies share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import xxhash
from torch import Tensor

from ..chance import ChanceKey
from .audio import Clips
from .dataset import Indices
from .decode import Pixels
from .duplicates import Array, U64, gradient_hash, min_hash, shingles_of, thumb_of
from .images import Images
from .mel import log_mel
from .samples import TARGETS, absorb
from .text import Texts

_HEARD_S, _HEARD = 30, 0.02  # what is compared of a recording: from where it reaches this share of its peak
_SILENT = 1e-4
_MELS = 32
_GREYS_PER_LOG = 255 / 14  # log-mels reach from -14 to a little above 0


@dataclass
class Reading:
    """One sample. ``moments``, (2, C), are mean and mean square of each channel; ``labels`` None where data say them."""

    digest: bytes
    values: dict[str, float | str]
    hash: U64 | None = None
    moments: Array | None = None
    note: str = ""
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

    def num_bytes(self, positions: Indices) -> int | None:
        """What is stored of these samples, where that is known."""
        if columns := getattr(self.held, "columns", None):
            return sum(column[:1].nbytes for column in columns.values()) * len(positions)
        blobs = getattr(self.held, "blobs", None) or getattr(self.held, "source", None)
        sizes = getattr(blobs, "sizes_bytes", None)
        return None if sizes is None else int(np.asarray(sizes)[positions].clip(0).sum())

    def signature(self, index: int) -> Array | None:
        """What near copies are compared by."""
        picture = self.picture(index)
        return None if picture is None else thumb_of(_grey_of(picture))

    def picture(self, index: int) -> Pixels | None:
        """What a contact sheet shows of a sample, (H, W, C) uint8; None where nothing can be shown."""
        return _pixels_in(self._sample(index))

    def read(self, index: int) -> Reading:
        """Raises:  BadSampleError"""
        sample = self._sample(index)
        digest, pixels = xxhash.xxh3_128(), _pixels_in(sample)
        absorb(digest, {name: value for name, value in sample.items() if name not in TARGETS})
        made = Reading(b"", {}) if pixels is None else _of_pixels(pixels)
        made.digest, made.labels = digest.digest(), ()
        for name, value in sample.items():
            value = value.detach().numpy() if isinstance(value, Tensor) else value
            value = value.item() if isinstance(value, np.ndarray | np.generic) and value.size == 1 else value
            if name in TARGETS and isinstance(value, int | str):
                classes = self.held.schema[name].classes
                made.labels = (classes[value] if classes and isinstance(value, int) else str(value),)
            elif isinstance(value, int | float):
                made.values[name] = float(value)
            elif isinstance(value, np.ndarray) and value.dtype.kind in "biuf" and name != "image":
                made.values[f"{name}: mean"] = float(value.mean(dtype=np.float64))
        return made

    def _sample(self, index: int) -> dict[str, Any]:
        sample = getattr(self.held, "named", dict)(self.held.read(index, ChanceKey()))
        return {name: value for name, value in sample.items() if name not in ("id", "index")}


class ImageReader(Reader):
    kind = "images"

    def read(self, index: int) -> Reading:
        if "mask" in self.held.schema:
            self.held.read(index, ChanceKey())  # raises where the mask cannot be used
        return _of_pixels(self.held.decoded(index))

    def picture(self, index: int) -> Pixels:
        pixels = self.held.decoded(index)
        return np.asarray(pixels if pixels.dtype == np.uint8 else pixels >> 8, np.uint8)


class ClipReader(Reader):
    kind = "recordings"

    def read(self, index: int) -> Reading:
        wave, rate = self.held._decoded(index, "")
        moments = np.array([[wave.mean()], [np.square(wave).mean()]])
        level = float(np.sqrt(moments[1, 0]))
        digest = xxhash.xxh3_128_digest(wave.tobytes() + f"{wave.shape}|{rate}".encode())
        values = {"seconds": wave.shape[1] / rate, "level dB": 20 * np.log10(max(level, 1e-9)), "rate": f"{rate:,} Hz"}
        if level < _SILENT:
            return Reading(digest, values, None, moments, "silent recordings")
        return Reading(digest, values, gradient_hash(_mels_of(wave, rate) * _GREYS_PER_LOG), moments)

    def picture(self, index: int) -> Pixels:
        """Log-mels of what is heard, the loudest at 1: near copies look alike whatever their gain and lead."""
        mels = _mels_of(*self.held._decoded(index, ""))
        return np.asarray(np.clip((mels - mels.min()) * _GREYS_PER_LOG, 0, 255), np.uint8)[..., None]


class TextReader(Reader):
    kind = "texts"

    def _text(self, index: int) -> str:
        return str(self.held.source.texts(np.array([index]))[0])

    def read(self, index: int) -> Reading:
        text = self._text(index)
        num_tokens = len(self.held.tokenizer.encode_batch([text], None)[0])
        made = Reading(xxhash.xxh3_128_digest(text.encode("utf-8", "surrogatepass")), {"characters": len(text)})
        made.values["tokens"] = num_tokens
        made.note, made.hash = ("", min_hash(text)) if text.strip() else ("empty texts", None)
        return made

    def signature(self, index: int) -> Array:
        return shingles_of(self._text(index))

    def picture(self, index: int) -> None:
        return None


def reader_of(held: Any) -> Reader:
    """The reader for a dataset's kind; of others, whose samples are dicts or tuples, what is found in them decides."""
    readers = ((Images, ImageReader), (Clips, ClipReader), (Texts, TextReader))
    return next((reader(held) for kind, reader in readers if isinstance(held, kind)), None) or Reader(held)


def _of_pixels(pixels: Pixels) -> Reading:
    """What any image tells, (H, W, C)."""
    pixels = np.ascontiguousarray(pixels)
    height, width = pixels.shape[:2]
    white = np.iinfo(pixels.dtype).max
    mean, deviation = (part.reshape(-1) / white for part in cv2.meanStdDev(pixels))
    digest = xxhash.xxh3_128_digest(pixels.tobytes() + f"{pixels.shape}|{white}".encode())
    values: dict[str, float | str] = {
        "width": width, "height": height, "brightness": float(mean.mean()), "contrast": float(deviation.mean()),
        "size": f"{width} × {height}",
    }  # fmt: skip
    note = "images of one colour" if deviation.max() == 0 else ""
    return Reading(digest, values, gradient_hash(_grey_of(pixels)), np.stack([mean, mean**2 + deviation**2]), note)


def _grey_of(pixels: Pixels) -> Pixels:
    """Shapes:  (H, W, C) → (H, W) float32, white is 255"""
    held = pixels[..., 0] if pixels.shape[2] == 1 else cv2.cvtColor(pixels[..., :3], cv2.COLOR_RGB2GRAY)
    return np.asarray(held, np.float32) / (1 if held.dtype == np.uint8 else 257)


def _pixels_in(sample: dict[str, Any]) -> Pixels | None:
    """The image of a sample, channels last."""
    value = sample.get("image", sample.get("input"))
    held = value.numpy() if isinstance(value, Tensor) and not value.is_floating_point() else value
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
