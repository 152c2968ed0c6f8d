"""What a survey reads of each sample, by its kind: sizes, categories, its content's hash, and keys that near copies share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from io import BytesIO
from pathlib import PurePath
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from PIL import Image
from torch import Tensor

from ..chance import ChanceKey, keyed_uniform
from ..contracts import KeyedDataset
from ..errors import BadSampleError, DataError
from .arrays import TARGETS
from .audio import Clips, decode_audio
from .dataset import Indices, Part
from .decode import Pixels, decode_image
from .foreign import Foreign, absorb, as_dataset
from .frames import is_category, is_date, is_number
from .images import IdxImages, Images
from .mel import log_mel
from .streams import Stream
from .tables import Table
from .text import TextBlocks, Texts

U64 = np.ndarray[Any, np.dtype[np.uint64]]
Progress = Callable[[int], None]

THUMB = 32  # pixels of a side, on which near copies are confirmed
SHINGLE = 5  # letters
BANDS, ROWS = 12, 6  # of a text's MinHash: two that share 9 of 10 shingles meet with probability .9999, half .17

_CHUNK = 64
_FLAT = 2.0  # greys: below that an image's gradients are noise
_MOST_LETTERS = 20_000
_HEARD_S = 30
_SILENT = 1e-4
_MANY_CLASSES = 50
_FORMS = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".webp": "WEBP", ".bmp": "BMP", ".gif": "GIF"}


@dataclass
class Reading:
    """One sample: ``bands`` are keys of which near copies share one, ``bits`` a hash whose distance is theirs."""

    digest: bytes
    measures: dict[str, float] = field(default_factory=dict)
    categories: dict[str, str] = field(default_factory=dict)
    bands: U64 | None = None
    bits: int = 0
    moments: np.ndarray[Any, Any] | None = None  # (2, C): mean and mean square of each channel
    notes: tuple[str, ...] = ()
    labels: tuple[str, ...] | None = None


@dataclass(frozen=True)
class BadSample:
    """A sample that cannot be read, and why."""

    id: str
    what: str
    got: str


@dataclass
class Contents:
    """What was read of one split; n samples, those that are bad left out.

    Shapes:  positions (n,) int64 in ``reader``; digests (n, 2) uint64; bands (n, B) uint64; bits (n,) uint64
    """

    reader: Any
    num_samples: int
    positions: Indices
    labels: list[tuple[str, ...]]
    digests: U64
    measures: dict[str, np.ndarray[Any, Any]]
    categories: dict[str, Any]
    bands: U64 | None = None
    bits: U64 | None = None
    moments: tuple[list[float], list[float]] | None = None
    notes: dict[str, list[str]] = field(default_factory=dict)
    bad: list[BadSample] = field(default_factory=list)
    bad_labels: list[tuple[str, ...]] = field(default_factory=list)
    num_bytes: int | None = None

    def id_of(self, row: int) -> str:
        return str(self.reader.id_of(int(self.positions[row])))


@dataclass(frozen=True)
class Rows:
    """A table as it stands, also one that training refuses; ``target`` is a column of it, or None."""

    frame: Any
    where: str
    target: str | None = None
    left_out: tuple[str, ...] = ()
    forced: tuple[str, ...] = ()  # categories although they are numbers
    id: str | None = None

    def __len__(self) -> int:
        return int(self.frame.num_rows)

    def id_of(self, index: int) -> str:
        return str(self.frame[self.id][index]) if self.id else f"row {index}"


class Reader:
    """What readers share: names and labels, which bad samples have too."""

    kind = "samples"
    threads = False

    def __init__(self, held: Any):
        self.held = held
        self.threads = bool(getattr(held, "threads", False))

    def id_of(self, index: int) -> str:
        return str(getattr(self.held, "id_of", lambda i: f"sample {i}")(index))

    def labels_of(self, index: int) -> tuple[str, ...]:
        """The classes of a sample; none where numbers are predicted, or nothing."""
        kept = getattr(self.held, "_labels", None)
        if kept is None or kept.field.kind == "number":
            return ()
        if kept.offsets is None:
            return (kept.field.classes[int(kept.values[index])],)
        numbers = kept.values[kept.offsets[index] : kept.offsets[index + 1]]
        return tuple(kept.field.classes[int(number)] for number in numbers)

    def targets_of(self, index: int) -> dict[str, float]:
        """The number that is to be predicted, where it is one."""
        kept = getattr(self.held, "_labels", None)
        return {"target": kept.of(index)} if kept is not None and kept.field.kind == "number" else {}

    def read(self, index: int) -> Reading:
        """Raises:  BadSampleError"""
        raise NotImplementedError

    def picture(self, index: int) -> Pixels | None:
        """What a contact sheet shows of it, (H, W, C) uint8; None where nothing can be shown."""
        return None

    def num_bytes(self, positions: Indices) -> int | None:
        blobs = getattr(self.held, "blobs", None) or getattr(self.held, "source", None)
        sizes = getattr(blobs, "sizes_bytes", None)
        return None if sizes is None else int(np.asarray(sizes)[positions].clip(0).sum())


class ImageReader(Reader):
    kind = "images"

    def read(self, index: int) -> Reading:
        where = f"{self.held.where}: {self.id_of(index)}"
        form, notes = "idx, L", []
        if isinstance(self.held, IdxImages):
            pixels = self.held.decoded(index)
        else:
            data = self.held.blobs.read(index, where)
            pixels = decode_image(data, where, self.held.channels, self.held.bits)
            with Image.open(BytesIO(data)) as opened:
                name, form = opened.format or "", f"{opened.format}, {opened.mode}"
            said = _FORMS.get(PurePath(self.id_of(index)).suffix.lower())
            notes += [f"files whose ending names another format than {name}"] if said not in (None, name) else []
        made = _of_pixels(pixels)
        made.categories |= {"form": form}
        made.measures |= self.targets_of(index)
        if "mask" in self.held.schema:
            self._look_at_mask(index, made)
        made.notes = (*made.notes, *notes)
        return made

    def _look_at_mask(self, index: int, made: Reading) -> None:
        mask = self.held.read(index, ChanceKey())["mask"].numpy()
        for number, name in enumerate(self.held.schema["mask"].classes):
            made.measures[f"share of {name}"] = float((mask == number).mean())

    def picture(self, index: int) -> Pixels:
        pixels = self.held.decoded(index)
        return pixels if pixels.dtype == np.uint8 else (pixels >> 8).astype(np.uint8)


class ClipReader(Reader):
    kind = "recordings"

    def _wave(self, index: int) -> tuple[Any, int]:
        where = f"{self.held.where}: {self.id_of(index)}"
        return decode_audio(self.held.blobs.read(index, where), where)

    def read(self, index: int) -> Reading:
        wave, rate = self._wave(index)
        wanted = self.held.channels
        if wanted != "mix" and len(wave) != wanted:
            raise BadSampleError(
                "this recording has other channels than stated", got=f"{len(wave)} channels", expected=f"{wanted}"
            )
        moments = np.array([[wave.mean()], [np.square(wave).mean()]])
        level = float(np.sqrt(moments[1, 0]))
        measures = {"seconds": wave.shape[1] / rate, "level dB": 20 * np.log10(max(level, 1e-9))}
        made = Reading(
            xxhash.xxh3_128_digest(wave.tobytes() + f"{wave.shape}|{rate}".encode()), measures | self.targets_of(index),
            {"rate": f"{rate:,} Hz", "channels": str(len(wave))}, moments=moments,
        )  # fmt: skip
        if level < _SILENT:
            made.notes = ("silent recordings",)
        else:
            made.bits, made.bands = _gradients(_mels_of(wave, rate))
        return made

    def picture(self, index: int) -> Pixels:
        """Log-mels of what is heard, at one loudness: near copies look alike, whatever their gain and lead."""
        mels = _mels_of(*self._wave(index))
        low, high = float(mels.min()), float(mels.max())
        return ((mels - low) / max(high - low, 1e-6) * 255).astype(np.uint8)[..., None]


class TextReader(Reader):
    kind = "texts"

    def text(self, index: int) -> str:
        return str(self.held.source.texts(np.array([index]))[0])

    def read(self, index: int) -> Reading:
        text = self.text(index)
        num_tokens = len(self.held.tokenizer.encode_batch([text], None)[0])
        notes = ["empty texts"] if not text.strip() else []
        if num_tokens > self.held.max_length:
            notes.append(f"texts longer than data.max_length, {self.held.max_length} tokens")
        bare = letters_of(text)
        return Reading(
            xxhash.xxh3_128_digest(text.encode("utf-8", "surrogatepass")),
            {"characters": len(text), "tokens": num_tokens} | self.targets_of(index),
            bands=_minhash(bare) if bare else None,
            notes=tuple(notes),
        )


class SampleReader(Reader):
    """Any dataset whose samples are dicts or tuples: what is found in them decides."""

    def __init__(self, held: Any):
        super().__init__(held)
        self.threads = False
        self.kind = "images" if "image" in {found.kind for found in held.schema.values()} else "samples"

    def _sample(self, index: int) -> dict[str, Any]:
        sample = self.held.read(index, ChanceKey())
        named = getattr(self.held, "named", dict)
        return {name: value for name, value in named(sample).items() if name not in ("id", "index")}

    def read(self, index: int) -> Reading:
        sample = self._sample(index)
        digest = xxhash.xxh3_128()
        absorb(digest, {name: value for name, value in sample.items() if name not in TARGETS})
        picture = _pixels_in(sample)
        made = Reading(b"") if picture is None else _of_pixels(picture)
        made.digest = digest.digest()
        for name, value in sample.items():
            self._look_at(name, value, made)
        made.labels = made.labels or ()
        return made

    def _look_at(self, name: str, value: Any, made: Reading) -> None:
        number = value.item() if isinstance(value, Tensor | np.ndarray | np.generic) and value.size == 1 else value
        if isinstance(value, Tensor) and value.numel() == 1:
            number = value.item()
        if name in TARGETS and isinstance(number, int | str):
            classes = self.held.schema[name].classes
            made.labels = (classes[number] if classes and isinstance(number, int) else str(number),)
        elif isinstance(number, int | float):
            made.measures[name] = float(number)
        elif isinstance(number, str):
            made.measures[f"{name}: characters"] = len(number)
            made.bands = _minhash(letters_of(number)) if letters_of(number) else None
        elif isinstance(value, Tensor | np.ndarray) and name not in TARGETS and "image" not in name:
            made.measures[f"{name}: mean"] = float(np.asarray(value, np.float64).mean())

    def picture(self, index: int) -> Pixels | None:
        return _pixels_in(self._sample(index))

    def text(self, index: int) -> str:
        return " ".join(value for name, value in self._sample(index).items() if isinstance(value, str))

    def num_bytes(self, positions: Indices) -> int | None:
        columns = getattr(self.held, "columns", None)
        if columns is None:
            return None
        return sum(column[:1].numel() * column.element_size() * len(positions) for column in columns.values())


def read_contents(dataset: Any, limit: int | None = None, progress: Progress | None = None) -> Contents:
    """Read the samples of one split, of whatever kind; with ``limit`` so many of them, chosen by keyed chance."""
    held, positions = _unwrapped(dataset, limit)
    total = len(positions)
    if limit is not None and limit < total:
        draws = keyed_uniform(ChanceKey(), "survey", positions)[:, 0]
        positions = positions[np.sort(np.argsort(draws, kind="stable")[:limit])]
    if isinstance(held, Rows):
        if progress is not None:
            progress(len(positions))
        return _of_rows(held, positions, total)
    reader = _reader_of(held)
    return _collected(reader, positions, total, progress or (lambda count: None))


def _unwrapped(dataset: Any, limit: int | None) -> tuple[Any, Indices]:
    """The dataset behind parts, and the positions in it."""
    if not isinstance(dataset, Rows):
        dataset = as_dataset(dataset)
    positions = np.arange(len(dataset))
    while isinstance(dataset, Part):
        positions, dataset = dataset.indices[positions], dataset.dataset
    if isinstance(dataset, Stream):  # it has no sample by number: those that are looked at are held
        samples = [sample for _, sample in zip(range(limit or len(dataset)), dataset.samples(ChanceKey()), strict=False)]
        return Foreign(samples), np.arange(len(samples))
    if isinstance(dataset, Table):
        known, options = dataset.encoding, dataset._options
        left_out = tuple(options.drop)
        return Rows(dataset._frame, dataset.where, known.target, left_out, options.categories, options.id), dataset.rows[positions]
    if isinstance(dataset, TextBlocks):
        return dataset.texts, np.arange(len(dataset.texts))
    return getattr(dataset, "without_augmentation", lambda: dataset)(), positions


def _reader_of(held: KeyedDataset) -> Reader:
    for kind, reader in ((Images, ImageReader), (Clips, ClipReader), (Texts, TextReader)):
        if isinstance(held, kind):
            return reader(held)
    return SampleReader(held)


def _collected(reader: Reader, positions: Indices, total: int, progress: Progress) -> Contents:
    good: list[int] = []
    readings: list[Reading] = []
    made = Contents(reader, total, positions, [], np.empty((0, 2), np.uint64), {}, {})
    for chunk, results in _read_in_chunks(reader, positions):
        for index, result in zip(chunk.tolist(), results, strict=True):
            if isinstance(result, Reading):
                good.append(index)
                readings.append(result)
            else:
                made.bad.append(BadSample(reader.id_of(index), result.what, result.got))
                made.bad_labels.append(reader.labels_of(index))
        progress(len(chunk))
    made.positions = np.array(good, np.int64)
    made.num_bytes = reader.num_bytes(positions)
    made.labels = [reader.labels_of(i) if r.labels is None else r.labels for i, r in zip(good, readings, strict=True)]
    _stack_readings(made, readings)
    return made


def _read_in_chunks(reader: Reader, positions: Indices) -> Iterator[tuple[Indices, list[Reading | DataError]]]:
    def read(chunk: Indices) -> list[Reading | DataError]:
        return [_tried(reader, index) for index in chunk.tolist()]

    chunks = [positions[start : start + _CHUNK] for start in range(0, len(positions), _CHUNK)]
    if not reader.threads:
        yield from ((chunk, read(chunk)) for chunk in chunks)
        return
    pool = ThreadPoolExecutor()
    try:
        yield from zip(chunks, pool.map(read, chunks), strict=True)
    finally:
        pool.shutdown(cancel_futures=True)


def _tried(reader: Reader, index: int) -> Reading | DataError:
    try:
        return reader.read(index)
    except DataError as error:
        return error


def _stack_readings(made: Contents, readings: list[Reading]) -> None:
    nothing = float("nan")
    made.digests = np.frombuffer(b"".join(r.digest for r in readings), np.uint64).reshape(-1, 2)
    made.measures = {
        name: np.array([r.measures.get(name, nothing) for r in readings])
        for name in dict.fromkeys(name for r in readings for name in r.measures)
    }
    made.categories = {
        name: pa.array([r.categories.get(name) for r in readings])
        for name in dict.fromkeys(name for r in readings for name in r.categories)
    }
    width = next((len(r.bands) for r in readings if r.bands is not None), 0)
    if width:
        # what has no key of its own gets one that no other has
        made.bands = np.stack([np.full(width, i, np.uint64) if r.bands is None else r.bands for i, r in enumerate(readings)])
        made.bands = np.where(np.array([r.bands is None for r in readings])[:, None], np.uint64(0), made.bands)
        made.bits = np.array([r.bits for r in readings], np.uint64)
    moments = [r.moments for r in readings if r.moments is not None]
    if moments and len({held.shape for held in moments}) == 1:
        mean, square = np.mean(moments, axis=0)
        made.moments = mean.tolist(), np.sqrt(np.maximum(square - mean**2, 0)).tolist()
    for row, reading in enumerate(readings):
        for note in reading.notes:
            made.notes.setdefault(note, []).append(made.id_of(row))
