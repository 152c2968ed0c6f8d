"""Samples in batches: the order, the draws and the place to go on from are functions of (seed, epoch, position).

So the number and the kind of workers, prefetching, a restart or another number of ranks change nothing (law 1), and
going on at batch 100,000 costs what beginning costs.
"""

from __future__ import annotations

import itertools
import os
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from functools import partial
from multiprocessing.util import Finalize
from types import GeneratorType
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from ..chance import ChanceKey
from ..contracts import INDEX, VALID, Batch, KeyedDataset
from ..errors import CheckpointError, DataError, SettingsError
from ..generators import kept_generators
from .cache import CachePlan, Wanted, with_cache
from .dataset import Indices, whole
from .foreign import Probe, as_dataset
from .order import Order, bucketed_order, plain_order, running_weights, sampled_order, shuffled_order, weighted_order
from .reading import Bad, Collate, OnBad, Read, Source, Task, collated, foreign_of
from .samples import stack
from .streams import Stream
from .travel import cannot_travel
from .workers import Feed, Processes, Threads

Kind = Literal["inline", "threads", "processes", "threaded_process"]
Backend = Literal["auto", Kind]
Last = Literal["keep", "drop", "pad"]

_MAX_WORKERS = 8
_SLOW_SAMPLE_S = 1e-3
_LEAST_AHEAD, _ROWS_AHEAD = 4, 4  # batches; rows for each thread
_BACKENDS = ("auto", "inline", "threads", "processes", "threaded_process")


@dataclass(frozen=True)
class FeedPlan:
    """How samples are read, and why."""

    backend: Kind
    workers: int
    reason: str

    def ahead(self, batch_size: int) -> int:
        """How many batches are asked for before they are wanted: threads fill one together, processes one each."""
        if self.backend == "processes":
            return 2 * self.workers
        return max(_LEAST_AHEAD, -(-_ROWS_AHEAD * self.workers // batch_size))


@dataclass
class FeedStats:
    """What feeding took: seconds that the trainer waited, and that readers worked; samples, and how many of them a
    cache had; batches, and how many others were ready when each was fetched.
    """

    wait_s: float = 0.0
    read_s: float = 0.0
    samples: int = 0
    hits: int = 0
    batches: int = 0
    ready: int = 0

    def since(self, before: FeedStats, elapsed_s: float) -> dict[str, float]:
        """Rates of the time between two moments."""
        samples, batches = self.samples - before.samples, self.batches - before.batches
        if not samples or elapsed_s <= 0:
            return {}
        return {
            "loader/waiting_fraction": round((self.wait_s - before.wait_s) / elapsed_s, 4),
            "loader/read_ms": round((self.read_s - before.read_s) / samples * 1e3, 4),
            "loader/cache_hit_fraction": round((self.hits - before.hits) / samples, 4),
            "loader/queue_depth": round((self.ready - before.ready) / batches, 2),
        }


class Loader:
    """Batches of a dataset; one ``for`` is one epoch.

    A batch is a dict of tensors, B first, with ``index`` int64 (B,), and with ``valid`` bool (B,) where ``last="pad"``
    filled it. ``state_dict()`` counts delivered batches only, those of the iteration that began last. ``collate`` gets
    the list of samples as the dataset gives them; what it draws from global generators is keyed by the batch.

    A sample that cannot be read ends the epoch (``on_bad="raise"``), is replaced by another that is keyed by it
    ("substitute"), or by one that ``valid`` calls none ("mask"); ``bad`` lists them, and past ``bad_fraction`` of all
    samples, one at least, the epoch ends. ``cache`` keeps decoded images in "ram" or on "disk".

    Raises:  SettingsError for a value that cannot be, DataError for a dataset that is none
    """

    def __init__(
        self, dataset: Any, batch_size: int, *, shuffle: bool = False, sampler: Any = None,
        weights: Sequence[float] | Tensor | Literal["balanced"] | None = None,
        buckets: bool | Literal["auto"] = "auto", collate: Collate | None = None, seed: int = 0,
        workers: int | Literal["auto"] = "auto", backend: Backend = "auto", cache: Wanted = "off",
        last: Last = "keep", on_bad: OnBad = "raise", bad_fraction: float = 0.01, rank: int = 0, world_size: int = 1,
    ):  # fmt: skip
        _check("batch_size", batch_size, batch_size > 0, "a whole number above 0")
        _check("cache", cache, cache in ("off", "ram", "disk", "auto"), '"off", "ram", "disk" or "auto"')
        _check("on_bad", on_bad, on_bad in ("raise", "substitute", "mask"), '"raise", "substitute" or "mask"')
        _check("bad_fraction", bad_fraction, 0 <= bad_fraction <= 1, "0 to 1")
        _check("last", last, last in ("keep", "drop", "pad"), '"keep", "drop" or "pad"')
        _check("backend", backend, backend in _BACKENDS, f"one of {', '.join(_BACKENDS)}")
        _check("workers", workers, workers == "auto" or workers >= 0, '"auto" or a number from 0')
        _check("rank", rank, 0 <= rank < world_size, f"0 to {world_size - 1}")
        chosen = [name for name, given in [("shuffle", shuffle), ("sampler", sampler is not None),
                                           ("weights", weights is not None)] if given]  # fmt: skip
        _check("shuffle, sampler, weights", chosen, len(chosen) <= 1, "at most one of the three")
        self.dataset: KeyedDataset
        self.cache_plan: CachePlan
        self.dataset, self.cache_plan = with_cache(as_dataset(dataset), cache)
        self.batch_size, self.shuffle, self.sampler, self.collate = batch_size, shuffle, sampler, collate
        self.seed, self.last, self.rank, self.world_size = seed, last, rank, world_size
        labels = getattr(self.dataset, "labels", None)
        is_padded = isinstance(self.dataset, Stream) and last == "pad"
        _check("last", last, not is_padded, '"keep" or "drop" for a stream')
        self._cumulative = running_weights(weights, len(self.dataset), labels)
        self._lengths = self._bucket_lengths(buckets)
        self.plan = plan_feed(self.dataset, workers, backend, collate)
        self._feed: Feed | None = None
        self._source = Source(self.dataset, collate, on_bad)
        self.transfer: Callable[[Batch], Batch] | None = None  # begun for a batch before the one before it is left
        self.stats = FeedStats()
        self.bad: dict[int, Bad] = {}
        self._most_bad = max(1, int(bad_fraction * len(self.dataset)))
        self._epoch = 0
        self._delivered = 0
        self._is_begun = False
        self._iterations: weakref.WeakSet[GeneratorType[Batch, None, None]] = weakref.WeakSet()

    def _bucket_lengths(self, buckets: bool | Literal["auto"]) -> np.ndarray[Any, Any] | None:
        # an order that was asked for, or that evaluation and prediction keep, is left alone
        is_free = self.sampler is None and (self.shuffle or self._cumulative is not None)
        lengths = getattr(self.dataset, "lengths", None) if is_free and buckets else None
        _check("buckets", buckets, buckets is not True or lengths is not None, "shuffled samples of several lengths")
        return lengths

    @property
    def has_buckets(self) -> bool:
        """Whether batches are made of samples that are about equally long."""
        return self._lengths is not None

    def __len__(self) -> int:
        whole, rest = divmod(self.num_samples, self.batch_size * self.world_size)
        return whole + (1 if rest and self.last != "drop" else 0)

    @property
    def batches_left(self) -> int:
        """Batches of the epoch that is under way, or of the next one."""
        return len(self) - self._delivered

    @property
    def num_samples(self) -> int:
        """Samples of one epoch, over all ranks."""
        return len(self.sampler) if self.sampler is not None else len(self.dataset)

    @property
    def epoch(self) -> int:
        return self._epoch

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {
            "epoch": self._epoch,
            "delivered": self._delivered,
            "global_batch": self.batch_size * self.world_size,
            "num_samples": self.num_samples,
            "order": self._order_text,
        }
        if self._source.on_bad != "raise":
            state["bad"] = [list(astuple(bad)) for bad in self.bad.values()]
        return state

    @property
    def _order_text(self) -> str:
        kind = "sampler" if self.sampler is not None else "weights" if self._cumulative is not None else ""
        return f"{kind or ('shuffled' if self.shuffle else 'plain')}{', buckets' if self.has_buckets else ''}"

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the last delivered batch.

        Raises:  CheckpointError while an epoch is under way, or where the batches were of another size
        """
        if any(iteration.gi_frame is not None for iteration in self._iterations):
            raise CheckpointError(
                "a loader's state is loaded before its iteration begins", where="Loader.load_state_dict",
                got="an epoch under way", fix="load the state first, then write: for batch in loader",
            )  # fmt: skip
        for name, now in self.state_dict().items():
            if name not in ("epoch", "delivered", "bad") and state.get(name, now) != now:
                raise CheckpointError(
                    "this loader's batches are not those of the saved state", where=f"Loader, {name}", got=now,
                    expected=state[name], fix="resume with the same data, order, and batch_size times number of ranks",
                )  # fmt: skip
        self._epoch, self._delivered, self._is_begun = state["epoch"], state["delivered"], False
        self.bad = {row[0]: Bad(*row) for row in state.get("bad", [])}

    def rewind(self) -> None:
        """Begin with epoch 0 again: an evaluation draws the same each time, also in a run that was resumed."""
        self._epoch, self._delivered, self._is_begun = 0, 0, False

    def __iter__(self) -> Iterator[Batch]:
        if self._is_begun:  # the epoch before was left early, or is still under way
            self._epoch, self._delivered = self._epoch + 1, 0
        self._is_begun = True
        iteration = cast("GeneratorType[Batch, None, None]", self._run(self._epoch, self._delivered))
        self._iterations.add(iteration)
        return iteration

    def _run(self, epoch: int, start: int) -> Iterator[Batch]:
        batches = self._read_ahead(epoch, start)
        if self.transfer is not None:
            batches = _one_ahead(map(self.transfer, batches))
        for delivered, batch in enumerate(batches, start + 1):
            if epoch == self._epoch:
                self._delivered = delivered
            yield batch
        if epoch == self._epoch:
            self._epoch, self._delivered, self._is_begun = epoch + 1, 0, False

    def _read_ahead(self, epoch: int, start: int) -> Iterator[Batch]:
        key = ChanceKey(self.seed, epoch)
        if isinstance(self.dataset, Stream):
            yield from self._stream(self.dataset, key, start)
        elif self.plan.backend == "inline":
            source = self._source
            for indices, valid in self._parts(key, start):
                begun = time.perf_counter()
                read = source.read(_task(indices, key))
                yield self._completed(read, key, len(indices), valid, time.perf_counter() - begun, 0)
        else:
            yield from self._fed(key, start)

    def _fed(self, key: ChanceKey, start: int) -> Iterator[Batch]:
        feed, parts, ahead = self._begin_feed(), self._parts(key, start), self.plan.ahead(self.batch_size)
        waiting: deque[tuple[Any, int, Tensor | None]] = deque()
        try:
            while True:
                for indices, valid in itertools.islice(parts, ahead - len(waiting)):
                    waiting.append((feed.ask(_task(indices, key)), len(indices), valid))
                if not waiting:
                    return
                begun = time.perf_counter()
                ready = feed.num_ready([ticket for ticket, *_ in waiting])
                ticket, size, valid = waiting.popleft()
                read = feed.take(ticket)
                yield self._completed(read, key, size, valid, time.perf_counter() - begun, ready)
        finally:
            for ticket, *_ in waiting:
                feed.forget(ticket)

    def _completed(
        self, read: Read, key: ChanceKey, size: int, valid: Tensor | None, wait_s: float, ready: int
    ) -> Batch:
        source = self._source if self._feed is None else self._feed.source
        batch = source.complete(read, key)
        if not size:  # a rank's share of a last batch with fewer samples than ranks: the same keys, no rows
            batch = {name: value[:0] for name, value in batch.items()}
        if valid is not None:
            batch[VALID] = batch[VALID] & valid if VALID in batch else valid
        stats = self.stats
        stats.wait_s, stats.read_s = stats.wait_s + wait_s, stats.read_s + read.read_s
        stats.samples, stats.hits = stats.samples + size, stats.hits + read.hits
        stats.batches, stats.ready = stats.batches + 1, stats.ready + ready
        if read.bad:
            self._note(read.bad)
        return batch

    @property
    def on_bad_text(self) -> str:
        """What becomes of samples that cannot be read."""
        return {"mask": "they are left out", "substitute": "others take their places"}.get(self._source.on_bad, "")

    def _note(self, found: Sequence[Bad]) -> None:
        self.bad |= {bad.index: bad for bad in found}
        if len(self.bad) > self._most_bad:
            raise DataError(
                "too many samples cannot be read", where="; ".join(bad.id for bad in list(self.bad.values())[:5]),
                got=f"{len(self.bad):,} of {len(self.dataset):,}; the last: {found[-1].reason}",
                expected=f"{self._most_bad:,} at most",
                fix="torchkeep survey DATA --bad lists all of them; a larger bad_fraction lets more pass",
            )  # fmt: skip

    def _stream(self, stream: Stream, key: ChanceKey, start: int) -> Iterator[Batch]:
        """Batches of a stream: what comes before batch ``start`` is read and left."""
        samples = stream.samples(key, self.shuffle)
        size = self.batch_size * self.world_size
        for number in range(len(self)):
            held = list(itertools.islice(samples, size))
            if number < start:
                continue
            share = np.array_split(np.arange(len(held)), self.world_size)[self.rank]
            mine = [held[place] for place in share.tolist()]
            read = partial(self._collated_stream, stream, key)
            self.stats.samples, self.stats.batches = self.stats.samples + len(mine), self.stats.batches + 1
            if mine:
                yield read(mine, number * size + share)
            else:  # fewer samples than ranks: the same keys, no rows
                yield {name: value[:0] for name, value in read(held[:1], np.zeros(1, dtype=np.int64)).items()}

    def _collated_stream(self, stream: Stream, key: ChanceKey, samples: list[Any], indices: Indices) -> Batch:
        if self.collate is not None:
            made = collated(stream, samples, Task(indices, key), self.collate)
        else:
            made = getattr(stream, "collate", stack)(samples)
        return {**made, INDEX: torch.from_numpy(indices)}

    def _begin_feed(self) -> Feed:
        if self._feed is None:
            self._feed = feed = self._made_feed()
            # before multiprocessing waits for its children at the end of the program
            self._finalizer = Finalize(self, feed.close, exitpriority=10)
        return self._feed

    def _made_feed(self) -> Feed:
        plan, source = self.plan, self._source
        if plan.backend == "threads":
            return Threads(replace(source, is_raw=self.collate is not None), plan.workers)
        cache = getattr(whole(self.dataset), "cache", None)
        number, threads = (1, plan.workers) if plan.backend == "threaded_process" else (plan.workers, 1)
        return Processes(source, number, threads, cache.fileno if cache is not None else _nothing)

    @property
    def worker_pids(self) -> list[int]:
        """The processes that read now."""
        return self._feed.pids if self._feed is not None else []

    def close(self) -> None:
        """End the workers. A later iteration starts new ones."""
        if self._feed is not None:
            self._finalizer()
            self._feed = None

    def peek(self) -> Batch:
        """The first batch of the next epoch, without counting it."""
        if isinstance(self.dataset, Stream):
            with kept_generators():
                return next(self._stream(self.dataset, ChanceKey(self.seed, self._epoch), 0))
        indices, valid = next(self._parts(ChanceKey(self.seed, self._epoch), 0))
        key = ChanceKey(self.seed, self._epoch)
        batch = self._source.complete(self._source.read(_task(indices, key)), key)
        return batch if valid is None else batch | {VALID: valid}

    def _parts(self, key: ChanceKey, start: int) -> Iterator[tuple[Indices, Tensor | None]]:
        """This rank's sample numbers, a batch at a time, from batch ``start`` on."""
        order = self._order(key)
        size, total = self.batch_size, self.num_samples
        for number in range(start, len(self)):
            first = (number * self.world_size) * size
            end = first + size * self.world_size
            if end <= total:
                yield order(first + self.rank * size, first + (self.rank + 1) * size), None
            elif self.last == "pad":
                yield self._padded(order, first, total)
            else:
                share = np.array_split(order(first, total), self.world_size)[self.rank]
                yield share, None

    def _padded(self, order: Callable[[int, int], Indices], first: int, total: int) -> tuple[Indices, Tensor | None]:
        # the batch's first sample stands in; "valid" says which are real
        real = order(first, total)
        filled = np.concatenate([real, np.repeat(real[:1], self.batch_size * self.world_size - len(real))])
        mine = slice(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
        return filled[mine], torch.from_numpy((np.arange(len(filled)) < len(real))[mine])

    def _order(self, key: ChanceKey) -> Order:
        size = len(self.dataset)
        if self.sampler is not None:
            return sampled_order(key, self.sampler)
        if self._cumulative is not None:
            order = weighted_order(key, self._cumulative)
        else:
            order = shuffled_order(key, size) if self.shuffle else plain_order(size)
        if self._lengths is None:
            return order
        return bucketed_order(key, order, self._lengths, size, self.batch_size * self.world_size)


def _task(indices: Indices, key: ChanceKey) -> Task:
    return Task(indices if len(indices) else np.zeros(1, dtype=np.int64), key)


def _one_ahead(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Each batch once the next one was begun: its way to the device takes place during the step before it."""
    for held in itertools.islice(batches, 1):
        for following in batches:
            yield held
            held = following
        yield held


def _nothing() -> None:
    return None


def plan_feed(dataset: KeyedDataset, workers: int | str, backend: str, collate: Collate | None) -> FeedPlan:
    """Choose who reads the samples. The choice changes no bit of any batch."""
    if workers == 0 or backend == "inline":
        return FeedPlan("inline", 0, "as set")
    number = min(_MAX_WORKERS, usable_cores()) if workers == "auto" else int(workers)
    if isinstance(dataset, Stream):
        return FeedPlan("inline", 0, "a stream is read in its own order")
    foreign = foreign_of(dataset)
    if foreign is not None:
        is_auto = workers == "auto" and backend == "auto"
        return _plan_foreign(dataset, foreign.probe, number, backend, is_auto, collate)
    if backend == "threaded_process":
        why_not = cannot_travel(dataset, collate)
        return FeedPlan("threads", number, why_not) if why_not else FeedPlan("threaded_process", number, "as set")
    augments = getattr(whole(dataset), "augmentations", None)
    has_callable = augments is not None and augments.has_callable and backend == "auto"
    if backend == "processes" or has_callable:
        why_not = cannot_travel(dataset, collate)
        reason = "an augmentation of the user's may hold the GIL" if has_callable else "as set"
        return FeedPlan("inline", 0, why_not) if why_not else FeedPlan("processes", number, reason)
    if getattr(dataset, "threads", False) or backend == "threads" or workers != "auto":
        return FeedPlan("threads", number, "reading releases the GIL" if workers == "auto" else "as set")
    return FeedPlan("inline", 0, "the data lie in memory and are gathered by batch")


def usable_cores() -> int:
    """The processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _plan_foreign(
    dataset: KeyedDataset, probe: Probe, number: int, backend: str, is_auto: bool, collate: Collate | None
) -> FeedPlan:
    said = "; it draws from global generators, seeded per sample" if probe.draws else ""
    if is_auto and probe.sample_s < _SLOW_SAMPLE_S:
        return FeedPlan("inline", 0, f"a sample takes {probe.sample_s * 1e6:.0f} µs{said}")
    if backend == "threads":
        # neither a draw nor who made it can be told while the trainer draws from the same generators
        said = f"; a thread would share the trainer's random generators{said}"
    why_not = cannot_travel(dataset, collate)
    if why_not:
        return FeedPlan("inline", 0, why_not + said)
    return FeedPlan("processes", number, f"a sample takes {probe.sample_s * 1e3:.1f} ms{said}")


def _check(name: str, got: object, holds: bool, expected: str) -> None:
    if not holds:
        raise SettingsError("a loader's setting cannot be used", where=f"Loader({name}=…)", got=got, expected=expected)
