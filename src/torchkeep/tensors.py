"""safetensors and strict JSON, checked before use. No pickle is written or read here (law 2).

A state is a tree of dicts and lists whose leaves are JSON values or tensors. ``pack`` parts it into JSON with
``{"$tensor": name}`` in place of each tensor, and tensors by name; ``unpack`` joins them again.
"""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import torch
from torch import Tensor

from .contracts import Json, TensorTree
from .errors import CheckpointError

_TENSOR = "$tensor"
_INT_KEYS = "$int_keys"
_TUPLE = "$tuple"
_FLOAT = "$float"
_BYTES = "$bytes"
MAX_DEPTH = 64
_MAX_DIGITS = 400
_MAX_AXES = 64
_MAX_HEADER_BYTES = 100 << 20  # the format's own limit
_ALIGNMENT = 8
_TYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint64: "U64", torch.uint32: "U32",
    torch.uint16: "U16", torch.uint8: "U8", torch.bool: "BOOL", torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
_KINDS = {text: kind for kind, text in _TYPES.items()}


def pack(state: Any, prefix: str = "") -> tuple[Json, TensorTree]:
    """Part a state into strict JSON and tensors. A tensor that is there twice, as tied parameters are, is kept once.

    Raises:  CheckpointError where a value is neither, naming its place in the tree
    """
    tensors = _Tensors()
    return _pack(state, prefix, tensors), tensors.by_name


class _Tensors:
    """The tensors met so far, and the names of those that may be met again."""

    def __init__(self) -> None:
        self.by_name: TensorTree = {}
        self._names: dict[Any, str] = {}

    def leaf(self, value: Tensor, path: str) -> Json:
        kept, leaf = value.detach(), {}
        if value.dtype not in _TYPES:  # such as complex numbers: as bytes, with what they are of
            leaf = {_BYTES: [str(value.dtype).removeprefix("torch."), list(value.shape)]}
            kept = torch.frombuffer(bytearray(_bytes_of(value)) or bytearray(1), dtype=torch.uint8)
        place = (value.device, value.dtype, value.data_ptr(), tuple(value.shape), value.stride())
        name = self._names.get(place) if value.numel() else None
        if name is None:
            name = path or "value"
            while name in self.by_name:  # {"a.b": …} beside {"a": {"b": …}}
                name += "'"
            self.by_name[name] = kept
            self._names[place] = name
        return {_TENSOR: name, **leaf}


def _pack(value: Any, path: str, tensors: _Tensors) -> Json:
    if isinstance(value, Tensor):
        return tensors.leaf(value, path)
    if isinstance(value, dict):
        return _pack_dict(value, path, tensors)
    if isinstance(value, list | tuple):
        items = [_pack(item, f"{path}.{i}" if path else str(i), tensors) for i, item in enumerate(value)]
        return {_TUPLE: items} if isinstance(value, tuple) else items
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return {_FLOAT: repr(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise CheckpointError(
        "a state holds something that is neither JSON nor a tensor", where=f"state key {path!r}",
        got=type(value).__name__, expected="None, bool, int, float, str, list, tuple, dict or Tensor",
        fix="return only such values from state_dict(): no object is ever pickled",
    )  # fmt: skip


def _pack_dict(value: dict[Any, Any], path: str, tensors: _Tensors) -> Json:
    def inner(key: Any) -> Json:
        return _pack(value[key], f"{path}.{key}" if path else str(key), tensors)

    if value and all(isinstance(key, int) and not isinstance(key, bool) for key in value):
        return {_INT_KEYS: {str(key): inner(key) for key in value}}
    wrong = next((key for key in value if not isinstance(key, str)), None)
    if wrong is not None:
        raise CheckpointError(
            "a state has a key that JSON cannot hold", where=f"state key {path!r}",
            got=f"{wrong!r} ({type(wrong).__name__})", expected="keys that are all str, or all int",
        )  # fmt: skip
    return {key: inner(key) for key in value}


def unpack(data: Json, tensors: TensorTree) -> Any:
    """Join what ``pack`` parted.

    Raises:  CheckpointError where it is nothing that ``pack`` makes
    """
    try:
        return _unpacked(data, tensors)
    except (TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:
        raise CheckpointError("a state is not of the form that it is written in", got=error) from None


def _unpacked(data: Json, tensors: TensorTree) -> Any:
    if isinstance(data, list):
        return [_unpacked(item, tensors) for item in data]
    if not isinstance(data, dict):
        return data
    if _TENSOR in data and len(data) <= 2:
        return _tensor_of(data, tensors)
    if len(data) == 1:
        key, value = next(iter(data.items()))
        if key == _INT_KEYS:
            return {int(name): _unpacked(item, tensors) for name, item in value.items()}
        if key == _TUPLE:
            return tuple(_unpacked(item, tensors) for item in value)
        if key == _FLOAT:
            return float(value)
    return {key: _unpacked(value, tensors) for key, value in data.items()}


def _tensor_of(leaf: Json, tensors: TensorTree) -> Tensor:
    name = leaf[_TENSOR]
    if name not in tensors:
        raise CheckpointError("a state names a tensor that is not there", where=f"tensor {name!r}")
    if _BYTES not in leaf:
        return tensors[name]
    text, shape = leaf[_BYTES]
    kind = getattr(torch, text, None)
    if not isinstance(kind, torch.dtype):
        raise CheckpointError("a state names a type that torch does not have", where=f"tensor {name!r}", got=text)
    if min(shape, default=0) < 0:
        raise ValueError(f"a shape of {shape}")
    size = math.prod(shape) * kind.itemsize
    return tensors[name][:size].clone().view(kind).view(shape)


def to_json(value: Json, *, indent: bool = False) -> bytes:
    """Strict JSON, keys in the order given, non-finite floats refused by ``pack`` before."""
    return orjson.dumps(value, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE if indent else 0)


def read_json(path: Path) -> Json:
    """Read strict JSON: no NaN, no key twice, no depth beyond 64, nothing but UTF-8.

    Raises:  CheckpointError naming the file
    """
    try:
        if path.exists() and not path.is_file():
            raise ValueError("no file")  # a device or a pipe would never end
        return parse_json(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(
            "a file is missing", where=path, fix="torchkeep runs shows which runs are whole"
        ) from None
    except (ValueError, OSError) as error:
        raise CheckpointError("a file is not the JSON it should be", where=path, got=error) from error
    except RecursionError:
        raise CheckpointError(
            "a file is nested too deeply", where=path, expected=f"at most {MAX_DEPTH} levels"
        ) from None


def parse_json(text: bytes) -> Json:
    """Strict JSON.

    Raises:  ValueError for what is none, RecursionError beyond 64 levels
    """
    data = json.loads(
        text.decode("utf-8"), object_pairs_hook=_once_each, parse_constant=_refused, parse_float=_finite,
        parse_int=_short,
    )  # fmt: skip
    if _is_deeper(data, MAX_DEPTH):
        raise RecursionError
    return data


def _short(text: str) -> int:
    # Python reads a number of n digits in n² steps: a file of some MB could take minutes
    return int(text) if len(text) <= _MAX_DIGITS else _refused(f"a number of {len(text):,} digits")


def _once_each(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("a key that is there twice")
    return made


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refused(text)


def _refused(text: str) -> Any:
    raise ValueError(f"{text}, which is no JSON")


def _is_deeper(data: Json, levels: int) -> bool:
    children = data.values() if isinstance(data, dict) else data if isinstance(data, list) else ()
    return levels < 1 or any(_is_deeper(child, levels - 1) for child in children if isinstance(child, dict | list))


def to_safetensors(tensors: TensorTree) -> list[memoryview]:
    """The bytes of a safetensors file in parts: the header, then each tensor as it lies on the CPU, not copied.

    Raises:  CheckpointError for a type that the format does not have
    Source:  https://github.com/huggingface/safetensors, section "Format"
    """
    header: dict[str, Any] = {}
    parts: list[memoryview] = []
    end = 0
    # wide types first, so that each tensor begins at a multiple of its own width
    for name, tensor in sorted(tensors.items(), key=lambda row: (-row[1].element_size(), row[0])):
        if tensor.dtype not in _TYPES:
            raise CheckpointError("safetensors does not have this type", where=f"tensor {name!r}", got=tensor.dtype)
        begin, data = end, _bytes_of(tensor)
        end += len(data)
        header[name] = {"dtype": _TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        parts.append(data)
    text = orjson.dumps(header)
    text += b" " * (-len(text) % _ALIGNMENT)
    return [memoryview(struct.pack("<Q", len(text)) + text), *parts]


def _bytes_of(tensor: Tensor) -> memoryview:
    if not tensor.numel():
        return memoryview(b"")
    tensor = tensor.detach().cpu().contiguous()
    # one element may have a stride of 0, which counts as contiguous and cannot be seen as bytes
    flat = tensor.reshape(-1) if tensor.numel() != 1 else tensor.as_strided((1,), (1,))
    return flat.view(torch.uint8).numpy().data


def read_safetensors(file: Path | np.ndarray[Any, Any]) -> TensorTree:
    """All tensors of a file, or of its bytes, whose memory they then share.

    Raises:  CheckpointError where the file is missing, damaged or of another form
    """
    where = file if isinstance(file, Path) else "its bytes"
    try:
        data = np.fromfile(file, np.uint8) if isinstance(file, Path) else file
        (size,) = struct.unpack_from("<Q", data.data)
        if size > min(len(data) - 8, _MAX_HEADER_BYTES):
            raise ValueError(f"a header of {size:,} bytes in a file of {len(data):,}")
        header = parse_json(data[8 : 8 + size].tobytes())
        header.pop("__metadata__", None)
        return _tensors_in(header, data[8 + size :])
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, struct.error) as error:
        raise CheckpointError("this is not a whole safetensors file", where=where, got=error) from None


def _tensors_in(header: dict[str, Any], data: np.ndarray[Any, Any]) -> TensorTree:
    """Raises:  ValueError, KeyError, TypeError where a tensor is not where its neighbours leave room for it"""
    tensors, end = {}, 0
    for name, row in sorted(header.items(), key=lambda item: tuple(item[1]["data_offsets"])):
        begin, stop = row["data_offsets"]
        kind, shape = _KINDS[row["dtype"]], row["shape"]
        if len(shape) > _MAX_AXES or not all(type(size) is int and 0 <= size < 1 << 63 for size in shape):
            raise ValueError(f"tensor {name!r} of shape {str(shape)[:100]}")
        if begin != end or stop - begin != math.prod(shape) * kind.itemsize:
            raise ValueError(f"tensor {name!r} at {begin:,} to {stop:,}, of shape {shape}")
        end = stop
        piece = data[begin:stop]
        if piece.ctypes.data % kind.itemsize:  # written by others
            piece = piece.copy()
        tensors[name] = torch.from_numpy(piece).view(kind).view(shape) if len(piece) else torch.empty(shape, dtype=kind)
    if end != len(data):
        raise ValueError(f"{len(data) - end:,} bytes that belong to no tensor")
    return tensors


def tensor_sha256(tensors: TensorTree) -> str:
    """The identity of a set of tensors: names, types, shapes and bits."""
    import hashlib

    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(_bytes_of(tensor))
    return digest.hexdigest()
