"""Recordings in class folders or tables: decoded, brought to one rate, made into log-mels when a batch needs them."""

from __future__ import annotations

import copy
import re
import struct
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from ..chance import ChanceKey
from ..contracts import Batch, Field, Sample
from ..errors import BadSampleError, SettingsError
from ..packages import package_of
from .blobs import Blobs, Cells, FolderRows, FrameRows, ListedFiles, folder_of
from .dataset import Filling, Indices, target_of, whole_of
from .frames import Form, Source, read_frame, where_of
from .index import Layout, list_folder
from .labels import LabelledData, Labels, labels_of_classes, labels_of_column
from .mel import POWER_FLOOR, log_mel, num_frames
from .samples import padded
from .sounds import Augmentation, SoundAugmentations

Wave = np.ndarray[Any, np.dtype[np.float32]]
Channels = Literal[1, 2, "mix"]
Features = Literal["log_mel", "waveform"]

AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".oga")
MAX_SAMPLES = 1 << 28  # of one recording, over all channels: a gigabyte of float32; 1.5 hours at 48 kHz

_LEAST_RATE = 1000  # Hz: 10 samples from one window to the next
_SAMPLES_AT_ONCE = 1 << 18  # of one transform: more would not stay in the cache, less lets threads wait for the GIL
_WAV_HEADER = struct.Struct("<4sI4s4sIHHIIHH4sI")
_SILENCE = float(np.log(POWER_FLOOR))
_IN_MEMORY = re.compile(r"Error opening <[^>]*>: ")
_ENDLESS_BYTES = 0x7FFFF000  # what programs write that could not know the length yet: sox this, ffmpeg 0xFFFFFFFF
_OGG_END = 4  # the flag of a stream's last page


class Clips(LabelledData):
    """What the sources of recordings share. ``blobs`` are the encoded recordings.

    Options: ``sample_rate`` in Hz (that of the first recording where nothing is said; others are resampled);
    ``channels`` 1, 2, or "mix" to average several into one; ``seconds``, a fixed length (longer ones are cut about
    their middle, shorter ones end in silence; without it a batch is padded to its longest); ``features`` "log_mel" or
    "waveform"; ``num_mels``; ``augment``; ``like``, a dataset whose classes and options are taken over.

    Shapes:  "audio" float32 (M, T) of log-mels, (T,) of one channel, (C, T) of several; in a batch with "length" int64
             (B,), the frames or samples that are the clip's own, where clips have several lengths
    """

    threads = True  # decoding, resampling and the transforms release the GIL
    suffixes = AUDIO_SUFFIXES
    input_column = "audio"
    sample_rate: int
    seconds: float | None
    num_mels: int

    def __init__(
        self, blobs: Blobs, labels: Labels | None, where: str, *, sample_rate: int | None = None,
        channels: Channels | None = None, seconds: float | None = None, features: Features | None = None,
        num_mels: int | None = None, augment: Sequence[Augmentation] = (), like: Any = None,
    ):  # fmt: skip
        known = whole_of(like, Clips, "a dataset of recordings", where)
        self.blobs = self._held = blobs
        self._labels, self.where = labels, where
        self.channels: Channels = channels or (known.channels if known is not None else 1)
        self.features: Features = features or (known.features if known is not None else "log_mel")
        self.num_mels = num_mels or (known.num_mels if known is not None else 64)
        self.seconds = seconds or (known.seconds if known is not None else None)
        self.augmentations = SoundAugmentations(tuple(augment), self.features == "log_mel")
        self.threads = not self.augmentations.has_callable
        for name, given, known_values in (
            ("features", self.features, ("log_mel", "waveform")), ("channels", self.channels, (1, 2, "mix")),
        ):  # fmt: skip
            if given not in known_values:
                expected = f"one of {', '.join(map(repr, known_values))}"
                raise SettingsError("recordings cannot be read so", where=name, got=repr(given), expected=expected)
        if self.features == "log_mel" and self.channels == 2:
            raise SettingsError(
                "log-mels are made of one channel", where="channels", got=2, expected='1 or "mix"',
                fix='features = "waveform" keeps two',
            )  # fmt: skip
        stated = sample_rate or (known.sample_rate if known is not None else None)
        self.sample_rate = stated or self._decoded(0, self._where(0))[1]
        if self.features == "log_mel" and self.sample_rate < _LEAST_RATE:
            raise SettingsError(
                "log-mels need a higher rate", where="sample_rate",
                got=f"{self.sample_rate:,} Hz" + ("" if sample_rate else f", the rate of {self._where(0)}"),
                expected=f"{_LEAST_RATE:,} Hz or more", fix='features = "waveform" takes any rate',
            )  # fmt: skip
        self.schema = self._schema_of({"audio": Field("audio", self._shape())})

    def _shape(self) -> tuple[int | None, ...]:
        size = round(self.seconds * self.sample_rate) if self.seconds else None
        if self.features == "log_mel":
            return (self.num_mels, num_frames(size, self.sample_rate) if size else None)
        return (2, size) if self.channels == 2 else (size,)

    def read(self, index: int, key: ChanceKey) -> Sample:
        """One sample: {"audio": float32, "label": …, "id": str}.

        Raises:  BadSampleError where the recording cannot be decoded, is empty, or has other channels than stated
        """
        audio = self._audio([self.wave(index, key)], np.array([index]), key)[0]
        sample = {"audio": torch.from_numpy(audio), **self._label_of(index), "id": self.id_of(index)}
        return self.augmentations.apply_callables(sample, key, index, self._where(index, key))

    def begin(self, indices: Indices, key: ChanceKey) -> Filling:
        """A batch whose log-mels are made at its end, in one transform; sample by sample where a callable is."""
        return Filling(self, indices, key) if self.augmentations.has_callable else _Waves(self, indices, key)

    def batch_of(self, waves: list[Wave], indices: Indices, key: ChanceKey) -> Batch:
        """The batch of some waves that are at their rate and length."""
        return self._padded(self._audio(waves, indices, key)) | self.labels_of(indices)

    def collate(self, samples: list[Sample]) -> Batch:
        """A batch of samples, padded to the longest."""
        rest = [{name: value for name, value in sample.items() if name != "audio"} for sample in samples]
        return self._padded([sample["audio"].numpy() for sample in samples]) | super().collate(rest)

    def _padded(self, audio: list[Wave]) -> Batch:
        held = padded(audio, _SILENCE if self.features == "log_mel" else 0.0)
        if self.seconds:
            return {"audio": held}
        return {"audio": held, "length": torch.tensor([part.shape[-1] for part in audio])}

    def wave(self, index: int, key: ChanceKey) -> Wave:
        """The samples at the dataset's rate and length, augmented. Shapes: float32 (C, T)."""
        where = self._where(index, key)
        wave, rate = self._decoded(index, where)
        if rate != self.sample_rate:
            wave = _resampled(wave, rate, self.sample_rate, where)
        wave = self.augmentations.change_speed(wave, key, index)
        if self.seconds:
            wave = self._cut(wave, index, key)
        return self.augmentations.apply_to_wave(wave, key, index, self.sample_rate)

    def _cut(self, wave: Wave, index: int, key: ChanceKey) -> Wave:
        size = round((self.seconds or 0) * self.sample_rate)
        spare = wave.shape[1] - size
        start = self.augmentations.crop_start(spare, key, index)
        if spare >= 0:
            return wave[:, start : start + size]
        held = np.zeros((len(wave), size), np.float32)  # np.pad takes ten times as long
        held[:, start : start + wave.shape[1]] = wave
        return held

    def _decoded(self, index: int, where: str) -> tuple[Wave, int]:
        wave, rate = decode_audio(self.blobs.read(index, where), where)
        if self.channels == "mix":
            return wave.mean(0, keepdims=True, dtype=np.float32), rate
        if len(wave) != self.channels:
            raise BadSampleError(
                "this recording has other channels than stated",
                where=where,
                got=f"{len(wave)} channels",
                expected=f"{self.channels}",
                fix='channels = "mix" averages them into one; in a recipe: audio_channels'
                if self.channels == 1
                else "",
            )
        return wave, rate

    def _audio(self, waves: list[Wave], indices: Indices, key: ChanceKey) -> list[Wave]:
        """What the model gets of each wave. Log-mels of many clips are made in one transform."""
        if self.features == "waveform":
            return [wave if self.channels == 2 else wave[0] for wave in waves]
        held = np.zeros((len(waves), max(wave.shape[1] for wave in waves)), np.float32)
        for row, wave in zip(held, waves, strict=True):
            row[: wave.shape[1]] = wave[0]
        few = max(1, _SAMPLES_AT_ONCE // held.shape[1])
        transforms = (held[first : first + few] for first in range(0, len(held), few))
        mels = [mel for some in transforms for mel in log_mel(some, self.sample_rate, self.num_mels)]
        counts = [num_frames(wave.shape[1], self.sample_rate) for wave in waves]
        parts = [mel[:, :count] for mel, count in zip(mels, counts, strict=True)]
        return [
            self.augmentations.apply_to_mel(part, key, index)
            for part, index in zip(parts, indices.tolist(), strict=True)
        ]

    def without_augmentation(self) -> Clips:
        """A copy that shares everything but the augmentations."""
        plain = copy.copy(self)
        plain.augmentations = SoundAugmentations((), self.features == "log_mel")
        plain.threads = True
        return plain

    def fingerprint(self) -> str:
        """xxh3 of the recordings' names, sizes or bytes, of what is made of them, and of the labels."""
        return self._digest(repr((self.sample_rate, self.channels, self.seconds, self.features, self.num_mels)))

    @property
    def lengths(self) -> np.ndarray[Any, Any] | None:
        """Bytes of each recording, near enough to its length for buckets; None where all are cut to one."""
        return None if self.seconds else getattr(self.blobs, "sizes_bytes", None)


class _Waves(Filling):
    """A batch of recordings under way: their waves."""

    def __init__(self, clips: Clips, indices: Indices, key: ChanceKey):
        super().__init__(clips, indices, key)
        self._indices = indices.copy()

    def fill(self, start: int, indices: Indices) -> None:
        self._indices[start : start + len(indices)] = indices
        for row, index in enumerate(indices.tolist(), start):
            self.samples[row] = self.dataset.wave(index, self.key)

    def finish(self) -> Batch:
        return dict(self.dataset.batch_of(self.samples, self._indices, self.key))


class AudioFolder(FolderRows, Clips):
    """``root/CLASS/any/where/name.wav``, also .flac and .ogg: the classes are the folders, in sorted order.

    With ``label_pattern``, a regular expression, the class is its group "label" in each name. Further options are
    those of ``Clips``.
    Raises:  DataError for a missing or empty root, no class folders, a class that ``like`` does not know
    """

    def __init__(
        self, root: str | Path, *, label_pattern: str | None = None, follow_links: bool = False, **options: Any
    ):
        where = str(root)
        listing = list_folder(Path(root), Layout(AUDIO_SUFFIXES, "recordings", True, label_pattern, follow_links))
        field = target_of(whole_of(options.get("like"), Clips, "a dataset of recordings", where))
        labels = labels_of_classes(listing.labels, listing.classes, field, where)
        self.listing = listing
        super().__init__(ListedFiles(listing), labels, where, **options)


class AudioTable(FrameRows, Clips):
    """A table whose ``audio`` column holds encoded recordings or names of files, and ``label`` what is to be predicted.

    A recording is bytes, a struct {bytes, path}, or a name relative to ``root``, the table's folder where nothing is
    said. ``label=None`` for none. Further options are those of ``Clips``.
    Raises:  DataError for a missing table or column, a row without a label, a class that ``like`` does not know
    """

    def __init__(
        self, source: Source, *, audio: str = "audio", label: str | None = "label", id: str | None = None,
        root: str | Path | None = None, separator: str | None = None, form: Form | None = None, identity: str = "",
        **options: Any,
    ):  # fmt: skip
        where, folder = where_of(source), folder_of(source, root)
        frame = read_frame(source, form or Form())
        field = target_of(whole_of(options.get("like"), Clips, "a dataset of recordings", where))
        labels = labels_of_column(frame, label, where, field, separator) if label is not None else None
        self._keep(frame, [audio], id, where)
        super().__init__(Cells(frame, audio, folder, where, "recordings", identity), labels, where, **options)


def decode_audio(data: bytes, where: str) -> tuple[Wave, int]:
    """The samples of a recording and its rate in Hz.

    Shapes:  float32 (C, T), full scale is 1
    Raises:  BadSampleError for bytes that are no whole WAV, FLAC or OGG, hold nothing, or more than MAX_SAMPLES
    """
    plain = _plain_wav(data)
    if plain is not None:
        return plain
    soundfile = package_of("soundfile", "audio")
    try:
        with soundfile.SoundFile(BytesIO(data)) as file:
            if file.frames * file.channels > MAX_SAMPLES:
                raise ValueError(f"{file.frames:,} samples of {file.channels} channels; the limit is {MAX_SAMPLES:,}")
            _check_end(data)
            expected, rate = file.frames, int(file.samplerate)
            wave = file.read(dtype="float32", always_2d=True).T
    except Exception as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        # soundfile names the object in memory that it was given
        got = f"{len(data):,} bytes" + (f", {_IN_MEMORY.sub('', said[0])}" if data else "")
        raise _not_decoded(where, got) from None
    if wave.shape[1] == 0 or wave.shape[1] < expected:
        raise _not_decoded(where, f"{wave.shape[1]:,} of {expected:,} samples")
    if not np.isfinite(wave).all():
        raise _not_decoded(where, "samples that are not finite")
    return np.ascontiguousarray(wave), rate


def _plain_wav(data: bytes) -> tuple[Wave, int] | None:
    """What soundfile gives, bit for bit, in a twentieth of its time: the usual WAV of 16-bit numbers with a header of
    44 bytes, whole, and with nothing behind its samples; None for any other.
    """
    if not _WAV_HEADER.size < len(data) <= 2 * MAX_SAMPLES:
        return None
    fields = _WAV_HEADER.unpack_from(data)
    channels, rate = fields[6:8]
    size = len(data) - _WAV_HEADER.size
    usual = (b"RIFF", len(data) - 8, b"WAVE", b"fmt ", 16, 1, channels, rate, 2 * channels * rate, 2 * channels, 16,
             b"data", size)  # fmt: skip
    if fields != usual or channels not in (1, 2) or not 0 < rate < 1 << 20 or size % (2 * channels):
        return None
    samples = np.frombuffer(data, "<i2", offset=_WAV_HEADER.size).reshape(-1, channels)
    return np.multiply(samples.T, np.float32(2**-15), dtype=np.float32, order="C"), rate


def _check_end(data: bytes) -> None:
    """The decoder takes what there is of a WAV or an OGG for the whole.

    Raises:  ValueError where the end is missing
    Source:  RFC 3533, section 6, for OGG's pages; Microsoft and IBM 1991, "Multimedia programming interface", for RIFF
    """
    if data[:4] == b"RIFF":
        place, size = 12, 0
        while data[place : place + 4] not in (b"data", b""):
            (size,) = struct.unpack_from("<I", data, place + 4)
            place += 8 + size + size % 2
        (size,) = struct.unpack_from("<I", data, place + 4)
        held = len(data) - place - 8
        if held < size < _ENDLESS_BYTES:
            raise ValueError(f"{held:,} of {size:,} bytes of samples")
    if data[:4] == b"OggS":
        page = data.rfind(b"OggS")
        sizes = data[page + 27 : page + 27 + data[page + 26]] if len(data) > page + 26 else b""
        is_whole = len(data) >= page + 27 + len(sizes) + sum(sizes)
        if not sizes or not is_whole or not data[page + 5] & _OGG_END:
            raise ValueError("the last page is missing")


def _not_decoded(where: str, got: str) -> BadSampleError:
    return BadSampleError(
        "this recording cannot be decoded", where=where, got=got, expected="a complete WAV, FLAC or OGG",
        fix="torchkeep survey DATA --bad lists all such recordings; mend or remove them and start a new run",
    )  # fmt: skip


def _resampled(wave: Wave, rate: int, wanted: int, where: str) -> Wave:
    size = wave.size * wanted // rate
    if size > MAX_SAMPLES:  # a header may say 1 Hz
        raise _not_decoded(where, f"{rate:,} Hz: {size:,} samples at {wanted:,} Hz; the limit is {MAX_SAMPLES:,}")
    resampled: Wave = package_of("soxr", "audio").resample(wave.T, rate, wanted).T
    return np.ascontiguousarray(resampled, np.float32)
