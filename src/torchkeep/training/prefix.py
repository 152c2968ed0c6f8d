"""The frozen part of a model, computed once: whether that can be, gives the same, and pays; and what it gives."""

from __future__ import annotations

import inspect
import re
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import xxhash
from torch import Tensor, nn

from .. import gradients, store
from ..contracts import INDEX, VALID, Batch, Json, KeyedDataset
from ..data.cache import cache_folder, room_bytes
from ..data.dataset import Part, whole
from ..data.loader import Loader
from ..errors import DataError, ModelError
from ..generators import kept_generators
from ..model.flow import patched
from ..model.folding import Forwards, find_folds
from ..model.freeze import begin_training, evaluating, learning
from ..model.frontier import Frontier, NoFrontierError, compute, find_frontier, recall
from ..store import Store
from ..tensors import tensor_sha256
from .binding import FEATURE, Binding
from .decisions import Decisions
from .device import Mover, autocast
from .features import CHUNK, Features, FeatureSettings, Views, example_of, plan_views, row_bytes
from .objective import Objective

LEAST_GAIN = 1.05
"""How much faster a run must be expected to be before anything is kept where nobody asked for it."""

_WAY = re.compile(r"^.* views?, ")
GAIN = "train/frozen_part_speedup"
"""The tag of what was measured of it: how many times as fast an epoch's steps are."""

_NAME, _ONCE = "frozen part", "computed once"
_OVERRIDE = "features.cache"
_TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2, "fp16": 1e-2}
_PROBED = 4  # samples of each of two batches on which all this is tried: a second run is to begin at once
_TIMES = 2
# to look takes about as long as 150 samples take: nothing against _LONG of them, else much must be there to be saved
_LONG, _LEAST_SAVED, _LEAST_RATIO = 5_000, 250, 1.5
AS_FED, _FOLDED = "as fed", ", normalisation folded"
_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    AS_FED: lambda image: image,
    "channels last": lambda image: image.contiguous(memory_format=torch.channels_last),
    "channels first": lambda image: image.contiguous(),
}


class Parts(Protocol):
    """What of a prepared training is needed here."""

    loader: Loader
    binding: Binding
    objective: Objective
    mover: Mover
    precision: str
    decisions: Decisions


@dataclass
class Prefix:
    """A frontier that was found to hold, the features before it, and what they are expected to save."""

    frontier: Frontier
    views: Views
    train: Features
    valid: Features | None
    expected_gain: float
    times: Times

    @property
    def num_bytes(self) -> int:
        """What all features take."""
        parts = [self.train, *([self.valid] if self.valid else [])]
        return sum(row_bytes(part.example) * len(part) * part.views.count for part in parts)

    def gain(self, epoch_s: float) -> float:
        """How many times as long all of the model would take for an epoch's steps that took so many seconds."""
        return len(self.train) * self.times.whole_s / epoch_s

    def close(self) -> None:
        for part in (self.train, self.valid):
            if part is not None:
                part.store.close()


def picture(rows: list[Json], seconds: dict[str, float], prefix: Prefix | None, note: str | None) -> Json:
    """What a person wants to see of what learns: a plan's map with shares of the time, and the prefix."""
    whole_s = seconds.get("(model)", 0.0)
    kept = prefix.frontier.modules if prefix is not None else []
    told = [
        row | {
            "time_fraction": seconds[row["name"]] / whole_s if whole_s and row["name"] in seconds else None,
            "is_cached": any(row["name"] == name or row["name"].startswith(f"{name}.") for name in kept),
        }
        for row in rows
    ]  # fmt: skip
    crossings = prefix.frontier.crossings if prefix is not None else []
    said = [f"{c.name} → {' × '.join(map(str, c.shape))} {str(c.dtype).removeprefix('torch.')}" for c in crossings]
    return {
        "rows": told,
        "frontier": said,
        "cache_bytes": prefix.num_bytes if prefix else None,
        "views": prefix.views.count if prefix else None,
        "expected_speedup": prefix.expected_gain if prefix else None,
        "measured_speedup": None,
        "note": note,
    }


class _NoPrefixError(Exception):
    """Why the frozen part is computed in each step."""


class Planner:
    """Looks for a prefix of a model in training, as ``parts`` feed it."""

    def __init__(self, parts: Parts, settings: FeatureSettings, seed: int, say: Callable[[str], None]):
        self.binding, self.objective, self.mover = parts.binding, parts.objective, parts.mover
        self.model: nn.Module = parts.binding.model
        self.precision, self.decisions = parts.precision, parts.decisions
        self.settings, self.seed, self._say = settings, seed, say
        self.note: str | None = None
        self._readers = max(1, parts.loader.plan.workers)

    def plan(self, train: KeyedDataset, valid: KeyedDataset | None, epochs: int, hindrance: str) -> Prefix | None:
        """The prefix, or None with the reason among the decisions. ``epochs`` are those that it would serve.

        Raises:  ModelError where it was asked for and cannot be, or where what was kept is not what is computed now
        """
        recorded, wanted = self.decisions.recorded(_NAME), self.settings.cache
        if recorded is not None and not str(recorded).startswith(_ONCE):
            hindrance = hindrance or "as it was when the run began"
        try:
            if hindrance or wanted == "off":
                raise _NoPrefixError(hindrance or "as set")
            return self._plan(train, valid, epochs, is_sure=wanted == "on" or recorded is not None)
        except (_NoPrefixError, NoFrontierError, DataError) as error:
            reason = error.what if isinstance(error, DataError) else str(error)
            if wanted == "on" or (wanted == "auto" and str(recorded).startswith(_ONCE)):
                raise ModelError(
                    "the frozen part cannot be computed once", where="features.cache", got=reason,
                    fix='features.cache = "auto" computes it in each step',
                ) from None  # fmt: skip
            self.note = f"computed in each step: {reason}"
            decide = self.decisions.note if wanted == "off" else self.decisions.choose
            decide(_NAME, "in each step", reason, _OVERRIDE)
            return None

    def _plan(self, train: KeyedDataset, valid: KeyedDataset | None, epochs: int, is_sure: bool) -> Prefix:
        views = plan_views(train, self.settings.views)
        if not is_sure:
            _check_length(epochs, len(train), len(valid) if valid is not None else 0, min(epochs, views.count))
        batches = [self._first(train, start) for start in (0, _PROBED) if start < len(train)]
        self._check_batch(batches[0])
        moved = [self.mover(batch) for batch in batches]
        with self._untouched():
            frontier = find_frontier(self.model, self.binding.whole, moved[0], self.binding.keys)
            for batch in moved[1:]:  # on the first one the search has compared them
                self._check_same(frontier, batch)
        made = [self._made(frontier, AS_FED, batch) for batch in batches]
        example = example_of(made[0], self.settings.dtype)
        if any(made[1][name].shape[1:] != row.shape for name, row in example.items()) if len(made) > 1 else False:
            raise _NoPrefixError("its results have several sizes")
        splits = [(train, views), *([(valid, _ONE_VIEW)] if valid is not None else [])]
        heads = [self._key(data, seen, example, frontier) for data, seen in splits]
        way = self._way(frontier, heads, moved[0])
        opened = [self._open(frontier, data, seen, example, head, way)
                  for (data, seen), head in zip(splits, heads, strict=True)]  # fmt: skip
        features, held = opened[0], opened[1] if valid is not None else None
        times = self._times(frontier, train, batches[0], way)
        gain = expected_gain(times, features, held, epochs)
        if gain < LEAST_GAIN and not is_sure:
            for part in opened:
                part.store.close()
            raise _NoPrefixError(f"computing it once would make the run {gain:.2f} × as fast")
        prefix = Prefix(frontier, views, features, held, gain, times)
        self._note(prefix, way)
        self._verify(prefix)
        return prefix

    def _note(self, prefix: Prefix, way: str) -> None:
        size = f"{prefix.num_bytes / 1e6:,.1f} MB"
        count = prefix.views.count
        said = f"{_ONCE}, {count} view{'s' * (count > 1)}, {way}"
        reason = f"{size}; {prefix.views.reason}; expected {prefix.expected_gain:.1f} × as fast"
        self.decisions.choose(_NAME, said, reason, _OVERRIDE)

    def _verify(self, prefix: Prefix) -> None:
        for part in (prefix.train, prefix.valid):
            differing = part.differing(self.settings.verify) if part is not None and self.settings.verify else []
            if differing:
                raise ModelError(
                    "what was kept of the frozen part is not what is computed now", where=str(prefix.train.store.path),
                    got=f"other bits for {', '.join(differing[:5])}", expected="the same bits",
                    fix="remove that file: it is made again",
                )  # fmt: skip

    def _first(self, dataset: KeyedDataset, start: int = 0) -> Batch:
        """A few samples, as the first epoch shows them."""
        indices = np.arange(start, min(start + _PROBED, len(dataset)))
        return next(iter(Loader(Part(dataset, indices), _PROBED, seed=self.seed, buckets=False, workers=0)))

    def _check_batch(self, batch: Batch) -> None:
        strange = [name for name in (*self.binding.keys, *self.binding.targets) if not isinstance(batch[name], Tensor)]
        if strange:
            raise _NoPrefixError(f"{strange[0]} is no tensor")

    @contextmanager
    def _untouched(self) -> Iterator[None]:
        """Train mode for a while; generators, buffers and gradients come back as they were."""
        buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        begin_training(self.model)
        try:
            with kept_generators():
                yield
        finally:
            gradients.clear(learning(self.model))
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)

    def _loss(self, call: Callable[[Batch], Any], batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """The loss and the gradients of one forward."""
        gradients.clear(learning(self.model))
        with kept_generators(), autocast(self.precision, self.mover.device):
            loss = self.objective(call(batch), self.binding.target(batch))
        gradients.backward(loss)
        found = [p.grad.clone() for p in learning(self.model) if p.grad is not None]
        return loss.detach(), found

    def _check_same(self, frontier: Frontier, moved: Batch) -> None:
        """Loss and gradients in training, and the loss in evaluation, with and without the prefix."""
        kept = self._kept(frontier, moved)
        short = partial(self._recalled, frontier, kept)
        pairs = [(self._loss(self.binding.whole, moved), self._loss(short, moved))]
        with evaluating(self.model):
            pairs.append((self._loss(self.binding.whole, moved), self._loss(short, moved)))
        for (loss, grads), (short_loss, short_grads) in pairs:
            same = len(grads) == len(short_grads) and self._near(loss, short_loss)
            if not same or not all(map(self._near, grads, short_grads)):
                raise _NoPrefixError("what comes after it gives other gradients when it is left out")

    def _near(self, one: Tensor, other: Tensor) -> bool:
        scale = float(one.abs().max()) if one.numel() else 0.0
        return torch.allclose(one, other, rtol=0, atol=_TOLERANCE[self.precision] * scale + 1e-12, equal_nan=True)

    def _kept(self, frontier: Frontier, moved: Batch, way: str = AS_FED) -> list[Tensor]:
        """What crosses the frontier, computed in one of the ways that are known."""
        layout = way.removesuffix(_FOLDED)
        moved = {name: _LAYOUTS[layout](value) if _is_image(value) else value for name, value in moved.items()}
        folds = self._folds(frontier, moved) if way != layout else {}
        with kept_generators(), gradients.none_needed(), autocast(self.precision, self.mover.device), patched(folds):
            return compute(frontier, self.model, self.binding.whole, moved)

    def _folds(self, frontier: Frontier, moved: Batch) -> Forwards:
        if self._found_folds is None:
            self._found_folds = find_folds(self.model, lambda: self._kept(frontier, moved))
        return self._found_folds

    _found_folds: Forwards | None = None

    def rest(self, frontier: Frontier) -> Callable[[Batch], Any]:
        """What is left of the model, for batches of features."""
        names = [f"{FEATURE}{place}" for place in range(len(frontier.crossings))]
        dtypes = [crossing.dtype for crossing in frontier.crossings]

        def call(batch: Batch) -> Any:
            kept = [batch[name].to(dtype) for name, dtype in zip(names, dtypes, strict=True)]
            return recall(frontier, self.model, self.binding.whole, batch, kept)

        return call

    def _recalled(self, frontier: Frontier, kept: list[Tensor], batch: Batch) -> Any:
        return recall(frontier, self.model, self.binding.whole, batch, kept)

    def _made(self, frontier: Frontier, way: str, batch: Batch) -> dict[str, Tensor]:
        """What is kept of a batch as it is fed: what crosses the frontier, and what else is needed."""
        kept = self._kept(frontier, self.mover(batch), way)
        made = {f"{FEATURE}{place}": tensor for place, tensor in enumerate(kept)}
        rest = [name for name in batch if name in frontier.inputs or name in self.binding.targets]
        return made | {name: batch[name] for name in rest if name not in (INDEX, VALID)}

    def _way(self, frontier: Frontier, heads: list[bytes], moved: Batch) -> str:
        """How the frozen part is computed: as what was kept before, or recorded, else in the fastest way."""
        ways = [layout + end for layout in _layouts_of(moved) for end in ("", _FOLDED)]
        recorded = _WAY.sub("", str(self.decisions.recorded(_NAME) or ""))
        if recorded in ways:
            return recorded
        known = (way for head in heads for way in ways if (path := _path(head, way)) and path.exists())
        return next(known, "") or self._fastest(frontier, moved)

    def _open(
        self, frontier: Frontier, dataset: KeyedDataset, views: Views, example: dict[str, Tensor], head: bytes, way: str
    ) -> Features:
        """The features of a dataset, those found that were kept before."""
        num, num_bytes = len(dataset) * views.count, row_bytes(example) * len(dataset) * views.count
        held, path, room = Store(num), _path(head, way), room_bytes("disk", folder="features")
        if path is not None and num_bytes <= room:
            held = Store.on_disk(path, num, room, 2 * num * (row_bytes(example) + 64) + (1 << 20))
        in_memory = num_bytes <= room_bytes("ram")
        if not in_memory and held.path is None:
            raise _NoPrefixError(f"{num_bytes / 1e9:,.1f} GB of it fit neither memory nor disk")
        make = partial(self._made, frontier, way)
        return Features(dataset, views, self.seed, make, held, example, in_memory=in_memory, say=self._say)

    def _fastest(self, frontier: Frontier, moved: Batch) -> str:
        """The fastest way: of the layouts, and with normalisation folded where that gives the same within tolerance."""
        seconds = {name: _median_s(partial(self._kept, frontier, moved, name)) for name in _layouts_of(moved)}
        layout = min(seconds, key=lambda name: seconds[name])
        if not self._folds(frontier, moved):
            return layout
        folded = self._kept(frontier, moved, layout + _FOLDED)
        if not all(map(self._near, self._kept(frontier, moved, layout), folded)):
            return layout
        folded_s = _median_s(lambda: self._kept(frontier, moved, layout + _FOLDED))
        return layout + _FOLDED if folded_s < seconds[layout] else layout

    def _times(self, frontier: Frontier, train: KeyedDataset, batch: Batch, way: str) -> Times:
        """Seconds for each sample, of a chunk: with all of the model, after the frontier, before it, and of reading."""
        size, moved = len(batch[INDEX]), self.mover(batch)
        kept = self._kept(frontier, moved)
        with self._untouched():
            whole_s = _median_s(lambda: self._loss(self.binding.whole, moved))
            rest_s = _median_s(lambda: self._loss(partial(self._recalled, frontier, kept), moved))
        frozen_s = _median_s(lambda: self._made(frontier, way, batch))
        read_s = _median_s(lambda: self._first(train)) / self._readers
        return Times((whole_s + read_s) / size, rest_s / size, (frozen_s + read_s) / size)

    def _key(self, dataset: KeyedDataset, views: Views, example: dict[str, Tensor], frontier: Frontier) -> bytes:
        """All that decides the bits of the features, but for the layout."""
        plain = whole(dataset).without_augmentation() if hasattr(whole(dataset), "without_augmentation") else dataset
        inputs = self.mover(self._first(plain))  # as they are brought to the model: mean and std are part of them
        entries = getattr(getattr(whole(dataset), "augmentations", None), "entries", ())
        said = (
            tensor_sha256(_frozen_tensors(self.model)),
            tensor_sha256({name: inputs[name] for name in self.binding.keys}),
            dataset.fingerprint(),
            _sources(self.model),
            [entry if isinstance(entry, str) else _source(entry) for entry in entries],
            (views.count, None if views.is_exact else self.seed),
            repr(frontier.crossings),
            [(name, tuple(row.shape), str(row.dtype)) for name, row in example.items()],
            (self.precision, self.mover.device.type, torch.__version__, torch.get_num_threads(), CHUNK),
        )
        return repr(said).encode()


@dataclass(frozen=True)
class Times:
    """Seconds for a sample: read and trained on as a whole, trained on after the frontier, read and brought there."""

    whole_s: float
    rest_s: float
    frozen_s: float


def expected_gain(times: Times, train: Features, valid: Features | None, epochs: int) -> float:
    """How many times as fast a run of so many epochs is expected to be, with what is kept already."""
    views = min(epochs, train.views.count)
    made = len(train) * views * (1 - train.share_found())
    evaluated = len(valid) * epochs if valid is not None else 0
    if valid is not None:
        made += len(valid) * (1 - valid.share_found())
    before = len(train) * epochs * times.whole_s + evaluated * times.frozen_s
    after = len(train) * epochs * times.rest_s + made * times.frozen_s
    return before / max(after, 1e-9)


def _check_length(epochs: int, num_train: int, num_valid: int, views: int) -> None:
    """Whether it can pay to look. Raises:  _NoPrefixError for a run that is over before"""
    before, after = epochs * (num_train + num_valid), views * num_train + num_valid
    if before < _LONG and (before - after < _LEAST_SAVED or before < _LEAST_RATIO * after):
        raise _NoPrefixError("so few samples and epochs are over before it would pay")


def _median_s(work: Callable[[], Any]) -> float:
    seconds = []
    for _ in range(_TIMES):
        begun = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds)


_ONE_VIEW = Views(1, True, "an evaluation draws nothing")


def _path(head: bytes, way: str) -> Path | None:
    """Where features lie that were computed in this way; None where the user has no home."""
    folder = cache_folder("features")
    return folder / f"{xxhash.xxh3_128_hexdigest(head + way.encode())}{store.SUFFIX}" if folder else None


def _layouts_of(batch: Batch) -> list[str]:
    """As it is fed, and where that is another one, either layout of images."""
    images = [value for value in batch.values() if _is_image(value)]
    others = [name for name in _LAYOUTS if any(_LAYOUTS[name](image) is not image for image in images)]
    return [AS_FED, *others]


def _is_image(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 4 and value.is_floating_point()


def _frozen_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that do not learn, and the buffers of modules none of whose own parameters does."""
    found: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    for path, module in model.named_modules():
        if not any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
            found |= {f"{path}.{name} (buffer)": tensor for name, tensor in module.named_buffers(recurse=False)}
    return found


def _sources(model: nn.Module) -> list[str]:
    """The code of each class of modules but torch's own, and those of which all learns."""
    kinds = {type(module) for module in model.modules()
             if not all(p.requires_grad for p in module.parameters()) or not list(module.parameters())}  # fmt: skip
    return sorted(_source(kind) for kind in kinds if not kind.__module__.startswith("torch."))


def _source(thing: Any) -> str:
    """The code of a class or function; its name where that cannot be read."""
    name = f"{getattr(thing, '__module__', '')}.{getattr(thing, '__qualname__', repr(thing))}"
    try:
        return f"{name} {xxhash.xxh3_64_hexdigest(inspect.getsource(thing).encode())}"
    except (OSError, TypeError):
        return name
