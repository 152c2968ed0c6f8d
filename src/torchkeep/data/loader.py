"""Samples in batches: the order, the draws and the place to go on from are functions of (seed, epoch, position).

So the number and the kind of workers, prefetching, a restart or another number of ranks change nothing (law 1), and
going on at batch 100,000 costs what beginning costs.
"""

from __future__ import annotations

import ast
import io
import itertools
import multiprocessing
import os
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import GeneratorType
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
import xxhash
from torch import Tensor

from ..chance import ChanceKey, keyed_seed
from ..contracts import INDEX, VALID, Batch, KeyedDataset
from ..errors import CheckpointError, DataError, SettingsError
from .dataset import Indices, Part, whole
from .foreign import Foreign, Probe, as_dataset
from .generators import kept_generators, keyed_generators
from .order import Order, bucketed_order, plain_order, running_weights, sampled_order, shuffled_order, weighted_order
from .samples import stack
from .streams import Stream

Backend = Literal["auto", "inline", "threads", "processes"]
Last = Literal["keep", "drop", "pad"]
Collate = Callable[[list[Any]], Any]

_MAX_WORKERS = 8
_SLOW_SAMPLE_S = 1e-3


@dataclass(frozen=True)
class FeedPlan:
    """How samples are read, and why."""

    backend: Literal["inline", "threads", "processes"]
    workers: int
    reason: str


class Loader:
    """Batches of a dataset; one ``for`` is one epoch.

    A batch is a dict of tensors, B first, with ``index`` int64 (B,), and with ``valid`` bool (B,) where ``last="pad"``
    filled it. ``state_dict()`` counts delivered batches only, those of the iteration that began last. ``collate`` gets
    the list of samples as the dataset gives them; what it draws from global generators is keyed by the batch.

    Raises:  SettingsError for a value that cannot be, DataError for a dataset that is none
    """

    def __init__(
        self, dataset: Any, batch_size: int, *, shuffle: bool = False, sampler: Any = None,
        weights: Sequence[float] | Tensor | Literal["balanced"] | None = None,
        buckets: bool | Literal["auto"] = "auto", collate: Collate | None = None, seed: int = 0,
        workers: int | Literal["auto"] = "auto", backend: Backend = "auto", cache: Literal["off"] = "off",
        last: Last = "keep", on_bad: Literal["raise"] = "raise", rank: int = 0, world_size: int = 1,
    ):  # fmt: skip
        _check("batch_size", batch_size, batch_size > 0, "a whole number above 0")
        _check("cache", cache, cache == "off", '"off"')
        _check("on_bad", on_bad, on_bad == "raise", '"raise"')
        _check("last", last, last in ("keep", "drop", "pad"), '"keep", "drop" or "pad"')
        _check("backend", backend, backend in ("auto", "inline", "threads", "processes"), "one of the four backends")
        _check("workers", workers, workers == "auto" or workers >= 0, '"auto" or a number from 0')
        _check("rank", rank, 0 <= rank < world_size, f"0 to {world_size - 1}")
        chosen = [name for name, given in [("shuffle", shuffle), ("sampler", sampler is not None),
                                           ("weights", weights is not None)] if given]  # fmt: skip
        _check("shuffle, sampler, weights", chosen, len(chosen) <= 1, "at most one of the three")
        self.dataset: KeyedDataset = as_dataset(dataset)
        self.batch_size, self.shuffle, self.sampler, self.collate = batch_size, shuffle, sampler, collate
        self.seed, self.last, self.rank, self.world_size = seed, last, rank, world_size
        labels = getattr(self.dataset, "labels", None)
        is_padded = isinstance(self.dataset, Stream) and last == "pad"
        _check("last", last, not is_padded, '"keep" or "drop" for a stream')
        self._cumulative = running_weights(weights, len(self.dataset), labels)
        self._lengths = self._bucket_lengths(buckets)
        self.plan = plan_feed(self.dataset, workers, backend, collate)
        self._executor: Executor | None = None
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
    def num_samples(self) -> int:
        """Samples of one epoch, over all ranks."""
        return len(self.sampler) if self.sampler is not None else len(self.dataset)

    @property
    def epoch(self) -> int:
        return self._epoch

    def state_dict(self) -> dict[str, Any]:
        return {
            "epoch": self._epoch,
            "delivered": self._delivered,
            "global_batch": self.batch_size * self.world_size,
            "num_samples": self.num_samples,
            "order": self._order_text,
        }

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
            if name not in ("epoch", "delivered") and state.get(name, now) != now:
                raise CheckpointError(
                    "this loader's batches are not those of the saved state", where=f"Loader, {name}", got=now,
                    expected=state[name], fix="resume with the same data, order, and batch_size times number of ranks",
                )  # fmt: skip
        self._epoch, self._delivered, self._is_begun = state["epoch"], state["delivered"], False

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
        for delivered, batch in enumerate(self._read_ahead(epoch, start), start + 1):
            if epoch == self._epoch:
                self._delivered = delivered
            yield batch
        if epoch == self._epoch:
            self._epoch, self._delivered, self._is_begun = epoch + 1, 0, False

    def _read_ahead(self, epoch: int, start: int) -> Iterator[Batch]:
        key = ChanceKey(self.seed, epoch)
        if isinstance(self.dataset, Stream):
            yield from self._stream(self.dataset, key, start)
            return
        parts = self._parts(key, start)
        if self.plan.backend == "inline":
            dataset, collate = self.dataset, self.collate
            for indices, valid in parts:
                yield _with_valid(read(dataset, indices, key, collate), valid)
            return
        executor = self._start()
        waiting: deque[tuple[Future[Any], Indices, Tensor | None]] = deque()
        try:
            for indices, valid in parts:
                waiting.append((self._submit(executor, indices, key), indices, valid))
                if len(waiting) > 2 * self.plan.workers:
                    yield self._finished(key, *waiting.popleft())
            while waiting:
                yield self._finished(key, *waiting.popleft())
        finally:
            for future, *_ in waiting:
                future.cancel()

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
            if mine:
                yield read(mine, number * size + share)
            else:  # fewer samples than ranks: the same keys, no rows
                yield {name: value[:0] for name, value in read(held[:1], np.zeros(1, dtype=np.int64)).items()}

    def _collated_stream(self, stream: Stream, key: ChanceKey, samples: list[Any], indices: Indices) -> Batch:
        if self.collate is not None:
            made = _collated(stream, samples, indices, key, self.collate)
        else:
            made = getattr(stream, "collate", stack)(samples)
        return {**made, INDEX: torch.from_numpy(indices)}

    def _submit(self, executor: Executor, indices: Indices, key: ChanceKey) -> Future[Any]:
        if self.plan.backend == "processes":
            return executor.submit(_read_in_worker, indices, key)
        if self.collate is not None:
            return executor.submit(_samples, self.dataset, indices, key)
        return executor.submit(read, self.dataset, indices, key, None)

    def _finished(self, key: ChanceKey, future: Future[Any], indices: Indices, valid: Tensor | None) -> Batch:
        try:
            result = future.result()
        except BrokenProcessPool as error:
            self._executor = None  # a later iteration starts new ones
            raise DataError(
                "a loader process died", where="Loader(backend='processes')", got=error,
                fix="workers = 0 shows the sample's own error",
            ) from error  # fmt: skip
        if self.plan.backend == "processes":
            result = {name: _as_tensor(value) for name, value in result.items()}
        elif self.collate is not None:  # not in the thread: it may draw from generators that the trainer uses meanwhile
            result = {**_collated(self.dataset, result, indices, key, self.collate), INDEX: torch.from_numpy(indices)}
        return _with_valid(result, valid)

    def _start(self) -> Executor:
        if self._executor is None and self.plan.backend == "threads":
            self._executor = ThreadPoolExecutor(self.plan.workers, "torchkeep-loader")
        elif self._executor is None:
            # forkserver: a fork of a process with threads may hang; spawn is what Windows has
            kind = "spawn" if sys.platform == "win32" else "forkserver"
            self._executor = ProcessPoolExecutor(
                self.plan.workers,
                multiprocessing.get_context(kind),
                initializer=_begin_worker,
                initargs=(_packed((self.dataset, self.collate)),),
            )
        assert self._executor is not None
        return self._executor

    def close(self) -> None:
        """End the workers. A later iteration starts new ones."""
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)
            self._executor = None

    def peek(self) -> Batch:
        """The first batch of the next epoch, without counting it."""
        if isinstance(self.dataset, Stream):
            with kept_generators():
                return next(self._stream(self.dataset, ChanceKey(self.seed, self._epoch), 0))
        indices, valid = next(self._parts(ChanceKey(self.seed, self._epoch), 0))
        return _with_valid(read(self.dataset, indices, ChanceKey(self.seed, self._epoch), self.collate), valid)

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


def read(dataset: KeyedDataset, indices: Indices, key: ChanceKey, collate: Collate | None) -> Batch:
    """One batch, read here and now: the same work whoever does it."""
    if not len(indices):  # a rank's share of a last batch with fewer samples than ranks: the same keys, no rows
        one = read(dataset, np.zeros(1, dtype=np.int64), key, collate)
        return {name: value[:0] for name, value in one.items()}
    if collate is not None:
        batch = _collated(dataset, _samples(dataset, indices, key), indices, key, collate)
    else:
        batch = dataset.read_batch(indices, key) or _stacked(dataset, _samples(dataset, indices, key))
    batch[INDEX] = torch.from_numpy(indices)
    return batch


def _samples(dataset: Any, indices: Indices, key: ChanceKey) -> list[Any]:
    while isinstance(dataset, Part):
        indices, dataset = dataset.indices[indices], dataset.dataset
    if isinstance(dataset, Foreign):
        return dataset.read_samples(indices, key)
    return [dataset.read(int(i), key) for i in indices]


def foreign_of(dataset: Any) -> Foreign | None:
    """The foreign dataset that this is, or is a part of."""
    found = whole(dataset)
    return found if isinstance(found, Foreign) else None


def _stacked(dataset: KeyedDataset, samples: list[Any]) -> Batch:
    foreign = foreign_of(dataset)
    if foreign is not None:
        return stack([foreign.named(sample) for sample in samples])
    return dict(getattr(dataset, "collate", stack)(samples))


def _collated(dataset: KeyedDataset, samples: list[Any], indices: Indices, key: ChanceKey, collate: Collate) -> Batch:
    foreign = foreign_of(dataset)
    with keyed_generators(keyed_seed(key, "collate", xxhash.xxh3_64_intdigest(indices.tobytes()))):
        made = _as_tensor(collate(samples))
    if isinstance(made, Mapping):
        return dict(made)
    if isinstance(made, tuple | list) and foreign is not None and not (len(made) == len(samples) > 2):
        return foreign.named(tuple(made))
    if isinstance(made, Tensor):
        return {"input": made}
    raise DataError(
        "collate gave something that is no batch", where=getattr(collate, "__qualname__", repr(collate)),
        got=type(made).__name__, expected="a dict of tensors, or a tuple with a name for each part",
    )  # fmt: skip


def _with_valid(batch: Batch, valid: Tensor | None) -> Batch:
    if valid is not None:
        batch[VALID] = valid
    return batch


_worker: tuple[KeyedDataset, Collate | None]


def _begin_worker(packed: bytes) -> None:
    import signal

    global _worker
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGTERM):  # both are the trainer's to answer, which ends its workers
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_trainer, daemon=True).start()
    _worker = ForkingPickler.loads(packed)


def _end_with_trainer() -> None:
    # a trainer that is killed can end nobody: its workers would hold the data and its terminal for ever
    trainer = multiprocessing.parent_process()
    if trainer is not None:
        trainer.join()
        os._exit(1)


def _read_in_worker(indices: Indices, key: ChanceKey) -> Batch:
    dataset, collate = _worker
    return {name: _as_array(value) for name, value in read(dataset, indices, key, collate).items()}


class _Laid(NamedTuple):
    """A tensor's values in the order of memory, and its strides: with others a kernel would give other bits."""

    values: np.ndarray[Any, Any]
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _as_array(value: Any) -> Any:
    # arrays travel through the pipe: torch's own way names shared memory, which a kill leaves behind
    if isinstance(value, Tensor) and value.dtype != torch.bfloat16:
        value, shape, strides = value.detach(), tuple(value.shape), value.stride()
        # not is_contiguous(): that says yes to one channel that is channels last
        if strides == torch.empty(shape, device="meta").stride():
            return value.numpy()
        is_dense = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) + 1 == value.numel()
        if not is_dense or 0 in strides:
            return value.contiguous().numpy()
        return _Laid(value.as_strided((value.numel(),), (1,)).numpy(), shape, strides)
    return _mapped(_as_array, value)


def _as_tensor(value: Any) -> Any:
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        return torch.from_numpy(value)
    if isinstance(value, _Laid):
        return torch.from_numpy(value.values).as_strided(value.shape, value.strides)
    return _mapped(_as_tensor, value)


def _mapped(change: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, dict):
        return {name: change(inner) for name, inner in value.items()}
    return type(value)(change(inner) for inner in value) if type(value) in (list, tuple) else value


class _Packer(ForkingPickler):
    """Packs tensors by value: torch's own way needs an open file for each, and a process may send 256 of them."""

    def __init__(self, file: Any):
        super().__init__(file)
        self.dispatch_table = {**self.dispatch_table, Tensor: _reduced}


def _reduced(tensor: Any) -> Any:
    plain = tensor.device.type == "cpu" and tensor.layout == torch.strided and tensor.dtype != torch.bfloat16
    if not plain or tensor.requires_grad:
        return tensor.__reduce_ex__(2)
    return _as_tensor, (_as_array(tensor),)


def _packed(value: Any) -> bytes:
    file = io.BytesIO()
    _Packer(file).dump(value)
    return file.getvalue()


def plan_feed(dataset: KeyedDataset, workers: int | str, backend: str, collate: Collate | None) -> FeedPlan:
    """Choose who reads the samples. The choice changes no bit of any batch."""
    if workers == 0 or backend == "inline":
        return FeedPlan("inline", 0, "as set")
    number = min(_MAX_WORKERS, _usable_cores()) if workers == "auto" else int(workers)
    if isinstance(dataset, Stream):
        return FeedPlan("inline", 0, "a stream is read in its own order")
    foreign = foreign_of(dataset)
    if foreign is not None:
        is_auto = workers == "auto" and backend == "auto"
        return _plan_foreign(dataset, foreign.probe, number, backend, is_auto, collate)
    if backend == "processes":
        why_not = cannot_travel(dataset, collate)
        return FeedPlan("inline", 0, why_not) if why_not else FeedPlan("processes", number, "as set")
    augments = getattr(whole(dataset), "augmentations", None)
    if augments is not None and augments.has_callable and backend == "auto":
        why_not = cannot_travel(dataset, collate)
        if why_not:
            return FeedPlan("inline", 0, why_not)
        return FeedPlan("processes", number, "an augmentation of the user's may hold the GIL")
    if getattr(dataset, "threads", False) or backend == "threads" or workers != "auto":
        return FeedPlan("threads", number, "reading releases the GIL" if workers == "auto" else "as set")
    return FeedPlan("inline", 0, "the data lie in memory and are gathered by batch")


def _usable_cores() -> int:
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


def cannot_travel(dataset: Any, collate: Any) -> str:
    """Why these cannot be sent to another process; empty where they can."""
    try:
        sent = _packed((dataset, collate))
    except Exception as error:
        return f"cannot travel to a process: {type(error).__name__}: {error}"
    if b"torchkeep_user_" in sent:
        return "its code is a file that the recipe names, which a process cannot import"
    main = sys.modules.get("__main__")
    file = getattr(main, "__file__", None)
    if file is None:
        return "defined in a notebook or a shell, which a process cannot import" if b"__main__" in sent else ""
    if getattr(main, "__spec__", None) is None and not _has_main_guard(Path(file)):
        return f"{Path(file).name} has no 'if __name__ == \"__main__\":', so a process would run it again"
    return ""


def _has_main_guard(path: Path) -> bool:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, UnicodeDecodeError):
        return True  # a compiled entry point, no script
    return any(isinstance(node, ast.If) and "__name__" in ast.unparse(node.test) for node in tree.body)


def _check(name: str, got: object, holds: bool, expected: str) -> None:
    if not holds:
        raise SettingsError("a loader's setting cannot be used", where=f"Loader({name}=…)", got=got, expected=expected)
