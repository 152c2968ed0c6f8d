"""What training will stumble over: labels that do not fit together, and splits that are not alike."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .contents import Contents

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


def label_problems(splits: Mapping[str, Contents]) -> Iterator[Problem]:
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


def _unequal(name: str, found: Counter[str], held: Contents) -> Iterator[Problem]:
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


def drifts(first: Contents, other: Contents, split: str) -> Iterator[Drift]:
    """How far the classes and columns of another split are from those of the first."""
    pairs = {"classes": (_plain_labels(first), _plain_labels(other))}
    pairs |= {name: (first.columns[name], other.columns[name]) for name in first.columns if name in other.columns}
    for what, (one, two) in pairs.items():
        is_number = isinstance(one, np.ndarray)
        if is_number != isinstance(two, np.ndarray):
            continue
        one, two = (held[np.isfinite(held)] if is_number else pc.drop_null(held) for held in (one, two))
        if len(one) and len(two):
            value, chance = (_of_numbers if is_number else _of_words)(one, two)
            bound = max(_DRIFT, chance)
            yield Drift(split, what, "KS" if is_number else "TV", value, bound, value > bound)


def _plain_labels(held: Contents) -> Any:
    # what is written in several ways is a problem of its own
    return pa.array([plain_label(label) for member in held.members for label in member.labels], pa.string())


def _of_numbers(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> tuple[float, float]:
    """The statistic, and what it exceeds by chance once in a thousand.

    Source:  Smirnov 1948, "Table for estimating the goodness of fit of empirical distributions"
    """
    chance = math.sqrt(-math.log(_ALPHA / 2) / 2 * (1 / len(one) + 1 / len(other)))
    return kolmogorov_smirnov(one, other), chance


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


def word_counts(words: Any) -> Counter[str]:
    """How often each text of a column comes, the most frequent first."""
    found = pc.value_counts(pc.drop_null(words))
    pairs = zip(found.field("values").to_pylist(), found.field("counts").to_pylist(), strict=True)
    return Counter(dict(sorted(pairs, key=lambda pair: -pair[1])))
