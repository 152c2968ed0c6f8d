"""Equal and nearly equal samples, found by hashes that near copies share, without comparing all with all.

Pictures have 64 bits of gradients to the right (dHash: Krawetz 2013, "Kind of like that", hackerfactor.com) and 64
downwards. Copies differ in a few, so that one quarter of the first is mostly equal (Norouzi, Punjani, Fleet 2012, "Fast
search in Hamming space with multi-index hashing"). Texts have a MinHash of their shingles (Broder 1997, "On the
resemblance and containment of documents"). What meets is confirmed on the samples themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import cv2
import numpy as np
import xxhash

Array = np.ndarray[Any, Any]
Hash = tuple[int, ...]
"""Bits whose distance counts, 0 for texts; then the keys of which near copies share one."""

_NEAR_BITS = 8  # of 128; JPEG at quality 30 changes 4 at most in 98 of 100 photographs, half the size fewer
_NEAR_CORRELATION = 0.99  # of two 32 × 32 greys; JPEG at quality 30 or half the size keeps .998
_NEAR_JACCARD = 0.85
_SHINGLE = 5  # letters
_BANDS, _ROWS = 12, 6  # sets that share 9 of 10 shingles meet with probability .9999, those that share half with .17
_MOST_LETTERS = 20_000
_MOST_NEIGHBOURS = 64  # of one key: images that are half black share one by the thousand
_FLAT = 2.0  # greys: below that gradients are noise
_FACTORS = np.random.Generator(np.random.Philox(0)).integers(1, 1 << 63, _BANDS * _ROWS, np.uint64) * 2 + 1


def _small_grey(pixels: Array, side: int) -> Array:
    """Shapes:  (H, W, C) uint8 → (side, side) float32"""
    grey = pixels[..., 0] if pixels.shape[2] == 1 else cv2.cvtColor(pixels[..., :3], cv2.COLOR_RGB2GRAY)
    return np.asarray(cv2.resize(grey.astype(np.float32), (side, side), interpolation=cv2.INTER_AREA))


def gradient_hash(pixels: Array) -> Hash | None:
    """The hash of a picture; None for one of a single grey, which has no gradients."""
    small = _small_grey(pixels, 9)
    if small.std() < _FLAT:
        return None
    across, down = small[:8, 1:] > small[:8, :-1], small[1:, :8] > small[:-1, :8]
    packed = np.packbits([across, down]).tobytes()
    return int.from_bytes(packed, "big"), *(packed[at] << 16 | packed[at + 1] << 8 | at for at in range(0, 8, 2))


def thumb_of(pixels: Array) -> Array:
    """A picture of any size as 32 × 32 greys about their mean, of length 1: a product is a correlation."""
    small = _small_grey(pixels, 32).reshape(-1)
    small -= small.mean()
    return np.asarray(small / max(float(np.linalg.norm(small)), 1e-6))


def _letters_of(text: str) -> bytes:
    """Letters and digits alone, without case."""
    return "".join(filter(str.isalnum, text.casefold()))[:_MOST_LETTERS].encode("utf-8", "replace")


def shingles_of(text: str) -> Array:
    """Hashes of all stretches of five letters, each once, uint64."""
    data = _letters_of(text)
    if len(data) < 8:
        return np.array([xxhash.xxh3_64_intdigest(data)], np.uint64)
    views = np.lib.stride_tricks.sliding_window_view(np.frombuffer(data, np.uint8), _SHINGLE)
    with np.errstate(over="ignore"):
        powers = np.uint64(0x9E3779B97F4A7C15) ** np.arange(1, _SHINGLE + 1, dtype=np.uint64)
        return np.unique((views * powers).sum(1, dtype=np.uint64))


def min_hash(text: str) -> Hash:
    """The hash of a text: the first key is that of all letters, others are shared by texts that share most shingles."""
    with np.errstate(over="ignore"):
        lowest = (shingles_of(text)[:, None] * _FACTORS >> np.uint64(1)).min(0).reshape(_BANDS, _ROWS)
    rows = (xxhash.xxh3_64_intdigest(row.tobytes(), seed=1 + number) for number, row in enumerate(lowest))
    return 0, xxhash.xxh3_64_intdigest(_letters_of(text)), *rows


def are_near(one: Array, other: Array) -> bool:
    """Whether two thumbs, or two sets of shingles, are those of near copies."""
    if one.dtype != np.uint64:
        return float(one @ other) >= _NEAR_CORRELATION
    shared = len(np.intersect1d(one, other, assume_unique=True))
    return shared >= _NEAR_JACCARD * (len(one) + len(other) - shared)


def equal_rows(digests: Sequence[bytes]) -> list[list[int]]:
    """The rows of each digest that comes more than once."""
    groups: dict[bytes, list[int]] = {}
    for row, digest in enumerate(digests):
        groups.setdefault(digest, []).append(row)
    return [rows for rows in groups.values() if len(rows) > 1]


def near_rows(hashes: Mapping[int, Hash], is_near: Callable[[int, int], bool]) -> list[list[int]]:
    """Groups of rows that ``is_near`` holds for near copies, among those that share a key and nearly their bits."""
    buckets: dict[int, list[int]] = {}
    groups = {row: {row} for row in hashes}
    for row, (bits, *keys) in sorted(hashes.items(), key=lambda pair: pair[1]):
        met = {other for key in keys for other in buckets.get(key, [])[-_MOST_NEIGHBOURS:]}
        for key in keys:
            buckets.setdefault(key, []).append(row)
        for other in sorted(met):
            small, large = sorted((groups[row], groups[other]), key=len)
            is_close = small is not large and (hashes[other][0] ^ bits).bit_count() <= _NEAR_BITS
            if is_close and is_near(min(row, other), max(row, other)):
                large |= small
                groups |= dict.fromkeys(small, large)
    found = {id(group): sorted(group) for group in groups.values() if len(group) > 1}
    return sorted(found.values())
