"""Arrays in memory: a batch is one gather per column."""

from __future__ import annotations

import struct
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from ..chance import ChanceKey
from ..contracts import Batch, Field, Kind, Preprocess, Sample, Schema
from ..errors import DataError
from .dataset import Indices, KeyedData
from .samples import TARGETS

_ZIP_HEADER, _ZIP_NAME_LENGTHS = 30, 26  # bytes before a member's name, and where its lengths stand (APPNOTE 4.3.7)
_CAST = {
    torch.float64: torch.float32,
    torch.uint16: torch.int32,
    torch.uint32: torch.int64,
    torch.uint64: torch.int64,
}


def gathered(column: Tensor, indices: Indices) -> Tensor:
    """Some rows of a tensor. Shapes:  column (N, …), indices (B,) → (B, …)"""
    if column.dtype == torch.bfloat16 or not column.is_contiguous():
        return torch.index_select(column, 0, torch.from_numpy(indices))
    # NumPy gathers flat rows in two thirds of the time of index_select
    rows = column.numpy().reshape(len(column), -1).take(indices, 0)
    return torch.from_numpy(rows).view(len(indices), *column.shape[1:])


class Columns(KeyedData):
    """Tensors of one length by name: what arrays and tables are once they are made."""

    columns: dict[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def read(self, index: int, key: ChanceKey) -> Sample:
        """One sample. Nothing here is random."""
        kinds = {name: field.kind for name, field in self.schema.items()}
        return {n: int(column[index]) if kinds[n] == "label" else column[index] for n, column in self.columns.items()}

    def begin(self, indices: Indices, key: ChanceKey) -> None:
        """None: a batch is one gather."""

    def read_batch(self, indices: Indices, key: ChanceKey) -> Batch:
        """Shapes: indices (B,) int64 → each column (B, …)."""
        return {name: gathered(column, indices) for name, column in self.columns.items()}

    def fingerprint(self) -> str:
        """xxh3 of names, shapes, types and bytes."""
        digest = xxhash.xxh3_128()
        for name, column in self.columns.items():
            digest.update(f"{name}|{tuple(column.shape)}|{column.dtype}|".encode())
            digest.update(bytes_of(column))
        return str(digest.hexdigest())

    @property
    def labels(self) -> Indices | None:
        """Class of each sample, (N,) int64; None where there is no label."""
        name = next((name for name, field in self.schema.items() if field.kind == "label"), None)
        return None if name is None else np.asarray(self.columns[name].numpy())


class Arrays(Columns):
    """Columns of one length: ``Arrays(image=x, label=y)``. The memory is shared with what is given where it can be.

    ``label``, ``labels``, ``target``, ``targets`` and ``y`` are targets; a target of whole numbers, (N,), is a label
    with the classes "0" … "max", a target of texts is numbered in sorted order. float64 becomes float32.

    Shapes:  each column (N, …); ``image`` uint8 (N, H, W) becomes (N, 1, H, W)
    Raises:  DataError for columns of different lengths, no columns, no samples, or values that are no numbers
    """

    def __init__(self, **columns: Any):
        _check_lengths(columns)
        made = {name: _column(name, given) for name, given in columns.items()}
        self.columns = {name: tensor for name, (_, tensor) in made.items()}
        fields = {name: field for name, (field, _) in made.items()}
        self.schema = Schema(fields, _preprocess_of(fields))

    def id_of(self, index: int) -> str:
        return str(index)


def open_arrays(path: Path) -> Arrays:
    """A .npz file's arrays, or the .npy files beside one of them, by name; mapped where they are not compressed.

    ``data/image.npy`` comes with ``data/label.npy`` and every other .npy of that folder.
    Raises:  DataError for a file that is no array, holds objects, or columns that do not fit together
    """
    try:
        if path.suffix.lower() == ".npz":
            return Arrays(**_members(path))
        beside = sorted(path.parent.glob("*.npy"))
        return Arrays(**{found.stem: np.load(found, mmap_mode="r", allow_pickle=False) for found in beside})
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise DataError(
            "these arrays cannot be read", where=path, got=said, expected="a .npz or .npy of numbers, without objects"
        ) from None


def _members(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    held: dict[str, np.ndarray[Any, Any]] = {}
    with path.open("rb") as file, zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            with archive.open(info) as member:
                name = info.filename.removesuffix(".npy")
                if info.compress_type != zipfile.ZIP_STORED:
                    held[name] = np.lib.format.read_array(member, allow_pickle=False)
                    continue
                version = np.lib.format.read_magic(member)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, is_fortran, kind = read(member)
                if kind.hasobject:
                    raise ValueError(f"{name!r} holds objects")
                file.seek(info.header_offset + _ZIP_NAME_LENGTHS)
                start = info.header_offset + _ZIP_HEADER + sum(struct.unpack("<HH", file.read(4))) + member.tell()
            held[name] = np.memmap(path, kind, "r", start, shape, "F" if is_fortran else "C")
    return held


def bytes_of(column: Tensor) -> memoryview:
    """A tensor's memory, for a checksum."""
    flat = column.contiguous().reshape(-1)
    stored: Any = flat.view(torch.uint8).numpy()
    return memoryview(stored)


def _check_lengths(columns: dict[str, Any]) -> None:
    if not columns:
        raise DataError("there are no columns", where="Arrays()", expected="Arrays(image=x, label=y)")
    bare = [name for name, given in columns.items() if not getattr(given, "shape", ())]
    if bare:
        got = type(columns[bare[0]]).__name__
        raise DataError(
            "a column is no array", where=f"Arrays({bare[0]}=…)", got=got, expected="a NumPy array or a tensor (N, …)"
        )
    lengths = {name: len(given) for name, given in columns.items()}
    if len(set(lengths.values())) > 1:
        got = ", ".join(f"{name}: {length:,}" for name, length in lengths.items())
        raise DataError("these columns have different lengths", where="Arrays()", got=got, expected="one length")
    if not next(iter(lengths.values())):
        raise DataError("the columns are empty", where="Arrays()", got="0 samples")


def _column(name: str, given: Any) -> tuple[Field, Tensor]:
    if isinstance(given, np.ndarray) and given.dtype.kind in "USO":
        return _text_column(name, given)
    column = _as_tensor(name, given)
    if name == "image" and column.dtype == torch.uint8 and column.ndim in (3, 4):
        return _image_column(column)
    is_target = name in TARGETS
    if is_target and column.ndim == 1 and not column.dtype.is_floating_point and not column.dtype.is_complex:
        return _label_column(name, column)
    return Field(_kind_of(column), tuple(column.shape[1:]), is_target=is_target), column


def _as_tensor(name: str, given: Any) -> Tensor:
    if isinstance(given, Tensor):
        column = given.detach().cpu()
    elif isinstance(given, np.ndarray) and given.dtype.kind in "biufc":
        native = np.ascontiguousarray(given, dtype=given.dtype.newbyteorder("="))
        with warnings.catch_warnings():
            # torch warns of memory that may not be written, such as a memory map: nothing here writes to it
            warnings.simplefilter("ignore", UserWarning)
            column = torch.from_numpy(native)
    else:
        got = f"{type(given).__name__} of {getattr(given, 'dtype', 'no dtype')}"
        raise DataError("a column is no array of numbers", where=f"Arrays({name}=…)", got=got, expected="numbers")
    return column.to(_CAST.get(column.dtype, column.dtype)).contiguous()


def _kind_of(column: Tensor) -> Kind:
    if not column.dtype.is_floating_point:
        return "tensor"
    return "number" if column.ndim == 1 else "vector" if column.ndim == 2 else "tensor"


def _text_column(name: str, given: np.ndarray[Any, Any]) -> tuple[Field, Tensor]:
    if name not in TARGETS or given.ndim != 1 or not all(isinstance(value, str) for value in given.tolist()):
        raise DataError(
            "a column is no array of numbers", where=f"Arrays({name}=…)", got=f"values of type {given.dtype}",
            expected="numbers; texts only as a target (N,)",
        )  # fmt: skip
    classes, numbers = np.unique(given.astype(str), return_inverse=True)
    field = Field("label", (), tuple(str(name) for name in classes), is_target=True)
    return field, torch.from_numpy(numbers.astype(np.int64))


def _image_column(column: Tensor) -> tuple[Field, Tensor]:
    column = column.unsqueeze(1) if column.ndim == 3 else column
    depths = (1, 3, 4)
    if column.shape[1] not in depths and column.shape[3] in depths:
        raise DataError(
            "these images have their channels last", where="Arrays(image=…)", got=tuple(column.shape),
            expected="(N, C, H, W)", fix="image = x.transpose(0, 3, 1, 2), or x.permute(0, 3, 1, 2) for a tensor",
        )  # fmt: skip
    return Field("image", tuple(column.shape[1:])), column


def _label_column(name: str, column: Tensor) -> tuple[Field, Tensor]:
    column = column.to(torch.int64)
    lowest, highest = int(column.min()), int(column.max())
    if lowest < 0:
        raise DataError(
            "a label is below 0", where=f"Arrays({name}=…)", got=f"{lowest} (sample {int(column.argmin())})",
            expected="classes counted from 0; for a regression, a target of floats",
            fix=f"{name} = {name}.astype('float32') for a regression",
        )  # fmt: skip
    return Field("label", (), tuple(str(number) for number in range(highest + 1)), is_target=True), column


def _preprocess_of(fields: dict[str, Field]) -> Preprocess | None:
    image = fields.get("image")
    if image is None or image.kind != "image" or image.shape is None:
        return None
    channels, height, width = (size or 0 for size in image.shape)
    half = (0.5,) * channels
    return Preprocess(height if height == width else None, channels, half, half)
