"""Where a sample's bytes come from: a file of a folder, or a cell of a table. They are read when they are needed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..errors import BadSampleError, DataError
from .frames import Frame, Source, check_ids, is_text, require_column
from .index import Listing, Names


class Blobs(Protocol):
    """Encoded samples by number."""

    def __len__(self) -> int: ...

    def read(self, index: int, where: str) -> bytes:
        """The bytes of one sample.

        Raises:  BadSampleError where they cannot be read
        """

    def file_of(self, index: int) -> Path | None:
        """The file that holds one sample, and no other; None where a table or memory does."""

    def id_of(self, index: int) -> str: ...

    def absorb(self, digest: Any) -> None: ...


class SizedBlobs(Blobs, Protocol):
    """Blobs that know the bytes of each sample, (N,), or say None."""

    @property
    def sizes_bytes(self) -> Any: ...


class ListedFiles:
    """The files of a listing."""

    def __init__(self, listing: Listing):
        self.listing = listing

    def __len__(self) -> int:
        return len(self.listing)

    def read(self, index: int, where: str) -> bytes:
        listing = self.listing
        data = b"" if listing.is_damaged else read_file(listing.path(index), where)
        if listing.is_damaged or (listing.saved_at is not None and len(data) != listing.sizes_bytes[index]):
            size = listing.sizes_bytes[index]
            raise BadSampleError(
                "the saved listing of this folder is no longer true",
                where=where,
                got="a damaged listing" if listing.is_damaged else f"a file of {len(data):,} bytes",
                expected=f"{size:,} bytes, as when the folder was listed",
                fix=f"remove the saved listing {listing.saved_at} and start a new run",
            )
        return data

    def file_of(self, index: int) -> Path:
        return self.listing.path(index)

    def id_of(self, index: int) -> str:
        """The name relative to the root, with "/" between its parts on every system."""
        return self.listing.names.shown(index)

    def absorb(self, digest: Any) -> None:
        digest.update(self.listing.fingerprint().encode())

    @property
    def sizes_bytes(self) -> Any:
        return self.listing.sizes_bytes


class Cells:
    """A column of bytes, of structs {bytes, path} as Hugging Face writes them, or of names of files below ``root``.

    Raises:  DataError for a missing column, or one of another type
    """

    def __init__(self, frame: Frame, name: str, root: Path, where: str, what: str = "images", identity: str = ""):
        # chunks stay as they are: joined, a table that is mapped from the disk would be copied into memory
        column = require_column(frame, name, where, f"data.{name}")
        self._bytes, paths = _bytes_and_paths(column, f"{where}: column {name!r}", what)
        self._paths = Names.of_column(paths) if paths is not None else None
        self._root, self._what, self._size, self._identity = root, what, len(column), identity

    def __len__(self) -> int:
        return self._size

    def read(self, index: int, where: str) -> bytes:
        held = self._bytes[index].as_py() if self._bytes is not None else None
        if held is not None:
            return bytes(held)
        file = self.file_of(index)
        if file is not None:
            return read_file(file, where)
        raise BadSampleError(
            f"this row has no {self._what}", where=where, got="an empty cell", expected="bytes or a file's name"
        )

    def file_of(self, index: int) -> Path | None:
        if self._paths is None or not self._paths.lengths[index] or self._has_bytes(index):
            return None
        return self._root / self._paths[index]

    def _has_bytes(self, index: int) -> bool:
        return self._bytes is not None and self._bytes[index].is_valid

    def id_of(self, index: int) -> str:
        """The path where the table has one, else the row, counted from 0."""
        return (self._paths.shown(index) if self._paths else "") or f"row {index}"

    def absorb(self, digest: Any) -> None:
        if self._identity:  # whoever made the table names its content already
            digest.update(self._identity.encode())
        elif self._bytes is not None:
            for cell in self._bytes:
                digest.update(cell.as_buffer() or b"" if cell.is_valid else b"")
                digest.update(b"|")
        if self._paths is not None and not self._identity:
            self._paths.absorb(digest)

    @property
    def sizes_bytes(self) -> Any:
        """Bytes of each sample, (N,), where the table holds them, else None."""
        return None if self._bytes is None else pc.fill_null(pc.binary_length(self._bytes), 0).to_numpy()


class FrameRows:
    """For datasets made of a table: ids from a column of it, and the columns that are neither input nor target."""

    input_column: str
    _frame: Frame
    _ids: Any = None
    where: str

    def _keep(self, frame: Frame, used: Sequence[str], id: str | None, where: str) -> None:
        self.input_column = used[0]
        self._frame = frame.drop_columns(list(dict.fromkeys(used)))
        if id is not None:
            self._ids = require_column(frame, id, where, "data.id")
            check_ids(self._ids, id, where)

    def id_of(self, index: int) -> str:
        """The id's cell; without one what the base says."""
        return str(self._ids[index]) if self._ids is not None else str(super().id_of(index))  # type: ignore[misc]

    def column(self, name: str) -> np.ndarray[Any, Any]:
        """The values of any other column, (N,)."""
        return np.asarray(require_column(self._frame, name, self.where, "data.split_by").to_numpy())


class FolderRows:
    """For datasets made of a folder: what splits by group go by."""

    listing: Listing

    def column(self, name: str) -> np.ndarray[Any, Any]:
        """What a group of ``label_pattern`` finds in each name, (N,) texts."""
        return self.listing.column(name)


def folder_of(source: Source, root: str | Path | None) -> Path:
    """What names of files in a table are relative to: ``root``, else the table's folder."""
    if root is not None:
        return Path(root)
    return Path(source).parent if isinstance(source, str | Path) else Path()


def _bytes_and_paths(column: Any, where: str, what: str) -> tuple[Any, Any]:
    """The column's bytes and its paths; either may be None."""
    kind = column.type
    if pa.types.is_struct(kind):
        names = [kind.field(number).name for number in range(kind.num_fields)]
        held = pc.struct_field(column, "bytes") if "bytes" in names else None
        paths = pc.struct_field(column, "path") if "path" in names else None
        if held is not None or paths is not None:
            return held, paths
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return column, None
    if is_text(kind):
        return None, column
    raise DataError(
        f"this column holds no {what}", where=where, got=f"type {kind}",
        expected="bytes, a struct {bytes, path}, or names of files",
    )  # fmt: skip


def read_file(path: Path, where: str) -> bytes:
    """The bytes of a file.

    Raises:  BadSampleError where it cannot be read
    """
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:  # a name with a null byte is a ValueError
        said = error.strerror if isinstance(error, OSError) else None
        raise BadSampleError(
            "this file cannot be read", where=where, got=said or error, expected=f"a file {path}"
        ) from None
