"""All that a survey reads of one split: who each sample is, what its copies are found by, and columns to compare."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from torch import Tensor

from ..chance import ChanceKey
from ..contracts import Json
from ..errors import DataError
from .audio import Clips
from .dataset import Indices, Part
from .decode import Pixels, in_bits
from .duplicates import Array, Hash, gradient_hash, min_hash, shingles_of, thumb_of
from .foreign import Foreign, as_dataset
from .frames import as_texts, is_category, is_date, is_number
from .images import Images
from .mel import log_mel
from .samples import TARGETS, absorb
from .streams import Stream
from .tables import Table, are_class_numbers
from .text import TextBlocks, Texts

Progress = Callable[[str, int, int], None]
"""A split's name, samples read, samples in all."""

_MOST_WORDS = 10
_MOST_OF_STREAM = 10_000  # they are held
_HEARD_S, _HEARD = 30, 0.02  # what is compared of a recording: from where it reaches this share of its peak
_GREYS_PER_LOG = 255 / 14  # log-mels reach from -14 to a little above 0


@dataclass(frozen=True)
class Member:
    """A sample of a split; ``index`` is its place in the dataset that the split is, or is a part of."""

    split: str
    index: int
    id: str
    labels: tuple[str, ...]


@dataclass(frozen=True)
class BadSample(Member):
    """A sample that cannot be read, and why; ``where`` names it with its source."""

    where: str
    what: str
    got: str


@dataclass(eq=False)
class Split:
    """One split: the samples that were read, a row each in ``members`` and what follows it, and the bad ones.

    ``held`` are columns of numbers, float64 with NaN where one is missing, or of texts, pyarrow.Array. ``mean`` and
    ``std`` are those of each channel, white or full scale being 1, each sample alike.
    """

    reader: Any
    kind: str
    num_samples: int
    num_bytes: int | None
    members: list[Member] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    hashes: list[Hash | None] = field(default_factory=list)
    held: dict[str, Any] = field(default_factory=dict)
    mean: list[float] = field(default_factory=list)
    std: list[float] = field(default_factory=list)
    bad: list[BadSample] = field(default_factory=list)

    @property
    def classes(self) -> Counter[str]:
        """How often each class comes, also in samples that cannot be read; the most frequent first."""
        found = Counter(label for member in [*self.members, *self.bad] for label in member.labels)
        return Counter(dict(found.most_common()))

    @property
    def columns(self) -> dict[str, dict[str, Any]]:
        """What is held of each: count and missing; of numbers the spread, of texts how many and the most frequent."""
        return {name: (_spread if isinstance(held, np.ndarray) else _words)(held) for name, held in self.held.items()}

    def to_json(self) -> Json:
        names = ("kind", "num_samples", "num_bytes", "classes", "columns", "mean", "std")
        return {name: getattr(self, name) for name in names} | {"bad": [asdict(sample) for sample in self.bad]}


def word_counts(words: Any) -> Counter[str]:
    """How often each text of a column comes, the most frequent first."""
    return Counter(dict(Counter(word for word in words.to_pylist() if word is not None).most_common()))


def _words(words: Any) -> dict[str, Any]:
    found = word_counts(words)
    top = dict(found.most_common(_MOST_WORDS))
    return {"count": found.total(), "missing": words.null_count, "values": len(found), "top": top}


def _spread(values: np.ndarray[Any, Any]) -> dict[str, float]:
    known = values[np.isfinite(values)]
    counts = {"count": len(known), "missing": len(values) - len(known)}
    known = known if len(known) else np.zeros(1)
    low, median, high = np.quantile(known, [0, 0.5, 1]).tolist()
    return counts | {"min": low, "median": median, "max": high, "mean": float(known.mean()), "std": float(known.std())}


@dataclass
class Reading:
    """One sample. ``moments``, (2, C), are mean and mean square of each channel; ``labels`` None: as the data say."""

    digest: bytes
    values: dict[str, float | str]
    hash: Hash | None = None
    moments: Array | None = None
    labels: tuple[str, ...] | None = None


class Reader:
    """The samples of a dataset by number: their names, labels, readings, and pictures to look at."""

    kind = "samples"

    def __init__(self, held: Any):
        self.held = held

    def id_of(self, index: int) -> str:
        return str(getattr(self.held, "id_of", "sample {}".format)(index))

    def labels_of(self, index: int) -> tuple[str, ...]:
        """The classes of a sample; none where numbers are predicted, or nothing."""
        kept = getattr(self.held, "_labels", None)
        if kept is None or kept.field.kind == "number":
            return ()
        place = slice(index, index + 1) if kept.offsets is None else slice(*kept.offsets[index : index + 2])
        return tuple(kept.field.classes[number] for number in kept.values[place].tolist())

    def signature(self, index: int) -> Array:
        """What near copies are compared by."""
        return thumb_of(self.shown(index))

    def shown(self, index: int) -> Any:
        """What a contact sheet shows of a sample: pixels, (H, W, C) uint8, or words."""
        sample = self._sample(index)
        pixels = _pixels_in(sample)
        return repr(sample) if pixels is None else pixels

    def read(self, index: int) -> Reading:
        """Raises:  BadSampleError"""
        sample = self._sample(index)
        digest, pixels = xxhash.xxh3_128(), _pixels_in(sample)
        absorb(digest, {name: value for name, value in sample.items() if name not in TARGETS})
        made = Reading(b"", {}) if pixels is None else _of_pixels(pixels)
        made.digest, made.labels = digest.digest(), ()
        for name, value in sample.items():
            value = value.detach().numpy() if isinstance(value, Tensor) else value
            value = value.item() if isinstance(value, np.ndarray | np.generic) and value.size == 1 else value
            if name in TARGETS and isinstance(value, int | str):
                classes = self.held.schema[name].classes
                made.labels = (classes[value] if classes and isinstance(value, int) else str(value),)
            elif isinstance(value, int | float):
                made.values[name] = float(value)
            elif isinstance(value, np.ndarray) and value.dtype.kind in "biuf" and name != "image":
                made.values[f"{name}: mean"] = float(value.mean(dtype=np.float64))
        return made

    def _sample(self, index: int) -> dict[str, Any]:
        sample = getattr(self.held, "named", dict)(self.held.read(index, ChanceKey()))
        return {name: value for name, value in sample.items() if name not in ("id", "index")}


class ImageReader(Reader):
    kind = "images"

    def read(self, index: int) -> Reading:
        if "mask" in self.held.schema:
            self.held.read(index, ChanceKey())  # raises where the mask cannot be used
        return _of_pixels(self.held.decoded(index))

    def shown(self, index: int) -> Pixels:
        return in_bits(self.held.decoded(index), 8)


class ClipReader(Reader):
    kind = "recordings"

    def read(self, index: int) -> Reading:
        wave, rate = self.held._decoded(index, "")
        moments = np.array([[wave.mean()], [np.square(wave).mean()]])
        level = float(np.sqrt(moments[1, 0]))
        digest = xxhash.xxh3_128_digest(wave.tobytes() + f"{wave.shape}|{rate}".encode())
        values = {"seconds": wave.shape[1] / rate, "level dB": 20 * np.log10(max(level, 1e-9)), "rate": f"{rate:,} Hz"}
        return Reading(digest, values, gradient_hash(_mels_of(wave, rate)), moments)

    def shown(self, index: int) -> Pixels:
        return _mels_of(*self.held._decoded(index, ""))


class TextReader(Reader):
    kind = "texts"

    def shown(self, index: int) -> str:
        return str(self.held.source.texts(np.array([index]))[0])

    def read(self, index: int) -> Reading:
        text = self.shown(index)
        num_tokens = len(self.held.tokenizer.encode_batch([text], None)[0])
        values: dict[str, float | str] = {"characters": len(text.strip()), "tokens": num_tokens}
        digest = xxhash.xxh3_128_digest(text.encode("utf-8", "surrogatepass"))
        return Reading(digest, values, min_hash(text) if text.strip() else None)

    def signature(self, index: int) -> Array:
        return shingles_of(self.shown(index))


def reader_of(held: Any) -> Reader:
    """The reader for a dataset's kind; of others, whose samples are dicts or tuples, what is found in them decides."""
    readers = ((Images, ImageReader), (Clips, ClipReader), (Texts, TextReader))
    return next((reader(held) for kind, reader in readers if isinstance(held, kind)), None) or Reader(held)


def _of_pixels(pixels: Pixels) -> Reading:
    """What any image tells, (H, W, C)."""
    pixels = np.ascontiguousarray(pixels)
    height, width = pixels.shape[:2]
    mean, deviation = (part.reshape(-1) / np.iinfo(pixels.dtype).max for part in cv2.meanStdDev(pixels))
    digest = xxhash.xxh3_128_digest(pixels.tobytes() + f"{pixels.shape}|{pixels.dtype}".encode())
    values: dict[str, float | str] = {
        "width": width, "height": height, "brightness": float(mean.mean()), "contrast": float(deviation.mean()),
        "size": f"{width} × {height}",
    }  # fmt: skip
    moments = np.stack([mean, mean**2 + deviation**2])
    return Reading(digest, values, gradient_hash(in_bits(pixels, 8)), moments)


def _pixels_in(sample: dict[str, Any]) -> Pixels | None:
    """The image of a sample, channels last."""
    value = sample.get("image", sample.get("input"))
    held = value.numpy() if isinstance(value, Tensor) and not value.is_floating_point() else value
    if not isinstance(held, np.ndarray) or held.dtype != np.uint8 or held.ndim != 3:
        return None
    last = held.transpose(1, 2, 0) if held.shape[0] in (1, 3, 4) else held
    return np.ascontiguousarray(last) if last.shape[2] in (1, 3, 4) else None


def _mels_of(wave: Any, rate: int) -> Pixels:
    """Log-mels of what is heard, at most half a minute: near copies look alike whatever their gain and lead.

    Shapes:  (C, T) → (96, 96, 1) uint8, low bands at the bottom
    """
    mono = wave.mean(0)
    loud = np.flatnonzero(np.abs(mono) >= _HEARD * np.abs(mono).max())
    heard = mono[loud[0] : loud[-1] + 1][: _HEARD_S * rate]
    mels = log_mel(heard[None] / max(float(np.abs(heard).max()), 1e-9), rate, 32)[0]
    greys = np.clip((mels - mels.min()) * _GREYS_PER_LOG, 0, 255).astype(np.uint8)
    return np.asarray(cv2.resize(greys[::-1], (96, 96), interpolation=cv2.INTER_AREA))[..., None]


@dataclass(frozen=True)
class Rows:
    """A table as it stands, also one that training refuses; ``target`` is a column of it, or None."""

    frame: Any
    target: str | None = None
    left_out: tuple[str, ...] = ()
    forced: tuple[str, ...] = ()  # categories although they are numbers
    id: str | None = None
    kind: str = "rows"

    def __len__(self) -> int:
        return int(self.frame.num_rows)

    def id_of(self, index: int) -> str:
        return str(self.frame[self.id][index]) if self.id in self.frame.column_names else f"row {index}"

    def shown(self, index: int) -> str:
        return "\n".join(f"{name} {self.frame[name][index]}" for name in self.frame.column_names)


def looked_at(dataset: Any) -> tuple[Any, Indices]:
    """What a dataset holds, behind its parts and without augmentation, and the positions in it."""
    held = dataset if isinstance(dataset, Rows) else as_dataset(dataset)
    if isinstance(held, Stream):
        held = Foreign(list(islice(held.samples(ChanceKey()), _MOST_OF_STREAM)))  # a stream has none by number
    positions = np.arange(len(held))
    while isinstance(held, Part):
        positions, held = held.indices[positions], held.dataset
    if isinstance(held, Table):
        unused, forced = tuple(held._unused), tuple(held._forced)
        return Rows(held._frame, held.encoding.target, unused, forced, held._id), held.rows[positions]
    if isinstance(held, TextBlocks) and len(positions) == len(held):
        return held.texts, np.arange(len(held.texts))
    return getattr(held, "without_augmentation", lambda: held)(), positions


def read_split(name: str, held: Any, positions: Indices, progress: Progress) -> Split:
    """Read these samples, of whatever kind."""
    if isinstance(held, Rows):
        return _of_rows(name, held, positions)
    reader = reader_of(held)
    sizes = getattr(getattr(held, "blobs", getattr(held, "source", None)), "sizes_bytes", None)
    num_bytes = None if sizes is None else int(np.asarray(sizes)[positions].clip(0).sum())
    made, readings = Split(reader, reader.kind, len(positions), num_bytes), list[Reading]()
    source, kept = getattr(held, "where", type(held).__name__), getattr(held, "_labels", None)

    def read(index: int) -> Reading | DataError:
        try:
            return reader.read(index)
        except DataError as error:
            return error

    with ThreadPoolExecutor() as pool:
        results = (pool.map if getattr(held, "threads", False) else map)(read, positions.tolist())
        for done, (index, found) in enumerate(zip(positions.tolist(), results, strict=True), 1):
            progress(name, done, len(positions))
            id, labels = reader.id_of(index), reader.labels_of(index)
            if isinstance(found, DataError):
                made.bad.append(BadSample(name, index, id, labels, f"{source}: {id}", found.what, found.got))
                continue
            made.members.append(Member(name, index, id, labels if found.labels is None else found.labels))
            readings.append(found)
    made.digests, made.hashes = [r.digest for r in readings], [r.hash for r in readings]
    for column in dict.fromkeys(column for r in readings for column in r.values):
        values = [r.values.get(column) for r in readings]
        has_texts = any(isinstance(value, str) for value in values)
        made.held[column] = pa.array(values, pa.string()) if has_texts else np.array(values, np.float64)
    if kept is not None and kept.field.kind == "number":
        made.held["target"] = np.array([kept.of(member.index) for member in made.members])
    moments = [r.moments for r in readings if r.moments is not None]
    if moments and len({found.shape for found in moments}) == 1:
        mean, square = np.mean(moments, axis=0)
        made.mean, made.std = mean.tolist(), np.sqrt(np.maximum(square - mean**2, 0)).tolist()
    return made


def _of_rows(split: str, rows: Rows, positions: Indices) -> Split:
    frame = rows.frame.take(pa.array(positions))
    made = Split(rows, rows.kind, len(positions), int(frame.nbytes), hashes=[None] * len(positions))
    names = [name for name in frame.column_names if name not in (rows.target, rows.id, *rows.left_out)]
    columns = {name: _column_of(frame[name], name in rows.forced) for name in names}
    made.held = {name: column for name, column in columns.items() if column is not None}
    made.digests = _digests_of(frame, list(made.held))
    labels: list[tuple[str, ...]] = [()] * len(positions)
    if rows.target in frame.column_names:
        target = frame[rows.target]
        column = _column_of(target, are_class_numbers(target))
        if isinstance(column, np.ndarray):
            made.held[str(rows.target)] = column
        elif column is not None:
            labels = [() if text is None else (text,) for text in column.to_pylist()]
    places = zip(positions.tolist(), labels, strict=True)
    made.members = [Member(split, index, rows.id_of(index), held) for index, held in places]
    return made


def _column_of(column: Any, is_forced: bool) -> Any:
    """Texts, or numbers, dates being days since 1970 and infinity NaN; None for a type that is neither."""
    if is_forced or is_category(column.type):
        return as_texts(column)
    if is_date(column.type):
        column = pc.cast(pc.cast(column, pa.date32(), safe=False), pa.int32())
    elif not is_number(column.type):
        return None
    values = pc.fill_null(pc.cast(column, pa.float64(), safe=False), float("nan")).to_numpy()
    return np.where(np.isfinite(values), values, np.nan)


def _digests_of(frame: Any, names: list[str]) -> list[bytes]:
    """A digest of each row over these columns; without any no row is like another."""
    texts = [pc.cast(frame[name], pa.string()) for name in names] or [pa.array(map(str, range(frame.num_rows)))]
    joined = pc.binary_join_element_wise(*texts, "\x1f", null_handling="replace", null_replacement="\x1e")
    return [xxhash.xxh3_128_digest(text.encode()) for text in joined.to_pylist()]
