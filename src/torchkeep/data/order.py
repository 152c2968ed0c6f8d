"""The order of an epoch, found by position: going on anywhere costs what beginning costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..chance import ChanceKey, epoch_order, keyed_bits, keyed_seed, weighted_positions
from ..errors import SettingsError
from ..generators import keyed_generators
from .dataset import Indices

Order = Callable[[int, int], Indices]
"""Positions [start, stop) of an epoch → the numbers of their samples."""

_CHUNK = 1 << 16  # positions permuted at once: 5 ms a chunk, and one chunk serves a whole small epoch
_BUCKET_BATCHES = 64


def plain_order(size: int) -> Order:
    """The samples as they stand."""
    return lambda start, stop: np.arange(start, min(stop, size), dtype=np.int64)


def shuffled_order(key: ChanceKey, size: int) -> Order:
    """A keyed permutation of the epoch."""
    return _by_chunk(lambda start, stop: epoch_order(key, size, start, stop), size)


def weighted_order(key: ChanceKey, cumulative: np.ndarray[Any, Any]) -> Order:
    """Draws with replacement in proportion to weights. Shapes: cumulative (N,) float64, their running sum."""
    return _by_chunk(lambda start, stop: weighted_positions(key, cumulative, start, stop), len(cumulative))


def bucketed_order(key: ChanceKey, order: Order, lengths: np.ndarray[Any, Any], size: int, batch_size: int) -> Order:
    """Batches of samples that are about equally long, so that little is padded; their order is mixed again.

    The rule: each stretch of 64 batches of ``order`` is sorted by length and cut into batches, which are put in the
    order of a draw keyed by their place. A last batch that is not full is what ``order`` has last: made of the longest,
    it would keep them from ever being seen where it is dropped.
    """
    stretch = _BUCKET_BATCHES * batch_size

    def one(start: int) -> Indices:
        stop = min(size, start + stretch)
        whole = (stop - start) // batch_size
        ids, rest = np.split(order(start, stop), [whole * batch_size])
        ids = ids[np.argsort(lengths[ids], kind="stable")]
        places = np.argsort(keyed_bits(key, "buckets", np.arange(start // batch_size, start // batch_size + whole)))
        return np.concatenate([ids.reshape(whole, batch_size)[places].reshape(-1), rest])

    def find(start: int, stop: int) -> Indices:
        first = start // stretch * stretch
        parts = [one(begin) for begin in range(first, max(stop, first + 1), stretch)]
        return np.concatenate(parts)[start - first : stop - first]

    return _by_chunk(find, size)


def sampled_order(key: ChanceKey, sampler: Any) -> Order:
    """A user's sampler: what it draws from global generators, or its own torch generator, is keyed by the epoch."""
    listed = _sampled(key, sampler)
    return lambda start, stop: listed[start:stop]


def _sampled(key: ChanceKey, sampler: Any) -> Indices:
    if hasattr(sampler, "set_epoch"):
        sampler.set_epoch(key.epoch)
    own = getattr(sampler, "generator", None)
    seed = keyed_seed(key, "sampler", own.initial_seed() if isinstance(own, torch.Generator) else 0)
    with keyed_generators(seed):
        if not isinstance(own, torch.Generator):
            return _positions(sampler)
        before = own.get_state()
        try:
            own.manual_seed(seed)
            return _positions(sampler)
        finally:
            own.set_state(before)


def _positions(sampler: Any) -> Indices:
    listed = list(sampler)
    try:
        return np.asarray(listed, dtype=np.int64).reshape(len(listed))
    except (TypeError, ValueError):
        raise SettingsError(
            "this sampler gives no positions",
            where="Loader(sampler=…)",
            got=f"{type(listed[0]).__name__}, first from {type(sampler).__name__}",
            expected="whole numbers, one for each sample",
            fix="give the sampler inside a batch sampler; batch_size= makes the batches",
        ) from None


def _by_chunk(find: Order, total: int) -> Order:
    """Look positions up a chunk at a time; a stretch over a chunk's end is looked up by itself."""
    begin, held = 0, find(0, 0)

    def look_up(start: int, stop: int) -> Indices:
        nonlocal begin, held
        if start < begin or stop > begin + len(held):
            begin, held = start, find(start, min(total, max(stop, start + _CHUNK)))
        return held[start - begin : stop - begin]

    return look_up


def running_weights(
    weights: Sequence[float] | Tensor | str | None, size: int, labels: Indices | None
) -> np.ndarray[Any, Any] | None:
    """The running sum of the weights, (N,) float64; "balanced" weighs each class alike.

    Raises:  SettingsError for weights that cannot be, or where there is not one class for each sample
    """
    if weights is None:
        return None
    if isinstance(weights, str):
        if weights != "balanced" or labels is None:
            got = repr(weights) if weights != "balanced" else "samples without one class each"
            raise _wrong_weights(got, 'a number for each sample, or "balanced" where each has a class')
        counts = np.bincount(labels)
        return np.cumsum(1.0 / counts[labels])
    array = np.asarray(weights, dtype=np.float64)
    fits = array.shape == (size,) and bool(np.isfinite(array).all()) and bool((array >= 0).all()) and array.sum() > 0
    if not fits:
        raise _wrong_weights(f"{array.shape}", f"{size} finite numbers from 0, not all 0")
    return np.cumsum(array)


def _wrong_weights(got: object, expected: str) -> SettingsError:
    what = "a loader's setting cannot be used"
    return SettingsError(what, where="Loader(weights=…)", got=got, expected=expected)
