"""What is in the data: counts, sizes, bad files, copies within and across splits, label problems and drift."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa

from ..contracts import Json
from ..errors import DataError
from . import drift, duplicates
from .contents import BadSample, Contents, read_contents
from .drift import Drift, Problem, class_counts, drifts, label_problems, listed, plain_label, word_counts
from .duplicates import equal_rows, near_rows

Progress = Callable[[int, int], None]

_MOST_WORDS = 10
_SIGNATURES = 20_000  # thumbs of 4 KB


@dataclass(frozen=True)
class SplitSurvey:
    """One split. ``mean`` and ``std`` are those of each channel, white or full scale being 1, each sample alike.

    ``measures`` holds count, missing, min, median, max, mean, std of each number; ``categories`` the different values
    of each, those missing, and the most frequent with their counts.
    """

    kind: str
    num_samples: int
    num_read: int
    num_bytes: int | None
    classes: dict[str, int]
    measures: dict[str, dict[str, float]]
    categories: dict[str, dict[str, Any]]
    mean: list[float]
    std: list[float]
    bad: list[BadSample]


@dataclass(frozen=True)
class Member:
    """A sample of a group of copies; ``index`` is its place in the dataset that its split is, or is a part of."""

    split: str
    index: int
    id: str
    labels: tuple[str, ...]


@dataclass(frozen=True)
class Copies:
    """Samples of the same content ("exact") or nearly so ("near"); a leak where they are in several splits."""

    kind: str
    samples: list[Member]
    is_leak: bool
    is_conflict: bool


@dataclass(frozen=True)
class Survey:
    """All that was found. ``leaks`` counts the samples of a split that the first one has too, by kind of copy."""

    splits: dict[str, SplitSurvey]
    copies: list[Copies]
    leaks: dict[str, dict[str, int]]
    problems: list[Problem]
    drift: list[Drift]

    def to_json(self) -> Json:
        """JSON values, with the thresholds that were used."""
        thresholds = {
            "near_bits": duplicates.NEAR_BITS, "near_correlation": duplicates.NEAR_CORRELATION,
            "near_jaccard": duplicates.NEAR_JACCARD, "few_samples": drift.FEW_SAMPLES,
            "imbalance": drift.IMBALANCE, "drift": drift.DRIFT,
        }  # fmt: skip
        return {"format": 1, "thresholds": thresholds, **asdict(self)}


def survey(datasets: Mapping[str, Any], *, limit: int | None = None, progress: Progress | None = None) -> Survey:
    """Survey splits by their names, the first of which is the training data; any dataset will do.

    ``limit`` looks at so many samples of each, chosen by keyed chance; ``progress(done, total)`` is called on the way.
    """
    return examined(datasets, limit=limit, progress=progress)[0]


def examined(
    datasets: Mapping[str, Any],
    known: Sequence[Problem] = (),
    *,
    limit: int | None = None,
    progress: Progress | None = None,
) -> tuple[Survey, dict[str, Contents]]:
    """The survey, and what it was made of, for a contact sheet. ``known`` are problems met when opening the data.

    Raises:  DataError where there are no samples
    """
    if not datasets or not all(map(len, datasets.values())):
        raise DataError("there is nothing to survey", where=", ".join(datasets), got="no samples")
    total, done = sum(min(len(held), limit or len(held)) for held in datasets.values()), 0

    def report(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    splits = {name: read_contents(dataset, limit, report) for name, dataset in datasets.items()}
    copies = list(_copies(splits))
    first, *others = splits
    apart = [found for name in others for found in drifts(splits[first], splits[name], name)]
    problems = [*known, *label_problems(splits), *_differences(splits), *_notes(splits)]
    made = Survey(
        {name: _summary(held) for name, held in splits.items()}, copies, _leaks(copies, first, others), problems,
        sorted(apart, key=lambda found: (not found.is_over, -found.value / found.bound)),
    )  # fmt: skip
    return made, splits


def _summary(held: Contents) -> SplitSurvey:
    mean, std = held.moments or ([], [])
    return SplitSurvey(
        held.kind, held.num_samples, len(held.positions) + len(held.bad), held.num_bytes, dict(class_counts(held)),
        {name: _spread(values) for name, values in held.measures.items()},
        {name: _words(values) for name, values in held.categories.items()}, mean, std, held.bad,
    )  # fmt: skip


def _spread(values: np.ndarray[Any, Any]) -> dict[str, float]:
    known = values[np.isfinite(values)]
    low, median, high = np.quantile(known, [0, 0.5, 1]).tolist() if len(known) else (0.0, 0.0, 0.0)
    mean, std = (float(known.mean()), float(known.std())) if len(known) else (0.0, 0.0)
    counts = {"count": len(known), "missing": len(values) - len(known)}
    return counts | {"min": low, "median": median, "max": high, "mean": mean, "std": std}


def _words(values: Any) -> dict[str, Any]:
    found = word_counts(values)
    return {"values": len(found), "missing": values.null_count, "top": dict(found.most_common(_MOST_WORDS))}


def _copies(splits: Mapping[str, Contents]) -> Iterator[Copies]:
    """Exact copies, then near ones: of each content that comes several times its first sample stands for all."""
    places = [(name, row) for name, held in splits.items() for row in range(len(held.positions))]
    equal = equal_rows(np.concatenate([held.digests for held in splits.values()]))
    for rows in equal:
        yield _group("exact", rows, places, splits)
    bands = [held.bands for held in splits.values() if held.bands is not None]
    if len(bands) < len(splits) or len({held.shape[1] for held in bands}) > 1:
        return
    stacked = np.concatenate(bands)
    is_first = np.ones(len(places), bool)
    for rows in equal:
        is_first[rows[1:]] = False
    chosen = np.flatnonzero(is_first & (stacked != 0).any(1))
    bits = np.concatenate([held.bits for held in splits.values()])
    for rows in near_rows(chosen, stacked, bits, _comparison(places, splits)):
        yield _group("near", rows, places, splits)


def _comparison(places: Sequence[tuple[str, int]], splits: Mapping[str, Contents]) -> Callable[[int, int], bool]:
    @lru_cache(_SIGNATURES)
    def signature(place: int) -> Any:
        held = splits[places[place][0]]
        return held.reader.signature(int(held.positions[places[place][1]]))

    reader = next(iter(splits.values())).reader
    return lambda one, other: reader.are_near(signature(one), signature(other))


def _group(kind: str, rows: Any, places: Sequence[tuple[str, int]], splits: Mapping[str, Contents]) -> Copies:
    found = [places[row] for row in rows.tolist()]
    members = [
        Member(name, int(splits[name].positions[row]), splits[name].id_of(row), splits[name].labels[row])
        for name, row in found
    ]
    meant = {frozenset(map(plain_label, member.labels)) for member in members if member.labels}
    return Copies(kind, members, len({member.split for member in members}) > 1, len(meant) > 1)


def _leaks(copies: Sequence[Copies], first: str, others: Sequence[str]) -> dict[str, dict[str, int]]:
    counts = {name: {"exact": 0, "near": 0} for name in others}
    for group in copies:
        if any(member.split == first for member in group.samples):
            for member in group.samples:
                if member.split != first:
                    counts[member.split][group.kind] += 1
    return counts


def _differences(splits: Mapping[str, Contents]) -> Iterator[Problem]:
    """What a split has another kind of, or lacks, or has in several sizes."""
    first, *others = splits
    for name in others:
        if splits[name].kind != splits[first].kind:
            yield Problem(name, f"{splits[name].kind}, where {first} has {splits[first].kind}", "")
        elif splits[first].kind == "rows":
            wanted, found = ({*splits[each].measures, *splits[each].categories} for each in (first, name))
            if wanted != found:
                yield Problem(name, f"columns that are not alike in {first} and here", listed(sorted(wanted ^ found)))
    sized = [held for held in splits.values() if getattr(held.reader.held, "image_size", 1) is None]
    sizes = {size for held in sized for size in held.categories.get("size", pa.array([])).to_pylist()}
    if len(sizes) > 1:
        what = "images of several sizes, which training cannot batch"
        yield Problem(", ".join(splits), what, f"{len(sizes):,} sizes", "data.image_size = 224")


def _notes(splits: Mapping[str, Contents]) -> Iterator[Problem]:
    for name, held in splits.items():
        for what, ids in held.notes.items():
            yield Problem(name, f"{len(ids):,} {what}", listed(ids))
