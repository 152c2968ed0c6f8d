"""Equal and nearly equal samples, found by hashes that near copies share, without comparing all with all.

Pictures have 64 bits of gradients to the right (dHash: Krawetz 2013, "Kind of like that", hackerfactor.com) and 64
downwards. Copies differ in a few, so that one quarter of the first is mostly equal (Norouzi, Punjani, Fleet 2012, "Fast
search in Hamming space with multi-index hashing"). Texts have a MinHash of their shingles (Broder 1997, "On the
resemblance and containment of documents"). What meets is confirmed on the samples themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import cv2
import numpy as np
import xxhash

Array = np.ndarray[Any, Any]
U64 = np.ndarray[Any, np.dtype[np.uint64]]

_NEAR_BITS = 8  # of 128; JPEG at quality 30 changes 4 at most in 98 of 100 photographs, half the size fewer
_NEAR_CORRELATION = 0.99  # of two 32 × 32 greys; JPEG at quality 30 or half the size keeps .998
_NEAR_JACCARD = 0.85
_SHINGLE = 5  # letters
_THUMB = 32
_BANDS, _ROWS = 12, 6  # sets that share 9 of 10 shingles meet with probability .9999, those that share half with .17
_MOST_LETTERS = 20_000
_MOST_NEIGHBOURS = 64  # in one band: images that are half black share one by the thousand
_FLAT = 2.0  # greys: below that gradients are noise
_ONES = np.array([bin(byte).count("1") for byte in range(256)], np.uint8)
_FACTORS = np.random.Generator(np.random.Philox(0)).integers(1, 1 << 63, _BANDS * _ROWS, np.uint64) * 2 + 1


def gradient_hash(grey: Array) -> U64 | None:
    """Two hashes of a picture; None for one of a single grey, which has no gradients. Shapes: (H, W) → (2,)."""
    small = cv2.resize(grey, (9, 9), interpolation=cv2.INTER_AREA).astype(np.float32)
    if small.std() < _FLAT:
        return None
    across, down = small[:8, 1:] > small[:8, :-1], small[1:, :8] > small[:-1, :8]
    return np.packbits(np.stack([across, down]).reshape(2, 64), axis=1).view(np.uint64)[:, 0]


def thumb_of(grey: Array) -> Array:
    """A picture of any size as 32 × 32 greys about their mean, of length 1: a product is a correlation."""
    small = cv2.resize(grey, (_THUMB, _THUMB), interpolation=cv2.INTER_AREA).astype(np.float32).reshape(-1)
    small -= small.mean()
    return np.asarray(small / max(float(np.linalg.norm(small)), 1e-6))


def _letters_of(text: str) -> bytes:
    """Letters and digits alone, without case."""
    return "".join(filter(str.isalnum, text.casefold()))[:_MOST_LETTERS].encode("utf-8", "replace")


def shingles_of(text: str) -> U64:
    """Hashes of all stretches of five letters, each once."""
    data = _letters_of(text)
    if len(data) < 8:
        return np.array([xxhash.xxh3_64_intdigest(data)], np.uint64)
    views = np.lib.stride_tricks.sliding_window_view(np.frombuffer(data, np.uint8), _SHINGLE)
    with np.errstate(over="ignore"):
        powers = np.uint64(0x9E3779B97F4A7C15) ** np.arange(1, _SHINGLE + 1, dtype=np.uint64)
        return np.unique((views * powers).sum(1, dtype=np.uint64))


def min_hash(text: str) -> U64:
    """Keys of which texts that share most shingles share one; the first is that of all letters. Shapes: (13,)."""
    with np.errstate(over="ignore"):
        lowest = (shingles_of(text)[:, None] * _FACTORS >> np.uint64(1)).min(0).reshape(_BANDS, _ROWS)
    rows = [xxhash.xxh3_64_intdigest(row.tobytes(), seed=1 + number) for number, row in enumerate(lowest)]
    return np.array([xxhash.xxh3_64_intdigest(_letters_of(text)), *rows], np.uint64)


def are_near(one: Array | None, other: Array | None) -> bool:
    """Whether two thumbs, or two sets of shingles, are those of near copies."""
    if one is None or other is None:
        return False
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


def near_rows(hashes: U64, is_near: Callable[[int, int], bool]) -> list[list[int]]:
    """Groups of rows that ``is_near`` holds for near copies, among those whose hashes meet. Shapes: (n, 2 or 13)."""
    groups: dict[int, set[int]] = {}
    for one, other in _candidates(hashes):
        small, large = sorted((groups.setdefault(row, {row}) for row in (one, other)), key=len)
        if small is not large and is_near(one, other):
            large |= small
            groups |= dict.fromkeys(small, large)
    return sorted(sorted(group) for group in {id(group): group for group in groups.values()}.values() if len(group) > 1)


def _candidates(hashes: U64) -> Iterator[tuple[int, int]]:
    """Pairs of rows that share a key, and of pictures nearly their bits, each once."""
    is_picture = hashes.shape[1] == 2
    keys_of = hashes[:, :1] >> np.arange(0, 64, 16, dtype=np.uint64) & np.uint64(0xFFFF) if is_picture else hashes
    found = [np.empty((0, 2), np.int64)]
    for keys in keys_of.T:
        order = np.lexsort((hashes[:, 0], keys))
        keys, places = keys[order], np.arange(len(order))
        for step in range(1, _MOST_NEIGHBOURS):
            places = places[: np.searchsorted(places, len(order) - step)]
            places = places[keys[places] == keys[places + step]]
            if not len(places):
                break
            pairs = np.stack([order[places], order[places + step]], 1)
            if is_picture:
                bits = np.ascontiguousarray(hashes[pairs[:, 0]] ^ hashes[pairs[:, 1]]).view(np.uint8)
                pairs = pairs[_ONES[bits].sum(1) <= _NEAR_BITS]
            found.append(np.sort(pairs, axis=1))
    yield from map(tuple, np.unique(np.concatenate(found), axis=0).tolist())
