"""What is in the data: counts, sizes, bad files, copies within and across splits, label problems and drift."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..contracts import Json
from ..errors import DataError
from .contents import Member, Progress, Split, looked_at, read_split, word_counts
from .duplicates import are_near, equal_rows, near_rows

_SIGNATURES = 20_000  # thumbs of 4 KB
_FEW_SAMPLES = 5
_IMBALANCE = 10.0
_DRIFT = 0.1  # distances below this are of no account, whatever their significance
_ALPHA = 0.001
_RARE = 5  # expected in the smaller split; rarer values are counted together
_SHOWN = 5


@dataclass(frozen=True)
class Problem:
    """Something to look at: where, what, which, and a setting that may help."""

    split: str
    what: str
    which: str
    fix: str = ""


@dataclass(frozen=True)
class Drift:
    """How far a split is from the first one; ``is_over`` where that is beyond ``bound``."""

    split: str
    what: str
    statistic: str  # "KS" for numbers, "TV" for texts
    value: float
    bound: float
    is_over: bool


@dataclass(frozen=True)
class Copies:
    """Samples of the same content, "exact" or "near": in several splits (a leak), with several labels (a conflict)."""

    kind: str
    samples: list[Member]
    is_leak: bool
    is_conflict: bool


@dataclass(frozen=True)
class Survey:
    """All that was found. ``leaks`` counts the samples of a split that the first one has too, by kind of copy."""

    splits: dict[str, Split]
    copies: list[Copies]
    leaks: dict[str, dict[str, int]]
    problems: list[Problem]
    drift: list[Drift]

    def to_json(self) -> Json:
        rows = {name: [asdict(row) for row in getattr(self, name)] for name in ("copies", "problems", "drift")}
        splits = {name: held.to_json() for name, held in self.splits.items()}
        return {"format": 1, "splits": splits, "leaks": self.leaks, **rows}


def examined(datasets: Mapping[str, Any], known: Sequence[Problem] = (), progress: Progress | None = None) -> Survey:
    """A survey of splits by their names, the first of which is the training data; ``known`` are problems met before.

    Raises:  DataError where there are no samples
    """
    held = {name: looked_at(dataset) for name, dataset in datasets.items()}
    if not held or not all(len(positions) for _, positions in held.values()):
        raise DataError("there is nothing to survey", where=", ".join(datasets), got="no samples")
    report = progress or (lambda name, done, total: None)
    splits = {name: read_split(name, *found, report) for name, found in held.items()}
    first, *others = splits
    copies = list(_copies(list(splits.values())))
    apart = [found for name in others for found in drifts(splits[first], splits[name], name)]
    apart.sort(key=lambda found: (not found.is_over, -found.value / found.bound))
    problems = [*known, *label_problems(splits), *_differences(splits)]
    return Survey(splits, copies, _leaks(copies, first, others), problems, apart)


def _copies(splits: Sequence[Split]) -> Iterator[Copies]:
    """Exact copies, then near ones: of each content that comes several times its first sample stands for all."""
    samples = [(held.reader, member) for held in splits for member in held.members]
    equal = equal_rows([digest for held in splits for digest in held.digests])
    yield from (_group("exact", [samples[row][1] for row in rows]) for rows in equal)
    hashes = dict(enumerate(found for held in splits for found in held.hashes))
    repeated = {row for rows in equal for row in rows[1:]}

    @lru_cache(_SIGNATURES)
    def signature(row: int) -> Any:
        reader, member = samples[row]
        return reader.signature(member.index)

    compared = {row: found for row, found in hashes.items() if found is not None and row not in repeated}
    near = near_rows(compared, lambda one, other: are_near(signature(one), signature(other)))
    yield from (_group("near", [samples[row][1] for row in rows]) for rows in near)


def _group(kind: str, samples: list[Member]) -> Copies:
    meant = {frozenset(map(plain_label, member.labels)) for member in samples if member.labels}
    return Copies(kind, samples, len({member.split for member in samples}) > 1, len(meant) > 1)


def _leaks(copies: Sequence[Copies], first: str, others: Sequence[str]) -> dict[str, dict[str, int]]:
    leaks = [group for group in copies if any(member.split == first for member in group.samples)]
    places = [(group.kind, member.split) for group in leaks for member in group.samples]
    return {name: {kind: places.count((kind, name)) for kind in ("exact", "near")} for name in others}


def _differences(splits: Mapping[str, Split]) -> Iterator[Problem]:
    """What a split has another kind of than the first, and images that a batch cannot hold."""
    first = next(iter(splits))
    for name, held in splits.items():
        if held.kind != splits[first].kind:
            yield Problem(name, f"{held.kind}, where {first} has {splits[first].kind}", "")
    data = [held for held in splits.values() if held.kind == "images" and held.reader.held.image_size is None]
    sizes = {size for held in data for size in held.held.get("size", pa.array([])).to_pylist()}
    if len(sizes) > 1:
        what = "images of several sizes, which training cannot batch"
        yield Problem(", ".join(splits), what, f"{len(sizes):,} sizes", "data.image_size = 224")


def label_problems(splits: Mapping[str, Split]) -> Iterator[Problem]:
    """Classes that are missing, rare, unequal or written in several ways, and samples without one."""
    counts = {name: held.classes for name, held in splits.items() if held.classes}
    first, spellings = next(iter(splits)), dict[str, dict[str, None]]()
    for name, found in counts.items():
        strange = [label for label in found if label not in counts.get(first, found)]
        if strange:
            yield Problem(name, f"{_classes(strange)} not in {first}", listed(strange))
        for label in found:
            spellings.setdefault(plain_label(label), {})[label] = None
    several = [" and ".join(map(repr, written)) for written in spellings.values() if len(written) > 1]
    if several:
        what = "labels that differ only by case, blanks or a dot"
        yield Problem(", ".join(counts), what, "; ".join(several[:_SHOWN]), "write each class in one way")
    for name, found in counts.items():
        yield from _unequal(name, found, splits[name])


def _unequal(name: str, found: Counter[str], held: Split) -> Iterator[Problem]:
    without = sum(not any(map(str.strip, member.labels)) for member in [*held.members, *held.bad])
    if without:
        yield Problem(name, "samples without a label", f"{without:,} of {held.num_samples:,}")
    if len(found) == 1:
        yield Problem(name, "one class only", repr(next(iter(found))))
        return
    few = [label for label, count in found.items() if count < _FEW_SAMPLES]
    if few:
        yield Problem(name, f"{_classes(few)} with fewer than {_FEW_SAMPLES} samples", listed(few))
    (most, highest), *_, (least, lowest) = found.items()
    if highest >= _IMBALANCE * lowest:
        which = f"{most!r} {highest:,}, {least!r} {lowest:,}"
        yield Problem(name, f"classes as unequal as {highest / lowest:,.0f} to 1", which, 'data.weights = "balanced"')


def plain_label(label: str) -> str:
    """A label as a person may have meant it: without case, blanks and a dot at its end."""
    return " ".join(label.casefold().split()).rstrip(". ")


def listed(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    return ", ".join(map(repr, names[:_SHOWN])) + (f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else "")


def _classes(names: list[str]) -> str:
    return f"{len(names):,} class{'es' if len(names) > 1 else ''}"


def drifts(first: Split, other: Split, split: str) -> Iterator[Drift]:
    """How far the classes and columns of another split are from those of the first.

    Source:  Smirnov 1948, "Table for estimating the goodness of fit of empirical distributions", for the bound of KS
    """
    # labels that are written in several ways are a problem of their own
    labels = [pa.array([plain_label(word) for member in held.members for word in member.labels], pa.string())
              for held in (first, other)]  # fmt: skip
    pairs = {name: (first.held[name], other.held[name]) for name in first.held if name in other.held}
    for what, (one, two) in {"classes": tuple(labels), **pairs}.items():
        is_number = isinstance(one, np.ndarray)
        if is_number != isinstance(two, np.ndarray):
            continue
        one, two = (held[np.isfinite(held)] if is_number else pc.drop_null(held) for held in (one, two))
        if len(one) and len(two):
            chance = math.sqrt(-math.log(_ALPHA / 2) / 2 * (1 / len(one) + 1 / len(two)))
            value, chance = (kolmogorov_smirnov(one, two), chance) if is_number else _of_words(one, two)
            bound = max(_DRIFT, chance)
            yield Drift(split, what, "KS" if is_number else "TV", value, bound, value > bound)


def kolmogorov_smirnov(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> float:
    """The largest distance of two empirical distributions, 0 to 1. Shapes: (n,), (m,)."""
    places = np.concatenate([one, other])
    shares = [np.searchsorted(np.sort(held), places, side="right") / len(held) for held in (one, other)]
    return float(np.abs(shares[0] - shares[1]).max())


def _of_words(one: Any, other: Any) -> tuple[float, float]:
    """The distance, and what chance gives: mean and four deviations of a sum of half-normal distances."""
    counts, sizes = [word_counts(held) for held in (one, other)], np.array([len(one), len(other)])
    pooled = counts[0] + counts[1]
    known = [word for word, count in pooled.items() if count * sizes.min() / sizes.sum() >= _RARE]
    shares = np.array([[found[word] for word in known] for found in counts]).reshape(2, -1) / sizes[:, None]
    shares = np.column_stack([shares, (1 - shares.sum(1)).clip(0)])  # the rare ones together
    pool = (shares * sizes[:, None]).sum(0) / sizes.sum()
    variance = pool * (1 - pool).clip(0) * (1 / sizes).sum()
    deviation = math.sqrt((1 - 2 / math.pi) * variance.sum()) / 2
    chance = float(np.sqrt(2 / math.pi * variance).sum() / 2 + 4 * deviation)
    return float(np.abs(shares[0] - shares[1]).sum() / 2), chance
