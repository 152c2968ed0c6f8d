"""Which samples there are: many names as one blob with offsets, and the listing of a folder, saved and opened again.

No Python object is held for a sample: 10 million names of 40 bytes are two arrays of 480 MB together, which processes
share. A saved listing is mapped from its files, and checked as fast as memory is read: 10 ms for a million names.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import threading
import time
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from ..errors import DataError, StorageError, nearest
from ..files import DurableFolder, cache_root, checksum

Array = np.ndarray[Any, Any]

_SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "test"}
_SAVED_FROM = 50_000  # files: below that a folder is listed anew in less time than a person notices
_SETTLED_S = 2.0  # a folder that changed within this time may change again without another time stamp
_CHECKED_AT_ONCE = 1 << 26  # bytes: 10 ms
_FORM = 3
_STORED = {"names": np.uint8, "offsets": np.int64, "sizes": np.int64, "labels": np.int32, "folders": np.uint8,
           "folder_offsets": np.int64, "changed": np.int64}  # fmt: skip


def bytes_of_array(numbers: Array) -> memoryview:
    """An array's memory, for a checksum or a file."""
    flat: Any = np.ascontiguousarray(numbers).reshape(-1)
    return memoryview(flat.view(np.uint8))


class Names:
    """Many texts as one blob of bytes and int64 offsets.

    Shapes:  blob (bytes,) uint8, offsets (N + 1,) int64
    """

    def __init__(self, blob: Array, offsets: Array):
        self.blob, self.offsets = blob, offsets

    @staticmethod
    def of(names: Iterable[str | bytes]) -> Names:
        """Names one after another, as the file system spells them: also those that are no UTF-8."""
        blob, offsets = bytearray(), array("q", [0])
        for name in names:
            blob += name if isinstance(name, bytes) else os.fsencode(name)
            offsets.append(len(blob))
        return Names(np.frombuffer(blob, np.uint8), np.frombuffer(offsets, np.int64))

    @staticmethod
    def of_column(column: Any) -> Names:
        """A pyarrow column of texts, copied buffer by buffer; a missing cell becomes an empty name."""
        texts = pc.fill_null(pc.cast(column, pa.large_string()), "")
        chunks = texts.chunks if isinstance(texts, pa.ChunkedArray) else [texts]
        blobs, ends, size = [], [np.zeros(1, np.int64)], 0
        for chunk in chunks:
            offsets = np.frombuffer(chunk.buffers()[1], np.int64)[chunk.offset : chunk.offset + len(chunk) + 1]
            if len(chunk):
                blobs.append(np.frombuffer(chunk.buffers()[2] or b"", np.uint8)[offsets[0] : offsets[-1]])
                ends.append(offsets[1:] - offsets[0] + size)
                size += int(offsets[-1] - offsets[0])
        return Names(np.concatenate(blobs or [np.empty(0, np.uint8)]), np.concatenate(ends))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> str:
        return os.fsdecode(self.raw(index))

    def raw(self, index: int) -> bytes:
        return bytes(self.blob[self.offsets[index] : self.offsets[index + 1]])

    def shown(self, index: int) -> str:
        """The name as it can be printed: bytes that are no UTF-8 as escapes."""
        return self.raw(index).decode("utf-8", "backslashreplace")

    @property
    def lengths(self) -> Array:
        """Bytes of each name, (N,) int64."""
        return np.diff(self.offsets)

    def absorb(self, digest: Any) -> None:
        """Add all of it to a checksum."""
        digest.update(bytes_of_array(self.blob))
        digest.update(bytes_of_array(self.offsets))


@dataclass(frozen=True)
class Layout:
    """What of a folder is listed: files of these endings, their classes, and whether links may lead out of it."""

    suffixes: tuple[str, ...]
    what: str
    has_classes: bool = True
    pattern: str | None = None
    follow_links: bool = False

    def holds(self, name: str) -> bool:
        return not name.startswith(".") and name.lower().endswith(self.suffixes)


@dataclass
class Listing:
    """The files of a folder in the order of their names' bytes, with "/" between the parts on every system.

    Shapes:  names N, sizes_bytes (N,) int64, labels (N,) int32, places in ``classes``; ``labels`` is empty without
             classes. ``folders`` and ``changed_ns`` tell whether the listing is still that of the disk.
    """

    root: Path
    names: Names
    sizes_bytes: Array
    labels: Array
    classes: tuple[str, ...]
    folders: Names
    changed_ns: Array
    pattern: str | None = None
    saved_at: Path | None = None
    _fingerprint: str = field(default="", repr=False)
    is_damaged: bool = field(default=False, init=False)
    checked: threading.Event = field(default_factory=threading.Event, init=False, repr=False)

    def __len__(self) -> int:
        return len(self.names)

    def path(self, index: int) -> Path:
        return self.root / self.names[index]

    def column(self, name: str) -> Array:
        """The part of each name that a named group of ``pattern`` finds, (N,) texts.

        Raises:  DataError where the pattern has no such group, or does not find it
        """
        find = re.compile(self.pattern or "").search
        found = [_part_of(find(self.names[index]), name) for index in range(len(self))]
        if None in found:
            got = f"label_pattern = {self.pattern!r}, and the name {self.names.shown(found.index(None))}"
            raise DataError("names do not tell this", where=f"{self.root}: {name!r}", got=got,
                            expected=f"a group (?P<{name}>…) that every name has")  # fmt: skip
        return np.array(found)

    def fingerprint(self) -> str:
        """xxh3 of the sorted relative names, the sizes of the files, and the labels; kept with a saved listing."""
        if not self._fingerprint:
            digest = xxhash.xxh3_128("\0".join(self.classes).encode("utf-8", "surrogateescape"))
            self.names.absorb(digest)
            for numbers in (self.sizes_bytes, self.labels):
                digest.update(bytes_of_array(numbers))
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def is_current(self) -> bool:
        """Whether no folder gained or lost a name since. A file rewritten in place is noticed when it is read."""
        return all(
            _changed_ns(self.root / self.folders[i]) == changed for i, changed in enumerate(self.changed_ns.tolist())
        )

    def save(self, folder: Path) -> None:
        """Write the listing as arrays that can be mapped; whole or not at all.

        Raises:  StorageError where the disk refuses
        """
        # not orjson: the root's name may be no UTF-8
        header = json.dumps([_FORM, str(self.root), self.classes, self.fingerprint(), self.pattern])
        with DurableFolder(folder, replace=True) as made:
            for name, numbers in self._arrays().items():
                made.write(f"{name}.bin", bytes_of_array(numbers))
            made.write("listing.json", header.encode())
        self.saved_at = folder

    def _check(self, sums: dict[str, str]) -> None:
        found = {f"{name}.bin": checksum(bytes_of_array(numbers)) for name, numbers in self._arrays().items()}
        self.is_damaged = found != {name: sums[name] for name in found}
        self.checked.set()

    def _arrays(self) -> dict[str, Array]:
        return {
            "names": self.names.blob, "offsets": self.names.offsets, "sizes": self.sizes_bytes, "labels": self.labels,
            "folders": self.folders.blob, "folder_offsets": self.folders.offsets, "changed": self.changed_ns,
        }  # fmt: skip

    @staticmethod
    def open(folder: Path) -> Listing | None:
        """A saved listing, mapped; None where there is none that can be used.

        The 480 MB of 10 million files are checked while the work begins; ``is_damaged`` counts once ``checked`` is set.
        """
        try:
            files = json.loads((folder / "manifest.json").read_bytes())["files"]
            header = (folder / "listing.json").read_bytes()
            form, root, classes, fingerprint, pattern = json.loads(header)
            held = {name: _mapped(folder / f"{name}.bin", kind) for name, kind in _STORED.items()}
            sums = {name: row["xxh3_128"] for name, row in files.items()}
            is_whole = checksum(header) == sums["listing.json"] and form == _FORM
            sizes = [files[f"{name}.bin"]["size_bytes"] for name in held]
        except (OSError, ValueError, TypeError, KeyError):
            return None
        if not is_whole or sizes != [numbers.nbytes for numbers in held.values()]:
            return None
        opened = Listing(
            Path(root), Names(held["names"], held["offsets"]), held["sizes"], held["labels"], tuple(classes),
            Names(held["folders"], held["folder_offsets"]), held["changed"], pattern, folder, fingerprint,
        )  # fmt: skip
        check = threading.Thread(target=opened._check, args=(sums,), daemon=True)
        check.start()
        if sum(numbers.nbytes for numbers in held.values()) <= _CHECKED_AT_ONCE:
            check.join()
        return None if opened.is_damaged else opened

    def __reduce__(self) -> Any:
        if self.saved_at is not None:  # another process maps it too
            return _reopened, (self.saved_at, self.fingerprint())
        return Listing, tuple(getattr(self, given.name) for given in fields(self) if given.init)


def _reopened(folder: Path, fingerprint: str) -> Listing:
    found = Listing.open(folder)
    if found is None or found.fingerprint() != fingerprint:  # another run has listed the folder anew meanwhile
        raise DataError("the saved listing of a folder has changed", where=folder, fix="start the run again")
    return found


def _mapped(path: Path, kind: Any) -> Array:
    return np.memmap(path, kind, mode="r") if path.stat().st_size else np.empty(0, kind)


def _changed_ns(folder: Path) -> int:
    try:
        return folder.stat().st_mtime_ns
    except OSError:
        return -1


def list_folder(root: Path, layout: Layout) -> Listing:
    """The files below ``root``, from the saved listing where that is still the disk's.

    A listing of many files is saved in the user's cache folder, so that the next start does not list them again.
    Raises:  DataError for a root that is missing or empty, has no classes, or holds a link that leads out of it
    """
    check_folder(root, layout)
    cache, name = cache_root(), xxhash.xxh3_128_hexdigest(repr((os.path.realpath(root), layout)).encode())
    saved = cache / "listings" / name if cache else None
    found = Listing.open(saved) if saved else None
    if found is not None and found.root == root.absolute() and found.is_current():
        return found
    listing = _listed(root.absolute(), layout)
    _check_listing(listing, root, layout)
    is_settled = time.time_ns() - int(listing.changed_ns.max(initial=0)) > _SETTLED_S * 1e9
    if saved and len(listing) >= _SAVED_FROM and is_settled:
        with contextlib.suppress(StorageError):  # a cache that cannot be written is no reason not to train
            listing.save(saved)
    return listing


def near_name(path: Path) -> str:
    """A did-you-mean clause of the names beside a path that is not there."""
    return nearest(path.name, [found.name for found in path.parent.iterdir()]) if path.parent.is_dir() else ""


def check_folder(root: Path, layout: Layout) -> None:
    """Raises:  DataError where ``root`` is no folder"""
    if not root.is_dir():
        got = "a file" if root.exists() else "no such folder"
        raise DataError(f"the folder of {layout.what} is missing", where=root, got=got, expected="a folder",
                        fix=near_name(root))  # fmt: skip


def _listed(root: Path, layout: Layout) -> Listing:
    sizes, labels, times = array("q"), array("i"), array("q")
    folders: list[str] = []
    number_of: dict[str, int] = {}
    find = _compiled(layout.pattern, root).search if layout.pattern else None

    def names() -> Iterator[str]:
        for name, entry in _walk(root, layout, folders, times):
            if layout.has_classes:
                label = _class_of(name, find, root, layout)
                labels.append(number_of.setdefault(label, len(number_of)))
            sizes.append(_size_bytes(entry))
            yield name

    held = Names.of(names())
    classes = tuple(sorted(number_of))
    place_of = np.argsort(np.argsort(list(number_of))) if number_of else np.empty(0, np.int64)
    return Listing(
        root, held, np.frombuffer(sizes, np.int64), place_of[np.frombuffer(labels, np.int32)].astype(np.int32),
        classes, Names.of(folders), np.frombuffer(times, np.int64), layout.pattern,
    )  # fmt: skip


def _compiled(pattern: str, root: Path) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise DataError(
            "the label pattern is no regular expression", where=root, got=f"pattern {pattern!r}: {error}",
            expected="a regular expression with a group (?P<label>…)",
        ) from None  # fmt: skip


def _part_of(found: re.Match[str] | None, group: str) -> str | None:
    return None if found is None else found.groupdict().get(group)


def _class_of(name: str, find: Any, root: Path, layout: Layout) -> str:
    label = name.partition("/")[0] if find is None else _part_of(find(name), "label")
    if label is None:
        raise DataError(
            "the label pattern does not fit this name", where=f"{root}: {name}", got=f"pattern {layout.pattern!r}",
            expected="a regular expression that finds a group 'label' in every name",
            fix=r'label_pattern = "(?P<label>\\w+)_"',
        )  # fmt: skip
    # a class is written into JSON and on the terminal: bytes that are no UTF-8 as escapes
    return os.fsencode(label).decode("utf-8", "backslashreplace")


def _size_bytes(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat().st_size
    except OSError:
        return -1  # gone since the folder was listed, or a link to nowhere: reading it says so


def _walk(root: Path, layout: Layout, folders: list[str], times: Any) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Files with their names relative to ``root``, in the order of the whole names' bytes."""
    real_root = os.path.realpath(root)

    def below(place: str, prefix: str, above: tuple[str, ...]) -> Iterator[tuple[str, os.DirEntry[str]]]:
        folders.append(prefix)
        times.append(_changed_ns(Path(place)))
        for _, is_folder, entry in sorted(_entries(place), key=lambda row: row[0]):
            if entry.is_symlink() and (is_folder or layout.holds(entry.name)):
                real = os.path.realpath(entry.path)
                if not layout.follow_links and not Path(real).is_relative_to(real_root):
                    raise _leads_out(root, prefix + entry.name, real)
                if is_folder and real in above:  # a link to a folder above it
                    continue
            if is_folder:
                yield from below(entry.path, f"{prefix}{entry.name}/", (*above, os.path.realpath(entry.path)))
            elif layout.holds(entry.name) and not (layout.has_classes and not layout.pattern and not prefix):
                yield prefix + entry.name, entry

    yield from below(str(root), "", (real_root,))


def _entries(place: str) -> Iterator[tuple[bytes, bool, os.DirEntry[str]]]:
    try:
        with os.scandir(place) as found:
            for entry in found:
                if not entry.name.startswith("."):
                    is_folder = _is_folder(entry)
                    yield os.fsencode(entry.name) + (b"/" if is_folder else b""), is_folder, entry
    except OSError as error:
        raise DataError(
            "this folder cannot be listed", where=place, got=error.strerror or error,
            expected="a folder that can be read, and stays while it is listed",
        ) from None  # fmt: skip


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _leads_out(root: Path, name: str, real: str) -> DataError:
    return DataError(
        "a link leads out of the data folder", where=f"{root}: {name}", got=f"a link to {real}",
        expected="links within the folder", fix="follow_links = true if these files are meant",
    )  # fmt: skip


def _check_listing(listing: Listing, root: Path, layout: Layout) -> None:
    if len(listing):
        if layout.has_classes and not layout.pattern and set(listing.classes) <= _SPLIT_NAMES:
            raise _are_splits(root, listing.classes)
        return
    entries = [entry for entry in os.scandir(root) if not entry.name.startswith(".")]
    folders = sorted(entry.name for entry in entries if entry.is_dir())
    loose = sum(layout.holds(entry.name) for entry in entries)
    if layout.has_classes and not layout.pattern and not folders:
        raise DataError(
            "this folder has no class folders" if entries else "this folder is empty",
            where=root,
            got=f"{loose:,} {layout.what} and {len(entries) - loose:,} other files",
            expected=f"a folder for each class, with its {layout.what}",
            fix=r'label_pattern = "(?P<label>\\w+)_" takes the class from each name' if loose else "",
        )
    raise DataError(
        f"there are no {layout.what} in " + ("these class folders" if folders else "this folder"),
        where=root,
        got=f"folders {', '.join(folders[:10])}" if folders else f"{len(entries):,} other files",
        expected=f"files that end in {', '.join(layout.suffixes)}",
    )


def _are_splits(root: Path, folders: Sequence[str]) -> DataError:
    return DataError(
        "these are splits, not classes", where=root, got=f"folders {', '.join(folders)}",
        expected="a folder for each class",
        fix=f'train = "{root.name}/{next((name for name in folders if name.startswith("train")), folders[0])}"',
    )  # fmt: skip
