"""Samples of any form: as dicts, as a batch, as a schema, as a checksum."""

from __future__ import annotations

import sysconfig
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from ..contracts import Batch, Field, Preprocess, Sample, Schema
from ..errors import BadSampleError, DataError

_LIBRARIES = ("<", *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")))
TARGETS = ("label", "target", "labels", "targets", "y")


def named_sample(sample: Any, names: Sequence[str] | None, where: str) -> Sample:
    """Any sample as a dict; two parts of a tuple are "input" and "target" where nothing is said.

    Raises:  DataError where a tuple's parts need names
    """
    if isinstance(sample, Mapping):
        return dict(sample)
    parts = tuple(sample) if isinstance(sample, tuple | list) else (sample,)
    names = names or (("input",), ("input", "target"))[min(len(parts), 2) - 1]
    if len(names) != len(parts):
        raise DataError(
            "the parts of this dataset's samples need names", where=where, got=f"{len(parts)} parts, names {names}",
            expected="one name for each part", fix='tk.Foreign(dataset, names=("left", "right", "target"))',
        )  # fmt: skip
    return dict(zip(names, parts, strict=True))


def stack(samples: list[Any]) -> Batch:
    """Samples as a batch: tensors and arrays are stacked, numbers become tensors, texts stay lists.

    Python floats become float32. Raises:  DataError where keys, kinds or shapes differ, naming the key
    """
    for sample in samples:
        if sample.keys() != samples[0].keys():
            raise DataError(
                "these samples have different keys and cannot be stacked",
                where=f"keys {', '.join(sorted(map(str, sample.keys() ^ samples[0].keys())))}",
                got=f"{', '.join(map(str, sample))} beside {', '.join(map(str, samples[0]))}",
                expected="the same keys in each sample",
                fix="collate= takes a function that makes a batch of a list of samples",
            )
    return {name: _stacked(name, [sample[name] for sample in samples]) for name in samples[0]}


def _stacked(name: str, values: list[Any]) -> Any:
    try:
        return _stack_values(name, values)
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:  # such as a number beside a None
        raise DataError(
            "these samples have values of different kinds and cannot be stacked",
            where=f"key {name!r}",
            got=f"{' and '.join(sorted({type(value).__name__ for value in values}))}; {error}",
            expected="values of one kind in a batch",
            fix="collate= takes a function that makes a batch of a list of samples",
        ) from error


def _stack_values(name: str, values: list[Any]) -> Any:
    first = values[0]
    is_array = isinstance(first, np.ndarray | np.generic) and first.dtype.kind in "biufc"
    if isinstance(first, Tensor) or is_array:
        values = [_as_tensor(value) for value in values]
        shapes = {tuple(value.shape) for value in values}
        if len(shapes) > 1:
            raise DataError(
                "these samples have different shapes and cannot be stacked", where=f"key {name!r}",
                got=" and ".join(str(shape) for shape in sorted(shapes)[:3]), expected="one shape in a batch",
                fix="collate= takes a function that makes a batch of a list of samples",
            )  # fmt: skip
        return torch.stack(values)
    if isinstance(first, bool | int):
        return torch.tensor(values)
    if isinstance(first, float):
        return torch.tensor(values, dtype=torch.float32)
    if isinstance(first, Mapping):
        return stack(values)
    if isinstance(first, tuple | list) and first and isinstance(first[0], int | float | Tensor | np.ndarray):
        return _stack_values(name, [torch.as_tensor(value) for value in values])
    return values


def _as_tensor(value: Any) -> Tensor:
    # torch warns of memory that may not be written to, which a stack only reads
    is_locked = isinstance(value, np.ndarray) and not value.flags.writeable
    return torch.as_tensor(value.copy() if is_locked else value)


def padded(values: Sequence[Any], fill: float) -> Tensor:
    """Arrays of several lengths as one tensor, filled up at the end of their last axis.

    Shapes:  B arrays (…, T_i) → (B, …, max T_i), int64 for whole numbers, else float32
    """
    longest = max(value.shape[-1] for value in values)
    kind = np.int64 if values[0].dtype.kind in "iu" else np.float32
    held = np.full((len(values), *values[0].shape[:-1], longest), fill, kind)
    for row, value in zip(held, values, strict=True):
        row[..., : value.shape[-1]] = value
    return torch.from_numpy(held)


def schema_of(sample: Sample) -> Schema:
    fields = {name: _field_of(name, value) for name, value in sample.items()}
    image = next((value for name, value in sample.items() if fields[name].kind == "image"), None)
    if image is None:
        return Schema(fields)
    channels = int(image.shape[0])
    return Schema(fields, Preprocess(None, channels, (0.5,) * channels, (0.5,) * channels))


def _field_of(name: str, value: Any) -> Field:
    target = name in TARGETS
    if isinstance(value, Tensor | np.ndarray):
        is_image = name == "image" and value.ndim == 3 and value.dtype in (torch.uint8, np.uint8)
        return Field("image" if is_image else "tensor", tuple(value.shape), is_target=target)
    if isinstance(value, bool | int | np.integer):
        return Field("label" if target else "number", (), is_target=target)
    if isinstance(value, float | np.floating):
        return Field("number", (), is_target=target)
    if isinstance(value, str):
        return Field("text" if name != "id" else "object", is_target=target)
    return Field("object", is_target=target)


def digest_of(value: Any) -> str:
    digest = xxhash.xxh3_128()
    absorb(digest, value)
    return digest.hexdigest()


def absorb(digest: Any, value: Any) -> None:
    if isinstance(value, Mapping):
        for key in value:
            digest.update(str(key).encode())
            absorb(digest, value[key])
    elif isinstance(value, tuple | list):
        for item in value:
            absorb(digest, item)
    elif isinstance(value, Tensor):
        absorb(digest, value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    elif isinstance(value, np.ndarray) and value.dtype != object:
        digest.update(np.ascontiguousarray(value).tobytes())
    elif isinstance(value, bool | int | float | str | bytes | np.generic) or value is None:
        digest.update(repr(value).encode())
    elif hasattr(value, "tobytes"):  # a Pillow image
        digest.update(value.tobytes())
    else:
        digest.update(type(value).__qualname__.encode())


def called(entry: Any, sample: Sample, rng: np.random.Generator, where: str) -> Any:
    """What a user's augmentation makes of a sample.

    Raises:  BadSampleError naming the sample and the user's own line where it fails
    """
    try:
        return entry(sample, rng)
    except Exception as error:
        raise BadSampleError(
            "an augmentation failed", where=f"{where}{user_line(error)}", got=f"{type(error).__name__}: {error}"
        ) from error


def user_line(error: BaseException) -> str:
    """Where in the user's own files the error arose; in a library's only where no other file took part."""
    frames = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    own = [place for place in frames[1:] if not place[0].startswith(_LIBRARIES)] or frames[-1:]
    return f" ({own[-1][0]}, line {own[-1][1]})"
