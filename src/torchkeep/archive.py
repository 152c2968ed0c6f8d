"""The file of a package: a zip whose members are stored, aligned and mapped into memory, or the same as a folder.

``package.json`` comes first and states each member's size and checksums. The whole form of the file follows from it:
times, flags, order and padding are fixed. So the same members give the same bytes, and what is read is compared with
what would be written: a zip that says anything else in any place, or holds one byte more, is refused unread.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import re
import stat
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from . import __version__
from .contracts import Json, TensorTree
from .errors import CheckpointError, PackageError, nearest
from .files import DurableFolder, checksum, make_folder, write_durable
from .tensors import MAX_DEPTH, parse_json, read_safetensors, to_json

HEAD = "package.json"
PARAMETERS = "parameters.safetensors"
CARD = "README.md"
SUFFIX = ".tkp"
FORMAT = 1
MAX_MEMBERS = 1000
MAX_NAME_BYTES = 200
MAX_HEAD_BYTES = 4 << 20  # JSON takes up to 30 times as much memory as it is long
MAX_JSON_BYTES = 64 << 20
_SMALL_BYTES = 1 << 20  # whose sha256 costs nothing to speak of
_MAX_SAID = 400  # a hostile file may put a book into a message
_ALIGNMENT = 64
_WIDE = 0xFFFFFFFF  # what is not below it stands in a field of 64 bits: zip64
_DAY = 0x21  # 1980-01-01, a zip's first
_PADDING = 0xD935  # the field that Android's zipalign pads with
_LOCAL = struct.Struct("<4s5H3I2H")
_ENTRY = struct.Struct("<4s6H3I5H2I")
_PART = re.compile(  # Windows keeps some names for devices, and drops a dot at the end
    r"(?!(?:con|prn|aux|nul|com\d|lpt\d)(?:\.|$))[a-z0-9_](?:[a-z0-9_.-]*[a-z0-9_-])?", re.IGNORECASE | re.ASCII
)
_HEX_DIGITS = {"crc32": 8, "xxh3_128": 32, "sha256": 64}

Content = bytes | memoryview | Sequence[memoryview]


class Sums(NamedTuple):
    """What a member must be when it is read again: for a zip, against damage, and as its identity."""

    bytes: int
    crc32: str
    xxh3_128: str
    sha256: str


def write_archive(
    path: Path, members: Mapping[str, Content], *, head: Mapping[str, Json] | None = None, folder: bool = False
) -> None:
    """Write a package durably; the same members and ``head``, the further keys of package.json, give the same bytes.

    A folder takes the place of nothing but a whole package in the form of a folder. With another package's ``head`` and
    members the copy has its identity, whichever version and form writes it. No member may change meanwhile.
    Raises:  PackageError for a name that a package cannot hold; StorageError where the disk refuses
    """
    with _refused(path, "a package cannot hold this", "names of a-z, 0-9, _ . - and /, and a head of strict JSON"):
        parts = {name: _parts_of(content) for name, content in sorted(members.items())}
        sums = {name: _sums_of(content) for name, content in parts.items()}
        rows = {"members": {name: row._asdict() for name, row in sums.items()}}
        text = _head_text({"format": FORMAT, "torchkeep": __version__} | dict(head or {}) | rows)
        _read_head(text, path)
    _check_place(path, folder)
    if not folder:
        make_folder(path.parent)
        write_durable(path, *_zipped(text, sums, parts))
        return
    with DurableFolder(path, replace=True, manifest=False) as made:
        for name, content in parts.items():
            made.write(name, *content)
        made.write(HEAD, text)


def _parts_of(content: Content) -> list[memoryview]:
    return [memoryview(content)] if isinstance(content, bytes | memoryview) else list(content)


def _check_place(path: Path, folder: bool) -> None:
    got = "a folder" if path.is_dir() else "a file"
    if path.is_dir() and folder:
        try:
            Archive.open(path)
            return
        except PackageError as error:
            got = error.got
    if path.is_dir() or (folder and path.exists()):
        raise PackageError(
            "something else is where the package should be written", where=path, got=got,
            expected="no such path, or a whole package of the same form", fix="give another path, or remove this one",
        )  # fmt: skip


def _sums_of(parts: Iterable[Any]) -> Sums:
    size, crc, damage, identity = 0, 0, xxhash.xxh3_128(), hashlib.sha256()
    for part in parts:
        size, crc = size + part.nbytes, zlib.crc32(part, crc)
        damage.update(part)
        identity.update(part)
    return Sums(size, f"{crc:08x}", damage.hexdigest(), identity.hexdigest())


class Archive:
    """A package that is open to be read. It holds no file open: each reading maps what it needs.

    Nothing is read but package.json until it is asked for, and all that is handed out has been checked.
    """

    def __init__(self, path: Path, text: bytes, head: dict[str, Json], sums: dict[str, Sums], places: dict[str, int]):
        self.path = path
        self.head = head
        self.identity = hashlib.sha256(text).hexdigest()
        self.names = tuple(sums)
        self._sums = sums
        self._places = places

    @classmethod
    def open(cls, path: Path) -> Archive:
        """Read what a package says of itself, and see that its form is exactly that.

        Raises:  PackageError where there is none, or it is damaged, of a newer format or of another form
        """
        path = path.absolute()
        with _refused(path):
            if not path.exists():
                raise PackageError("there is no package here", where=path)
            if path.is_dir():
                return cls(path, *_read_folder(path))
            if not path.is_file():
                raise ValueError("neither a file nor a folder")  # a pipe would never end
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as whole:
                return cls(path, *_read_zip(whole, path))

    def read(self, name: str) -> memoryview:
        """A member's bytes, mapped.

        Raises:  PackageError where it is not there or is damaged, as for all that read
        """
        return self._mapped(name, mmap.ACCESS_READ).data

    def json(self, name: str) -> Json:
        """A member as strict JSON: no NaN, no key twice, no depth beyond 64, no more than 64 MB."""
        data = self.read(name)
        with _refused(self._where(name)):
            return _json_in(data, MAX_JSON_BYTES)

    def tensors(self, name: str) -> TensorTree:
        """A member's tensors, mapped: they take memory when they are used, and a copy of their own when written to."""
        data = self._mapped(name, mmap.ACCESS_COPY)
        with _refused(self._where(name)):
            return read_safetensors(data)

    def verify(self) -> None:
        """Read every member and compare every checksum.

        Raises:  PackageError naming the first that is damaged
        """
        for name in self.names:
            self._mapped(name, mmap.ACCESS_READ, every=True)

    def _mapped(self, name: str, access: int, every: bool = False) -> np.ndarray[Any, Any]:
        """A member as it lies in the file, (N,) uint8; of a long one sha256 is compared only with ``every``."""
        if name not in self._sums:
            raise PackageError(
                "this package has no such member", where=self.path, got=name, expected=", ".join(self.names),
                fix=nearest(name, list(self.names)),
            )  # fmt: skip
        sums, place = self._sums[name], self._places.get(name)
        with _refused(self._where(name)):
            data = _map(self.path if place is not None else self.path / name, place or 0, sums.bytes, access)
            is_whole = checksum(data.data) == sums.xxh3_128
            if not is_whole or ((every or len(data) <= _SMALL_BYTES) and _sums_of([data.data]) != sums):
                raise ValueError("other bytes than were written: the checksum differs")
        return data

    def _where(self, name: str) -> str:
        return f"{name} in {self.path}"


def _map(path: Path, place: int, size: int, access: int) -> np.ndarray[Any, Any]:
    if not size:
        return np.empty(0, np.uint8)
    before = place % mmap.ALLOCATIONGRANULARITY
    with path.open("rb") as file:
        held = mmap.mmap(file.fileno(), before + size, access=access, offset=place - before)
    if hasattr(held, "madvise"):  # from a cold disk: what lies ahead is fetched meanwhile
        held.madvise(mmap.MADV_WILLNEED)
    return np.frombuffer(held, np.uint8, size, before)


@contextlib.contextmanager
def _refused(
    where: object,
    what: str = "this package is damaged, or was changed after it was written",
    fix: str = "copy it again from where it came from, or package the run again",
) -> Iterator[None]:
    """Whatever a hostile or damaged file leads to, as the one error."""
    try:
        yield
    except CheckpointError as error:
        raise PackageError(what, where=where, got=error.got[:_MAX_SAID], expected=error.expected, fix=fix) from None
    except OSError as error:
        raise PackageError("this package cannot be read", where=where, got=error) from None
    except RecursionError:
        raise PackageError(what, where=where, got=f"more than {MAX_DEPTH} levels in one another", fix=fix) from None
    except (ValueError, TypeError, LookupError, OverflowError, MemoryError, struct.error) as error:
        said = str(error)[:_MAX_SAID] or type(error).__name__
        raise PackageError(what, where=where, got=said, fix=fix) from None


# --- package.json


def _head_text(head: dict[str, Json]) -> bytes:
    """package.json with a checksum of itself: in a folder no other would tell that it is damaged."""
    return to_json(head | {"checksum": checksum(to_json(head, indent=True))}, indent=True)


def _read_head(text: bytes, path: Path) -> tuple[dict[str, Json], dict[str, Sums]]:
    """Raises:  PackageError for a newer format; ValueError for anything but what is written"""
    head = _json_in(text, MAX_HEAD_BYTES)
    number = head.get("format") if isinstance(head, dict) else None
    if type(number) is int and number > FORMAT:
        raise PackageError(
            "this package is of a newer format", where=path,
            got=f"format {str(number)[:20]}, written by torchkeep {str(head.get('torchkeep'))[:40]!r}",
            expected=f"format {FORMAT}, which torchkeep {__version__} reads", fix="pip install -U torchkeep",
        )  # fmt: skip
    if type(number) is not int or number != FORMAT or not isinstance(head.get("torchkeep"), str):
        raise ValueError(f"{HEAD} states no format")
    head.pop("checksum", None)
    if text != _head_text(head):
        raise ValueError(f"another {HEAD} than was written: the checksum differs")
    members = head.get("members")
    if not isinstance(members, dict) or list(members) != sorted(members):
        raise ValueError(f"{HEAD} has no members in order")
    _check_names(members)
    return head, {name: _sums_in(row, name) for name, row in members.items()}


def _json_in(text: bytes | memoryview, limit: int) -> Json:
    if len(text) > limit:
        raise ValueError(f"{len(text):,} bytes of JSON, where at most {limit:,} are read")
    return parse_json(bytes(text))


def _check_names(names: Iterable[str]) -> None:
    """Raises:  ValueError where not every system could write files of these names beside one another"""
    taken = {HEAD: ""}
    for number, name in enumerate(names):
        parts = name.split("/")
        if number >= MAX_MEMBERS:
            raise ValueError(f"more than {MAX_MEMBERS:,} members")
        if len(name) > MAX_NAME_BYTES or not all(map(_PART.fullmatch, parts)):
            raise ValueError(f"a member of the name {name[: MAX_NAME_BYTES + 1]!r}")
        for end in range(1, len(parts) + 1):
            place = "/".join(parts[:end])
            kind = place if end == len(parts) else f"{place}/"
            if taken.setdefault(place.lower(), kind) != kind:
                raise ValueError(f"a member of the name {name!r} where {taken[place.lower()] or HEAD!r} is already")


def _sums_in(row: Any, name: str) -> Sums:
    sums = Sums(**row)
    is_hex = all(re.fullmatch(f"[0-9a-f]{{{n}}}", getattr(sums, kind)) for kind, n in _HEX_DIGITS.items())
    if not is_hex or type(sums.bytes) is not int or sums.bytes < 0:
        raise ValueError(f"no size and checksums of {name!r}")
    return sums


# --- the folder and the zip


_Read = tuple[bytes, dict[str, Json], dict[str, Sums], dict[str, int]]


def _read_folder(path: Path) -> _Read:
    """Raises:  ValueError for any file, link or size that package.json does not state"""
    found = _files_in(path)
    if found.get(HEAD, 0) > MAX_HEAD_BYTES:
        raise ValueError(f"a {HEAD} of {found[HEAD]:,} bytes")
    text = (path / HEAD).read_bytes() if HEAD in found else b""
    if not text:
        raise ValueError(f"a folder without a {HEAD}")
    head, sums = _read_head(text, path)
    expected = {name: row.bytes for name, row in sums.items()} | {HEAD: len(text)}
    if wrong := sorted(found.items() ^ expected.items()):
        name = wrong[0][0]
        raise ValueError(f"{name[:MAX_NAME_BYTES]!r} of {found.get(name)} bytes, where {expected.get(name)} are stated")
    return text, head, sums, {}


def _files_in(folder: Path) -> dict[str, int]:
    """The sizes of the files in a folder, by their names from there. No link is followed."""
    sizes: dict[str, int] = {}
    for place, folders, files in os.walk(folder, onerror=_raise):
        for file in (Path(place, name) for name in (*folders, *files)):
            status = file.lstat()
            if stat.S_ISREG(status.st_mode):
                sizes[file.relative_to(folder).as_posix()] = status.st_size
            elif not stat.S_ISDIR(status.st_mode):
                raise ValueError(f"{file.name!r}, which is a link or no file")
        if len(sizes) > MAX_MEMBERS + 1:
            raise ValueError(f"more than {MAX_MEMBERS:,} files")
    return sizes


def _raise(error: OSError) -> None:
    raise error


def _read_zip(whole: mmap.mmap, path: Path) -> _Read:
    """Raises:  PackageError for what is no package; ValueError for a byte around the members that is not ours"""
    text = _first_member(whole, path)
    head, sums = _read_head(text, path)
    headers, end, tail = _laid_out(text, sums)
    if len(whole) != end + len(tail):
        raise ValueError(f"{len(whole):,} bytes, where its {HEAD} states {end + len(tail):,}")
    for name, (header, place) in headers.items():
        if whole[place - len(header) : place] != header:
            raise ValueError(f"another zip header of {name!r} than is written")
    if whole[end:] != tail:
        raise ValueError("another zip directory than is written")
    return text, head, sums, {name: place for name, (_, place) in headers.items()}


def _first_member(whole: mmap.mmap, path: Path) -> bytes:
    first = whole[:_ALIGNMENT]
    crc, size = _LOCAL.unpack_from(first.ljust(_ALIGNMENT))[6:8]
    if first != _local_header(HEAD, size, crc, 0):
        is_zip = first.startswith(b"PK")
        raise PackageError(
            "this is no package", where=path, got="a zip of another form" if is_zip else "no zip",
            expected="a file as torchkeep package writes it",
            fix="where it is a package that was zipped anew: unzip it, and give the folder" if is_zip else "",
        )  # fmt: skip
    if size > MAX_HEAD_BYTES:
        raise ValueError(f"a {HEAD} of {size:,} bytes")
    text = whole[_ALIGNMENT : _ALIGNMENT + size]
    if len(text) < size or zlib.crc32(text) != crc:
        raise ValueError(f"another {HEAD} than was written: the checksum differs")
    return text


def _zipped(text: bytes, sums: dict[str, Sums], parts: dict[str, list[memoryview]]) -> Iterator[bytes | memoryview]:
    headers, _, tail = _laid_out(text, sums)
    for name, (header, _) in headers.items():
        yield header
        yield from parts.get(name, [memoryview(text)])
    yield tail


def _laid_out(text: bytes, sums: dict[str, Sums]) -> tuple[dict[str, tuple[bytes, int]], int, bytes]:
    """Each member's header and the place where its bytes begin, where the last ends, and the directory after it.

    Source:  APPNOTE.TXT 6.3.10 of PKWARE, sections 4.3.7 to 4.3.16 and 4.5.3
    """
    headers, entries, end = {}, bytearray(), 0
    rows = {name: (row.bytes, int(row.crc32, 16)) for name, row in sums.items()}
    for name, (size, crc) in ({HEAD: (len(text), zlib.crc32(text))} | rows).items():
        header = _local_header(name, size, crc, end)
        entries += _entry(name, size, crc, end)
        headers[name] = (header, end + len(header))
        end += len(header) + size
    return headers, end, bytes(entries) + _end_of(len(headers), len(entries), end)


def _local_header(name: str, size: int, crc: int, place: int) -> bytes:
    """What stands at ``place`` before a member, padded so that its bytes begin at a multiple of 64."""
    wide = _wide_field(size, size) if size >= _WIDE else b""
    padding = -(place + _LOCAL.size + len(name) + len(wide) + 6) % _ALIGNMENT
    extra = wide + struct.pack("<3H", _PADDING, 2 + padding, _ALIGNMENT) + bytes(padding)
    shown = min(size, _WIDE)
    version = 45 if wide else 10
    row = _LOCAL.pack(b"PK\3\4", version, 0, 0, 0, _DAY, crc, shown, shown, len(name), len(extra))
    return row + name.encode("ascii") + extra


def _entry(name: str, size: int, crc: int, place: int) -> bytes:
    """A member's line in the directory; no attributes: neither a link nor anything that runs."""
    extra = _wide_field(*(value for value in (size, size, place) if value >= _WIDE))
    shown, version = min(size, _WIDE), 45 if extra else 10
    sizes = (crc, shown, shown, len(name), len(extra))
    row = _ENTRY.pack(b"PK\1\2", version, version, 0, 0, 0, _DAY, *sizes, 0, 0, 0, 0, min(place, _WIDE))
    return row + name.encode("ascii") + extra


def _wide_field(*values: int) -> bytes:
    return struct.pack(f"<2H{len(values)}Q", 1, 8 * len(values), *values) if values else b""


def _end_of(count: int, size: int, place: int) -> bytes:
    wide = b""
    if place >= _WIDE:
        wide = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, size, place)
        wide += struct.pack("<4sIQI", b"PK\6\7", 0, place + size, 1)
    return wide + struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, count, count, size, min(place, _WIDE), 0)
