"""Durable files: the only place that syncs and renames.

What is acknowledged is durable (law 3): the bytes are written under a hidden name, synced, renamed, and the folder is
synced. A failed sync marks the page clean in the kernel, so it is never retried: the attempt is abandoned.
"""

from __future__ import annotations

import contextlib
import itertools
import mmap
import os
import shutil
import socket
import struct
import sys
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Literal

import orjson
import xxhash

from .errors import RunFolderError, StorageError

LOCK = ".lock"

if TYPE_CHECKING:
    import numpy as np

_READERS = 2
_READS_ANYWHERE = hasattr(os, "preadv")
_CHUNK_BYTES = 8 << 20  # hashed and written in turn: less is given back to other threads too often to be fast
_SMALL_BYTES = 1 << 16
_TELLS_OPENINGS_APART = sys.platform == "linux"
_seeking = threading.Lock()  # Windows writes and locks where a file's one position is


@dataclass(frozen=True)
class Receipt:
    """What a file must be when it is read again."""

    size_bytes: int
    checksum: str


def checksum(data: bytes | memoryview) -> str:
    """xxh3-128, against damage: it names no identity."""
    return xxhash.xxh3_128_hexdigest(data)


def receipt_of(path: Path) -> Receipt:
    """Size and checksum of a file as it lies on the disk."""
    digest, size = xxhash.xxh3_128(), 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(_CHUNK_BYTES):
            digest.update(block)
            size += len(block)
    return Receipt(size, digest.hexdigest())


def read_with_receipt(path: Path) -> tuple[np.ndarray[Any, Any], Receipt]:
    """A file's bytes in memory that can be written to, (N,) uint8, hashed while they are read.

    Raises:  OSError
    """
    import numpy as np

    digest, done = xxhash.xxh3_128(), 0
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        # no np.empty: the huge pages that it asks for are many times slower where a virtual machine has none ready
        data = np.frombuffer(mmap.mmap(-1, size) if size else b"", np.uint8)
        for count in _read_counts(file, data):
            digest.update(data[done : done + count].data)
            done += count
    return data[:done], Receipt(done, digest.hexdigest())


def _read_counts(file: FileIO, data: np.ndarray[Any, Any]) -> Iterator[int]:
    """Fill memory from a file; the bytes of each piece that has arrived, in order."""
    places = range(0, len(data), _CHUNK_BYTES)
    pieces = [data[place : place + _CHUNK_BYTES].data for place in places]
    if len(places) < _READERS or not _READS_ANYWHERE:
        yield from map(_read_at, itertools.repeat(file), pieces, places)
        return
    from concurrent.futures import ThreadPoolExecutor  # imports logging, which no verb needs to begin

    # new memory costs more than the copy into it: one reader and the hashing in turn leave a second core idle
    with ThreadPoolExecutor(_READERS) as pool:
        yield from pool.map(_read_at, itertools.repeat(file), pieces, places)


def _read_at(file: FileIO, memory: memoryview, place: int) -> int:
    done, count = 0, 1
    while done < len(memory) and count:
        rest = memory[done:]
        count = os.preadv(file.fileno(), [rest], place + done) if _READS_ANYWHERE else file.readinto(rest)
        done += count
    return done


@contextlib.contextmanager
def reported(path: Path) -> Iterator[None]:
    """Turn what the system says of a write into the one form of message."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            "the disk refused a write", where=path, got=f"{error.strerror or error} (errno {error.errno})",
            expected="a writable folder with free space",
            fix="free some space, or choose a folder that can be written; what was saved before is whole",
        ) from error  # fmt: skip


def sync_folder(folder: Path) -> None:
    """Make names within a folder durable. Windows has no such call: its rename is journalled."""
    if sys.platform == "win32":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_file(file: IO[Any]) -> None:
    """Hand a file's bytes to the disk and wait until it has them."""
    file.flush()
    if sys.platform == "darwin":
        import fcntl

        # there fsync leaves the bytes in the drive's own cache; some file systems have only that
        with contextlib.suppress(OSError):
            fcntl.fcntl(file.fileno(), fcntl.F_FULLFSYNC)
            return
    os.fsync(file.fileno())


def make_folder(folder: Path) -> None:
    """Make a folder, durably, where it is not there yet."""
    if not folder.is_dir():
        with reported(folder):
            folder.mkdir(parents=True, exist_ok=True)
            sync_folder(folder.parent)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A hidden file that takes the place of ``path`` once all is written and synced, or leaves it as it was."""
    hidden = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with reported(path):
        try:
            with hidden.open("wb") as file:
                yield file
                sync_file(file)
            os.replace(hidden, path)
            sync_folder(path.parent)
        except BaseException:
            with contextlib.suppress(OSError):
                hidden.unlink()
            raise


def write_durable(path: Path, *parts: bytes | memoryview) -> Receipt:
    """Replace ``path`` by the parts, one after the other, or leave it as it was.

    Raises:  StorageError where the disk refuses; the old content then stands
    """
    digest, size = xxhash.xxh3_128(), 0
    with replacing(path) as file:
        for block in _blocks(parts):
            digest.update(block)
            size += file.write(block)
    return Receipt(size, digest.hexdigest())


class DurableFolder:
    """A folder that becomes visible whole, by one rename, or not at all.

    >>> with DurableFolder(Path("step-00000010")) as folder:
    ...     folder.write("model.safetensors", data)
    The manifest, with each file's size and checksum, is written last; ``manifest`` is false where another file is it.
    With ``replace`` one that is there is hidden at the very end, and goes when the new one is durable: after a kill
    between the two renames ``sweep`` brings it back.
    """

    def __init__(self, path: Path, replace: bool = False, manifest: bool = True):
        self.path = path
        self.replace = replace
        self.manifest = manifest
        self.hidden = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self.receipts: dict[str, Receipt] = {}

    def __enter__(self) -> DurableFolder:
        with reported(self.path):
            shutil.rmtree(self.hidden, ignore_errors=True)
            self.hidden.mkdir(parents=True)
        return self

    def write(self, name: str, *parts: bytes | memoryview) -> None:
        """One file, hashed while it is written, synced before the call returns."""
        digest, size = xxhash.xxh3_128(), 0
        if "/" in name:
            with reported(self.path / name):
                (self.hidden / name).parent.mkdir(parents=True, exist_ok=True)
        with reported(self.path / name), (self.hidden / name).open("wb", buffering=0) as file:
            for block in _blocks(parts):
                digest.update(block)
                write_all(file, block)
                _write_out(file, size, len(block))
                size += len(block)
            sync_file(file)
        self.receipts[name] = Receipt(size, digest.hexdigest())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            shutil.rmtree(self.hidden, ignore_errors=True)
            return
        try:
            files = {name: {"size_bytes": r.size_bytes, "xxh3_128": r.checksum} for name, r in self.receipts.items()}
            if self.manifest:
                self.write("manifest.json", orjson.dumps({"format": 1, "files": files}, option=orjson.OPT_INDENT_2))
            with reported(self.path):
                for folder in self.hidden.glob("**/"):  # itself too
                    sync_folder(folder)
                self._appear()
        except BaseException:
            shutil.rmtree(self.hidden, ignore_errors=True)
            raise

    def _appear(self) -> None:
        old = self.path.with_name(f".{self.path.name}.{os.getpid()}.replaced")
        if self.replace and self.path.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.rename(self.path, old)
        try:
            os.rename(self.hidden, self.path)
        except OSError:
            with contextlib.suppress(OSError):
                os.rename(old, self.path)
            raise
        sync_folder(self.path.parent)
        shutil.rmtree(old, ignore_errors=True)


def _blocks(parts: Iterable[bytes | memoryview]) -> Iterator[memoryview]:
    """The same bytes in blocks: small parts joined, large ones cut."""
    small = bytearray()
    for part in parts:
        view = memoryview(part).cast("B")
        if len(view) < _SMALL_BYTES:
            small += view
        if small and (len(view) >= _SMALL_BYTES or len(small) >= _CHUNK_BYTES):
            yield memoryview(bytes(small))
            small.clear()
        if len(view) >= _SMALL_BYTES:
            yield from (view[start : start + _CHUNK_BYTES] for start in range(0, len(view), _CHUNK_BYTES))
    if small:
        yield memoryview(bytes(small))


def _write_out(file: IO[bytes], place: int, size: int) -> None:
    """Let the disk begin with what was just written, so that a sync finds little left: half the time for 1.2 GB."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # a hint: pages that are not on the disk yet stay in memory
            os.posix_fadvise(file.fileno(), place, size, os.POSIX_FADV_DONTNEED)


def write_all(file: IO[bytes], block: memoryview) -> None:
    """Write every byte of ``block`` to an unbuffered file."""
    # an unbuffered write may take less than it was given, on a disk that is nearly full for one
    while len(block):
        block = block[file.write(block) :]


def write_at(handle: int, data: memoryview, place: int) -> None:
    """Write every byte of ``data`` at a place of a file, whoever writes at others meanwhile."""
    while len(data):
        if sys.platform == "win32":
            with _seeking:
                os.lseek(handle, place, os.SEEK_SET)
                done = os.write(handle, data)
        else:
            done = os.pwrite(handle, data, place)
        data, place = data[done:], place + done


def copy_file(source: Path, target: Path) -> None:
    """Put a copy in a file's place, durably, or leave that as it was.

    Raises:  StorageError where the disk refuses
    """
    with replacing(target) as file, source.open("rb") as taken:
        shutil.copyfileobj(taken, file, _CHUNK_BYTES)


def copy_folder(source: Path, target: Path) -> None:
    """Copy a folder of files, which becomes visible by one rename; its manifest comes last, where renames are copies.

    Raises:  StorageError where the disk refuses
    """
    hidden = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    with reported(target):
        try:
            shutil.rmtree(hidden, ignore_errors=True)
            hidden.mkdir(parents=True)
            for file in sorted(source.iterdir(), key=lambda file: file.name == "manifest.json"):
                copy_file(file, hidden / file.name)
            if target.exists():
                remove_folder(target)
            os.rename(hidden, target)
            sync_folder(target.parent)
        except BaseException:
            shutil.rmtree(hidden, ignore_errors=True)
            raise


def remove_folder(path: Path) -> None:
    """Retire a folder: hidden first by a rename, so that a kill halfway leaves no half folder under its name."""
    hidden = path.with_name(f".{path.name}.{os.getpid()}.retired")
    with contextlib.suppress(OSError):
        os.rename(path, hidden)
        shutil.rmtree(hidden, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Remove what attempts that ended early have left hidden. Call with the folder's lock held.

    Raises:  StorageError where a folder that was about to be replaced cannot be given its name back
    """
    for left in folder.glob(".*.tmp"):
        shutil.rmtree(left, ignore_errors=True)
        with contextlib.suppress(OSError):
            left.unlink(missing_ok=True)
    for left in folder.glob(".*.replaced"):
        path = folder / left.name[1:].rsplit(".", 2)[0]
        if path.exists():
            shutil.rmtree(left, ignore_errors=True)
        else:
            with reported(path):
                os.rename(left, path)
    for left in folder.glob(".*.retired"):
        shutil.rmtree(left, ignore_errors=True)


def set_aside(path: Path) -> Path:
    """Rename something damaged so that nobody takes it for good; nothing is deleted."""
    number = 1
    while (target := path.with_name(f"damaged-{path.name}-{number}")).exists():
        number += 1
    with reported(target):
        os.rename(path, target)
    return target


class FolderLock:
    """One process at a time in a folder. The system releases it when the process dies, however it dies.

    ``left_by`` names a process that had the lock before and did not give it back: killed, or cut off with its machine.
    """

    def __init__(self, folder: Path):
        self.path = folder / LOCK
        self.left_by = ""
        self._file: IO[str] | None = None

    def acquire(self) -> FolderLock:
        """Take the lock.

        Raises:  RunFolderError if another process holds it; it is named
        """
        with reported(self.path):
            file = self.path.open("a+", encoding="utf-8")
        is_taken = _try_lock(file)
        file.seek(0)
        said = file.read(200).strip()
        if not is_taken:
            file.close()
            raise RunFolderError(
                "this run's folder is in use", where=self.path.parent, got=f"held by {said or 'another process'}",
                expected="no running process on it", fix="wait for that run to end, or give another --run-dir",
            )  # fmt: skip
        self.left_by = said
        with reported(self.path):
            file.truncate(0)
            file.write(f"pid {os.getpid()} on {socket.gethostname()}")
            file.flush()
        self._file = file
        return self

    @property
    def is_from_here(self) -> bool:
        """Whether the process that left the lock was on this host, where the lock tells that it is gone."""
        return self.left_by.endswith(f" on {socket.gethostname()}")

    @property
    def stale(self) -> str:
        """What to say of a lock that was never given back; empty where the last one was."""
        if not self.left_by:
            return ""
        elsewhere = "" if self.is_from_here else "; a lock of another host may not reach here: make sure that it ended"
        return f"the last process in this folder, {self.left_by}, did not end by itself{elsewhere}"

    def release(self) -> None:
        """Give the lock back; also as ``close``."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.truncate(0)
            self._file.close()
            self._file = None

    close = release

    @staticmethod
    def is_held(folder: Path) -> bool:
        """Whether some process, this one included, works in the folder now."""
        path = folder / ".lock"
        if not path.exists():
            return False
        try:
            with path.open("r+", encoding="utf-8") as file:
                return not _try_lock(file)
        except OSError:
            return False


def new_folder(parent: Path, name: str) -> tuple[Path, FolderLock]:
    """Make ``parent/name`` and lock it; ``name-2``, ``name-3`` … where it is in use: never a second user of one folder.

    One that is empty is taken: a process that was killed before it wrote anything may have left it.
    """
    with reported(parent / name):
        parent.mkdir(parents=True, exist_ok=True)
        for number in itertools.count(1):
            folder = parent / (name if number == 1 else f"{name}-{number}")
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
                sync_folder(parent)
            if not folder.is_dir() or not _is_empty(folder):
                continue
            with contextlib.suppress(RunFolderError):
                lock = FolderLock(folder).acquire()
                if _is_empty(folder):  # else another process made its run here meanwhile
                    return folder, lock
                lock.release()
    raise AssertionError("numbers do not end")


def _is_empty(folder: Path) -> bool:
    return {path.name for path in folder.iterdir()} <= {LOCK}


def _try_lock(file: IO[str]) -> bool:
    try:
        if sys.platform == "win32":
            import msvcrt

            file.seek(1 << 20)  # beyond the text, which others may read
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def cache_root() -> Path | None:
    """Where what can be made again is kept: $TORCHKEEP_CACHE, else in the user's cache folder; None without a home."""
    if said := os.environ.get("TORCHKEEP_CACHE"):
        return Path(said)
    base = os.environ.get("LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME")
    usual = {"win32": "AppData/Local", "darwin": "Library/Caches"}.get(sys.platform, ".cache")
    try:
        return (Path(base) if base else Path.home() / usual) / "torchkeep"
    except RuntimeError:  # a user without a home, as in some containers
        return None


def lock_byte(handle: int, place: int, kind: Literal["shared", "exclusive", "none"], waits: bool = True) -> bool:
    """Lock one byte of a file, which need not be there, or give it back with "none"; whether that was done.

    Linux tells openings of a file apart; elsewhere the lock is the process's, and goes when it closes any of them.
    """
    try:
        if sys.platform == "win32":
            import msvcrt

            taken = msvcrt.LK_LOCK if waits else msvcrt.LK_NBLCK
            if kind != "shared":  # Windows has none, and does not remove an open file
                with _seeking:
                    os.lseek(handle, place, os.SEEK_SET)
                    msvcrt.locking(handle, msvcrt.LK_UNLCK if kind == "none" else taken, 1)
        else:
            import fcntl

            if _TELLS_OPENINGS_APART:
                form = {"shared": fcntl.F_RDLCK, "exclusive": fcntl.F_WRLCK, "none": fcntl.F_UNLCK}[kind]
                request = struct.pack("hhqqi4x", form, os.SEEK_SET, place, 1, 0)  # struct flock
                fcntl.fcntl(handle, fcntl.F_OFD_SETLKW if waits else fcntl.F_OFD_SETLK, request)
            else:
                form = {"shared": fcntl.LOCK_SH, "exclusive": fcntl.LOCK_EX, "none": fcntl.LOCK_UN}[kind]
                fcntl.lockf(handle, form if waits else form | fcntl.LOCK_NB, 1, place)
    except OSError:
        if waits:
            raise
        return False
    return True


def opened_anew(handle: int) -> int:
    """Another opening of the same file, for locks of its own, also where the file has no name."""
    if _TELLS_OPENINGS_APART:
        return os.open(f"/proc/self/fd/{handle}", os.O_RDWR | getattr(os, "O_CLOEXEC", 0))
    return os.dup(handle)


class AppendFile:
    """A file of lines that only grows. A line torn by a kill is cut off when the file is opened again."""

    def __init__(self, path: Path):
        self.path = path
        self._refused: OSError | None = None
        with reported(path):
            is_new = not path.exists()
            self._file = path.open("ab", buffering=0)
            self._cut_torn_tail()
            if is_new:
                sync_folder(path.parent)

    def _cut_torn_tail(self) -> None:
        end = size = self._file.seek(0, os.SEEK_END)
        with self.path.open("rb") as file:
            while end:
                start = max(0, end - _CHUNK_BYTES)
                file.seek(start)
                newline = file.read(end - start).rfind(b"\n")
                if newline >= 0:
                    end = start + newline + 1
                    break
                end = start
        if end < size:
            self._file.truncate(end)

    def append(self, lines: bytes) -> None:
        """Hand lines to the system: they survive a kill of this process from here on.

        Raises:  StorageError where the disk refuses; the file then ends with the last whole line
        """
        size = self._file.seek(0, os.SEEK_END)
        with reported(self.path):
            try:
                write_all(self._file, memoryview(lines))
            except OSError:
                self._file.truncate(size)
                raise

    def sync(self) -> None:
        """Wait until the disk has every line: they survive a power cut from here on.

        Raises:  StorageError where the disk refuses, and from then on: another sync would say that all is well
        """
        with reported(self.path):
            if self._refused is not None:
                raise self._refused
            try:
                sync_file(self._file)
            except OSError as error:
                self._refused = error
                raise

    def close(self) -> None:
        self._file.close()
