"""The spectrograms equal transformers' and do not depend on what else is in the batch."""

from __future__ import annotations

import numpy as np
import pytest
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

from torchkeep.data.mel import POWER_FLOOR, hertz_to_mel, log_mel, mel_filters, mel_to_hertz, num_frames


def waves(count: int, num_samples: int) -> np.ndarray:
    """Two tones in a little noise, full scale 1."""
    rng = np.random.default_rng(0)
    time = np.arange(num_samples) / 8000
    tones = np.sin(2 * np.pi * rng.uniform(100, 3000, (count, 2, 1)) * time).sum(1)
    return (0.3 * tones + 0.02 * rng.standard_normal((count, num_samples))).astype(np.float32)


@pytest.mark.parametrize(("sample_rate", "num_fft", "num_mels"), [(8000, 256, 40), (16000, 512, 40), (44100, 2048, 80)])
@pytest.mark.parametrize("low_hz", [0.0, 60.0])
def test_filters_equal_those_of_transformers(sample_rate: int, num_fft: int, num_mels: int, low_hz: float) -> None:
    ours = mel_filters(num_mels, num_fft, sample_rate, low_hz, sample_rate / 2)
    theirs = mel_filter_bank(
        num_fft // 2 + 1, num_mels, low_hz, sample_rate / 2, sample_rate, norm=None, mel_scale="htk"
    )
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, theirs.T, rtol=0, atol=1e-6)


def test_the_scale_has_an_inverse() -> None:
    hertz = np.linspace(0, 22050, 100)
    np.testing.assert_allclose(mel_to_hertz(hertz_to_mel(hertz)), hertz, atol=1e-8)


@pytest.mark.parametrize("band", [(-1.0, 4000.0), (0.0, 4001.0), (500.0, 500.0)])
def test_a_band_that_cannot_be_is_refused(band: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="a band from"):
        mel_filters(40, 256, 8000, *band)


@pytest.mark.parametrize(("sample_rate", "num_samples"), [(8000, 4321), (16000, 16000)])
def test_spectrograms_equal_those_of_transformers(sample_rate: int, num_samples: int) -> None:
    given = waves(3, num_samples)
    window_size, hop, num_fft = sample_rate // 40, sample_rate // 100, 256 if sample_rate == 8000 else 512
    theirs = [
        spectrogram(
            wave,
            window_function(window_size, "hann"),
            window_size,
            hop,
            num_fft,
            power=2.0,
            pad_mode="constant",
            mel_filters=mel_filters(40, num_fft, sample_rate, 20.0, sample_rate / 2).T.astype(np.float64),
            mel_floor=POWER_FLOOR,
            log_mel="log",
        )
        for wave in given
    ]
    ours = log_mel(given, sample_rate)
    assert ours.dtype == np.float32
    assert ours.flags.c_contiguous
    np.testing.assert_allclose(ours, np.stack(theirs), rtol=0, atol=1e-4)


def test_silence_is_the_floor() -> None:
    np.testing.assert_allclose(log_mel(np.zeros((2, 800), np.float32), 8000), np.log(POWER_FLOOR), rtol=1e-6)


@pytest.mark.parametrize("num_samples", [0, 1, 79, 80, 81, 8000])
@pytest.mark.parametrize("window_s", [0.025, 0.023125])
def test_there_is_a_frame_for_each_hop(num_samples: int, window_s: float) -> None:
    frames = log_mel(np.zeros((2, num_samples), np.float32), 8000, window_s=window_s)
    assert frames.shape == (2, 40, num_frames(num_samples, 8000)) == (2, 40, 1 + num_samples // 80)


def test_zeros_behind_a_clip_change_none_of_its_frames() -> None:
    clip = waves(1, 3001)
    padded = np.pad(clip, ((0, 0), (0, 2000)))
    alone, behind = log_mel(clip, 8000), log_mel(padded, 8000)[:, :, : num_frames(3001, 8000)]
    np.testing.assert_allclose(alone, behind, rtol=0, atol=1e-5)


def test_a_clip_has_the_same_bits_in_any_batch() -> None:
    given = waves(8, 4000)
    together = log_mel(given, 8000)
    for row in range(8):
        np.testing.assert_array_equal(log_mel(given[row : row + 1], 8000)[0], together[row])


def test_a_window_of_no_sample_is_refused() -> None:
    with pytest.raises(ValueError, match="a window of"):
        log_mel(np.zeros((1, 100), np.float32), 8000, window_s=0.0)
