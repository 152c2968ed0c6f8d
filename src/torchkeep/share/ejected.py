"""The pieces of an ejected script, whose sources it holds word for word: nothing here knows the rest of the house.

What has a namesake there gives the same bits in fewer lines, for one process that reads everything in order.
"""

from __future__ import annotations

import csv
import gzip
import importlib.util
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zlib import crc32

import cv2
import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

if TYPE_CHECKING:  # only the script needs them
    import scipy.fft
    import soundfile

Array = np.ndarray[Any, Any]
Columns = dict[str, Any]

# --- chance

MASK, GOLDEN = (1 << 64) - 1, 0x9E3779B97F4A7C15


def mix(x: Any) -> Any:
    """SplitMix64's finaliser, of a number or of an array of uint64: 64 bits that look like chance."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def keyed_bits(seed: int, epoch: int, operation: str, ids: Array) -> Array:
    """64 bits for each id, which depend on nothing else."""
    state = 0
    for key in (seed, epoch, crc32(operation.encode())):
        state = mix((state ^ key) + GOLDEN & MASK)
    return np.asarray(mix(mix(ids.astype(np.uint64) + state) + GOLDEN))


def shuffled(seed: int, epoch: int, size: int) -> Array:
    """The order of an epoch: four rounds of a Feistel network; what falls outside walks on until it is inside."""
    width, keys = (size - 1).bit_length(), keyed_bits(seed, epoch, "order", np.arange(4)) >> 1
    x, outside = np.arange(size, dtype=np.uint64), np.arange(size)
    while outside.size:
        high, low = x[outside] >> width // 2, x[outside] & (1 << width // 2) - 1
        for i in (0, 2):
            high = high ^ mix(low + keys[i]) & (1 << width - width // 2) - 1
            low = low ^ mix(high + keys[i + 1]) & (1 << width // 2) - 1
        x[outside] = high << width // 2 | low
        outside = np.flatnonzero(x >= size)
    return x.astype(np.int64)


def shuffled_few(seed: int, epoch: int, size: int) -> Array:
    """The order of an epoch of at most 256 samples."""
    return np.argsort(keyed_bits(seed, epoch, "order", np.arange(size)), kind="stable")


def bucketed(seed: int, epoch: int, order: Array, lengths: Array, batch_size: int) -> Array:
    """The order in batches of about equal lengths: 64 batches at a time are sorted, cut, and mixed again."""
    parts = []
    for start in range(0, len(order), 64 * batch_size):
        stretch, first = order[start : start + 64 * batch_size], start // batch_size
        num_whole = len(stretch) // batch_size
        ids, rest = np.split(stretch, [num_whole * batch_size])
        batches = ids[np.argsort(lengths[ids], kind="stable")].reshape(num_whole, batch_size)
        places = np.argsort(keyed_bits(seed, epoch, "buckets", np.arange(first, first + num_whole)))
        parts += [batches[places].reshape(-1), rest]
    return np.concatenate(parts)


def split(labels: Array, fraction: float, seed: int, operation: str) -> tuple[Array, Array]:
    """The rows that are kept and those that are set apart, from each class alike; a class keeps its last one."""
    order = np.lexsort((keyed_bits(seed, 0, operation, np.arange(len(labels))) >> 11, labels))
    is_apart = np.zeros(len(labels), bool)
    is_apart[order] = np.diff(np.floor(np.arange(len(labels) + 1) * fraction + 1e-9)) > 0
    for lost in np.setdiff1d(labels, labels[~is_apart]):
        is_apart[np.flatnonzero(labels == lost)[0]] = False
    return np.flatnonzero(~is_apart), np.flatnonzero(is_apart)


# --- the rate over time


def one_cycle(step: int, total_steps: int, warmup: float) -> float:
    """The learning rate's factor: up from 1/25, then down to almost nothing, both by half a cosine."""
    peak = max(1.0, warmup if warmup >= 1 else warmup * total_steps) - 1
    start, end, share = 1 / 25, 1.0, step / max(1.0, peak)
    if step > peak:
        start, end, share = 1.0, 1 / 25e4, min(1.0, (step - peak) / max(1.0, total_steps - 1 - peak))
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * share))


def warmed_up(step: int, rise: float, factor: float) -> float:
    """The learning rate's factor: for the first ``rise`` steps on a straight line from 0."""
    return (step + 1) / (rise + 1) if step < rise else factor


# --- tables

MISSING = ("", "?", "NA", "NaN", "nan")


def read_csv(path: Path, delimiter: str = ",", names: Sequence[str] = ()) -> Columns:
    """The columns of a file by name; each cell is a text."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = [[cell.strip() for cell in row] for row in csv.reader(file, delimiter=delimiter) if row]
    return {name: np.array(cells, dtype=object) for name, *cells in zip(*filter(None, [names]), *rows, strict=True)}


def read_texts(path: Path, delimiter: str = ",", names: Sequence[str] = ()) -> Columns:
    """The columns of a file by name; each cell is a text."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = [row for row in csv.reader(file, delimiter=delimiter) if row]
    return {name: np.array(cells, dtype=object) for name, *cells in zip(*filter(None, [names]), *rows, strict=True)}


def read_parquet(path: Path) -> Columns:
    """The columns of a file by name; each cell is a text."""
    columns = pq.read_table(path).to_pydict()
    return {n: np.array(["" if c is None else str(c) for c in cells], dtype=object) for n, cells in columns.items()}


def floats(cells: Array) -> Array:
    """Texts as numbers, NaN where one is missing."""
    return np.array([np.nan if cell in MISSING else float(cell) for cell in cells])


def standardised(columns: Columns, training: Columns, names: Sequence[str]) -> Array:
    """By the training's mean and deviation, 0 where missing, (N, F); gaps of the training are marked beside it."""
    made: list[Array] = []
    for name in names:
        values, known = floats(columns[name]), floats(training[name])
        is_missing, known = np.isnan(values), known[~np.isnan(known)]
        made.append(np.where(is_missing, 0.0, (values - known.mean()) / (known.std() or 1.0)))
        made += [is_missing] if len(known) < len(training[name]) else []
    return np.stack(made, 1).astype(np.float32)


def numbered(columns: Columns, training: Columns, names: Sequence[str]) -> Array:
    """The words of the training counted from 1, 0 where missing or not among them, (N, G)."""
    made = []
    for name in names:
        known = {word: number for number, word in enumerate(sorted(set(training[name]) - set(MISSING)), 1)}
        made.append([known.get(cell, 0) for cell in columns[name]])
    return np.array(made).T


# --- images

SUFFIXES: tuple[str, ...] = ()


def files_in(folder: Path) -> Columns:
    """The files of class folders, in the order of their names, and their classes."""
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES]
    names = sorted(name for name in names if "/" in name and not f"/{name}".count("/."))
    samples, labels = [folder / name for name in names], [name.partition("/")[0] for name in names]
    return {"sample": np.array(samples, dtype=object), "label": np.array(labels, dtype=object)}


def listed_files(path: Path) -> Columns:
    """The files that a table names, and their classes."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return {"sample": np.array([Path(row["file"]) for row in rows]), "label": np.array([row["label"] for row in rows])}


def encoded_images(path: Path, image: str, label: str) -> Columns:
    """The images that a table holds, as bytes, and their classes."""
    table = pq.read_table(path, columns=[image, label])
    held = [cell["bytes"] if isinstance(cell, dict) else cell for cell in table[image].to_pylist()]
    return {"sample": np.array(held, dtype=object), "label": np.array([str(name) for name in table[label].to_pylist()])}


def read_idx(path: Path) -> Array:
    """The bytes of a file in LeCun's format as an array; .gz is unpacked."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    shape = np.frombuffer(data, ">i4", data[3], 4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape)


def idx_images(path: Path) -> Columns:
    """The images of a file in LeCun's format, and their classes, which stand in the file beside it."""
    labels = path.with_name(path.name.replace("images", "labels").replace("idx3", "idx1"))
    return {"sample": read_idx(path), "label": read_idx(labels).astype(str)}


def decode_colours(sample: Path | bytes) -> Array:
    """Shapes:  uint8 (H, W, 3), RGB"""
    data = np.frombuffer(sample if isinstance(sample, bytes) else sample.read_bytes(), np.uint8)
    return np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR))[..., ::-1]


def decode_grey(sample: Path | bytes) -> Array:
    """Shapes:  uint8 (H, W, 1)"""
    data = np.frombuffer(sample if isinstance(sample, bytes) else sample.read_bytes(), np.uint8)
    return np.asarray(cv2.imdecode(data, cv2.IMREAD_GRAYSCALE))[..., None]


def resized(image: Array, size: int) -> Array:
    """A square of this side: averaged over areas from half the size down, else read between pixels."""
    shrinks = min(image.shape[:2]) >= 2 * size
    made = cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    return np.asarray(made).reshape(size, size, image.shape[2])


def middle(image: Array, size: int, fraction: float) -> Array:
    """The middle square, of so much of the short side, at this size."""
    height, width = image.shape[:2]
    side = max(1, round(fraction * min(height, width)))
    top, left = (height - side) // 2, (width - side) // 2
    return resized(image[top : top + side, left : left + side], size)


def random_resized_crop(image: Array, rng: np.random.Generator, size: int) -> Array:
    """A box of 8 to 100 % of the area and of ratio 3/4 to 4/3, at this size; the middle where ten tries do not fit."""
    height, width = image.shape[:2]
    for _ in range(10):
        area, ratio = rng.uniform(0.08, 1) * height * width, np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        rows, columns = round(np.sqrt(area / ratio)), round(np.sqrt(area * ratio))
        if 0 < rows <= height and 0 < columns <= width:
            top, left = rng.integers(height - rows + 1), rng.integers(width - columns + 1)
            return resized(image[top : top + rows, left : left + columns], size)
    return middle(image, size, 1.0)


def horizontal_flip(image: Array, rng: np.random.Generator) -> Array:
    """Left and right change places for every second sample."""
    return image[:, ::-1] if rng.random() < 0.5 else image


def vertical_flip(image: Array, rng: np.random.Generator) -> Array:
    """Top and bottom change places for every second sample."""
    return image[::-1] if rng.random() < 0.5 else image


def random_rotation(image: Array, rng: np.random.Generator) -> Array:
    """Turned about its middle by up to 15°; what comes in is the image mirrored at its edge."""
    height, width = image.shape[:2]
    matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), rng.uniform(-15, 15), 1.0)
    turned = cv2.warpAffine(np.ascontiguousarray(image), matrix, (width, height), borderMode=cv2.BORDER_REFLECT_101)
    return np.asarray(turned).reshape(image.shape)


def random_shift(image: Array, rng: np.random.Generator) -> Array:
    """Moved by up to an eighth of each side; what comes in is the image mirrored at its edge."""
    height, width = image.shape[:2]
    wide = np.pad(image, ((height // 8,) * 2, (width // 8,) * 2, (0, 0)), "reflect")
    top, left = rng.integers(2 * (height // 8) + 1), rng.integers(2 * (width // 8) + 1)
    return wide[top : top + height, left : left + width]


# --- texts

WORD = r"\w+(?:['\u2019]\w+)*|[^\w\s\ud800-\udfff]"


def words_of(text: str) -> list[str]:
    """The words and signs of a text, lower-cased."""
    return re.findall(WORD, unicodedata.normalize("NFKC", text).lower())


def learn_vocabulary(texts: Array) -> dict[str, int]:
    """The words that come at least twice, the most frequent first, numbered from 2."""
    counts = Counter(word for text in texts for word in words_of(text))
    known = [word for word, count in counts.items() if count >= 2] or list(counts)
    return {word: number for number, word in enumerate(sorted(known, key=lambda word: (-counts[word], word)), 2)}


def tokens_of(texts: Array, vocabulary: dict[str, int], max_length: int) -> Array:
    """Words as numbers: 0 pads, 1 is a word that is not known. Shapes: int32 (N, longest)."""
    rows = [[vocabulary.get(word, 1) for word in words_of(text)[:max_length]] or [1] for text in texts]
    return np.array(list(zip_longest(*rows, fillvalue=0)), np.int32).T


def bytes_of(texts: Array, max_length: int) -> Array:
    """The bytes of UTF-8, each one more: 0 pads, 257 is an empty text. Shapes: int32 (N, longest)."""
    rows = [[byte + 1 for byte in text.encode("utf-8", "replace")[:max_length]] or [257] for text in texts]
    return np.array(list(zip_longest(*rows, fillvalue=0)), np.int32).T


# --- recordings


def wave_of(path: Path, sample_rate: int) -> Array:
    """The samples of a recording of one channel. Shapes: float32 (1, T)."""
    wave, rate = soundfile.read(path, dtype="float32", always_2d=True)
    if wave.shape[1] != 1 or rate != sample_rate:
        raise ValueError(f"{path}: {wave.shape[1]} channels at {rate} Hz, and not 1 at {sample_rate}")
    return np.ascontiguousarray(wave.T)


def cut(wave: Array, size: int, rng: np.random.Generator | None = None) -> Array:
    """So many samples: about the middle, or anywhere; a shorter recording ends in silence, or lies anywhere in it."""
    spare = wave.shape[1] - size
    start = max(spare, 0) // 2 if rng is None else int(rng.integers(abs(spare) + 1))
    if spare >= 0:
        return wave[:, start : start + size]
    return np.pad(wave, ((0, 0), (start, -spare - start)))


def log_mel(waves: Array, sample_rate: int, num_mels: int) -> Array:
    """The logarithm of the power in bands of HTK's mel scale, each 10 ms: (B, T) → float32 (B, M, 1 + T // hop)."""
    size, hop = round(0.025 * sample_rate), round(0.010 * sample_rate)
    num_fft = 1 << (size - 1).bit_length()
    low, high = 2595.0 * np.log10(1.0 + np.array([20.0, sample_rate / 2]) / 700.0)
    corners = 700.0 * (10.0 ** (np.linspace(low, high, num_mels + 2)[:, None] / 2595.0) - 1.0)
    bins = np.fft.rfftfreq(num_fft, 1 / sample_rate)
    rising = (bins - corners[:-2]) / (corners[1:-1] - corners[:-2])
    falling = (corners[2:] - bins) / (corners[2:] - corners[1:-1])
    filters = np.maximum(0.0, np.minimum(rising, falling)).astype(np.float32)
    padded = np.pad(waves, ((0, 0), (size // 2, size - size // 2)))
    frames = np.lib.stride_tricks.sliding_window_view(padded, size, axis=1)[:, ::hop]
    window = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / size)).astype(np.float32)
    spectra = scipy.fft.rfft(frames * window, n=num_fft)
    bands = np.matmul(spectra.real**2 + spectra.imag**2, np.ascontiguousarray(filters.T))
    return np.asarray(np.log(np.maximum(bands, np.float32(1e-6))).swapaxes(1, 2))


# --- averages of the parameters


@torch.no_grad()
def join(averaged: nn.Module, model: nn.Module, share: float) -> None:
    """Let the model join the average of all that joined before, statistics too."""
    for kept, live in zip(averaged.state_dict().values(), model.state_dict().values(), strict=True):
        kept.lerp_(live, share) if kept.is_floating_point() else kept.copy_(live)


# --- metrics, of the (outputs, targets) of each batch

Seen = list[tuple[Tensor, Tensor]]


def class_counts(seen: Seen) -> tuple[Tensor, Tensor, Tensor]:
    """Of each class how often it was met, was there, and was said."""
    classes, truth = torch.cat([o.argmax(1) for o, _ in seen]), torch.cat([t for _, t in seen])
    size = seen[0][0].shape[1]
    table = torch.bincount(truth * size + classes, minlength=size * size).view(size, size).cpu().double()
    return table.diagonal(), table.sum(1), table.sum(0)


def f1(seen: Seen) -> float:
    """The mean over the classes that occur."""
    hit, true, said = class_counts(seen)
    return float((2 * hit / (true + said).clamp(min=1))[true + said > 0].mean())


def precision(seen: Seen) -> float:
    """The mean over the classes that occur."""
    hit, true, said = class_counts(seen)
    return float((hit / said.clamp(min=1))[true + said > 0].mean())


def recall(seen: Seen) -> float:
    """The mean over the classes that occur."""
    hit, true, said = class_counts(seen)
    return float((hit / true.clamp(min=1))[true + said > 0].mean())


def r2(seen: Seen) -> float:
    """The share of the targets' variance that is predicted."""
    pairs = [(output.double(), target.double()) for output, target in seen]
    first, second = float(sum(t.sum() for _, t in pairs)), float(sum(t.square().sum() for _, t in pairs))
    error = float(sum((t - o).square().sum() for o, t in pairs))
    return 1 - error / (second - first * first / sum(len(t) for _, t in pairs))


# --- what is the user's own


def load_function(path: Path, name: str) -> Any:
    """A function of a file of code."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def within(name: str, parts: Sequence[str]) -> bool:
    """Whether a module or parameter belongs to one of the parts."""
    return any(f"{name}.".startswith(f"{part}.") for part in parts)


def set_frozen(model: nn.Module, names: Sequence[str]) -> None:
    """Train mode but for the parts of these names, which keep their statistics and get no gradients."""
    for name, module in model.named_modules():
        module.training = not within(name, names)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not within(name, names))


def fitting(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that the model has a place for; the head of other classes is left out."""
    own = model.state_dict()
    return {name: value for name, value in tensors.items() if name in own and own[name].shape == value.shape}
