"""Log-mel spectrograms in NumPy, a batch in one transform: they are made in loader threads, where torch has no part."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from ..packages import package_of

F32 = np.ndarray[Any, np.dtype[np.float32]]
F64 = np.ndarray[Any, np.dtype[np.float64]]

POWER_FLOOR = 1e-6
"""The least power of a band, about 95 dB below a full-scale sine in a window of 200 samples; silence is its logarithm.
Down to there float32 transforms are within 1e-3 of float64 ones in the logarithm, also beside such a sine."""


def hertz_to_mel(hertz: F64) -> F64:
    """HTK's scale, equal steps of which are heard as about equal."""
    return 2595.0 * np.log10(1.0 + hertz / 700.0)


def mel_to_hertz(mel: F64) -> F64:
    """The inverse of ``hertz_to_mel``."""
    return 700.0 * (10.0 ** (mel / 2595.0) - 1.0)


@lru_cache(maxsize=16)
def mel_filters(num_mels: int, num_fft: int, sample_rate: int, low_hz: float, high_hz: float) -> F32:
    """Triangles of height 1 whose corners are equally far apart on HTK's mel scale. The array is not to be written to.

    A triangle that is narrower than the distance of two bins may hold none: then its row is 0.

    Shapes:  float32 (M, F), F = num_fft // 2 + 1
    Raises:  ValueError unless 0 <= low_hz < high_hz <= sample_rate / 2
    Source:  Young et al. 2006, "The HTK book", §5.4; transformers' mel_filter_bank with mel_scale="htk", norm=None
    """
    if not 0 <= low_hz < high_hz <= sample_rate / 2:
        raise ValueError(f"a band from {low_hz} to {high_hz} Hz at {sample_rate} samples a second")
    low, high = hertz_to_mel(np.array([low_hz, high_hz]))
    corners = mel_to_hertz(np.linspace(low, high, num_mels + 2))[:, None]
    bins = np.fft.rfftfreq(num_fft, 1 / sample_rate)
    rising = (bins - corners[:-2]) / (corners[1:-1] - corners[:-2])
    falling = (corners[2:] - bins) / (corners[2:] - corners[1:-1])
    filters = np.maximum(0.0, np.minimum(rising, falling)).astype(np.float32)
    filters.flags.writeable = False
    return filters


def num_frames(num_samples: int, sample_rate: int, hop_s: float = 0.010) -> int:
    """How many frames ``log_mel`` gives: one about every hop from the first sample on, ``1 + T // hop``."""
    return 1 + num_samples // round(hop_s * sample_rate)


def log_mel(
    waves: F32, sample_rate: int, num_mels: int = 40, window_s: float = 0.025, hop_s: float = 0.010,
    low_hz: float = 20.0,
) -> F32:  # fmt: skip
    """The natural logarithm of the power in each mel band, from ``low_hz`` to half the sample rate.

    Frame t is a periodic Hann window about sample ``t * hop``. The wave is 0 before its start and after its end, so
    that a clip has the same frames however many zeros follow it: ``num_frames(length)`` of them are its own.

    Shapes:  waves float32 (B, T) → float32 (B, M, 1 + T // hop), hop = round(hop_s * sample_rate)
    Units:   full scale is 1; not below log(POWER_FLOOR) = -13.8
    Raises:  ValueError for a window or a hop of less than a sample
    """
    window_size, hop = round(window_s * sample_rate), round(hop_s * sample_rate)
    if window_size < 1 or hop < 1:
        raise ValueError(f"a window of {window_s} s and a hop of {hop_s} s at {sample_rate} samples a second")
    num_fft = 1 << (window_size - 1).bit_length()
    filters = mel_filters(num_mels, num_fft, sample_rate, low_hz, sample_rate / 2)
    # SciPy's transform takes several frames into one vector register: 34 µs a second of sound, NumPy's 134
    spectra = package_of("scipy.fft", "audio").rfft(_frames(waves, window_size, hop) * _hann(window_size), n=num_fft)
    power = (spectra.real**2 + spectra.imag**2).astype(np.float32, copy=False)
    # a product for each clip: one of (B * frames, F) would round by the size of the batch, this one only by the longest
    # clip's frames; in the order of memory, for a transposed matrix wakes all of OpenBLAS's threads: 496 ms, not .35
    bands = np.matmul(power, np.ascontiguousarray(filters.T))
    logarithms = np.log(np.maximum(bands, np.float32(POWER_FLOOR)))
    return np.ascontiguousarray(logarithms.swapaxes(1, 2))


def _frames(waves: F32, window_size: int, hop: int) -> F32:
    """Overlapping views of the padded waves. Shapes: (B, T) → (B, 1 + T // hop, window_size)."""
    before = window_size // 2
    padded = np.pad(waves, ((0, 0), (before, window_size - before)))
    views: F32 = np.lib.stride_tricks.sliding_window_view(padded, window_size, axis=1)
    return views[:, ::hop]


@lru_cache(maxsize=16)
def _hann(size: int) -> F32:
    """The periodic window: one period of a raised cosine (Harris 1978, §V.C)."""
    window: F32 = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / size)).astype(np.float32)
    window.flags.writeable = False
    return window
