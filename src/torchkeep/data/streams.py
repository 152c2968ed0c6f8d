"""Datasets that only give one sample after another: torch's IterableDataset, and others with ``__iter__`` alone.

A stream is read in the training process, in its own order. What it draws from the global generators is keyed by the
epoch and kept apart from the trainer's. A resume reads the epoch again up to its place; it is exact where the stream
gives the same samples each time, which nobody can promise but the stream.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import xxhash
from torch.utils.data import Dataset

from ..chance import ChanceKey, keyed_seed, keyed_uniform
from ..contracts import Batch, Sample
from ..errors import BadSampleError, DataError
from ..generators import borrowed_generators, kept_generators
from .samples import absorb, named_sample, schema_of

PROMISE = "a stream: a resume reads the epoch again up to its place, and is exact if the stream repeats itself"


class Stream(Dataset[Any]):
    """An iterable dataset with this house's contract. One epoch is ``length`` samples of a new iteration.

    ``set_epoch(epoch)`` of the dataset is called before each. With ``buffer`` the order of training is mixed within so
    many samples, by keyed chance.

    Raises:  DataError if nothing comes, if ``length`` is not known, if it can be read only once, or if a sample's parts
             need names
    """

    threads = False

    def __init__(self, dataset: Any, names: Sequence[str] | None = None, length: int | None = None, buffer: int = 1024):
        self.dataset, self.buffer = dataset, buffer
        self.names = tuple(names) if names is not None else None
        self.where = type(dataset).__name__
        _check_repeats(dataset, self.where)
        self._length = length if length is not None else _length_of(dataset, self.where)
        with kept_generators():
            first = next(iter(self.samples(ChanceKey())), None)
        if first is None:
            raise DataError("the stream is empty", where=self.where, got="0 samples")
        self.schema = schema_of(first)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Any:
        raise DataError(
            "a stream has no sample by number", where=self.where, got=f"sample {index}",
            expected="samples one after another",
            fix="next(iter(stream.samples(ChanceKey()))), or a map-style dataset",
        )  # fmt: skip

    def read(self, index: int, key: ChanceKey) -> Any:
        return self[index]

    def read_batch(self, indices: np.ndarray[Any, Any], key: ChanceKey) -> Batch | None:
        return self[int(indices[0])]  # type: ignore[no-any-return]  # it raises

    def samples(self, key: ChanceKey, shuffle: bool = False) -> Iterator[Sample]:
        """The samples of an epoch from its first on.

        Raises:  DataError where the stream ends before ``length`` samples, BadSampleError where it fails
        """
        held = self._mixed(key) if shuffle and self.buffer > 1 else self._named(key)
        count = 0
        for sample in itertools.islice(held, self._length):
            count += 1
            yield sample
        if count < self._length:
            raise DataError(
                "the stream ended before its epoch", where=self.where, got=f"{count:,} samples",
                expected=f"{self._length:,}", fix=f"length={count}: an epoch is so many samples",
            )  # fmt: skip

    def _named(self, key: ChanceKey) -> Iterator[Sample]:
        for place, sample in enumerate(self._raw(key)):
            yield named_sample(sample, self.names, f"sample {place} of {self.where}")

    def _raw(self, key: ChanceKey) -> Iterator[Any]:
        generators = borrowed_generators(keyed_seed(key, "stream"))
        iteration: Iterator[Any] | None = None
        place = 0
        while True:
            try:
                with generators():
                    iteration = iteration or self._begun(key)
                    sample = next(iteration)
            except StopIteration:
                return
            except Exception as error:
                raise BadSampleError(
                    "the stream cannot give its next sample",
                    where=f"sample {place} of {self.where}, epoch {key.epoch + 1}",
                    got=f"{type(error).__name__}: {error}",
                    expected="a dict, a tuple or a tensor",
                ) from error
            place += 1
            yield sample

    def _begun(self, key: ChanceKey) -> Iterator[Any]:
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(key.epoch)
        return iter(self.dataset)

    def _mixed(self, key: ChanceKey) -> Iterator[Sample]:
        """Each time one of the buffer leaves, by a draw keyed by the place, and the next sample takes its place."""
        held: list[Sample] = []
        for place, sample in enumerate(self._named(key)):
            if len(held) < self.buffer:
                held.append(sample)
                continue
            chosen = int(keyed_uniform(key, "stream/mix", np.array([place]))[0, 0] * len(held))
            leaving, held[chosen] = held[chosen], sample
            yield leaving
        draws = keyed_uniform(key, "stream/rest", np.arange(len(held)))[:, 0]
        yield from (held[chosen] for chosen in np.argsort(draws, kind="stable"))

    def fingerprint(self) -> str:
        """xxh3 of the length and of the first sample: a stream names no more of itself."""
        digest = xxhash.xxh3_128(f"{self.where}|{len(self)}".encode())
        with kept_generators():
            absorb(digest, next(iter(self.samples(ChanceKey()))))
        return digest.hexdigest()

    def without_augmentation(self) -> Stream:
        """Itself: what a stream draws is not ours to leave out."""
        return self


def is_stream(dataset: Any) -> bool:
    """Whether a dataset has no order of its own: ``__iter__``, and no sample by number."""
    from torch.utils.data import IterableDataset

    is_iterable = hasattr(dataset, "__iter__") and not hasattr(dataset, "__getitem__")
    return isinstance(dataset, IterableDataset) or is_iterable


def _check_repeats(dataset: Any, where: str) -> None:
    # a class may begin anew in its __iter__, and be its own iterator; Python's own iterators never do
    if isinstance(dataset, Iterator) and type(dataset).__module__ in ("builtins", "itertools"):
        raise DataError(
            "this can be read only once, and each epoch reads it anew", where=where, got=f"an iterator, {where}",
            expected="a dataset whose __iter__ begins anew", fix="a class with __iter__, or a list of the samples",
        )  # fmt: skip


def _length_of(dataset: Any, where: str) -> int:
    try:
        return len(dataset)
    except (TypeError, NotImplementedError):
        raise DataError(
            "how many samples an epoch of this stream has is not known", where=where,
            got="an iterable without a length", expected="a number of samples",
            fix="tk.Stream(dataset, length=10_000), or data.length in a recipe",
        ) from None  # fmt: skip
