"""The full checks that look through the data: splits that share samples, classes that are missing, augmentation."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .. import gradients
from ..chance import ChanceKey, epoch_order
from ..contracts import INDEX, Batch
from ..data.arrays import Arrays
from ..data.contents import Split, looked_at, read_split
from ..data.dataset import whole
from ..data.foreign import Foreign
from ..data.reading import foreign_of, tensors_in
from ..data.samples import stack
from ..data.streams import Stream
from ..data.survey import listed
from ..data.tables import Table
from ..model.freeze import evaluating
from ..watch.console import format_number
from .subject import Finding, Subject, error, passed, skipped, warning

_MOST, _AT_ONCE, _READ_S = 5_000, 250, 4.0
_LEAST_SHARE, _LEAST_COPIES = 0.01, 3
_UNLIKELY = 1e-3
_FAR, _LEAST_ROWS, _WINDOW = 5.0, 50, 4  # deviations; rows; places in time
_MANY = 100  # samples of a class in the mean: then one that has a single sample is an accident
_COMPARED, _SIDE = 256, 8
_FADED = 0.05  # of the contrast that was there


def _read(datasets: dict[str, Any], seed: int) -> dict[str, list[Split]]:
    """What a survey reads of up to 5,000 samples of each, in an order that is drawn once; what there is time for."""
    held = {name: looked_at(dataset) for name, dataset in datasets.items()}
    orders = {name: epoch_order(ChanceKey(seed), len(at), 0, min(len(at), _MOST)) for name, (_, at) in held.items()}
    found: dict[str, list[Split]] = {name: [] for name in datasets}
    end = time.perf_counter() + _READ_S
    for start in range(0, _MOST, _AT_ONCE):
        for name, (whole_data, at) in held.items():
            rows = orders[name][start : start + _AT_ONCE]
            if len(rows):
                found[name].append(read_split(name, whole_data, at[rows], lambda *_: None))
        if time.perf_counter() > end:
            break
    return found


# --- train and valid


def splits_apart(subject: Subject) -> Finding:
    """Samples of the validation that are in the training are known by heart, and measure nothing.

    How many are there by chance is told by the training's own: as many as have a double among themselves.
    """
    work = subject.work
    if work.valid is None or isinstance(whole(work.train), Stream) or isinstance(whole(work.valid), Stream):
        return skipped("it takes two splits whose samples are known by their number")
    read = _read({"train": work.train, "valid": work.valid}, work.settings.seed)
    train, valid = ([digest for part in parts for digest in part.digests] for parts in read.values())
    if not train or not valid:
        return skipped("no sample could be read")
    counts = Counter(train)
    shared = sum(digest in counts for digest in valid)
    doubles = sum(count for count in counts.values() if count > 1) / len(train)
    by_chance = len(valid) * doubles if _may_repeat(subject) else 0.0
    is_all = (len(train), len(valid)) == (len(work.train), len(work.valid))
    said = f"{shared:,} of {len(valid):,} samples of valid are in train" + (
        "" if is_all else f", as far as {len(train):,} of {len(work.train):,} samples of train tell"
    )
    over, share_read = shared - by_chance, len(train) / len(work.train)
    is_many = over >= max(_LEAST_COPIES, 3 * by_chance**0.5)
    if is_many and over / share_read >= _LEAST_SHARE * len(valid):
        return warning(said, f"about {by_chance:.0f}, as doubles come by chance", "torchkeep survey TRAIN VALID names "
                       "them; data.valid_fraction cuts the training split in two; data.split_by keeps groups together",
                       )  # fmt: skip
    return passed(said + (f", where about {by_chance:.0f} come by chance" if shared else ""))


def _may_repeat(subject: Subject) -> bool:
    """Whether two samples may be equal by chance: rows of a table, texts, a few numbers; not pictures or sounds."""
    keys = subject.binding.keys
    kinds = {field.kind for key in keys if (field := subject.prepared.schema.fields.get(key)) is not None}
    if isinstance(whole(subject.work.train), Table) or "tokens" in kinds:
        return True
    given = [t for key in keys for t in tensors_in(subject.batch.get(key)) if t.is_floating_point()]
    return not kinds & {"image", "audio"} and all(len(torch.unique(t)) < t.numel() / 2 for t in given)


# --- what is in the samples


def samples(subject: Subject) -> Finding:
    """All samples are finite, stay what they are, and those of valid lie where those of train lie."""
    work = subject.work
    if isinstance(whole(work.train), Stream) or subject.work.step is not None:
        return skipped("it takes samples that are known by their number, and a loss of torchkeep's own step")
    if _changes(work.train):
        return warning("a sample that is read twice is another one", "the same sample each time",
                       "work on a copy in __getitem__: x = x - mean in place of x -= mean")  # fmt: skip
    seen = {"train": _Moments(subject.binding.keys)}
    loaders = {"train": subject.prepared.shuffled_loader()}
    if work.valid is not None and not isinstance(whole(work.valid), Stream):
        seen["valid"] = _Moments(subject.binding.keys)
        loaders["valid"] = subject.prepared.evaluation_loader(work.valid)
    for name, loader in loaders.items():
        with contextlib.closing(loader):
            broken = _first_broken(subject, loader, seen[name])
        if broken:
            return error(f"{name}, {broken}", "finite numbers", "fill them in, or leave the samples out")
    return _alike(seen)


def _changes(data: Any) -> bool:
    """Whether a dataset writes to what it holds: without a draw, a sample is another one the second time."""
    foreign = foreign_of(data)
    if foreign is None or foreign.draws:
        return False
    one = [tensor.clone() for tensor in tensors_in(foreign.read(0, ChanceKey()))]
    other = list(tensors_in(foreign.read(0, ChanceKey())))
    return any(a.shape != b.shape or not torch.equal(a.nan_to_num(), b.nan_to_num())
               for a, b in zip(one, other, strict=False))  # fmt: skip


class _Moments:
    """The mean and the spread of each floating input over all that was read."""

    def __init__(self, keys: list[str]):
        self._keys = keys
        self.sums: dict[str, Tensor] = {}

    def add(self, batch: Batch) -> None:
        for key in self._keys:
            for tensor in tensors_in(batch.get(key)):
                if tensor.is_floating_point() and tensor.numel():
                    held = tensor.detach().double()
                    found = torch.stack([torch.ones_like(held).sum(), held.sum(), held.square().sum()])
                    self.sums[key] = self.sums.get(key, torch.zeros_like(found)) + found

    def of(self, key: str) -> tuple[float, float]:
        count, total, squares = self.sums[key].tolist()
        mean = total / count
        return mean, max(0.0, squares / count - mean**2) ** 0.5


def _first_broken(subject: Subject, loader: Any, moments: _Moments) -> str:
    """The first samples that are not finite and make the loss so; empty where there are none in the time there is."""
    end = time.perf_counter() + _READ_S / 2
    for raw in loader:
        batch = subject.prepared.mover(raw)
        moments.add(batch)
        held = {key: list(tensors_in(batch.get(key))) for key in (*subject.binding.keys, *subject.binding.targets)}
        wrong = [t for tensors in held.values() for t in tensors if t.is_floating_point() and not t.isfinite().all()]
        if wrong:
            rows = (~wrong[0].isfinite()).flatten(1).any(1) if wrong[0].ndim > 1 else ~wrong[0].isfinite()
            with evaluating(subject.model), gradients.none_needed():
                is_harmless = bool(subject.loss(batch).isfinite())
            if not is_harmless:
                return f"sample {listed([str(n) for n in batch[INDEX][rows.cpu()].tolist()])}: not finite"
        if time.perf_counter() > end:
            break
    return ""


def _alike(seen: dict[str, _Moments]) -> Finding:
    train, valid = seen["train"], seen.get("valid")
    for key in valid.sums if valid is not None else ():
        if key not in train.sums or valid is None:
            continue
        (mean, spread), (other, others) = train.of(key), valid.of(key)
        if abs(other - mean) > _FAR * max(spread, 1e-6) or others > _FAR * max(spread, 1e-6):
            said = f"{key}: mean {format_number(other)}, deviation {format_number(others)} in valid, "
            said += f"{format_number(mean)} and {format_number(spread)} in train"
            return warning(said, "one scale", "bring both splits to it by the mean and deviation of train")
    return passed("finite" + (", and of one scale in both splits" if valid is not None else ""))


def leak(subject: Subject) -> Finding:
    """The end of a window is not the target, and no column of a table tells two classes apart all by itself."""
    place = _copied_into(subject)
    if place:
        said = f"the last place of {place} is the target, in all {subject.num_rows} samples of the first batch"
        fix = "look at the indices: a forecast begins behind its window"
        return warning(said, "a target that the input does not hold", fix)
    table, train = whole(subject.work.train), subject.work.train
    labels = getattr(train, "labels", None)
    if not isinstance(table, Table) or labels is None or len(np.unique(labels)) != 2 or len(labels) < _LEAST_ROWS:
        return skipped("it takes a table with two classes")
    batch = train.read_batch(np.arange(len(train)), ChanceKey()) or {}
    numbers, first = batch.get("numbers"), torch.from_numpy(labels == labels.min())
    if not isinstance(numbers, Tensor):
        return skipped("the table has no numbers")
    for column in range(numbers.shape[1]):
        low, high = numbers[first, column], numbers[~first, column]
        if min(len(low), len(high)) < _LEAST_ROWS / 5 or not len(low):
            break
        if low.max() < high.min() or high.max() < low.min():
            name = table.encoding.numbers[column] if column < len(table.encoding.numbers) else f"number {column}"
            said = f"{name} alone tells both classes apart in all {len(labels):,} rows"
            fix = f'data.drop = ["{name}"], if it follows from the target'
            return warning(said, "columns that are known before the answer is", fix)
    return passed("no column tells the classes by itself")


def _copied_into(subject: Subject) -> str:
    """An input whose last place in time is the target in every sample; empty for none."""
    target = None if subject.work.step is not None else subject.binding.target(subject.batch)
    if not isinstance(target, Tensor) or not target.is_floating_point() or target.numel() != subject.num_rows:
        return ""
    for key in subject.binding.keys:
        given = subject.batch.get(key)
        if isinstance(given, Tensor) and given.is_floating_point() and given.ndim > 1 and given.shape[1] >= _WINDOW:
            last = given[:, -1].reshape(len(given), -1)
            if bool(((last == target.reshape(-1, 1)).all(0) & (last != last[:1]).any(0)).any()):
                return key
    return ""


# --- classes


def classes(subject: Subject) -> Finding:
    """Every class has samples to learn from, and the validation has more than one."""
    name = subject.binding.targets[0] if len(subject.binding.targets) == 1 else ""
    field = subject.work.train.schema.fields.get(name)
    if subject.work.step is not None or field is None or field.kind != "label":
        return skipped("the target is no class")
    counts = _counts_of(subject, field.classes)
    train, valid = counts["train"], counts.get("valid", Counter())
    if not train:
        return skipped("the labels could not be read")
    if len(train) == 1 and train.total() > 1:
        return warning(f"all {train.total():,} labels of train are {next(iter(train))!r}", "at least two classes",
                       "look at the column or function that gives the label")  # fmt: skip
    # arrays only imply their classes: what neither split has, nobody asked for
    known = set(valid) if isinstance(whole(subject.work.train), Arrays | Foreign) else {*field.classes, *valid}
    missing = sorted(known - set(train))
    if missing and train.total() == len(subject.work.train):
        return warning(f"train has no sample of {listed(missing)}", "samples of every class",
                       "look at how the splits were made; data.valid_fraction keeps the shares of all classes",
                       )  # fmt: skip
    single = [label for label, count in train.items() if count == 1]
    if single and train.total() >= _MANY * len(train):
        return warning(f"train has 1 sample of {listed(single)}", "several samples of every class",
                       "a label that was mistyped? torchkeep survey lists them")  # fmt: skip
    return _in_valid(train, valid)


def _in_valid(train: Counter[str], valid: Counter[str]) -> Finding:
    only = next(iter(valid), "")
    if len(valid) == 1 and (train[only] / train.total()) ** valid.total() < _UNLIKELY:
        return warning(f"all {valid.total():,} samples of valid are {only!r}", f"{len(train)} classes, as in train",
                       "samples are in the order of their classes? data.valid_fraction draws from all of them",
                       )  # fmt: skip
    least, count = min(train.items(), key=lambda pair: pair[1])
    return passed(f"{len(train):,} classes, the fewest samples, {count:,}, of {least!r}; {len(valid):,} in valid")


def _counts_of(subject: Subject, names: tuple[str, ...]) -> dict[str, Counter[str]]:
    """How often each class comes in each split, by the labels that the data keep, or else those of what is read."""
    splits = {"train": subject.work.train, "valid": subject.work.valid}
    held = {name: data for name, data in splits.items() if data is not None and not isinstance(whole(data), Stream)}
    kept = {name: getattr(data, "labels", None) for name, data in held.items()}
    unread = {name: held[name] for name, labels in kept.items() if labels is None}
    found = {name: Counter(labels.tolist()) for name, labels in kept.items() if labels is not None}
    counts = {name: Counter({_name_of(number, names): n for number, n in c.items()}) for name, c in found.items()}
    for name, parts in _read(unread, subject.work.settings.seed).items() if unread else ():
        counts[name] = sum((part.classes for part in parts), Counter[str]())
    return {"train": Counter[str](), **counts}


def _name_of(number: int, names: tuple[str, ...]) -> str:
    return names[number] if 0 <= number < len(names) else str(number)


# --- augmentation


def augmentation(subject: Subject) -> Finding:
    """What augmentation leaves of the samples still tells their classes apart, where simple features do so at all."""
    train = subject.work.train
    plain = getattr(train, "without_augmentation", lambda: train)()
    if isinstance(whole(train), Stream) or whole(plain) is whole(train):
        return skipped("there is no augmentation")
    size = min(len(train), _COMPARED)
    rows = epoch_order(ChanceKey(subject.work.settings.seed), len(train), 0, size)
    for name, clean, changed in _compared(subject, plain, rows):
        lost = _what_is_lost(clean, changed)
        if lost:
            return warning(f"{name}: {lost}", "samples that still show what they are", _fix_of(train))
        labels = getattr(train, "labels", None)
        if labels is not None:
            return _told_apart(clean, changed, torch.from_numpy(labels[rows].astype(np.int64)), _fix_of(train))
        return passed(f"{name}: {size:,} samples are changed, and keep their contrast")
    return skipped("augmentation changes no tensor of these samples")


def _fix_of(train: Any) -> str:
    entries = getattr(getattr(whole(train), "augmentations", None), "entries", ())
    names = ", ".join(
        entry if isinstance(entry, str) else getattr(entry, "__name__", "a function") for entry in entries
    )
    return f"look at one sample, dataset[0]; leave out, one by one, what is in data.augment: {names}"


def _compared(subject: Subject, plain: Any, rows: np.ndarray[Any, Any]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """The inputs that augmentation changes, as they are without and with it. Shapes:  (N, …), (N, …)"""
    key = ChanceKey(subject.work.settings.seed)
    clean, changed = (_batch_of(data, rows, key) for data in (plain, subject.work.train))
    for name in subject.binding.keys:
        one, other = clean.get(name), changed.get(name)
        if not isinstance(one, Tensor) or not isinstance(other, Tensor) or one.shape != other.shape:
            continue
        if one.ndim > 1 and not torch.equal(one, other):
            yield name, one.double(), other.double()


def _batch_of(data: Any, rows: np.ndarray[Any, Any], key: ChanceKey) -> Batch:
    found = data.read_batch(rows, key)
    if found is None:
        samples = [data.read(row, key) for row in rows.tolist()]
        found = getattr(data, "collate", stack)(samples)
    return dict(found)


def _what_is_lost(clean: Tensor, changed: Tensor) -> str:
    """What is wrong with changed samples whatever their classes are; empty for nothing."""
    if not bool(changed.isfinite().all()) and bool(clean.isfinite().all()):
        return "augmented samples are not finite"
    was, remains = (held.flatten(1).std(1) for held in (clean, changed))
    faded = (remains < _FADED * was)[was > 0]
    if len(faded) and float(faded.double().mean()) > 0.5:
        now, before = (format_number(float(held.mean())) for held in (remains, was))
        return f"augmented samples are nearly constant: a standard deviation of {now} in place of {before}"
    return ""


def _told_apart(clean: Tensor, changed: Tensor, labels: Tensor, fix: str) -> Finding:
    """Classes by the nearest other sample, before and after, against what chance gives."""
    rate = float(torch.bincount(labels).double().div(len(labels)).square().sum())
    noise = (rate * (1 - rate) / len(labels)) ** 0.5
    views = list(zip(_features_of(clean), _features_of(changed), strict=True))
    before = max(_nearest(one, one, labels) for one, _ in views)
    after = max(_nearest(other, known, labels) for one, other in views for known in (one, other))
    said = (f"the nearest sample is of the same class in {before:.0%} of {len(labels):,} samples, "
            f"augmented in {after:.0%}, by chance in {rate:.0%}")  # fmt: skip
    if before < rate + max(0.1, 6 * noise):
        return passed(f"{said}: these classes are not told apart so simply")
    if after < rate + 3 * noise and after - rate < (before - rate) / 5:
        return warning(said, "samples that still show what they are", fix)
    return passed(said)


def _features_of(held: Tensor) -> Iterator[Tensor]:
    """A small picture about its mean; and the mean along the last axis, which no shift in time or to a side changes.

    Shapes:  (N, …) → (N, F)
    """
    flat = (F.adaptive_avg_pool2d(held, _SIDE) if held.ndim in (3, 4) else held).flatten(1)
    yield flat - flat.mean(1, keepdim=True)
    if held.ndim > 2:
        yield held.mean(-1).flatten(1)


def _nearest(asked: Tensor, known: Tensor, labels: Tensor) -> float:
    """How often the nearest of the other samples has the same label."""
    distance = torch.cdist(asked, known).fill_diagonal_(torch.inf)
    return float((labels[distance.argmin(1)] == labels).double().mean())
