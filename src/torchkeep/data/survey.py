"""What is in the data: counts, sizes, bad files, copies within and across splits, label problems and drift."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from ..contracts import Json
from ..errors import DataError
from .contents import Member, Split, looked_at, read_split
from .drift import Drift, Problem, drifts, label_problems, listed, plain_label
from .duplicates import are_near, equal_rows, near_rows

_SIGNATURES = 20_000  # thumbs of 4 KB


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


def examined(
    datasets: Mapping[str, Any], known: Sequence[Problem], limit: int | None, progress: Callable[[int, int], None] | None
) -> Survey:
    """A survey of splits by their names, the first of which is the training data.

    ``known`` are problems met when opening them, ``limit`` is how many samples of each are looked at.
    Raises:  DataError where there are no samples
    """
    views = {name: looked_at(dataset, limit) for name, dataset in datasets.items()}
    if not views or not all(len(positions) for _, positions, _ in views.values()):
        raise DataError("there is nothing to survey", where=", ".join(datasets), got="no samples")
    total, done = sum(len(positions) for _, positions, _ in views.values()), 0

    def report(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    splits = {name: read_split(name, *view, report) for name, view in views.items()}
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
    repeated = {row for rows in equal for row in rows[1:]}
    hashes = {row: found for row, found in enumerate(found for held in splits for found in held.hashes)}
    hashed = [(row, found) for row, found in hashes.items() if found is not None and row not in repeated]
    if len({len(found) for _, found in hashed}) != 1:  # nothing, or pictures beside texts
        return
    chosen = [samples[row] for row, _ in hashed]

    @lru_cache(_SIGNATURES)
    def signature(place: int) -> Any:
        reader, member = chosen[place]
        return reader.signature(member.index)

    near = near_rows(np.stack([found for _, found in hashed]), lambda a, b: are_near(signature(a), signature(b)))
    yield from (_group("near", [chosen[row][1] for row in rows]) for rows in near)


def _group(kind: str, samples: list[Member]) -> Copies:
    meant = {frozenset(map(plain_label, member.labels)) for member in samples if member.labels}
    return Copies(kind, samples, len({member.split for member in samples}) > 1, len(meant) > 1)


def _leaks(copies: Sequence[Copies], first: str, others: Sequence[str]) -> dict[str, dict[str, int]]:
    leaks = [group for group in copies if any(member.split == first for member in group.samples)]
    places = [(group.kind, member.split) for group in leaks for member in group.samples]
    return {name: {kind: places.count((kind, name)) for kind in ("exact", "near")} for name in others}


def _differences(splits: Mapping[str, Split]) -> Iterator[Problem]:
    """What a split has another kind of, or lacks, or has in several sizes, and what readers note of samples."""
    first = next(iter(splits))
    kind, columns = splits[first].kind, splits[first].columns
    for name, held in splits.items():
        if held.kind != kind:
            yield Problem(name, f"{held.kind}, where {first} has {kind}", "")
        elif kind == "rows" and held.columns.keys() != columns.keys():
            which = listed(sorted(held.columns.keys() ^ columns.keys()))
            yield Problem(name, f"columns that are not alike in {first} and here", which)
        yield from (Problem(name, f"{len(ids):,} {what}", listed(ids)) for what, ids in held.notes.items())
    data = {name: getattr(held.reader, "held", None) for name, held in splits.items()}
    sized = [name for name in splits if getattr(data[name], "image_size", 1) is None and "size" in splits[name].columns]
    sizes = {size for name in sized for size in splits[name].columns["size"].to_pylist()}
    if len(sizes) > 1:
        what = "images of several sizes, which training cannot batch"
        yield Problem(", ".join(splits), what, f"{len(sizes):,} sizes", "data.image_size = 224")
