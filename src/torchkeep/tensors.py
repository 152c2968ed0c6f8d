"""safetensors and strict JSON, checked before use. No pickle is written or read here (law 2).

A state is a tree of dicts and lists whose leaves are JSON values or tensors. ``pack`` parts it into JSON with
``{"$tensor": name}`` in place of each tensor, and tensors by name; ``unpack`` joins them again.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from .contracts import Json, TensorTree
from .errors import CheckpointError

_TENSOR = "$tensor"
_INT_KEYS = "$int_keys"
_TUPLE = "$tuple"
_FLOAT = "$float"
_MAX_DEPTH = 64


def pack(state: Any, prefix: str = "") -> tuple[Json, TensorTree]:
    """Part a state into strict JSON and tensors.

    Raises:  CheckpointError where a value is neither, naming its place in the tree
    """
    tensors: TensorTree = {}
    return _pack(state, prefix, tensors), tensors


def _pack(value: Any, path: str, tensors: TensorTree) -> Json:
    if isinstance(value, Tensor):
        name = path or "value"
        while name in tensors:  # {"a.b": …} beside {"a": {"b": …}}
            name += "'"
        tensors[name] = value.detach()
        return {_TENSOR: name}
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


def _pack_dict(value: dict[Any, Any], path: str, tensors: TensorTree) -> Json:
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
    """Join what ``pack`` parted."""
    if isinstance(data, list):
        return [unpack(item, tensors) for item in data]
    if not isinstance(data, dict):
        return data
    if len(data) == 1:
        key, value = next(iter(data.items()))
        if key == _TENSOR:
            if value not in tensors:
                raise CheckpointError("a state names a tensor that is not there", where=f"tensor {value!r}")
            return tensors[value]
        if key == _INT_KEYS:
            return {int(name): unpack(item, tensors) for name, item in value.items()}
        if key == _TUPLE:
            return tuple(unpack(item, tensors) for item in value)
        if key == _FLOAT:
            return float(value)
    return {key: unpack(value, tensors) for key, value in data.items()}


def to_json(value: Json, *, indent: bool = False) -> bytes:
    """Strict JSON, keys in the order given, non-finite floats refused by ``pack`` before."""
    return orjson.dumps(value, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE if indent else 0)


def read_json(path: Path) -> Json:
    """Read strict JSON: no NaN, no depth beyond 64, nothing but UTF-8.

    Raises:  CheckpointError naming the file
    """
    try:
        data = orjson.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(
            "a file is missing", where=path, fix="torchkeep runs shows which runs are whole"
        ) from None
    except (orjson.JSONDecodeError, OSError) as error:
        raise CheckpointError("a file is not the JSON it should be", where=path, got=error) from error
    if _depth(data) > _MAX_DEPTH:
        raise CheckpointError("a file is nested too deeply", where=path, expected=f"at most {_MAX_DEPTH} levels")
    return data


def _depth(data: Json) -> int:
    deepest, todo = 0, [(data, 1)]
    while todo:
        value, depth = todo.pop()
        deepest = max(deepest, depth)
        children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        if depth <= _MAX_DEPTH:
            todo.extend((child, depth + 1) for child in children)
    return deepest


def to_safetensors(tensors: TensorTree, metadata: dict[str, str] | None = None) -> bytes:
    """The bytes of a safetensors file. Each tensor is written contiguous, from the CPU, sharing nothing."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    pointers: set[int] = set()
    for name, tensor in plain.items():
        if tensor.numel() and tensor.untyped_storage().data_ptr() in pointers:
            plain[name] = tensor.clone()
        pointers.add(plain[name].untyped_storage().data_ptr())
    data: bytes = safetensors.torch.save(plain, metadata)
    return data


def read_safetensors(path: Path) -> TensorTree:
    """All tensors of a file, on the CPU.

    Raises:  CheckpointError where the file is missing, damaged or of another form
    """
    try:
        return safetensors.torch.load(path.read_bytes())
    except (OSError, safetensors.SafetensorError, ValueError, RuntimeError) as error:
        raise CheckpointError("this is not a whole safetensors file", where=path, got=error) from error


def tensor_sha256(tensors: TensorTree) -> str:
    """The identity of a set of tensors: names, types, shapes and bits."""
    import hashlib

    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        # one element may have a stride of 0, which counts as contiguous and cannot be seen as bytes
        flat = tensor.reshape(-1) if tensor.numel() != 1 else tensor.as_strided((1,), (1,))
        digest.update(flat.view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()
