"""Any map-style torch Dataset, list or sequence: its samples get names, and its chance becomes keyed.

Foreign code may draw from the global generators of torch, NumPy or Python. A probe looks at their states before and
after some samples; later batches are watched too. Once a draw is seen, each sample is read with all three generators
seeded by (seed, epoch, sample), and the trainer's own states are put back: law 1 then holds for code that never heard
of it.
"""

from __future__ import annotations

import contextlib
import random
import statistics
import sysconfig
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
import xxhash
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from ..chance import ChanceKey, keyed_seed
from ..contracts import Batch, Field, KeyedDataset, Preprocess, Sample, Schema
from ..errors import BadSampleError, DataError
from .arrays import TARGETS, Arrays

_LIBRARIES = ("<", *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")))


@dataclass(frozen=True)
class Probe:
    """What a look at some samples has found."""

    draws: bool
    repeatable: bool
    sample_s: float


class Foreign(Dataset[Any]):
    """A torch dataset with this house's contract.

    ``names`` are given to the parts of tuple samples; two parts are ``input`` and ``target`` where nothing is said.

    Raises:  DataError if the dataset is empty, has no length, or its tuples need names
    """

    def __init__(self, dataset: Any, names: Sequence[str] | None = None):
        if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
            raise DataError(
                "this is not a map-style dataset",
                where=type(dataset).__name__,
                got="no __getitem__ and __len__"
                if not hasattr(dataset, "__iter__")
                else "an iterable without an order",
                expected="a Dataset with __len__ and __getitem__",
                fix="collect the samples in a list, or write a Dataset class",
            )
        if isinstance(dataset, tuple) and dataset and all(isinstance(part, Tensor | np.ndarray) for part in dataset):
            raise DataError(
                "several arrays are not yet a dataset",
                where="(x, y)",
                got=f"a tuple of {len(dataset)} arrays",
                expected="a dataset",
                fix="tk.Arrays(input=x, label=y)",
            )
        if len(dataset) == 0:
            raise DataError("the dataset is empty", where=type(dataset).__name__, got="0 samples")
        self.dataset = dataset
        self.names = tuple(names) if names is not None else None
        with kept_generators():
            self.schema = _schema_of(self.named(self._raw(0)))
        self._probe: Probe | None = None
        self._draws = False

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample:
        return self.named(self._raw(index))

    def read(self, index: int, key: ChanceKey) -> Any:
        """One sample, as the dataset gives it, its chance drawn from ``key``."""
        return self.read_samples(np.array([index]), key)[0]

    def read_samples(self, indices: np.ndarray[Any, Any], key: ChanceKey) -> list[Any]:
        """Samples as the dataset gives them; the global generators are as before afterwards."""
        before = _generator_states()
        if not self.draws:
            samples = [self._raw(int(i)) for i in indices]
            if _same_states(before, _generator_states()):
                return samples
            self._draws = True  # these are read again below, keyed
        try:
            return [self._keyed(int(i), key) for i in indices]
        finally:
            _restore(before)

    def read_batch(self, indices: np.ndarray[Any, Any], key: ChanceKey) -> Batch | None:
        """None: a foreign dataset knows one sample at a time."""
        return None

    def fingerprint(self) -> str:
        """xxh3 of the length and of the first, middle and last sample: a foreign dataset names no more of itself.

        Samples drawn from a generator of the dataset's own are other ones each time; then the length stands alone.
        """
        digest = xxhash.xxh3_128(f"{type(self.dataset).__qualname__}|{len(self)}".encode())
        if not self.probe.repeatable:
            return digest.hexdigest()
        for index in sorted({0, len(self) // 2, len(self) - 1}):
            _absorb(digest, self.named(self.read(index, ChanceKey())))
        return digest.hexdigest()

    def without_augmentation(self) -> Foreign:
        """Itself: what a foreign dataset draws is not ours to leave out."""
        return self

    @property
    def draws(self) -> bool:
        return self._draws or self.probe.draws

    @property
    def probe(self) -> Probe:
        """Look at the first, middle and last sample, once, leaving every generator as it was."""
        if self._probe is None:
            with kept_generators():
                self._probe = self._look(sorted({0, len(self) // 2, len(self) - 1}))
        return self._probe

    def _look(self, indices: list[int]) -> Probe:
        draws, repeatable, times_s = False, True, []
        for index in indices:
            before = _generator_states()
            started = time.perf_counter()
            self._raw(index)
            times_s.append(time.perf_counter() - started)
            draws = draws or not _same_states(before, _generator_states())
        for index in indices:
            first, second = (_digest(self._keyed(index, ChanceKey())) for _ in range(2))
            repeatable = repeatable and first == second
        return Probe(draws, repeatable, statistics.median(times_s))

    def _keyed(self, index: int, key: ChanceKey) -> Any:
        _seed(keyed_seed(key, "foreign", index))
        return self._raw(index)

    def _raw(self, index: int) -> Any:
        try:
            return self.dataset[index]
        except Exception as error:
            raise BadSampleError(
                "the dataset cannot give this sample",
                where=f"sample {index} of {type(self.dataset).__name__}{_user_line(error)}",
                got=f"{type(error).__name__}: {error}",
                expected="a dict, a tuple or a tensor",
                fix=f"try dataset[{index}] alone",
            ) from error

    def named(self, sample: Any) -> Sample:
        """Any sample as a dict.

        Raises:  DataError where a tuple's parts need names
        """
        if isinstance(sample, Mapping):
            return dict(sample)
        parts = tuple(sample) if isinstance(sample, tuple | list) else (sample,)
        names = self.names or (("input",), ("input", "target"))[min(len(parts), 2) - 1]
        if len(names) != len(parts):
            raise DataError(
                "the parts of this dataset's samples need names",
                where=type(self.dataset).__name__,
                got=f"{len(parts)} parts, names {names}",
                expected="one name for each part",
                fix='tk.Foreign(dataset, names=("left", "right", "target"))',
            )
        return dict(zip(names, parts, strict=True))


def as_dataset(data: Any, names: Sequence[str] | None = None) -> KeyedDataset:
    """Anything that holds samples, with this house's contract. Tensors in memory are gathered by batch."""
    if hasattr(data, "read_batch") and hasattr(data, "schema"):
        return cast(KeyedDataset, data)
    if type(data) is TensorDataset and len(data.tensors) in (1, 2) and all(map(_is_kept_as_is, data.tensors)):
        named = tuple(names or ("input", "target")[: len(data.tensors)])
        return cast(KeyedDataset, Arrays(**dict(zip(named, data.tensors, strict=True))))
    return cast(KeyedDataset, Foreign(data, names))


def _is_kept_as_is(column: Tensor) -> bool:
    # Arrays makes float64 float32, and takes no class below 0, such as the -100 that a loss leaves out
    is_target = column.ndim == 1 and not column.is_floating_point() and column.dtype != torch.bool
    return column.dtype != torch.float64 and not (is_target and column.numel() and int(column.min()) < 0)


def stack(samples: list[Any]) -> Batch:
    """Samples as a batch: tensors and arrays are stacked, numbers become tensors, texts stay lists.

    Python floats become float32. Raises:  DataError where shapes differ, naming the key
    """
    return {name: _stack_values(name, [sample[name] for sample in samples]) for name in samples[0]}


def _stack_values(name: str, values: list[Any]) -> Any:
    first = values[0]
    if isinstance(first, np.ndarray | np.generic):
        values = [torch.as_tensor(value) for value in values]
        first = values[0]
    if isinstance(first, Tensor):
        shapes = {tuple(value.shape) for value in values}
        if len(shapes) > 1:
            raise DataError(
                "these samples have different shapes and cannot be stacked",
                where=f"key {name!r}",
                got=" and ".join(str(shape) for shape in sorted(shapes)[:3]),
                expected="one shape in a batch",
                fix="collate= takes a function that makes a batch of a list of samples",
            )
        return torch.stack(values)
    if isinstance(first, bool | int):
        return torch.tensor(values)
    if isinstance(first, float):
        return torch.tensor(values, dtype=torch.float32)
    if isinstance(first, Mapping):
        return stack(values)
    if isinstance(first, tuple | list) and first and isinstance(first[0], int | float | Tensor | np.ndarray):
        return _stack_values(name, [torch.as_tensor(value) for value in values])
    return values


@contextlib.contextmanager
def kept_generators() -> Iterator[None]:
    """Leave torch's, NumPy's and Python's global generators as they were."""
    before = _generator_states()
    try:
        yield
    finally:
        _restore(before)


@contextlib.contextmanager
def keyed_generators(seed: int) -> Iterator[None]:
    """Seed the global generators for foreign code, and put them back afterwards."""
    with kept_generators():
        _seed(seed)
        yield


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.default_generator.manual_seed(seed)


def _generator_states() -> tuple[Any, Any, Tensor]:
    return random.getstate(), np.random.get_state(), torch.default_generator.get_state()


def _restore(states: tuple[Any, Any, Tensor]) -> None:
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.default_generator.set_state(states[2])


def _same_states(one: tuple[Any, Any, Tensor], other: tuple[Any, Any, Tensor]) -> bool:
    numpy_same = one[1][2:] == other[1][2:] and np.array_equal(one[1][1], other[1][1])
    return one[0] == other[0] and numpy_same and torch.equal(one[2], other[2])


def _schema_of(sample: Sample) -> Schema:
    fields = {name: _field_of(name, value) for name, value in sample.items()}
    image = next((value for name, value in sample.items() if fields[name].kind == "image"), None)
    if image is None:
        return Schema(fields)
    channels = int(image.shape[0])
    return Schema(fields, Preprocess(None, channels, (0.5,) * channels, (0.5,) * channels))


def _field_of(name: str, value: Any) -> Field:
    target = name in TARGETS
    if isinstance(value, Tensor | np.ndarray):
        is_image = name == "image" and value.ndim == 3 and value.dtype in (torch.uint8, np.uint8)
        return Field("image" if is_image else "tensor", tuple(value.shape), is_target=target)
    if isinstance(value, bool | int | np.integer):
        return Field("label" if target else "number", (), is_target=target)
    if isinstance(value, float | np.floating):
        return Field("number", (), is_target=target)
    if isinstance(value, str):
        return Field("text" if name != "id" else "object", is_target=target)
    return Field("object", is_target=target)


def _digest(value: Any) -> str:
    digest = xxhash.xxh3_128()
    _absorb(digest, value)
    return digest.hexdigest()


def _absorb(digest: Any, value: Any) -> None:
    if isinstance(value, Mapping):
        for key in value:
            digest.update(str(key).encode())
            _absorb(digest, value[key])
    elif isinstance(value, tuple | list):
        for item in value:
            _absorb(digest, item)
    elif isinstance(value, Tensor):
        _absorb(digest, value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    elif isinstance(value, np.ndarray) and value.dtype != object:
        digest.update(np.ascontiguousarray(value).tobytes())
    elif isinstance(value, bool | int | float | str | bytes | np.generic) or value is None:
        digest.update(repr(value).encode())
    elif hasattr(value, "tobytes"):  # a Pillow image
        digest.update(value.tobytes())
    else:
        digest.update(type(value).__qualname__.encode())


def _user_line(error: BaseException) -> str:
    """Where in the user's own files the error arose; in a library's only where no other file took part."""
    frames = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    own = [place for place in frames[1:] if not place[0].startswith(_LIBRARIES)] or frames[-1:]
    return f" ({own[-1][0]}, line {own[-1][1]})"
