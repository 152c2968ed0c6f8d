"""Samples in batches: the order, the draws and the place to go on from are functions of (seed, epoch, position).

So the number and the kind of workers, prefetching, a restart or another number of ranks change nothing (law 1), and
going on at batch 100,000 costs what beginning costs.
"""

from __future__ import annotations

import ast
import multiprocessing
import os
import random
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..chance import ChanceKey, epoch_order, keyed_seed, weighted_positions
from ..contracts import INDEX, VALID, Batch, KeyedDataset
from ..errors import CheckpointError, DataError, SettingsError
from .foreign import Foreign, as_dataset, kept_generators, stack

Backend = Literal["auto", "inline", "threads", "processes"]
Last = Literal["keep", "drop", "pad"]
Collate = Callable[[list[Any]], Any]
Indices = np.ndarray[Any, np.dtype[np.int64]]

_ORDER_CHUNK = 1 << 16  # positions permuted at once: 5 ms a chunk, and one chunk serves a whole small epoch
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
    filled it. ``state_dict()`` counts delivered batches only. ``collate`` gets the list of samples as the dataset
    gives them.

    Raises:  SettingsError for a value that cannot be, DataError for a dataset that is none
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        *,
        shuffle: bool = False,
        sampler: Any = None,
        weights: Sequence[float] | Tensor | None = None,
        collate: Collate | None = None,
        seed: int = 0,
        workers: int | Literal["auto"] = "auto",
        backend: Backend = "auto",
        cache: Literal["off"] = "off",
        last: Last = "keep",
        on_bad: Literal["raise"] = "raise",
        rank: int = 0,
        world_size: int = 1,
    ):
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
        self._cumulative = _running_sum(weights, len(self.dataset))
        self.plan = plan_feed(self.dataset, workers, backend, collate)
        self._executor: Executor | None = None
        self._epoch = 0
        self._delivered = 0
        self._resumes = False
        self._active = 0

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

    def state_dict(self) -> dict[str, int]:
        return {
            "epoch": self._epoch,
            "delivered": self._delivered,
            "global_batch": self.batch_size * self.world_size,
            "num_samples": self.num_samples,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after the last delivered batch.

        Raises:  CheckpointError while an epoch is under way, or where the batches were of another size
        """
        if self._active:
            raise CheckpointError(
                "a loader's state is loaded before its iteration begins",
                where="Loader.load_state_dict",
                got="an epoch under way",
                fix="load the state first, then write: for batch in loader",
            )
        for name, now in [("global_batch", self.batch_size * self.world_size), ("num_samples", self.num_samples)]:
            if state[name] != now:
                raise CheckpointError(
                    "this loader's batches are not those of the saved state",
                    where=f"Loader, {name}",
                    got=now,
                    expected=state[name],
                    fix="resume with the same data and batch_size times number of ranks",
                )
        self._epoch, self._delivered, self._resumes = state["epoch"], state["delivered"], True

    def __iter__(self) -> Iterator[Batch]:
        if self._resumes:
            self._resumes = False
        elif self._delivered:  # the epoch before was left early
            self._epoch += 1
            self._delivered = 0
        return self._run(self._epoch, self._delivered)

    def _run(self, epoch: int, start: int) -> Iterator[Batch]:
        self._active += 1
        try:
            for delivered, batch in enumerate(self._read_ahead(epoch, start), start + 1):
                self._delivered = delivered
                yield batch
            self._epoch, self._delivered = epoch + 1, 0
        finally:
            self._active -= 1

    def _read_ahead(self, epoch: int, start: int) -> Iterator[Batch]:
        key = ChanceKey(self.seed, epoch)
        parts = self._parts(key, start)
        if self.plan.backend == "inline":
            dataset, collate = self.dataset, self.collate
            for indices, valid in parts:
                yield _with_valid(read(dataset, indices, key, collate), valid)
            return
        executor = self._start()
        waiting: deque[tuple[Future[Batch], Tensor | None]] = deque()
        try:
            for indices, valid in parts:
                waiting.append((self._submit(executor, indices, key), valid))
                if len(waiting) > 2 * self.plan.workers:
                    yield _finished(*waiting.popleft())
            while waiting:
                yield _finished(*waiting.popleft())
        finally:
            for future, _ in waiting:
                future.cancel()

    def _submit(self, executor: Executor, indices: Indices, key: ChanceKey) -> Future[Batch]:
        if self.plan.backend == "processes":
            return executor.submit(_read_in_worker, indices, key)
        return executor.submit(read, self.dataset, indices, key, self.collate)

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
                initargs=(self.dataset, self.collate),
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

    def _order(self, key: ChanceKey) -> Callable[[int, int], Indices]:
        if self.sampler is not None:
            listed = self._sampled(key)
            return lambda start, stop: listed[start:stop]
        size, cumulative = len(self.dataset), self._cumulative
        if cumulative is not None:
            return _by_chunk(lambda start, stop: weighted_positions(key, cumulative, start, stop), size)
        if self.shuffle:
            return _by_chunk(lambda start, stop: epoch_order(key, size, start, stop), size)
        return _by_chunk(lambda start, stop: np.arange(start, stop, dtype=np.int64), size)

    def _sampled(self, key: ChanceKey) -> Indices:
        # a user's sampler draws from global generators: keyed by the epoch, so that a resume sees the same list
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(key.epoch)
        with kept_generators():
            seed = keyed_seed(key, "sampler")
            random.seed(seed)
            np.random.seed(seed & 0xFFFFFFFF)
            torch.default_generator.manual_seed(seed)
            return np.fromiter(iter(self.sampler), dtype=np.int64)


def _by_chunk(find: Callable[[int, int], Indices], total: int) -> Callable[[int, int], Indices]:
    """Look positions up a chunk at a time; a stretch over a chunk's end is looked up by itself."""
    begin, held = 0, find(0, 0)

    def look_up(start: int, stop: int) -> Indices:
        nonlocal begin, held
        if start < begin or stop > begin + len(held):
            begin, held = start, find(start, min(total, max(stop, start + _ORDER_CHUNK)))
        return held[start - begin : stop - begin]

    return look_up


def read(dataset: KeyedDataset, indices: Indices, key: ChanceKey, collate: Collate | None) -> Batch:
    """One batch, read here and now: the same work whoever does it."""
    batch = dataset.read_batch(indices, key) if collate is None else None
    if batch is None:
        batch = _assemble(dataset, _samples(dataset, indices, key), collate)
    batch[INDEX] = torch.from_numpy(indices)
    return batch


def _samples(dataset: KeyedDataset, indices: Indices, key: ChanceKey) -> list[Any]:
    if isinstance(dataset, Foreign):
        return dataset.read_samples(indices, key)
    return [dataset.read(int(i), key) for i in indices]


def _assemble(dataset: KeyedDataset, samples: list[Any], collate: Collate | None) -> Batch:
    if collate is None:
        return stack([dataset.named(sample) for sample in samples] if isinstance(dataset, Foreign) else samples)
    made = collate(samples)
    if isinstance(made, Mapping):
        return dict(made)
    if isinstance(made, tuple | list) and isinstance(dataset, Foreign):
        return dataset.named(tuple(made))
    if isinstance(made, Tensor):
        return {"input": made}
    raise DataError(
        "collate gave something that is no batch",
        where=getattr(collate, "__qualname__", repr(collate)),
        got=type(made).__name__,
        expected="a dict of tensors, or a tuple with a name for each part",
    )


def _with_valid(batch: Batch, valid: Tensor | None) -> Batch:
    if valid is not None:
        batch[VALID] = valid
    return batch


def _finished(future: Future[Batch], valid: Tensor | None) -> Batch:
    try:
        batch = future.result()
    except BrokenProcessPool as error:
        raise DataError(
            "a loader process died",
            where="Loader(backend='processes')",
            got=error,
            fix="workers = 0 shows the sample's own error",
        ) from error
    return _with_valid({name: _as_tensor(value) for name, value in batch.items()}, valid)


def _as_tensor(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    return {name: _as_tensor(inner) for name, inner in value.items()} if isinstance(value, dict) else value


_worker: tuple[KeyedDataset, Collate | None]


def _begin_worker(dataset: KeyedDataset, collate: Collate | None) -> None:
    import signal

    global _worker
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's to answer
    _worker = dataset, collate


def _read_in_worker(indices: Indices, key: ChanceKey) -> Batch:
    # arrays travel through the pipe: torch's own way names shared memory, which a kill leaves behind
    dataset, collate = _worker
    return {name: _as_array(value) for name, value in read(dataset, indices, key, collate).items()}


def _as_array(value: Any) -> Any:
    if isinstance(value, Tensor) and value.dtype != torch.bfloat16:
        return value.numpy()
    return {name: _as_array(inner) for name, inner in value.items()} if isinstance(value, dict) else value


def plan_feed(dataset: KeyedDataset, workers: int | str, backend: str, collate: Collate | None) -> FeedPlan:
    """Choose who reads the samples. The choice changes no bit of any batch."""
    if workers == 0 or backend == "inline":
        return FeedPlan("inline", 0, "as set")
    number = min(_MAX_WORKERS, os.cpu_count() or 1) if workers == "auto" else int(workers)
    if isinstance(dataset, Foreign):
        return _plan_foreign(dataset, number, backend, workers == "auto" and backend == "auto", collate)
    if backend == "processes":
        why_not = cannot_travel(dataset, collate)
        return FeedPlan("inline", 0, why_not) if why_not else FeedPlan("processes", number, "as set")
    if getattr(dataset, "threads", False) or backend == "threads" or workers != "auto":
        return FeedPlan("threads", number, "reading releases the GIL" if workers == "auto" else "as set")
    return FeedPlan("inline", 0, "the data lie in memory and are gathered by batch")


def _plan_foreign(dataset: Foreign, number: int, backend: str, is_auto: bool, collate: Collate | None) -> FeedPlan:
    probe = dataset.probe
    drawn = "; it draws from global generators, seeded per sample" if probe.draws else ""
    if is_auto and probe.sample_s < _SLOW_SAMPLE_S:
        return FeedPlan("inline", 0, f"a sample takes {probe.sample_s * 1e6:.0f} µs{drawn}")
    if backend == "threads" and not probe.draws:
        return FeedPlan("threads", number, "as set")
    why_not = cannot_travel(dataset, collate)
    if why_not:
        return FeedPlan("inline", 0, why_not + drawn)
    return FeedPlan("processes", number, f"a sample takes {probe.sample_s * 1e3:.1f} ms{drawn}")


def cannot_travel(dataset: Any, collate: Any) -> str:
    """Why these cannot be sent to another process; empty where they can."""
    try:
        sent = bytes(ForkingPickler.dumps((dataset, collate)))
    except Exception as error:
        return f"cannot travel to a process: {type(error).__name__}: {error}"
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


def _running_sum(weights: Sequence[float] | Tensor | None, size: int) -> np.ndarray[Any, Any] | None:
    if weights is None:
        return None
    array = np.asarray(weights, dtype=np.float64)
    fits = array.shape == (size,) and bool(np.isfinite(array).all()) and bool((array >= 0).all()) and array.sum() > 0
    _check("weights", f"{array.shape}", fits, f"{size} finite numbers from 0, not all 0")
    return np.cumsum(array)


def _check(name: str, got: object, holds: bool, expected: str) -> None:
    if not holds:
        raise SettingsError("a loader's setting cannot be used", where=f"Loader({name}=…)", got=got, expected=expected)
