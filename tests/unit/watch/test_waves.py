"""Sounds become 16-bit files that any program opens; texts of any length are kept whole."""

from __future__ import annotations

import io
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from torchkeep.errors import DataError
from torchkeep.watch.media import MediaStore
from torchkeep.watch.waves import audio, text


def heard(media: MediaStore, told: dict[str, Any]) -> tuple[int, np.ndarray[Any, Any]]:
    """The rate, and samples (T, channels)."""
    with wave.open(io.BytesIO(media.read(told["media"])), "rb") as file:
        assert file.getsampwidth() == 2
        data = np.frombuffer(file.readframes(file.getnframes()), "<i2").reshape(-1, file.getnchannels())
        return file.getframerate(), data


@pytest.mark.parametrize(
    ("samples", "channels"),
    [(torch.zeros(8000), 1), (np.zeros((1, 8000)), 1), (torch.zeros(2, 8000), 2), (np.zeros((8000, 2)), 2),
     (np.zeros((8000, 1)), 1), ([0.0] * 8000, 1)],
    ids=["T", "1T", "2T", "T2", "T1", "list"],
)  # fmt: skip
def test_shapes(tmp_path: Path, samples: Any, channels: int) -> None:
    media = MediaStore(tmp_path)
    told = audio(samples, 16000, "silence").settle(media)
    rate, data = heard(media, told)
    assert (rate, data.shape) == (16000, (8000, channels))
    assert (told["sample_rate"], told["seconds"], told["caption"]) == (16000, 0.5, "silence")


@pytest.mark.parametrize(
    ("samples", "expected"),
    [(np.array([-1, -0.5, 0, 0.5, 1]), [-32767, -16384, 0, 16384, 32767]),
     (torch.tensor([0.5, -0.25], dtype=torch.bfloat16), [16384, -8192]),
     (np.array([-32768, 5, 32767], np.int16), [-32768, 5, 32767]),
     (np.array([0, 128, 255], np.uint8), [-32768, 0, 32512]),
     (np.array([-(2**31), 1 << 16, 2**31 - 1], np.int32), [-32768, 1, 32767]),
     (torch.tensor([True, False]), [32767, 0])],
    ids=["float", "bfloat16", "int16", "uint8", "int32", "bool"],
)  # fmt: skip
def test_types(tmp_path: Path, samples: Any, expected: list[int]) -> None:
    media = MediaStore(tmp_path)
    np.testing.assert_allclose(heard(media, audio(samples, 8000).settle(media))[1][:, 0], expected, atol=1)


def test_channels_stay_apart(tmp_path: Path) -> None:
    media = MediaStore(tmp_path)
    data = heard(media, audio(np.array([[1.0, 0.0], [0.0, 1.0]]), 8000).settle(media))[1]
    np.testing.assert_array_equal(data, [[32767, 0], [0, 32767]])


def test_what_is_changed_is_said(tmp_path: Path) -> None:
    media = MediaStore(tmp_path)
    told = audio(np.array([np.nan, 2.0, -np.inf, 0.1]), 8000, "loud").settle(media)
    assert heard(media, told)[1][:3, 0].tolist() == [0, 32767, -32767]
    assert told["caption"] == "loud; 1 samples are NaN, silent here; 2 samples beyond ±1 are clipped"


def test_the_sound_is_that_of_the_call(tmp_path: Path) -> None:
    media, samples = MediaStore(tmp_path), np.zeros(4)
    late = audio(samples, 8000)
    samples[:] = 1
    assert not heard(media, late.settle(media))[1].any()


@pytest.mark.parametrize(
    ("samples", "rate"),
    [([], 8000), (np.zeros((3, 100)), 8000), (np.zeros((1, 2, 100)), 8000), (0.5, 8000), ("noise", 8000),
     (np.zeros(4), 0), (np.zeros(4), -1), (np.zeros(4), float("nan")), (np.zeros(4), "fast"), (np.zeros(4), 1e12),
     (np.broadcast_to(np.float32(0), 1 << 31), 8000)],
)  # fmt: skip
def test_what_is_no_sound_is_refused(samples: Any, rate: Any) -> None:
    with pytest.raises(DataError, match="audio"):
        audio(samples, rate)


def test_a_short_text_is_in_the_record_alone(tmp_path: Path) -> None:
    media = MediaStore(tmp_path)
    assert text("grüße").settle(media) == {"text": "grüße", "num_characters": 5, "media": None}
    assert text({"a": 1}).settle(media)["text"] == "{'a': 1}"
    assert text("").settle(media)["num_characters"] == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("letter", ["a", "é", "蜂", "🐝"])
def test_a_long_text_is_kept_whole(tmp_path: Path, letter: str) -> None:
    media = MediaStore(tmp_path)
    whole = "".join(f"{number}{letter}" for number in range(300_000))
    told = text(whole).settle(media)
    assert told["text"] == whole[:100_000]
    assert told["num_characters"] == len(whole)
    assert media.read(told["media"]).decode() == whole
    assert told["media"].endswith(".txt")


def test_half_of_a_surrogate_pair_is_replaced(tmp_path: Path) -> None:
    media = MediaStore(tmp_path)
    assert text("a\ud83db").settle(media)["text"] == "a?b"
    assert media.read(text("\ud83d" * 200_000).settle(media)["media"]) == b"?" * 200_000


def test_what_has_no_text_is_refused() -> None:
    class Silent:
        def __str__(self) -> str:
            raise RuntimeError("no words")

    with pytest.raises(DataError, match="no words"):
        text(Silent())
