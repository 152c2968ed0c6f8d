"""Any map-style torch Dataset, list or sequence: its samples get names, and its chance becomes keyed.

Foreign code may draw from the global generators of torch, NumPy or Python. A probe looks at their states before and
after some samples; later batches are watched too. Once a draw is seen, each sample is read with all three generators
seeded by (seed, epoch, sample), and the trainer's own states are put back: law 1 then holds for code that never heard
of it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
import xxhash
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from ..chance import ChanceKey, keyed_seed
from ..contracts import Batch, KeyedDataset, Sample
from ..errors import BadSampleError, DataError
from ..generators import generator_states, kept_generators, restore, same_states, seed_all
from .arrays import Arrays
from .dataset import Filling
from .samples import absorb, digest_of, named_sample, schema_of, stack, user_line
from .streams import Stream, is_stream


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
                "this is no dataset",
                where=type(dataset).__name__,
                got="no __getitem__ and __len__, and no __iter__",
                expected="a Dataset with __len__ and __getitem__, or an iterable one",
                fix="collect the samples in a list, or write a Dataset class",
            )
        if isinstance(dataset, tuple) and dataset and all(isinstance(part, Tensor | np.ndarray) for part in dataset):
            raise DataError(
                "several arrays are not yet a dataset", where="(x, y)", got=f"a tuple of {len(dataset)} arrays",
                expected="a dataset", fix="tk.Arrays(input=x, label=y)",
            )  # fmt: skip
        if len(dataset) == 0:
            raise DataError("the dataset is empty", where=type(dataset).__name__, got="0 samples")
        self.dataset = dataset
        self.names = tuple(names) if names is not None else None
        with kept_generators():
            self.schema = schema_of(self.named(self._raw(0)))
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
        before = generator_states()
        if not self.draws:
            samples = [self._raw(int(i)) for i in indices]
            if same_states(before, generator_states()):
                return samples
            self._draws = True  # these are read again below, keyed
        try:
            return [self._keyed(int(i), key) for i in indices]
        finally:
            restore(before)

    def read_batch(self, indices: np.ndarray[Any, Any], key: ChanceKey) -> Batch | None:
        """None: a foreign dataset knows one sample at a time."""
        return None

    def begin(self, indices: np.ndarray[Any, Any], key: ChanceKey) -> Filling:
        """A batch to be filled; its ``samples`` are as the dataset gives them."""
        return _ForeignFilling(self, indices, key)

    def fingerprint(self) -> str:
        """xxh3 of the length and of the first, middle and last sample: a foreign dataset names no more of itself.

        Samples drawn from a generator of the dataset's own are other ones each time; then the length stands alone.
        """
        digest = xxhash.xxh3_128(f"{type(self.dataset).__qualname__}|{len(self)}".encode())
        if not self.probe.repeatable:
            return digest.hexdigest()
        for index in sorted({0, len(self) // 2, len(self) - 1}):
            absorb(digest, self.named(self.read(index, ChanceKey())))
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
            before = generator_states()
            started = time.perf_counter()
            self._raw(index)
            times_s.append(time.perf_counter() - started)
            draws = draws or not same_states(before, generator_states())
        for index in indices:
            first, second = (digest_of(self._keyed(index, ChanceKey())) for _ in range(2))
            repeatable = repeatable and first == second
        return Probe(draws, repeatable, statistics.median(times_s))

    def _keyed(self, index: int, key: ChanceKey) -> Any:
        seed_all(keyed_seed(key, "foreign", index))
        return self._raw(index)

    def _raw(self, index: int) -> Any:
        try:
            return self.dataset[index]
        except Exception as error:
            raise BadSampleError(
                "the dataset cannot give this sample",
                where=f"sample {index} of {type(self.dataset).__name__}{user_line(error)}",
                got=f"{type(error).__name__}: {error}",
                expected="a dict, a tuple or a tensor",
                fix=f"try dataset[{index}] alone",
            ) from error

    def named(self, sample: Any) -> Sample:
        """Any sample as a dict.

        Raises:  DataError where a tuple's parts need names
        """
        return named_sample(sample, self.names, type(self.dataset).__name__)


class _ForeignFilling(Filling):
    """Reads some samples at a time, so that the generators are looked at once for all of them."""

    def fill(self, start: int, indices: np.ndarray[Any, Any]) -> None:
        self.samples[start : start + len(indices)] = self.dataset.read_samples(indices, self.key)

    def finish(self) -> Batch:
        return stack([self.dataset.named(sample) for sample in self.samples])


def as_dataset(data: Any, names: Sequence[str] | None = None) -> KeyedDataset:
    """Anything that holds samples, with this house's contract. Tensors in memory are gathered by batch."""
    if hasattr(data, "read_batch") and hasattr(data, "schema"):
        return cast(KeyedDataset, data)
    if is_stream(data):
        return cast(KeyedDataset, Stream(data, names))
    if type(data) is TensorDataset and len(data.tensors) in (1, 2) and all(map(_is_kept_as_is, data.tensors)):
        named = tuple(names or ("input", "target")[: len(data.tensors)])
        return cast(KeyedDataset, Arrays(**dict(zip(named, data.tensors, strict=True))))
    return cast(KeyedDataset, Foreign(data, names))


def _is_kept_as_is(column: Tensor) -> bool:
    # Arrays makes float64 float32, and takes no class below 0, such as the -100 that a loss leaves out
    is_target = column.ndim == 1 and not column.is_floating_point() and column.dtype != torch.bool
    return column.dtype != torch.float64 and not (is_target and column.numel() and int(column.min()) < 0)
