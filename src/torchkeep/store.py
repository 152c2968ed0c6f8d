"""Arrays by number in one sparse file: what costs time to make again, such as decoded pictures and features.

It is a cache: nothing is synced, and each array is checked against its checksum before a process first hands it out.
Data are written before their record, so that whoever is killed leaves at most unused space. All numbers are
little-endian:

    0      header: magic, version u32, 4 bytes to be locked, number of records u64, start of the data u64, xxh3_64 of
           these 32 bytes
    48     end of the space given out u64, xxh3_64 of these 8 bytes
    64     records of 64 bytes: offset, size, identity, xxh3_64 of the data u64; shape 4 × u32; dtype, axes u8; 10 zero
           bytes; xxh32 of these 60 bytes. A record of zeros is no array.
    start  the data, each array at a multiple of 64

Space is given out by leases under a lock; within a lease nobody waits. Reading from a mapping means that a disk which
fails to read, or a file that others cut, ends the process: a cache belongs on a disk of one's own.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
import sys
import tempfile
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from .files import lock_byte, opened_anew, write_at

Array = np.ndarray[Any, Any]

SUFFIX = ".store"
VERSION = 1

_MAGIC = b"TKSTORE\0"
_HEADER = struct.Struct("<8sIIQQ")
_NUMBER = struct.Struct("<Q")
_END = struct.Struct("<QQ")
_END_AT = 48
_RECORD = struct.Struct("<4Q4I2B10xI")
_ROW = np.dtype({"names": ["offset", "size"], "formats": ["<u8", "<u8"], "itemsize": 64})
_ALIGN = 64
_PAGE = 4096
_AXES = 4
_DTYPES = tuple(map(np.dtype, ("?", "u1", "i1", "<u2", "<i2", "<f2", "<u4", "<i4", "<f4", "<u8", "<i8", "<f8",
                               "<c8", "<c16")))  # fmt: skip
_CODES = {dtype: code for code, dtype in enumerate(_DTYPES)}
_LEASE_BYTES = 1 << 24
_TRIES = 8
_LEASE_LOCK, _HOLD_LOCK = 12, 13  # bytes that are locked: Windows lets nobody else write there

_opened: weakref.WeakSet[Store] = weakref.WeakSet()


class Store:
    """Arrays of up to four axes by their number, 0 to ``num`` - 1. What it lacks or refuses costs time, never a run.

    Without ``on_disk``, ``in_memory`` or ``attach`` there is no file: nothing is found, nothing is kept. ``refused``
    says why nothing more is kept; ``damaged`` counts what did not fit its checksum.
    """

    def __init__(self, num: int, budget_bytes: int = 0, path: Path | None = None, most_bytes: int | None = None):
        self.num, self.budget_bytes = num, budget_bytes
        self.most_bytes = budget_bytes if most_bytes is None else min(most_bytes, budget_bytes)
        self.path = path.absolute() if path else None
        self.refused = ""
        self.damaged = 0
        self._start = -(-(_ALIGN + num * _RECORD.size) // _PAGE) * _PAGE
        self._map: mmap.mmap | None = None
        self._handle = -1
        self._release: Any = None
        self._verified = bytearray(num)  # of each array that was verified here 1 to 255, by its checksum
        self._after_fork()
        _opened.add(self)

    @classmethod
    def on_disk(cls, path: Path, num: int, budget_bytes: int, most_bytes: int | None = None) -> Store:
        """The store in a file, shared by all who open it; a damaged file, or one of another form, is replaced.

        Units:   ``budget_bytes``, what all store files of the folder may take; the least recently used make room.
                 ``most_bytes``, what the data of this one may take, and its apparent size; the budget where it is None
        """
        store = cls(num, budget_bytes, path, most_bytes)
        with store._noting():
            path.parent.mkdir(parents=True, exist_ok=True)
            store._open(path)
            with contextlib.suppress(OSError):  # a file of another user's
                os.utime(path)  # used now
            evict(path.parent, budget_bytes)
        return store

    @classmethod
    def in_memory(cls, num: int, budget_bytes: int) -> Store:
        """A store without a name, gone with the last process that has it; ``fileno`` hands it to another."""
        store = cls(num, budget_bytes)
        with store._noting():
            if hasattr(os, "memfd_create"):
                store._handle = os.memfd_create("torchkeep-store", os.MFD_CLOEXEC)
            else:
                with tempfile.TemporaryFile() as file:
                    store._handle = os.dup(file.fileno())
            store._make()
            store._hold()
        return store

    @classmethod
    def adopt(cls, handle: int) -> Store:
        """The store behind another process's ``fileno``; the handle is the store's from here on."""
        with mmap.mmap(handle, _ALIGN, access=mmap.ACCESS_READ) as found:
            store = cls(_HEADER.unpack_from(found)[3] if found[: len(_MAGIC)] == _MAGIC else 0)
        store.attach(handle)
        return store

    def attach(self, handle: int) -> None:
        """Give a store without a file, such as one in memory that was pickled, that of another process."""
        with self._noting():
            self._handle = opened_anew(handle)
            os.close(handle)
            self.budget_bytes = self.most_bytes = os.fstat(self._handle).st_size - self._start
            if not self._hold():
                os.close(self._handle)
                self.refused = "this is a store of another form"

    def fileno(self) -> int:
        return self._handle

    def __reduce__(self) -> Any:
        if self.path is not None:
            return Store.on_disk, (self.path, self.num, self.budget_bytes, self.most_bytes)
        return Store, (self.num,)

    def get(self, index: int, identity: int = 0) -> Array | None:
        """The array, read-only and not copied; None where there is none, it is of another identity, or damaged."""
        held = self._map
        if held is None:
            return None
        place = _ALIGN + 64 * index
        row = held[place : place + 64]
        offset, size, known, checksum, a, b, c, d, code, axes, check = _RECORD.unpack(row)
        if not offset or known != identity:
            return None
        is_whole = xxhash.xxh32_intdigest(row[:60]) == check and offset + size <= len(held)
        if is_whole and self._verified[index] != checksum % 255 + 1:
            is_whole = xxhash.xxh3_64_intdigest(memoryview(held)[offset : offset + size]) == checksum
            self._verified[index] = checksum % 255 + 1 if is_whole else 0
        if not is_whole:
            self.damaged += 1
            return None
        return np.ndarray((a, b, c, d)[:axes], _DTYPES[code], held, offset)

    def put(self, index: int, array: Array, identity: int = 0) -> bool:
        """Keep an array, in place of the one before; False where the budget is used up or the disk refuses."""
        assert 0 <= index < self.num, f"array {index} of {self.num}"
        assert array.ndim <= _AXES, f"{array.ndim} axes, where a record has {_AXES}"
        if self._map is None or self.refused:
            return False
        array = np.asarray(array, array.dtype.newbyteorder("<"), order="C")
        code = _CODES[array.dtype]
        data = array.reshape(-1).view(np.uint8).data
        with self._noting():
            offset = self._place(len(data))
            if offset:
                write_at(self._handle, data, offset)
                checksum = xxhash.xxh3_64_intdigest(data)
                shape = (*array.shape, 0, 0, 0, 0)[:_AXES]
                row = _RECORD.pack(offset, len(data), identity, checksum, *shape, code, array.ndim, 0)
                row = row[:60] + xxhash.xxh32_digest(row[:60])[::-1]
                write_at(self._handle, memoryview(row), _ALIGN + 64 * index)
                self._verified[index] = checksum % 255 + 1
                return True
        return False

    @property
    def used_bytes(self) -> int:
        """Space that was given out for data."""
        return max(0, self._end() - self._start) if self._map is not None else 0

    @property
    def count(self) -> int:
        """How many arrays there are, of any identity."""
        return int((self._rows()["offset"] > 0).sum()) if self._map is not None else 0

    def close(self) -> None:
        """Let go of the file; arrays that were handed out stay valid."""
        self._map = None
        if self._release is not None:
            self._release()
            self._release, self._handle = None, -1

    @contextlib.contextmanager
    def _noting(self) -> Iterator[None]:
        """What the system refuses ends the keeping, and nothing else."""
        try:
            yield
        except (OSError, OverflowError) as error:
            self.refused = self.refused or f"{getattr(error, 'strerror', None) or error}"

    def _open(self, path: Path) -> None:
        for _ in range(_TRIES):
            self._handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
            lock_byte(self._handle, _LEASE_LOCK, "exclusive")
            try:
                if not _is_at(path, self._handle):  # removed or replaced since it was opened
                    continue
                if not os.fstat(self._handle).st_size:
                    self._make()
                if self._hold():
                    return
                path.unlink()
            finally:
                lock_byte(self._handle, _LEASE_LOCK, "none")
                if self._map is None:
                    os.close(self._handle)
        raise OSError(f"{path.name} is removed again and again")

    def _make(self) -> None:
        """An empty store; its header is written last."""
        os.ftruncate(self._handle, self._start)
        # zeros, not a hole: reading a hole of a full tmpfs ends the process
        for place in range(0, self._start, 1 << 20):
            write_at(self._handle, memoryview(bytes(min(1 << 20, self._start - place))), place)
        self._set_end(self._start)
        write_at(self._handle, memoryview(self._header()), 0)

    def _header(self) -> bytes:
        fixed = _HEADER.pack(_MAGIC, VERSION, 0, self.num, self._start)
        return fixed + _NUMBER.pack(xxhash.xxh3_64_intdigest(fixed))

    def _hold(self) -> bool:
        """Map the file, and keep it from being evicted; False where it is of another form."""
        lock_byte(self._handle, _HOLD_LOCK, "shared")
        size = os.fstat(self._handle).st_size
        if size < self._start:
            return False
        if size < self._start + self.most_bytes:
            os.ftruncate(self._handle, self._start + self.most_bytes)
        held = mmap.mmap(self._handle, 0, access=mmap.ACCESS_READ)
        if held[: _HEADER.size + 8] != self._header():
            return False
        self._map = held
        if self._end() < self._start:
            self._map = None
            return False
        self._release = weakref.finalize(self, _let_go, self._handle)
        if self.path is not None:
            # after a power cut the end may be older than the records: nothing that they name is given out again
            rows = self._rows()
            reach = rows["offset"] + rows["size"]
            reach = int(reach[reach <= len(held)].max(initial=0))
            if reach > self._end():
                self._set_end(reach)
        return True

    def _rows(self) -> Any:
        assert self._map is not None
        return np.frombuffer(self._map, _ROW, self.num, _ALIGN)

    def _end(self) -> int:
        """Where the space given out ends; 0 where that is damaged."""
        assert self._map is not None
        number, check = _END.unpack_from(self._map, _END_AT)
        return int(number) if xxhash.xxh3_64_intdigest(_NUMBER.pack(number)) == check else 0

    def _set_end(self, end: int) -> None:
        number = _NUMBER.pack(end)
        write_at(self._handle, memoryview(number + _NUMBER.pack(xxhash.xxh3_64_intdigest(number))), _END_AT)

    def _place(self, size: int) -> int:
        """Space for an array; 0 where there is none."""
        size = -(-max(size, 1) // _ALIGN) * _ALIGN
        with self._lock:
            if self._free + size > self._free_end and not self._lease(size):
                return 0
            self._free += size
            return self._free - size

    def _lease(self, size: int) -> bool:
        assert self._map is not None
        wanted = max(size, min(_LEASE_BYTES, self.most_bytes // 64) // _ALIGN * _ALIGN)
        lock_byte(self._handle, _LEASE_LOCK, "exclusive")
        try:
            end = self._end()
            room = min(self._start + self.most_bytes, len(self._map)) - end if end else 0
            if self.path is not None:
                room = min(room, self.budget_bytes - evict(self.path.parent, self.budget_bytes - wanted))
            wanted = min(wanted, room)
            if wanted < size:
                self.refused = (
                    f"the budget of {self.most_bytes:,} bytes, or of {self.budget_bytes:,} for all, is used up"
                )
                return False
            self._set_end(end + wanted)
        finally:
            lock_byte(self._handle, _LEASE_LOCK, "none")
        self._free, self._free_end = end, end + wanted
        return True

    def _after_fork(self) -> None:
        """A lease and locks of this process's own."""
        self._lock = threading.Lock()
        self._free = self._free_end = 0
        if self._release is not None:
            self._release.detach()
            with self._noting():
                inherited, self._handle = self._handle, opened_anew(self._handle)
                os.close(inherited)
                lock_byte(self._handle, _HOLD_LOCK, "shared")
                self._release = weakref.finalize(self, _let_go, self._handle)


def _let_go(handle: int) -> None:
    # a mapping that arrays still use keeps its own copy of the handle, and with it the lock
    with contextlib.suppress(OSError):  # Windows has not locked it
        lock_byte(handle, _HOLD_LOCK, "none")
    os.close(handle)


def _renew() -> None:
    for store in list(_opened):
        store._after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)


def evict(folder: Path, budget_bytes: int) -> int:
    """Remove the least recently used store files that no process holds, until all take ``budget_bytes`` at most.

    Units:   returns the bytes that are taken on the disk by those that are left
    """
    found = []
    for path in folder.glob("*" + SUFFIX):
        with contextlib.suppress(OSError):  # others remove files too
            known = path.stat()
            found.append((known.st_mtime_ns, 512 * getattr(known, "st_blocks", -(-known.st_size // 512)), path))
    taken = sum(size for _, size, _ in found)
    own = {store.path for store in _opened if store._map is not None}
    for _, size, path in sorted(found):
        if taken > budget_bytes and path.absolute() not in own and _is_removed(path):
            taken -= size
    return taken


def _is_at(path: Path, handle: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(handle), path.stat())
    return False


def _is_removed(path: Path) -> bool:
    with contextlib.suppress(OSError):
        if sys.platform == "win32":  # it refuses where a process, this one too, has the file open
            path.unlink()
            return True
        handle = os.open(path, os.O_RDWR)
        try:
            if lock_byte(handle, _HOLD_LOCK, "exclusive", waits=False):
                path.unlink()
                return True
        finally:
            os.close(handle)
    return False
