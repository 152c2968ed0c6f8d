"""Augmentations of recordings: keyed by seed, epoch and sample, and as far as their definitions say."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from test_audio import RATE, clips, noises, peak_hz, tone

from torchkeep.chance import ChanceKey, keyed_generator
from torchkeep.data.audio import Clips
from torchkeep.data.loader import Loader
from torchkeep.data.sounds import NAMES, random_gain, random_noise, random_shift, random_speed, spec_mask
from torchkeep.errors import DataError, SettingsError


@pytest.mark.parametrize("name", NAMES)
def test_augmentation_is_keyed(name: str) -> None:
    options: dict[str, Any] = {"seconds": 0.2}
    data, plain = clips(noises(4), augment=[name], **options), clips(noises(4), **options)
    for index in range(4):
        first = data.read(index, ChanceKey(1, 0))["audio"]
        assert torch.equal(first, data.read(index, ChanceKey(1, 0))["audio"])
        assert torch.equal(
            data.without_augmentation().read(index, ChanceKey(1, 0))["audio"], plain.read(index, ChanceKey())["audio"]
        )
    for other in (ChanceKey(1, 1), ChanceKey(2, 0)):
        assert any(
            not torch.equal(data.read(i, other)["audio"], data.read(i, ChanceKey(1, 0))["audio"]) for i in range(4)
        )
    batch = data.read_batch(np.array([3, 1]), ChanceKey(1, 5))
    assert batch is not None
    assert (batch["audio"][0] - data.read(3, ChanceKey(1, 5))["audio"]).abs().max() <= 1e-5


def rngs(count: int) -> list[np.random.Generator]:
    return [keyed_generator(ChanceKey(), "test", number) for number in range(count)]


def test_a_shift_moves_by_up_to_a_tenth_of_a_second_and_lets_silence_in() -> None:
    wave = np.zeros((1, 8000), np.float32)
    wave[0, 4000] = 1
    places = np.array([random_shift(wave, rng, RATE)[0].argmax() for rng in rngs(2000)]) - 4000
    assert -1600 <= places.min() < -1500
    assert 1500 < places.max() <= 1600
    assert abs(places.mean()) < 4 * 924 / 2000**0.5  # the deviation of a uniform draw over 3201 places is 924
    ones = [random_shift(np.ones((2, 900), np.float32), rng, RATE) for rng in rngs(50)]
    assert all(((one == 0) | (one == 1)).all() and (one[0] == one[1]).all() for one in ones)
    assert min(one.mean() for one in ones) < 0.1  # a clip shorter than the shift may leave altogether


def test_a_gain_is_uniform_in_decibels() -> None:
    wave = np.ones((1, 10), np.float32)
    levels = np.array([20 * np.log10(random_gain(wave, rng, RATE)[0, 0]) for rng in rngs(2000)])
    assert -6 <= levels.min() < -5.9
    assert 5.9 < levels.max() <= 6
    assert abs(levels.mean()) < 4 * 12 / 12**0.5 / 2000**0.5


def test_noise_is_10_to_40_decibels_below_the_recording() -> None:
    wave = tone()[None]
    added = [random_noise(wave, rng, RATE) - wave for rng in rngs(800)]
    noisy = [noise for noise in added if noise.any()]
    assert abs(len(noisy) - 400) < 4 * (800 / 4) ** 0.5  # every second recording stays as it is
    ratios = [10 * np.log10(np.square(wave).mean() / np.square(noise).mean()) for noise in noisy]
    assert 9.7 < min(ratios) < 11
    assert 39 < max(ratios) < 40.3
    assert abs(np.mean(ratios) - 25) < 4 * 30 / 12**0.5 / 350**0.5
    assert abs(np.corrcoef(noisy[0][0, :-1], noisy[0][0, 1:])[0, 1]) < 0.05  # white: a sample says nothing of the next


def test_a_mask_takes_up_to_two_sixths_of_bands_and_two_tenths_of_frames() -> None:
    mel = np.random.default_rng(0).normal(size=(60, 120)).astype(np.float32)
    bands, frames = [], []
    for rng in rngs(500):
        masked = spec_mask(mel, rng)
        filled = masked == mel.mean()
        bands.append(int(filled.all(1).sum()))
        frames.append(int(filled.all(0).sum()))
        rest = masked[~filled.all(1)][:, ~filled.all(0)]
        assert np.array_equal(rest, mel[~filled.all(1)][:, ~filled.all(0)])
    assert max(bands) <= 20
    assert max(frames) <= 24
    assert max(bands) > 16
    assert max(frames) > 20
    # two widths, uniform in 0 … 10 and 0 … 12; they overlap now and then
    assert 8 < np.mean(bands) <= 10.5
    assert 10 < np.mean(frames) <= 12.5


def test_a_crop_may_begin_anywhere() -> None:
    ramp = np.arange(4000, dtype=np.float32) / 4000
    data = clips([ramp] * 400, seconds=0.125, features="waveform", augment=["random_crop"])
    starts = np.array([round(float(data.read(i, ChanceKey(0, 0))["audio"][0]) * 4000) for i in range(400)])
    assert 0 <= starts.min() < 50
    assert 1950 < starts.max() <= 2000
    assert abs(starts.mean() - 1000) < 4 * 2000 / 12**0.5 / 400**0.5
    assert data.without_augmentation()[0]["audio"][0] == ramp[1000]
    ones = clips([np.ones(1000, np.float32)] * 400, seconds=0.125, features="waveform", augment=["random_crop"])
    starts = np.array([int(ones.read(i, ChanceKey(0, 0))["audio"].argmax()) for i in range(400)])
    assert all(float(ones.read(i, ChanceKey(0, 0))["audio"].sum()) == 1000 for i in range(4))
    assert 0 <= starts.min() < 25
    assert 975 < starts.max() <= 1000
    assert ones.without_augmentation()[0]["audio"][:1000].min() == 1


def test_a_speed_changes_length_and_pitch_by_up_to_15_percent() -> None:
    wave = np.stack([tone(440, 1.0), tone(880, 1.0)])
    changed = [random_speed(wave, rng) for rng in rngs(300)]
    factors = np.array([RATE / one.shape[1] for one in changed])
    assert 0.85 <= factors.min() < 0.86
    assert 1.14 < factors.max() <= 1.1501
    assert abs(factors.mean() - 1) < 4 * 0.3 / 12**0.5 / 300**0.5
    for one, factor in zip(changed[:5], factors, strict=False):
        assert one.dtype == np.float32
        assert [peak_hz(row, RATE) for row in one] == [
            pytest.approx(440 * factor, abs=2),
            pytest.approx(880 * factor, abs=2),
        ]
    data = clips([tone(440, 0.5)], seconds=0.5, features="waveform", augment=["random_speed"])
    assert {len(data.read(0, ChanceKey(0, epoch))["audio"]) for epoch in range(5)} == {8000}


def test_a_second_entry_of_a_name_draws_apart() -> None:
    def level(augment: list[str], index: int) -> float:
        data = clips([np.ones(200, np.float32)] * 8, features="waveform", augment=augment)
        return 20 * math.log10(float(data.read(index, ChanceKey(4))["audio"][0]))

    once = [level(["random_gain"], i) for i in range(8)]
    twice = [level(["random_gain", "random_gain"], i) for i in range(8)]
    assert not np.allclose(np.array(twice), 2 * np.array(once), atol=0.1)


def louder(sample: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    return sample | {"audio": sample["audio"] + float(rng.uniform(1, 2))}


def test_a_callable_gets_the_sample_and_a_keyed_generator() -> None:
    data = clips(noises(3), augment=[louder])
    assert not data.threads
    plain = data.without_augmentation()
    added = [data.read(0, ChanceKey(0, epoch))["audio"] - plain.read(0, ChanceKey())["audio"] for epoch in (0, 0, 1)]
    assert torch.equal(added[0], added[1])
    assert not torch.equal(added[0], added[2])
    assert 1 <= float(added[0].mean()) <= 2
    assert next(iter(Loader(data, 3, workers=0)))["audio"].shape[0] == 3
    for wrong in (lambda sample, rng: None, lambda sample, rng: sample | {"audio": sample["audio"].numpy()}):
        with pytest.raises(DataError, match="returns something else"):
            clips(noises(1), augment=[wrong])[0]


@pytest.mark.parametrize(
    ("augment", "features", "fragment"),
    [(["spec_masc"], "log_mel", "'spec_mask'"), (["spec_mask"], "waveform", "log_mel")],
)
def test_augmentations_that_cannot_be(augment: list[str], features: Any, fragment: str) -> None:
    with pytest.raises(SettingsError) as caught:
        clips([tone()], augment=augment, features=features)
    assert fragment in caught.value.said()
    assert isinstance(clips([tone()]), Clips)
