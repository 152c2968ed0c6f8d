"""Who reads the batches: threads of this process, other processes, or threads of one other process.

Each takes tasks in order and gives what was read in the order in which it is asked for. Which of them works, and how
many, changes no bit of any batch: what a batch holds follows from its task alone.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import recv_handle, send_handle
from queue import SimpleQueue
from typing import Any, Protocol, cast

import torch

from ..errors import DataError, TorchkeepError
from .dataset import whole
from .reading import Read, Reading, Source, Task
from .travel import as_arrays, as_batch, packed, receive, send, unpacked

_ROWS_SHARE = 4  # a batch is parted into so many times the threads: the last to finish waits for little
_MOST_DEATHS = 3
_TASKS_AHEAD = 2  # of one worker: it begins the next while its last is fetched
_PATIENCE_S = 2.0
_CANNOT_BEGIN, _READS_NOW = -1, -2  # in place of a ticket
_PRELOADED = ["__main__", "torchkeep.data.workers"]  # a process is then a copy of one that has imported torch


class Feed(Protocol):
    """Tasks in, batches out."""

    source: Source

    @property
    def pids(self) -> list[int]:
        """The processes that read."""

    def ask(self, task: Task) -> Any:
        """Have a batch read; the ticket is for ``take`` or ``forget``."""

    def take(self, ticket: Any) -> Read:
        """What was read, once it is there.

        Raises:  what reading it raised
        """

    def num_ready(self, tickets: Sequence[Any]) -> int: ...

    def forget(self, ticket: Any) -> None: ...

    def close(self) -> None: ...


class _Job:
    """A batch that threads are filling."""

    def __init__(self, source: Source, task: Task, num_threads: int):
        self.reading = Reading(source, task)
        size = self.reading.num_rows
        self.rows_at_once = size if self.reading.is_gathered else max(1, size // (_ROWS_SHARE * num_threads))
        self.claimed, self.left = 0, size
        self.errors: dict[int, BaseException] = {}
        self.read: Read | None = None
        self.done = threading.Event()


class Threads:
    """Threads that fill one batch together, so that the first comes early, and go on with the next while one is slow.

    They are daemons, and are ended when the loader is: code that reads must not keep a program from ending.
    """

    pids: list[int] = []  # noqa: RUF012 - it is never changed

    def __init__(self, source: Source, number: int):
        self.source = source
        self._jobs: deque[_Job] = deque()
        self._change = threading.Condition()
        self._is_closed = False
        self._threads = [threading.Thread(target=self._work, name="torchkeep-loader", daemon=True)
                         for _ in range(number)]  # fmt: skip
        for thread in self._threads:
            thread.start()

    def ask(self, task: Task) -> _Job:
        job = _Job(self.source, task, len(self._threads))
        with self._change:
            self._jobs.append(job)
            self._change.notify_all()
        return job

    def take(self, ticket: _Job) -> Read:
        ticket.done.wait()
        if ticket.errors:
            raise ticket.errors[min(ticket.errors)]  # the first row's, whichever came first
        assert ticket.read is not None
        return ticket.read

    def num_ready(self, tickets: Sequence[_Job]) -> int:
        return sum(ticket.done.is_set() for ticket in tickets)

    def forget(self, ticket: _Job) -> None:
        with self._change, contextlib.suppress(ValueError):
            self._jobs.remove(ticket)

    def close(self) -> None:
        with self._change:
            self._is_closed = True
            self._jobs.clear()
            self._change.notify_all()
        for thread in self._threads:
            thread.join(_PATIENCE_S)

    def _work(self) -> None:
        while True:
            with self._change:
                while not self._jobs and not self._is_closed:
                    self._change.wait()
                if self._is_closed:
                    return
                job = self._jobs[0]
                start = job.claimed
                job.claimed = stop = min(start + job.rows_at_once, job.reading.num_rows)
                if stop == job.reading.num_rows:
                    self._jobs.popleft()
            self._fill(job, start, stop)

    def _fill(self, job: _Job, start: int, stop: int) -> None:
        try:
            if not job.errors:
                job.reading.fill(start, stop)
        except BaseException as error:  # a thread has nobody else to tell
            job.errors[start] = error
        with self._change:
            job.left -= stop - start
            is_last = job.left == 0
        if is_last:
            try:
                job.read = job.reading.finish() if not job.errors else None
            except BaseException as error:
                job.errors[job.reading.num_rows] = error
            job.done.set()


@dataclass
class _Order:
    """A task on its way to a process, and how often one died of it."""

    ticket: int
    task: Task
    deaths: int = 0

    @property
    def is_alone(self) -> bool:
        """Whether it is read sample by sample with nothing beside it, for the next death to have one cause."""
        return self.deaths > 0


@dataclass
class _Worker:
    process: Any
    channel: Connection[Any, Any]
    current: int = -1  # the number of the sample that it reads alone
    orders: deque[_Order] = field(default_factory=deque)


class Processes:
    """Processes that read, each with ``threads`` threads. One that dies is replaced, and its batches come again.

    Raises:  DataError naming the sample after three deaths over one batch, or where a process cannot begin
    """

    def __init__(self, source: Source, number: int, threads: int = 1, share: Callable[[], int | None] = lambda: None):
        # forkserver: a fork of a process with threads may hang; spawn is what Windows has
        self._context: Any = multiprocessing.get_context("spawn" if sys.platform == "win32" else "forkserver")
        if sys.platform != "win32":
            self._context.set_forkserver_preload([*_PRELOADED, type(whole(source.dataset)).__module__])
        self.source = source
        self._packed, self._threads, self._share = packed(source), threads, share
        self._ahead = _TASKS_AHEAD * threads
        self._tickets = itertools.count()
        self._waiting: deque[_Order] = deque()
        self._arrived: dict[int, Read | BaseException] = {}
        self._forgotten: set[int] = set()
        self._workers = [self._begin() for _ in range(number)]

    def _begin(self) -> _Worker:
        ours, theirs = self._context.Pipe()
        shared = self._share()
        arguments = (theirs, self._packed, self._threads, shared is not None)
        process = self._context.Process(target=_serve, args=arguments, daemon=True, name="torchkeep-loader")
        process.start()
        theirs.close()
        if shared is not None:
            send_handle(ours, shared, process.pid)
        return _Worker(process, ours)

    @property
    def pids(self) -> list[int]:
        return [worker.process.pid for worker in self._workers]

    def ask(self, task: Task) -> int:
        order = _Order(next(self._tickets), task)
        self._waiting.append(order)
        self._hand_out()
        return order.ticket

    def take(self, ticket: int) -> Read:
        while ticket not in self._arrived:
            self._receive(None)
        result = self._arrived.pop(ticket)
        if isinstance(result, BaseException):
            raise result
        return result

    def num_ready(self, tickets: Sequence[int]) -> int:
        self._receive(0)
        return sum(ticket in self._arrived for ticket in tickets)

    def forget(self, ticket: int) -> None:
        if self._arrived.pop(ticket, None) is None:
            self._forgotten.add(ticket)
        self._waiting = deque(order for order in self._waiting if order.ticket not in self._forgotten)

    def close(self) -> None:
        for worker in self._workers:
            worker.channel.close()  # which ends a worker that waits for work
        for worker in self._workers:
            worker.process.join(_PATIENCE_S)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
        self._workers = []

    def _hand_out(self) -> None:
        while self._waiting:
            order = self._waiting[0]
            free = [worker for worker in self._workers if self._can_take(worker, order)]
            if not free:
                return
            worker = min(free, key=lambda worker: len(worker.orders))
            worker.orders.append(self._waiting.popleft())
            with contextlib.suppress(OSError):  # it died: that is seen where results are fetched
                worker.channel.send((order.ticket, order.task, order.is_alone))

    def _can_take(self, worker: _Worker, order: _Order) -> bool:
        if order.is_alone:
            return not worker.orders
        return len(worker.orders) < self._ahead and not any(held.is_alone for held in worker.orders)

    def _receive(self, timeout_s: float | None) -> None:
        """Take in what has come, and replace who has died."""
        by_place = {place: w for w in self._workers for place in (w.channel, w.process.sentinel)}
        ready = wait(list(by_place), timeout_s)
        for worker in {id(by_place[place]): by_place[place] for place in ready}.values():
            try:
                if worker.channel.poll():
                    self._take_in(worker, *receive(worker.channel))
                elif not worker.process.is_alive():
                    self._replace(worker)
            except (EOFError, OSError):
                self._replace(worker)
        self._hand_out()

    def _take_in(self, worker: _Worker, ticket: int, result: Any) -> None:
        if ticket == _READS_NOW:
            worker.current = result
            return
        if ticket == _CANNOT_BEGIN:
            raise _restored(result)
        worker.orders = deque(order for order in worker.orders if order.ticket != ticket)
        if ticket in self._forgotten:
            self._forgotten.discard(ticket)
            return
        if isinstance(result, _Failure):
            self._arrived[ticket] = _restored(result)
        else:
            self._arrived[ticket] = result._replace(batch=as_batch(result.batch))

    def _replace(self, worker: _Worker) -> None:
        worker.process.join()
        worker.channel.close()
        orders = [order for order in worker.orders if order.ticket not in self._forgotten]
        if orders:
            orders[0].deaths += 1
            if orders[0].deaths >= _MOST_DEATHS:
                self._arrived[orders[0].ticket] = _died_of(worker, orders[0])
                orders = orders[1:]
        self._waiting.extendleft(reversed(orders))
        self._workers[self._workers.index(worker)] = self._begin()


def _died_of(worker: _Worker, order: _Order) -> DataError:
    index, code = worker.current, worker.process.exitcode
    cause = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
    of = f"while sample {index} was read" if index >= 0 else "before it read a sample"
    return DataError(
        f"a loader process died {_MOST_DEATHS} times, each time {of}", where=f"sample {index}" if index >= 0 else "",
        got=cause, expected="a sample that can be read" if index >= 0 else "a process that can begin",
        fix="workers = 0 shows what the sample's own code says; SIGKILL often means that memory ran out",
    )  # fmt: skip


@dataclass(frozen=True)
class _Failure:
    """An error, and what its traceback said where it arose."""

    packed: bytes
    text: str


class _Remote(Exception):  # noqa: N818
    """The traceback in the process that read, shown as the cause of the error here."""

    def __str__(self) -> str:
        return f'\n"""\n{self.args[0]}"""'


def _failure(error: BaseException) -> _Failure:
    text = "".join(traceback.format_exception(error))
    try:
        data = packed(error)
        unpacked(data)
    except Exception:  # an error whose class cannot travel, or not be made again from its arguments
        last = traceback.format_exception_only(error)[-1].strip()
        data = packed(DataError("reading a batch failed in a loader process", got=last))
    return _Failure(data, text)


def _restored(failure: _Failure) -> BaseException:
    error = cast(BaseException, unpacked(failure.packed))
    if not isinstance(error, TorchkeepError) or error.__cause__ is None:
        error.__cause__ = _Remote(failure.text)
    return error


def _serve(channel: Connection[Any, Any], data: bytes, num_threads: int, has_shared: bool) -> None:
    """The life of a loader process."""
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGTERM):  # both are the trainer's to answer, which ends its workers
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_trainer, daemon=True).start()
    try:
        source: Source = unpacked(data)
        if has_shared:
            whole(source.dataset).cache.attach(recv_handle(channel))
    except BaseException as error:
        send(channel, _CANNOT_BEGIN, _failure(error))
        return
    with contextlib.suppress(EOFError, OSError):  # the trainer has closed its end
        if num_threads == 1:
            _serve_alone(channel, source)
        else:
            _serve_threads(channel, source, num_threads)


def _serve_alone(channel: Connection[Any, Any], source: Source) -> None:
    while True:
        ticket, task, is_alone = channel.recv()
        read = partial(_read_alone, source, task, channel) if is_alone else partial(source.read, task)
        send(channel, ticket, _result(read))


def _serve_threads(channel: Connection[Any, Any], source: Source, number: int) -> None:
    """One thread takes the tasks, one gives the results in their order, the others read."""
    raw = replace(source, is_raw=source.collate is not None)
    crew, results = Threads(raw, number), SimpleQueue[Any]()

    def give() -> None:
        while True:
            ticket, read = results.get()
            send(channel, ticket, _result(read))

    threading.Thread(target=give, daemon=True).start()
    while True:
        ticket, task, is_alone = channel.recv()
        if is_alone:
            results.put((ticket, partial(_read_alone, source, task, channel)))
        else:
            results.put((ticket, partial(_taken, raw, crew, crew.ask(task), task)))


def _taken(source: Source, crew: Threads, job: _Job, task: Task) -> Read:
    read = crew.take(job)
    return read._replace(batch=source.complete(read, task.key)) if source.is_raw else read


def _read_alone(source: Source, task: Task, channel: Connection[Any, Any]) -> Read:
    """Sample by sample, each named before it is read: the next death shall have a name."""
    reading = Reading(source, task)
    if reading.is_gathered:
        reading.fill(0, reading.num_rows)
        return reading.finish()
    for row, index in enumerate(task.indices.tolist()):
        send(channel, _READS_NOW, index)
        reading.fill(row, row + 1)
    return reading.finish()


def _result(read: Callable[[], Read]) -> Any:
    try:
        made = read()
        return made._replace(batch=as_arrays(made.batch))
    except BaseException as error:
        return _failure(error)


def _end_with_trainer() -> None:
    # a trainer that is killed can end nobody: its workers would hold the data and its terminal for ever
    trainer = multiprocessing.parent_process()
    if trainer is not None:
        trainer.join()
        os._exit(1)
