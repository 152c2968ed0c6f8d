"""Sounds and texts."""

from __future__ import annotations

import io
import wave
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..contracts import Json
from ..errors import DataError
from .kept import Kept, numbers
from .media import Late, MediaStore

_MOST_CHARACTERS = 100_000
_PIECE = 1 << 20
_MOST_RATE = 1 << 24
_MOST_BYTES = 1 << 31  # half of what the format can say


def audio(samples: Any, sample_rate: float, caption: str = "") -> Late:
    """Sound as 16-bit PCM: floats in -1 … 1, of which louder ones are clipped, or integers of any width.

    Shapes:  samples (T,), (1, T) or (2, T); (T, 1) and (T, 2) too
    Units:   ``sample_rate`` in hertz
    Raises:  DataError for no samples, another shape or a rate that no file can have
    """
    values = numbers(samples, "audio")
    shape = tuple(values.shape)
    is_known = len(shape) == 1 or (len(shape) == 2 and min(shape) in (1, 2))
    if not is_known or 0 in shape or 2 * np.prod(shape, dtype=float) > _MOST_BYTES:
        raise DataError(
            "this is no sound", where="audio", got=f"shape {shape}",
            expected="samples (T,), (1, T) or (2, T), T at least 1, at most 2 GiB of 16 bits",
        )  # fmt: skip
    try:
        rate = int(sample_rate)
    except (TypeError, ValueError, OverflowError):
        rate = 0
    if not 0 < rate < _MOST_RATE:
        raise DataError("this is no sample rate", where="audio", got=sample_rate, expected="hertz, such as 16000")
    return _Sound(Kept(values), rate, str(caption))


@dataclass(frozen=True)
class _Sound:
    kept: Kept
    rate: int
    caption: str

    def settle(self, media: MediaStore) -> dict[str, Json]:
        values = self.kept.array()
        values = values[None] if values.ndim == 1 else values if len(values) <= 2 else values.T
        pcm, note = _sixteen_bit(values)
        file = io.BytesIO()
        with wave.open(file, "wb") as target:
            target.setnchannels(len(pcm))
            target.setsampwidth(2)
            target.setframerate(self.rate)
            target.writeframes(np.ascontiguousarray(pcm.T).data)
        seconds = pcm.shape[1] / self.rate
        caption = "; ".join(filter(None, (self.caption, note)))
        name = media.put(file.getbuffer(), ".wav")
        return {"media": name, "sample_rate": self.rate, "seconds": seconds, "caption": caption}


def _sixteen_bit(values: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], str]:
    """The samples as int16, and what had to be changed."""
    kind, bits = values.dtype.kind, 8 * values.dtype.itemsize
    if kind == "b":
        values, kind = values.astype(np.float32), "f"
    if kind != "f":
        signed = values.astype(np.float64) - (2.0 ** (bits - 1) if kind == "u" else 0)
        return np.clip(np.floor(signed * 2.0 ** (16 - bits)), -32768, 32767).astype("<i2"), ""
    num_nan, num_loud = np.count_nonzero(np.isnan(values)), np.count_nonzero(np.abs(values) > 1)
    notes = [f"{num_nan:,} samples are NaN, silent here"] if num_nan else []
    notes += [f"{num_loud:,} samples beyond ±1 are clipped"] if num_loud else []
    return (np.clip(np.nan_to_num(values), -1, 1) * 32767).round().astype("<i2"), "; ".join(notes)


def text(value: Any) -> Late:
    """A text, or what ``str`` makes of anything else; beyond 100,000 characters the whole is a file.

    Raises:  DataError where ``str`` fails
    """
    try:
        return _Text(str(value))
    except Exception as error:  # of a foreign __str__
        raise DataError("this has no text", where="text", got=f"{type(value).__name__}: {error}") from None


@dataclass(frozen=True)
class _Text:
    whole: str

    def settle(self, media: MediaStore) -> dict[str, Json]:
        shown, size = self.whole[:_MOST_CHARACTERS], len(self.whole)
        name = None
        if size > _MOST_CHARACTERS:
            file = io.BytesIO()
            for start in range(0, size, _PIECE):  # at once it would take three bytes a character
                file.write(_encoded(self.whole[start : start + _PIECE]))
            name = media.put(file.getbuffer(), ".txt")
        return {"text": _encoded(shown).decode(), "num_characters": size, "media": name}


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "replace")  # half of a surrogate pair is "?"
