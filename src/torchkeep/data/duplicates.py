"""Equal and nearly equal samples, found by hashes that near copies share, without comparing all with all.

Pictures have a hash of 64 bits: whether each of 8 × 8 areas is darker than the one to its right (Krawetz 2013, "Kind
of like that", hackerfactor.com: dHash), and one more for the area below it. Copies differ in a few bits, so one of the
four quarters of the first is mostly equal: certain up to 3 bits (Norouzi, Punjani, Fleet 2012, "Fast search in Hamming
space with multi-index hashing"). Texts have a MinHash of their shingles, whose rows meet as often as the sets overlap
(Broder 1997, "On the resemblance and containment of documents"). What meets is confirmed on the samples themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import cv2
import numpy as np
import xxhash

Array = np.ndarray[Any, Any]
U64 = np.ndarray[Any, np.dtype[np.uint64]]

NEAR_BITS = 8  # of 128; JPEG at quality 30 changes 4 at most in 98 of 100 photographs, half the size fewer
NEAR_CORRELATION = 0.99  # of two 32 × 32 greys; JPEG at quality 30 or half the size keeps .998
NEAR_JACCARD = 0.85
SHINGLE = 5  # letters

_THUMB = 32
_BANDS, _ROWS = 12, 6  # sets that share 9 of 10 shingles meet with probability .9999, those that share half with .17
_MOST_LETTERS = 20_000
_MOST_NEIGHBOURS = 64  # in one band: images that are half black share one by the thousand
_FLAT = 2.0  # greys: below that gradients are noise
_ONES = np.array([bin(byte).count("1") for byte in range(256)], np.uint8)
_FACTORS = np.random.Generator(np.random.Philox(0)).integers(1, 1 << 63, _BANDS * _ROWS, np.uint64) * 2 + 1


def gradient_hash(grey: Array) -> tuple[U64, U64] | None:
    """Two hashes of a picture, and the quarters of the first; None for a picture of one grey, which has no gradients.

    Shapes:  (H, W) uint8 or float32 → (2,) uint64, (4,) uint64
    """
    small = cv2.resize(grey, (9, 9), interpolation=cv2.INTER_AREA).astype(np.float32)
    if small.std() < _FLAT:
        return None
    across, down = small[:8, 1:] > small[:8, :-1], small[1:, :8] > small[:-1, :8]
    bits = np.packbits(np.stack([across, down]).reshape(2, 64), axis=1).view(np.uint64)[:, 0]
    quarters = bits[0] >> np.arange(0, 64, 16, dtype=np.uint64) & np.uint64(0xFFFF)
    # the quarter's number stands above its bits: quarters only meet their like
    return bits, quarters | np.arange(1, 5, dtype=np.uint64) << np.uint64(16)


def letters_of(text: str) -> str:
    """Letters and digits alone, without case."""
    return "".join(filter(str.isalnum, text.casefold()))[:_MOST_LETTERS]


def shingles_of(letters: str) -> U64:
    """Hashes of all stretches of five letters, each once."""
    data = letters.encode("utf-8", "replace")
    if len(data) < 8:
        return np.array([xxhash.xxh3_64_intdigest(data)], np.uint64)
    views = np.lib.stride_tricks.sliding_window_view(np.frombuffer(data, np.uint8), SHINGLE)
    with np.errstate(over="ignore"):
        powers = np.uint64(0x9E3779B97F4A7C15) ** np.arange(1, SHINGLE + 1, dtype=np.uint64)
        return np.unique((views * powers).sum(1, dtype=np.uint64))


def min_hash(letters: str) -> U64:
    """Keys of which texts that share most shingles share one; the first is that of the letters as they are.

    Shapes:  (13,) uint64
    """
    with np.errstate(over="ignore"):
        lowest = (shingles_of(letters)[:, None] * _FACTORS >> np.uint64(1)).min(0).reshape(_BANDS, _ROWS)
    rows = [xxhash.xxh3_64_intdigest(row.tobytes(), seed=1 + number) for number, row in enumerate(lowest)]
    return np.array([xxhash.xxh3_64_intdigest(letters.encode("utf-8", "replace")), *rows], np.uint64)


def equal_rows(digests: U64) -> list[Array]:
    """The rows of each content that comes more than once. Shapes: (N, 2) → several (n,), each ascending."""
    order = np.lexsort((digests[:, 1], digests[:, 0]))
    held = digests[order]
    starts = np.flatnonzero(np.r_[True, (held[1:] != held[:-1]).any(1)]) if len(held) else np.empty(0, np.int64)
    groups = [np.sort(rows) for rows in np.split(order, starts[1:]) if len(rows) > 1]
    return sorted(groups, key=lambda rows: int(rows[0]))


def near_rows(rows: Array, bands: U64, bits: U64, is_near: Callable[[int, int], bool]) -> list[Array]:
    """Groups of rows that ``is_near`` holds for near copies, among those that share a band and nearly their bits.

    Shapes:  rows (n,), places in bands (N, B) and bits (N, 2) → several (n,), each ascending
    """
    parent: dict[int, int] = {}

    def root(row: int) -> int:
        while parent.setdefault(row, row) != row:
            row = parent[row]
        return row

    for one, other in _candidates(rows, bands, bits):
        if root(one) != root(other) and is_near(one, other):
            parent[max(root(one), root(other))] = min(root(one), root(other))
    groups: dict[int, list[int]] = {}
    for row in sorted(parent):
        groups.setdefault(root(row), []).append(row)
    return [np.array(members) for members in groups.values() if len(members) > 1]


def _candidates(rows: Array, bands: U64, bits: U64) -> Iterator[tuple[int, int]]:
    """Pairs of rows that share a band and differ in at most NEAR_BITS bits, each once."""
    found = [np.empty((0, 2), np.int64)]
    for keys in bands[rows].T:
        order = np.lexsort((bits[rows, 0], keys))
        sorted_rows, keys, places = rows[order], keys[order], np.arange(len(rows))
        for step in range(1, _MOST_NEIGHBOURS):
            places = places[: np.searchsorted(places, len(rows) - step)]
            places = places[keys[places] == keys[places + step]]
            if not len(places):
                break
            one, other = sorted_rows[places], sorted_rows[places + step]
            is_close = _ONES[(bits[one] ^ bits[other]).view(np.uint8)].sum(1) <= NEAR_BITS
            found.append(np.sort(np.stack([one[is_close], other[is_close]], 1), axis=1))
    yield from map(tuple, np.unique(np.concatenate(found), axis=0).tolist())


def thumb_of(grey: Array) -> Array:
    """A picture of any size as 32 × 32 greys about their mean, of length 1: a product is a correlation."""
    small = cv2.resize(grey, (_THUMB, _THUMB), interpolation=cv2.INTER_AREA).astype(np.float32).reshape(-1)
    small -= small.mean()
    return np.asarray(small / max(float(np.linalg.norm(small)), 1e-6))


def is_same_picture(one: Array, other: Array) -> bool:
    """Whether two thumbs are those of near copies."""
    return float(one @ other) >= NEAR_CORRELATION


def is_same_text(one: U64, other: U64) -> bool:
    """Whether two sets of shingles, each without repeats, are those of near copies, by Jaccard's index."""
    shared = len(np.intersect1d(one, other, assume_unique=True))
    return shared >= NEAR_JACCARD * (len(one) + len(other) - shared)
