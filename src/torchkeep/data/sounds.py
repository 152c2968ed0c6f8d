"""Augmentations of recordings. Every draw is a function of (seed, epoch, sample id, operation), as for images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..chance import ChanceKey, keyed_generator, keyed_uniform
from ..contracts import Sample
from ..errors import DataError, SettingsError, nearest
from .samples import called

F32 = np.ndarray[Any, np.dtype[np.float32]]
Augmentation = str | Callable[[Sample, np.random.Generator], Sample]

_SPEED = (0.85, 1.15)
_SHIFT_S = 0.1
_GAIN_DB = 6.0
_NOISE_DB = (10.0, 40.0)  # signal over noise
_MASKS = 2
_MASKED_BANDS = 1 / 6  # at most, of all bands, for each mask
_MASKED_FRAMES = 1 / 10


def random_speed(wave: F32, rng: np.random.Generator) -> F32:
    """Up to 15 % slower or faster, and so lower or higher, by linear interpolation. Shapes: (C, T) → (C, T')."""
    size = max(1, round(wave.shape[1] / rng.uniform(*_SPEED)))
    places = np.linspace(0, wave.shape[1] - 1, size)
    return np.stack([np.interp(places, np.arange(wave.shape[1]), row) for row in wave]).astype(np.float32)


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
    """White noise for every second recording, 10 to 40 dB below it; silence stays silent."""
    if rng.random() < 0.5:
        return wave
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
_SPEED_NAME, _CROP, _MASK = "random_speed", "random_crop", "spec_mask"
NAMES = (_SPEED_NAME, _CROP, *_ON_WAVES, _MASK)


@dataclass(frozen=True)
class SoundAugmentations:
    """The speed first, then the crop, those on waves in the order of the list, the mask on log-mels, and callables.

    Raises:  SettingsError for an unknown name, and for a mask where there are no log-mels
    """

    entries: tuple[Augmentation, ...] = ()
    has_mels: bool = True

    def __post_init__(self) -> None:
        for entry in self.entries:
            if not callable(entry) and entry not in NAMES:
                raise SettingsError(
                    "unknown augmentation of recordings", where="augment", got=repr(entry),
                    expected=f"one of {', '.join(NAMES)}, or in Python a callable (sample, rng)",
                    fix=nearest(str(entry), list(NAMES)),
                )  # fmt: skip
        if _MASK in self.entries and not self.has_mels:
            raise SettingsError(
                "spec_mask masks log-mels", where="augment", got='features = "waveform"',
                expected='features = "log_mel"',
            )  # fmt: skip

    @property
    def has_callable(self) -> bool:
        return any(callable(entry) for entry in self.entries)

    def change_speed(self, wave: F32, key: ChanceKey, index: int) -> F32:
        """Before anything has a fixed length. Shapes: (C, T) → (C, T')"""
        if _SPEED_NAME not in self.entries:
            return wave
        return random_speed(wave, keyed_generator(key, _operation(_SPEED_NAME), index))

    def crop_start(self, spare: int, key: ChanceKey, index: int) -> int:
        """Where a recording that is ``spare`` samples longer is cut, or one that is shorter is placed.

        With "random_crop" anywhere; else about the middle, and at the beginning.
        """
        if _CROP not in self.entries:
            return max(spare, 0) // 2
        spare = abs(spare)
        return int(keyed_uniform(key, _operation(_CROP), np.array([index]))[0, 0] * (spare + 1))

    def apply_to_wave(self, wave: F32, key: ChanceKey, index: int, sample_rate: int) -> F32:
        """Shapes:  (C, T) → (C, T)"""
        for name, operation in self._operations():
            if name in _ON_WAVES:
                wave = _ON_WAVES[name](wave, keyed_generator(key, operation, index), sample_rate)
        return wave

    def apply_to_mel(self, mel: F32, key: ChanceKey, index: int) -> F32:
        """Shapes:  (M, T) → (M, T)"""
        for name, operation in self._operations():
            if name == _MASK:
                mel = spec_mask(mel, keyed_generator(key, operation, index))
        return mel

    def apply_callables(self, sample: Sample, key: ChanceKey, index: int, where: str) -> Sample:
        """A user's own, each with its generator.

        Raises:  DataError where one returns something else than a sample with such a recording
        """
        for place, entry in enumerate(self.entries):
            if callable(entry):
                kind = sample["audio"].shape[:-1]
                sample = called(entry, sample, keyed_generator(key, _operation(f"callable/{place}"), index), where)
                _check_sample(sample, kind, entry)
        return sample

    def _operations(self) -> Iterator[tuple[str, str]]:
        """The named entries, each with what keys its draws: a second one of a name draws apart from the first."""
        names = [entry for entry in self.entries if isinstance(entry, str)]
        for place, name in enumerate(names):
            earlier = names[:place].count(name)
            yield name, _operation(f"{name}/{earlier}" if earlier else name)


def _check_sample(sample: Any, kind: tuple[int, ...], entry: Any) -> None:
    audio = sample.get("audio") if isinstance(sample, dict) else None
    if isinstance(audio, Tensor) and audio.dtype == torch.float32 and audio.shape[:-1] == kind:
        return
    got = type(sample).__name__ if not isinstance(sample, dict) else f"'audio' of {type(audio).__name__}"
    raise DataError(
        "an augmentation returns something else than a sample",
        where=getattr(entry, "__qualname__", repr(entry)),
        got=f"'audio' of {audio.dtype} {tuple(audio.shape)}" if isinstance(audio, Tensor) else got,
        expected=f"a dict whose 'audio' is a float32 tensor ({', '.join([*map(str, kind), 'T'])})",
    )


def _operation(name: str) -> str:
    return f"sound/{name}"
