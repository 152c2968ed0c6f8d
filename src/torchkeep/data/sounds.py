"""Augmentations of recordings. Every draw is a function of (seed, epoch, sample id, operation), as for images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..chance import ChanceKey, keyed_generator, keyed_uniform
from ..contracts import Sample
from ..errors import SettingsError, nearest

F32 = np.ndarray[Any, np.dtype[np.float32]]
Augmentation = str | Callable[[Sample, np.random.Generator], Sample]

_SHIFT_S = 0.1
_GAIN_DB = 6.0
_NOISE_DB = (10.0, 40.0)  # signal over noise
_MASKS = 2
_MASKED_BANDS = 1 / 6  # at most, of all bands, for each mask
_MASKED_FRAMES = 1 / 6


def random_shift(wave: F32, rng: np.random.Generator, sample_rate: int) -> F32:
    """Moved by up to 0.1 s either way; silence comes in. Shapes: (C, T) → (C, T)."""
    most = min(round(_SHIFT_S * sample_rate), wave.shape[1])
    by = int(rng.integers(-most, most + 1))
    moved = np.zeros_like(wave)
    if by >= 0:
        moved[:, by:] = wave[:, : wave.shape[1] - by]
    else:
        moved[:, :by] = wave[:, -by:]
    return moved


def random_gain(wave: F32, rng: np.random.Generator, sample_rate: int) -> F32:
    """Louder or softer by up to 6 dB."""
    return wave * np.float32(10 ** (rng.uniform(-_GAIN_DB, _GAIN_DB) / 20))


def random_noise(wave: F32, rng: np.random.Generator, sample_rate: int) -> F32:
    """White noise, 10 to 40 dB below the recording; silence stays silent."""
    level = np.sqrt(np.mean(np.square(wave))) * 10 ** (-rng.uniform(*_NOISE_DB) / 20)
    return wave + np.float32(level) * rng.standard_normal(wave.shape, np.float32)


def spec_mask(mel: F32, rng: np.random.Generator) -> F32:
    """Two stretches of bands and two of frames take the clip's mean. Shapes: (M, T) → (M, T).

    Source:  Park et al. 2019 (arXiv 1904.08779), "SpecAugment", sections 2.2 and 2.3
    """
    masked, fill = mel.copy(), mel.mean()
    for axis, most in ((0, _MASKED_BANDS), (1, _MASKED_FRAMES)):
        size = mel.shape[axis]
        for _ in range(_MASKS):
            width = int(rng.integers(0, int(most * size) + 1))
            start = int(rng.integers(0, size - width + 1))
            masked[(slice(None),) * axis + (slice(start, start + width),)] = fill
    return masked


_ON_WAVES = {"random_shift": random_shift, "random_gain": random_gain, "random_noise": random_noise}
_CROP, _MASK = "random_crop", "spec_mask"
NAMES = (_CROP, *_ON_WAVES, _MASK)


@dataclass(frozen=True)
class SoundAugmentations:
    """Names in the order of the list: those on waves first, then the mask on log-mels, then callables.

    Raises:  SettingsError for an unknown name, and for a mask where there are no log-mels
    """

    entries: tuple[Augmentation, ...] = ()
    has_mels: bool = True

    def __post_init__(self) -> None:
        for entry in self.entries:
            if not callable(entry) and entry not in NAMES:
                raise SettingsError(
                    "unknown augmentation of recordings",
                    where="augment",
                    got=repr(entry),
                    expected=f"one of {', '.join(NAMES)}, or in Python a callable (sample, rng)",
                    fix=nearest(str(entry), list(NAMES)),
                )
        if _MASK in self.entries and not self.has_mels:
            raise SettingsError(
                "spec_mask masks log-mels",
                where="augment",
                got='features = "waveform"',
                expected='features = "log_mel"',
            )

    @property
    def has_callable(self) -> bool:
        return any(callable(entry) for entry in self.entries)

    def crop_start(self, spare: int, key: ChanceKey, index: int) -> int:
        """Where a longer recording is cut: about its middle, or anywhere with "random_crop"."""
        if _CROP not in self.entries:
            return spare // 2
        return int(keyed_uniform(key, _operation(_CROP), np.array([index]))[0, 0] * (spare + 1))

    def apply_to_wave(self, wave: F32, key: ChanceKey, index: int, sample_rate: int) -> F32:
        """Shapes:  (C, T) → (C, T)"""
        for name in self._named(_ON_WAVES):
            wave = _ON_WAVES[name](wave, keyed_generator(key, _operation(name), index), sample_rate)
        return wave

    def apply_to_mel(self, mel: F32, key: ChanceKey, index: int) -> F32:
        """Shapes:  (M, T) → (M, T)"""
        if _MASK in self.entries:
            return spec_mask(mel, keyed_generator(key, _operation(_MASK), index))
        return mel

    def apply_callables(self, sample: Sample, key: ChanceKey, index: int) -> Sample:
        """A user's own, each with its generator."""
        for place, entry in enumerate(self.entries):
            if callable(entry):
                sample = entry(sample, keyed_generator(key, _operation(f"callable/{place}"), index))
        return sample

    def _named(self, known: Sequence[str] | dict[str, Any]) -> list[str]:
        return [entry for entry in self.entries if isinstance(entry, str) and entry in known]


def _operation(name: str) -> str:
    return f"sound/{name}"
