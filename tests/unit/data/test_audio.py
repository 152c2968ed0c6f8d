"""Recordings: decoded at any depth and rate, the same alone and in a batch, damage said, augmentation keyed."""

from __future__ import annotations

import math
import struct
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from torchkeep.chance import ChanceKey
from torchkeep.data.audio import AudioFolder, AudioTable, decode_audio
from torchkeep.data.loader import Loader
from torchkeep.data.sounds import NAMES
from torchkeep.errors import BadSampleError, DataError, SettingsError

RATE = 16_000


def tone(hertz: float = 440, seconds: float = 0.5, rate: int = RATE) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def encoded(wave: np.ndarray, rate: int = RATE, form: str = "WAV", subtype: str = "PCM_16") -> bytes:
    held = BytesIO()
    soundfile.write(held, wave, rate, format=form, subtype=subtype)
    return held.getvalue()


def clips(waves: list[np.ndarray], rate: int = RATE, **options: Any) -> AudioTable:
    cells = [encoded(wave, rate, subtype="FLOAT") for wave in waves]
    frame = pa.table({"audio": cells, "label": ["ab"[i % 2] for i in range(len(waves))]})
    return AudioTable(frame, **options)


def noises(count: int, longest: float = 1.0) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.normal(0, 0.1, int(size)).astype(np.float32) for size in rng.integers(200, longest * RATE, count)]


def peak_hz(wave: np.ndarray, rate: int) -> float:
    spectrum = np.abs(np.fft.rfft(wave * np.hanning(len(wave))))
    return float(spectrum.argmax() * rate / len(wave))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(6):
        path = tmp_path / "digits" / f"{number % 3}_{('anna', 'bert')[number % 2]}_{number}.wav"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encoded(tone(200 + 50 * number, 0.1 + 0.02 * number)))
    return tmp_path / "digits"


# --- decoding


@pytest.mark.parametrize(
    ("form", "subtype", "error"),
    [
        ("WAV", "PCM_U8", 1 / 128),
        ("WAV", "PCM_16", 2**-15),
        ("WAV", "PCM_24", 2**-23),
        ("WAV", "PCM_32", 2**-24),
        ("WAV", "FLOAT", 0),
        ("FLAC", "PCM_16", 2**-15),
        ("FLAC", "PCM_24", 2**-23),
        ("OGG", "VORBIS", 0.05),
    ],
)
def test_every_depth_has_the_same_scale(form: str, subtype: str, error: float) -> None:
    stored = tone(440, 2.0)
    wave, rate = decode_audio(encoded(stored, RATE, form, subtype), "x")
    assert (rate, wave.shape, wave.dtype) == (RATE, (1, len(stored)), np.float32)
    assert np.abs(wave[0] - stored).max() <= error


@pytest.mark.parametrize("channels", [1, 2])
def test_the_usual_wav_is_read_as_soundfile_reads_it(channels: int) -> None:
    stored = np.random.default_rng(channels).integers(-32768, 32768, (5000, channels)).astype(np.int16)
    data = encoded(stored)
    wave, rate = decode_audio(data, "x")
    wanted, _ = soundfile.read(BytesIO(data), dtype="float32", always_2d=True)
    assert (rate, wave.shape) == (RATE, (channels, 5000))
    assert np.array_equal(wave, wanted.T)
    assert np.array_equal(decode_audio(data + b"LIST\0\0\0\0", "x")[0], wave)  # not the usual one


@pytest.mark.parametrize("stored", [8_000, 22_050, 44_100, 48_000])
def test_a_tone_keeps_its_pitch_at_another_rate(stored: int) -> None:
    data = clips([tone(440, 1.0, stored)], stored, sample_rate=RATE, features="waveform")
    audio = data[0]["audio"].numpy()
    assert abs(len(audio) - RATE) <= 1
    assert abs(peak_hz(audio, RATE) - 440) <= 1
    assert abs(np.abs(audio[1000:-1000]).max() - 0.5) < 0.01
    own = clips([tone(440, 1.0, stored)], stored, features="waveform")
    assert own.sample_rate == stored
    assert torch.equal(own[0]["audio"], torch.from_numpy(tone(440, 1.0, stored)))


def test_channels_are_one_two_or_mixed() -> None:
    stereo = np.stack([tone(440), tone(880)], 1)
    with pytest.raises(BadSampleError, match="other channels than stated") as caught:
        clips([stereo])
    assert (caught.value.got, caught.value.expected) == ("2 channels", "1")
    assert 'channels = "mix"' in caught.value.fix
    both = clips([stereo], channels=2, features="waveform")
    assert both.schema["audio"].shape == (2, None)
    assert torch.equal(both[0]["audio"], torch.from_numpy(stereo.T))
    mixed = clips([stereo, tone(440)], channels="mix", features="waveform")
    assert np.allclose(mixed[0]["audio"], stereo.mean(1), atol=1e-7)
    assert torch.equal(mixed[1]["audio"], torch.from_numpy(tone(440)))
    with pytest.raises(SettingsError, match="log-mels are made of one channel"):
        clips([stereo], channels=2)
    with pytest.raises(BadSampleError, match="other channels than stated"):
        clips([tone()], channels=2, features="waveform")


def test_a_length_in_seconds_is_cut_about_the_middle_or_ends_in_silence() -> None:
    long, short = np.linspace(-1, 1, RATE, dtype=np.float32), tone(440, 0.25)
    data = clips([long, short], seconds=0.5, features="waveform")
    batch = data.read_batch(np.arange(2), ChanceKey())
    assert batch is not None
    assert set(batch) == {"audio", "label"}
    assert batch["audio"].shape == (2, 8000)
    assert torch.equal(batch["audio"][0], torch.from_numpy(long[4000:12000]))
    assert torch.equal(batch["audio"][1, :4000], torch.from_numpy(short))
    assert (batch["audio"][1, 4000:] == 0).all()
    assert data.lengths is None
    mels = clips([long, short], seconds=0.5, num_mels=32)
    assert mels.schema["audio"].shape == tuple(mels[0]["audio"].shape) == (32, 51)


@pytest.mark.parametrize("features", ["waveform", "log_mel"])
def test_a_sample_in_a_batch_is_the_sample_alone(features: Any) -> None:
    data = clips(noises(8), features=features)
    order = np.array([5, 0, 7, 3, 2])
    batch = data.read_batch(order, ChanceKey())
    assert batch is not None
    for row, index in enumerate(order.tolist()):
        alone, length = data[index]["audio"], int(batch["length"][row])
        inside = batch["audio"][row, ..., :length]
        assert alone.shape == inside.shape
        if features == "waveform":
            assert torch.equal(alone, inside)
        else:
            assert (alone - inside).abs().max() <= 1e-5
        silence = 0.0 if features == "waveform" else math.log(1e-6)
        assert torch.allclose(batch["audio"][row, ..., length:], torch.tensor(silence))
    assert max(batch["length"]) == batch["audio"].shape[-1]
    collated = data.collate([data[int(index)] for index in order])
    assert torch.equal(collated["length"], batch["length"])
    assert torch.allclose(collated["audio"], batch["audio"], atol=1e-5)
    theirs = next(iter(DataLoader(data, batch_size=5, collate_fn=data.collate)))
    assert set(theirs) == {"audio", "length", "label"}


def test_silence_is_finite() -> None:
    data = clips(
        [np.zeros(1600, np.float32), np.zeros(1, np.float32)], augment=[n for n in NAMES if n != "random_crop"]
    )
    for index in range(2):
        audio = data[index]["audio"]
        assert torch.isfinite(audio).all()
        assert torch.allclose(audio, torch.tensor(math.log(1e-6)))


# --- damage


def lying(size: int) -> bytes:
    data = bytearray(encoded(tone()))
    data[40:44] = struct.pack("<I", size)
    return bytes(data)


NOISE = encoded(np.random.default_rng(0).normal(0, 0.1, 8 * RATE).astype(np.float32), form="OGG", subtype="VORBIS")


@pytest.mark.parametrize(
    ("data", "got"),
    [
        (b"", "0 bytes"),
        (b"RIFF and no more", "16 bytes"),
        (b"\x89PNG\r\n\x1a\n" + bytes(200), "208 bytes"),
        (encoded(tone())[:30], "30 bytes"),
        (encoded(tone())[:-1], "15,999 of 16,000 bytes of samples"),
        (encoded(tone(), form="FLAC")[:-100], "flac decoder lost sync"),
        (NOISE[: len(NOISE) // 2], "the last page is missing"),
        (NOISE[: NOISE.rfind(b"OggS")], "the last page is missing"),
        (lying(1_000_000), "16,000 of 1,000,000 bytes of samples"),
        (lying(0), "0 of 0 samples"),
        (encoded(np.array([0.1, np.nan], np.float32), subtype="FLOAT"), "samples that are not finite"),
        (encoded(np.array([0.1, np.inf], np.float32), subtype="FLOAT"), "samples that are not finite"),
        (encoded(np.zeros(0, np.float32)), "0 of 0 samples"),
    ],
)
def test_what_is_no_whole_recording_says_so(data: bytes, got: str) -> None:
    with pytest.raises(BadSampleError, match="cannot be decoded") as caught:
        decode_audio(data, "x.wav (sample 3)")
    assert got in caught.value.got
    assert caught.value.where == "x.wav (sample 3)"
    assert "0x" not in caught.value.got  # no address in memory
    assert "expected: a complete WAV, FLAC or OGG" in str(caught.value)


SEEDS = [
    encoded(tone(seconds=0.05), form=form, subtype=subtype)
    for form, subtype in (("WAV", "PCM_16"), ("WAV", "PCM_24"), ("WAV", "FLOAT"), ("FLAC", "PCM_16"), ("OGG", "VORBIS"))
]


@settings(deadline=None, max_examples=300)
@given(st.sampled_from(SEEDS), st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=4), st.floats(0, 1))
def test_any_bytes_are_finite_samples_or_a_bad_sample(
    data: bytes, changes: list[tuple[float, int]], kept: float
) -> None:
    spoiled = bytearray(data[: round(kept * len(data)) if kept < 0.5 else len(data)])
    for place, value in changes:
        if spoiled:  # most of them in the header
            spoiled[int(place**4 * (len(spoiled) - 1))] = value
    try:
        wave, rate = decode_audio(bytes(spoiled), "x")
    except BadSampleError:
        return
    assert np.isfinite(wave).all()
    assert wave.size > 0 < rate


@pytest.mark.parametrize("size", [0xFFFFFFFF, 0x7FFFF000])
def test_a_wav_that_was_written_to_a_pipe_has_no_length_and_is_whole(size: int) -> None:
    assert decode_audio(lying(size), "x")[0].shape == (1, 8000)
    assert decode_audio(encoded(tone()) + b"LIST and more", "x")[0].shape == (1, 8000)


def test_a_header_that_would_fill_the_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = encoded(tone(), rate=1)
    data = AudioTable(pa.table({"audio": [encoded(tone()), slow], "label": ["a", "b"]}))
    monkeypatch.setattr("torchkeep.data.audio.MAX_SAMPLES", 100_000)
    with pytest.raises(BadSampleError, match="cannot be decoded") as caught:
        data[1]
    assert "1 Hz: 128,000,000 samples at 16,000 Hz; the limit is 100,000" in caught.value.got
    monkeypatch.setattr("torchkeep.data.audio.MAX_SAMPLES", 5_000)
    with pytest.raises(BadSampleError, match="cannot be decoded") as caught:
        data[0]
    assert "the limit is 5,000" in caught.value.got
    with pytest.raises(SettingsError, match="need a higher rate"):
        clips([tone()], sample_rate=100)


def test_a_file_that_vanishes_or_changes_its_content_is_named(folder: Path) -> None:
    data = AudioFolder(folder, label_pattern=r"(?P<label>\d)_")
    (folder / "1_bert_1.wav").unlink()
    (folder / "2_anna_2.wav").write_bytes(encoded(tone())[:500])
    for index, fragments in {3: ["1_bert_1.wav", "cannot be read"], 4: ["2_anna_2.wav", "cannot be decoded"]}.items():
        with pytest.raises(BadSampleError) as caught:
            data.read(index, ChanceKey(0, 1))
        for fragment in [*fragments, "epoch 2"]:
            assert fragment in caught.value.said()


# --- folders, loaders


def test_names_tell_classes_and_groups(folder: Path) -> None:
    data = AudioFolder(folder, label_pattern=r"^(?P<label>\d)_(?P<speaker>[a-z]+)_")
    assert data.schema["label"].classes == ("0", "1", "2")
    assert data.labels is not None
    assert [data.id_of(i)[0] for i in range(6)] == [str(label) for label in data.labels]
    assert data.column("speaker").tolist() == [data.id_of(i).split("_")[1] for i in range(6)]
    assert data[0]["id"] == "0_anna_0.wav"
    with pytest.raises(DataError, match="pattern does not fit"):
        AudioFolder(folder, label_pattern=r"(?P<label>anna)")
    with pytest.raises(DataError, match="do not tell this"):
        data.column("take")
    with pytest.raises(DataError, match="no class folders"):
        AudioFolder(folder)


def test_who_reads_changes_nothing(folder: Path) -> None:
    data = AudioFolder(folder, label_pattern=r"(?P<label>\d)_", augment=NAMES)
    plans: list[dict[str, Any]] = [{"workers": 0}, {"workers": 2, "backend": "threads"}]
    plans.append({"workers": 1, "backend": "processes"})
    epochs = []
    for plan in plans:
        loader = Loader(data, 4, shuffle=True, seed=3, **plan)
        epochs.append([batch for _ in range(2) for batch in loader])
        assert loader.plan.backend == plan.get("backend", "inline")
        loader.close()
    for other in epochs[1:]:
        for batch, wanted in zip(other, epochs[0], strict=True):
            assert set(batch) == set(wanted)
            assert all(torch.equal(batch[name], wanted[name]) for name in wanted)


def test_validation_is_made_as_training_is() -> None:
    train = clips([tone(440, 0.5, 8000)] * 2, 8000, num_mels=20, seconds=0.3, augment=["random_gain"])
    valid = clips([tone(440, 0.5, 44_100)] * 2, 44_100, like=train)
    assert (valid.sample_rate, valid.num_mels, valid.seconds) == (8000, 20, 0.3)
    assert valid.augmentations.entries == ()
    assert valid.schema == train.schema
