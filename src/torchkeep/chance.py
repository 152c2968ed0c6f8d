"""Draws and orders that are pure functions of (seed, epoch, sample id, operation): nothing here has a state.

The hash is the 64-bit finaliser of SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number
generators", figure 16), applied after each part of the key is folded in. The order of an epoch is a bijection on
[0, N): a four-round Feistel network with cycle walking (Black & Rogaway 2002, "Ciphers with arbitrary finite
domains", method 3), so that any stretch of any epoch is found without what came before it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from zlib import crc32

import numpy as np

U64 = np.ndarray[Any, np.dtype[np.uint64]]

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1
_ROUNDS = 4
_SORTED_SIZE = 256  # four rounds over so few bits prefer some orders of 4 samples to others by half; a sort does not


@dataclass(frozen=True)
class ChanceKey:
    """Which run and which epoch a draw belongs to; the sample and the operation are named at the draw."""

    seed: int = 0
    epoch: int = 0


def _mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def _mix_array(x: U64) -> U64:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@lru_cache(maxsize=1024)
def _base(key: ChanceKey, operation: str) -> int:
    # crc32, not hash(): the same in every process
    state = _mix((key.seed & _MASK) + _GOLDEN & _MASK)
    state = _mix((state ^ (key.epoch & _MASK)) + _GOLDEN & _MASK)
    return _mix((state ^ crc32(operation.encode())) + _GOLDEN & _MASK)


def keyed_bits(key: ChanceKey, operation: str, ids: np.ndarray[Any, Any], draw: int = 0) -> U64:
    """64 random bits for each id.

    Shapes:  ids (B,) integers → (B,) uint64
    """
    return _keyed_bits(key, operation, ids, np.uint64((draw + 1) * _GOLDEN & _MASK))


def _keyed_bits(key: ChanceKey, operation: str, ids: np.ndarray[Any, Any], steps: Any) -> U64:
    with np.errstate(over="ignore"):
        return _mix_array(_mix_array(ids.astype(np.uint64) + np.uint64(_base(key, operation))) + steps)


def keyed_uniform(key: ChanceKey, operation: str, ids: np.ndarray[Any, Any], count: int = 1) -> np.ndarray[Any, Any]:
    """Draws that depend on the key, the operation and the id alone.

    Shapes:  ids (B,) integers → (B, count) float64
    Units:   uniform in [0, 1)
    """
    steps = np.array([(draw + 1) * _GOLDEN & _MASK for draw in range(count)], dtype=np.uint64)
    return (_keyed_bits(key, operation, ids[:, None], steps) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def keyed_seed(key: ChanceKey, operation: str, sample_id: int = 0) -> int:
    """A 63-bit seed for a generator that foreign code insists on."""
    return _mix((_mix(sample_id + _base(key, operation) & _MASK) + _GOLDEN) & _MASK) >> 1


def keyed_generator(key: ChanceKey, operation: str, sample_id: int) -> np.random.Generator:
    """A NumPy generator for one sample and one operation, for a user's callable ``(sample, rng)``."""
    return np.random.Generator(np.random.Philox(keyed_seed(key, operation, sample_id)))


def epoch_order(key: ChanceKey, size: int, start: int, stop: int) -> np.ndarray[Any, Any]:
    """Positions [start, stop) of the keyed order of ``size`` samples, found without the positions before them.

    Shapes:  (stop - start,) int64, no value twice within one epoch
    Raises:  ValueError if [start, stop) is not within [0, size]
    Source:  Black & Rogaway 2002, method 3 (cycle walking over a Feistel network)
    """
    if not 0 <= start <= stop <= size:
        raise ValueError(f"positions [{start}, {stop}) of {size}")
    if size <= _SORTED_SIZE:
        draws = keyed_bits(key, "order", np.arange(size))
        return np.argsort(draws, kind="stable")[start:stop].astype(np.int64)
    bits = max(2, (size - 1).bit_length())  # a domain below 2 x size (or 4): under 2 walks on average
    low_bits, tables = bits // 2, _round_tables(key, bits)
    low_mask = (1 << low_bits) - 1

    def permute(x: Any) -> Any:
        high, low = x >> low_bits, x & low_mask
        for first, second in zip(tables[::2], tables[1::2], strict=True):
            high ^= first.take(low)
            low ^= second.take(high)
        high <<= low_bits
        return np.bitwise_or(high, low, out=high)

    values = permute(np.arange(start, stop, dtype=np.int64))
    outside = np.flatnonzero(values >= size)
    while outside.size:
        walked = permute(values[outside])
        values[outside] = walked
        outside = outside[walked >= size]
    return np.asarray(values, dtype=np.int64)


@lru_cache(maxsize=8)
def _round_tables(key: ChanceKey, bits: int) -> list[np.ndarray[Any, Any]]:
    """What each round adds to a half, for every value of the other half: a look-up instead of eight operations.

    Shapes:  for a low half (2^(bits // 2),) and a high half in turn, int64
    """
    low_size, high_size = 1 << bits // 2, 1 << bits - bits // 2
    made = []
    for round_idx in range(_ROUNDS):
        own, other = (low_size, high_size) if round_idx % 2 == 0 else (high_size, low_size)
        mixed = _mix_array(np.arange(own, dtype=np.uint64) + np.uint64(keyed_seed(key, "order", round_idx)))
        made.append((mixed & np.uint64(other - 1)).astype(np.int64))
    return made


def weighted_positions(key: ChanceKey, cumulative: np.ndarray[Any, Any], start: int, stop: int) -> np.ndarray[Any, Any]:
    """Samples drawn with replacement in proportion to their weights, for positions [start, stop) of an epoch.

    Shapes:  cumulative (N,) float64, the running sum of the weights → (stop - start,) int64
    """
    draws = keyed_uniform(key, "weighted", np.arange(start, stop))[:, 0] * cumulative[-1]
    positions: np.ndarray[Any, Any] = np.searchsorted(cumulative, draws, side="right").astype(np.int64)
    positions[positions >= len(cumulative)] = len(cumulative) - 1  # a draw that was rounded up to the sum
    return positions
