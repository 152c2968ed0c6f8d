"""A dataset in parts, by a stated rule and keyed chance."""

from __future__ import annotations

import contextlib
from typing import Any, Literal, cast

import numpy as np
import xxhash

from ..chance import ChanceKey, keyed_uniform
from ..contracts import KeyedDataset
from ..errors import DataError, SettingsError
from .dataset import Indices, Part, whole_column
from .streams import Stream

Rule = Literal["label", "random"] | str
"""How a part is chosen: "label", "random", "group:COLUMN" or "time:COLUMN"."""

_SLACK = 1e-9  # 10 · 0.3 is a little under 3


def split(
    dataset: KeyedDataset, valid: float, seed: int = 0, by: Rule = "label", test: float | None = None
) -> tuple[KeyedDataset, ...]:
    """(train, valid) or, with ``test``, (train, valid, test): fractions of the samples, without augmentation but train.

    The rules: "label" puts the samples in the order of (class, draw keyed by seed and position); the sample at place k
    is for validation where floor((k + 1) · fraction) > floor(k · fraction), so that each class is divided alike; a
    class that would lose its last training sample keeps it. "random" is the same with one class. "group:COLUMN" takes
    whole groups, in the order of a draw keyed by seed and the group's name, until the fraction is nearest.
    "time:COLUMN" takes the latest samples; those of the same time as the first one taken go with it. ``test`` is taken
    before ``valid``. Statistics and vocabularies become those of the training samples alone.

    Raises:  DataError if a part would be empty, SettingsError for another rule
    """
    if isinstance(dataset, Stream):
        raise DataError("a stream cannot be split by number", where="valid_fraction", fix="name data.valid")
    rest = np.arange(len(dataset))
    parts: list[Indices] = []
    for fraction, operation in ((test, "split/test"), (valid, "split")):
        if fraction:
            kept, taken = _indices_by(dataset, rest, fraction, seed, by, operation)
            parts.insert(0, rest[taken])
            rest = rest[kept]
    _check_learned(dataset, rest, parts)
    learn = getattr(dataset, "learned_from", None)
    learned = cast(KeyedDataset, learn(rest) if learn is not None else dataset)
    return cast(
        "tuple[KeyedDataset, ...]",
        (Part(learned, rest), *(Part(learned, taken).without_augmentation() for taken in parts)),
    )


def _check_learned(dataset: KeyedDataset, rest: Indices, parts: list[Indices]) -> None:
    """Raises:  DataError where a part has a class that training would never see"""
    labels = getattr(dataset, "labels", None)
    unseen = np.setdiff1d(labels[np.concatenate(parts)], labels[rest]) if labels is not None and parts else np.empty(0)
    if len(unseen):
        classes = next(field.classes for field in dataset.schema.values() if field.kind == "label")
        names = [classes[int(number)] if classes else str(number) for number in unseen[:5]]
        raise DataError(
            "a class is not among those of the training data", where="data.split_by",
            got=f"{', '.join(map(repr, names))} in a part that was set apart, and not in training",
            expected="each class in the training part", fix='split_by = "label" leaves each class a training sample',
        )  # fmt: skip


def _indices_by(
    dataset: KeyedDataset, rest: Indices, fraction: float, seed: int, by: Rule, operation: str
) -> tuple[Indices, Indices]:
    rule, _, column = by.partition(":")
    if rule == "group" and column:
        return split_groups(whole_column(dataset, column)[rest], fraction, seed, operation)
    if rule == "time" and column:
        return split_time(whole_column(dataset, column)[rest], fraction)
    if rule not in ("label", "random") or column:
        raise SettingsError(
            "there is no such rule for a split", where="data.split_by", got=repr(by),
            expected='"label", "random", "group:COLUMN" or "time:COLUMN"',
        )  # fmt: skip
    labels = getattr(dataset, "labels", None) if rule == "label" else None
    return split_indices(len(rest), None if labels is None else labels[rest], fraction, seed, operation)


def split_indices(
    num_samples: int, labels: Indices | None, fraction: float, seed: int, operation: str = "split"
) -> tuple[Indices, Indices]:
    """Positions of the two parts, each ascending; see ``split`` for the rule "label"."""
    draws = keyed_uniform(ChanceKey(seed), operation, np.arange(num_samples))[:, 0]
    classes = np.zeros(num_samples, np.int64) if labels is None else labels
    order = np.lexsort((draws, classes))
    places = np.arange(num_samples + 1) * fraction + _SLACK
    is_valid = np.zeros(num_samples, bool)
    is_valid[order] = np.diff(np.floor(places)) > 0
    for lost in np.setdiff1d(classes, classes[~is_valid]):
        is_valid[np.flatnonzero(classes == lost)[0]] = False
    return _both(is_valid, fraction)


def split_groups(groups: np.ndarray[Any, Any], fraction: float, seed: int, operation: str) -> tuple[Indices, Indices]:
    """Positions of the two parts; no group is in both."""
    names, number_of, counts = np.unique(groups.astype(str), return_inverse=True, return_counts=True)
    hashes = np.array([xxhash.xxh3_64_intdigest(name.encode()) for name in names.tolist()], np.uint64)
    order = np.argsort(keyed_uniform(ChanceKey(seed), operation, hashes)[:, 0], kind="stable")
    ends = np.cumsum(counts[order])
    wanted = fraction * len(groups)
    # as many groups as come nearest to the fraction, at least one and not all
    taken = int(np.argmin(np.abs(ends - wanted))) + 1
    taken = min(max(taken, 1), len(names) - 1)
    return _both(np.isin(number_of, order[:taken]), fraction, f"{len(names)} groups")


def split_time(times: np.ndarray[Any, Any], fraction: float) -> tuple[Indices, Indices]:
    """Positions of the two parts; everything in the first is earlier than everything in the second.

    Texts, as a group of ``label_pattern`` finds them, are read as numbers or as dates (ISO 8601).
    """
    times = _as_times(times) if times.dtype.kind == "U" else times
    missing = np.flatnonzero(times != times) if times.dtype.kind in "fmM" else np.empty(0)
    if missing.size or times.dtype == object:
        got = f"no time in sample {missing[0]}" if missing.size else "values that are no times or numbers"
        raise DataError("a split by time needs a time of each sample", where="data.split_by", got=got)
    count = max(1, int(len(times) * fraction + _SLACK))
    cut = np.sort(times)[-count]
    return _both(times >= cut, fraction)


def _as_times(texts: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    # as texts "10" would be earlier than "9"
    for kind in (np.float64, "datetime64[us]"):
        with contextlib.suppress(ValueError):
            return texts.astype(kind)
    return texts.astype(object)


def _both(is_valid: np.ndarray[Any, Any], fraction: float, of: str = "") -> tuple[Indices, Indices]:
    if not is_valid.any() or is_valid.all():
        raise DataError(
            "a split leaves one part empty", where=f"valid_fraction = {fraction}",
            got=of or f"{len(is_valid)} samples", expected="at least one sample in each part",
            fix="another valid_fraction, or name the validation data with valid = …",
        )  # fmt: skip
    return np.flatnonzero(~is_valid), np.flatnonzero(is_valid)
