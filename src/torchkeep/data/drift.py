"""What training will stumble over: labels that do not fit together, and splits that are not alike."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .contents import Contents

FEW_SAMPLES = 5
IMBALANCE = 10.0
DRIFT = 0.1
"""Distances below this are of no account, whatever their significance."""

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
    statistic: str  # "KS" for numbers, "TV" for categories
    value: float
    bound: float
    is_over: bool


def label_problems(splits: Mapping[str, Contents]) -> Iterator[Problem]:
    """Classes that are missing, rare, unequal or written in several ways, and samples without one."""
    counts = {name: class_counts(held) for name, held in splits.items()}
    first, *others = splits
    for name in others:
        strange = [label for label in counts[name] if label not in counts[first]]
        if strange and counts[first]:
            yield Problem(name, f"{_classes(strange)} not in {first}", listed(strange))
    yield from _spellings(counts)
    for name, found in counts.items():
        yield from _unequal(name, found, splits[name])


def _spellings(counts: Mapping[str, Counter[str]]) -> Iterator[Problem]:
    places: dict[str, dict[str, None]] = {}
    for label in (label for found in counts.values() for label in found):
        places.setdefault(plain_label(label), {})[label] = None
    several = [" and ".join(map(repr, spellings)) for spellings in places.values() if len(spellings) > 1]
    if several:
        used = ", ".join(name for name, found in counts.items() if found)
        what = "labels that differ only by case, blanks or a dot"
        yield Problem(used, what, "; ".join(several[:_SHOWN]), "write each class in one way")


def _unequal(name: str, found: Counter[str], held: Contents) -> Iterator[Problem]:
    without = sum(not labels or not all(map(str.strip, labels)) for labels in [*held.labels, *held.bad_labels])
    if not found:
        return
    if without:
        yield Problem(name, "samples without a label", f"{without:,} of {held.num_samples:,}")
    if len(found) == 1:
        yield Problem(name, "one class only", repr(next(iter(found))))
        return
    few = [label for label, count in found.items() if count < FEW_SAMPLES]
    if few:
        yield Problem(name, f"{_classes(few)} with fewer than {FEW_SAMPLES} samples", listed(few))
    most, least = found.most_common()[0], found.most_common()[-1]
    if most[1] >= IMBALANCE * least[1]:
        which = f"{most[0]!r} {most[1]:,}, {least[0]!r} {least[1]:,}"
        yield Problem(name, f"classes as unequal as {most[1] / least[1]:,.0f} to 1", which, 'data.weights = "balanced"')


def class_counts(held: Contents) -> Counter[str]:
    """How often each class comes, in samples that can be read and those that cannot; the most frequent first."""
    return Counter(dict(Counter(label for row in [*held.labels, *held.bad_labels] for label in row).most_common()))


def plain_label(label: str) -> str:
    """A label as a person may have meant it: without case, blanks and a dot at its end."""
    return " ".join(label.casefold().split()).rstrip(". ")


def listed(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    return ", ".join(map(repr, names[:_SHOWN])) + (f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else "")


def _classes(names: list[str]) -> str:
    return f"{len(names):,} class{'es' if len(names) > 1 else ''}"


def drifts(first: Contents, other: Contents, split: str) -> Iterator[Drift]:
    """How far the classes, numbers and categories of another split are from those of the first."""
    pair = (first, other)
    # what is written in several ways is a problem of its own
    labels = [pa.array([plain_label(label) for row in held.labels for label in row], pa.string()) for held in pair]
    if all(map(len, labels)):
        yield _of_words(split, "classes", *labels)
    for name in [name for name in first.measures if name in other.measures]:
        numbers = [held.measures[name][np.isfinite(held.measures[name])] for held in pair]
        if all(map(len, numbers)):
            yield _of_numbers(split, name, *numbers)
    for name in [name for name in first.categories if name in other.categories]:
        words = [pc.drop_null(held.categories[name]) for held in pair]
        if all(map(len, words)):
            yield _of_words(split, name, *words)


def _of_numbers(split: str, what: str, one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> Drift:
    """The bound is the statistic's own at a significance of .001, and never below ``DRIFT``.

    Source:  Smirnov 1948, "Table for estimating the goodness of fit of empirical distributions"
    """
    value = kolmogorov_smirnov(one, other)
    chance = math.sqrt(-math.log(_ALPHA / 2) / 2 * (1 / len(one) + 1 / len(other)))
    bound = max(DRIFT, chance)
    return Drift(split, what, "KS", value, bound, value > bound)


def kolmogorov_smirnov(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> float:
    """The largest distance of two empirical distributions, 0 to 1. Shapes: (n,), (m,)."""
    places = np.concatenate([one, other])
    shares = [np.searchsorted(np.sort(held), places, side="right") / len(held) for held in (one, other)]
    return float(np.abs(shares[0] - shares[1]).max())


def _of_words(split: str, what: str, one: Any, other: Any) -> Drift:
    """The bound is what chance gives: mean and four deviations of a sum of half-normal distances."""
    counts = [word_counts(held) for held in (one, other)]
    pooled, sizes = counts[0] + counts[1], np.array([len(one), len(other)])
    known = [word for word, count in pooled.items() if count * sizes.min() / sizes.sum() >= _RARE]
    shares = np.array([[found[word] for word in known] for found in counts]).reshape(2, -1) / sizes[:, None]
    shares = np.column_stack([shares, (1 - shares.sum(1)).clip(0)])  # the rare ones together
    value = float(np.abs(shares[0] - shares[1]).sum() / 2)
    pool = (shares * sizes[:, None]).sum(0) / sizes.sum()
    variance = pool * (1 - pool).clip(0) * (1 / sizes).sum()
    deviation = math.sqrt((1 - 2 / math.pi) * variance.sum()) / 2
    bound = max(DRIFT, float(np.sqrt(2 / math.pi * variance).sum() / 2 + 4 * deviation))
    return Drift(split, what, "TV", value, bound, value > bound)


def word_counts(words: Any) -> Counter[str]:
    """How often each text of a column comes, the most frequent first."""
    found = pc.value_counts(pc.drop_null(words))
    pairs = zip(found.field("values").to_pylist(), found.field("counts").to_pylist(), strict=True)
    return Counter(dict(sorted(pairs, key=lambda pair: -pair[1])))
