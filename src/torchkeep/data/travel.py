"""What goes from one process to another: datasets once, batches through memory that has no name.

A batch's arrays travel in a file of memory that only the two processes hold: nothing of it can be left behind, and
/dev/shm may be as small as it likes. Where the system has none they go through the pipe.
"""

from __future__ import annotations

import ast
import io
import mmap
import os
import sys
from multiprocessing import reduction
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .reading import as_tensors, mapped

_LEAST_SHARED_BYTES = 1 << 16  # less goes through the pipe as quickly
_ALIGNMENT = 64
_PROTOCOL = 5  # arrays beside the rest, PEP 574


class _Laid(NamedTuple):
    """A tensor's values in the order of memory, and its strides: with others a kernel would give other bits."""

    values: np.ndarray[Any, Any]
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def as_arrays(value: Any) -> Any:
    """The same with arrays in place of tensors: torch's own way names shared memory, which a kill leaves behind."""
    if isinstance(value, Tensor) and value.dtype != torch.bfloat16:
        value, shape, strides = value.detach(), tuple(value.shape), value.stride()
        # not is_contiguous(): that says yes to one channel that is channels last
        if strides == torch.empty(shape, device="meta").stride():
            return value.numpy()
        is_dense = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) + 1 == value.numel()
        if not is_dense or 0 in strides:
            return value.contiguous().numpy()
        return _Laid(value.as_strided((value.numel(),), (1,)).numpy(), shape, strides)
    return mapped(as_arrays, value)


def as_batch(value: Any) -> Any:
    """What ``as_arrays`` was given."""
    if isinstance(value, _Laid):
        return torch.from_numpy(value.values).as_strided(value.shape, value.strides)
    return as_tensors(value) if isinstance(value, np.ndarray) else mapped(as_batch, value)


def send(channel: Connection[Any, Any], label: Any, value: Any) -> None:
    """Send ``value``, whose arrays go through nameless memory."""
    held: list[Any] = []
    file = io.BytesIO()
    ForkingPickler(file, _PROTOCOL, True, held.append).dump(value)
    buffers = [buffer.raw() for buffer in held]
    size = sum(len(buffer) for buffer in buffers)
    if size < _LEAST_SHARED_BYTES or not hasattr(os, "memfd_create"):
        channel.send((label, file.getvalue(), [bytes(buffer) for buffer in buffers], None))
        return
    memory = os.memfd_create("torchkeep-batch")
    try:
        places = [_write(memory, buffer) for buffer in buffers]
        channel.send((label, file.getvalue(), [], places))
        reduction.send_handle(channel, memory, os.getppid())
    finally:
        os.close(memory)


def _write(memory: int, buffer: memoryview) -> tuple[int, int]:
    end = os.lseek(memory, 0, os.SEEK_END)
    start = -(-end // _ALIGNMENT) * _ALIGNMENT
    done = 0
    while done < len(buffer):
        done += os.pwrite(memory, buffer[done:], start + done)
    return start, start + len(buffer)


def receive(channel: Connection[Any, Any]) -> tuple[Any, Any]:
    """The label and the value that were sent. Arrays stay where the sender put them, and are ours alone.

    Raises:  EOFError, OSError where the sender died
    """
    label, data, buffers, places = channel.recv()
    if places is not None:
        memory = reduction.recv_handle(channel)
        try:
            flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
            mapping = mmap.mmap(memory, max(end for _, end in places), flags=flags)
        finally:
            os.close(memory)
        whole = memoryview(mapping)
        buffers = [whole[start:end] for start, end in places]
    else:
        buffers = [bytearray(buffer) for buffer in buffers]  # a tensor's memory can be written to
    return label, _unpacked(data, buffers)


def _unpacked(data: bytes, buffers: list[Any]) -> Any:
    return ForkingPickler.loads(data, buffers=buffers)


class _Packer(ForkingPickler):
    """Packs tensors by value: torch's own way needs an open file for each, and a process may send 256 of them."""

    def __init__(self, file: Any):
        super().__init__(file)
        self.dispatch_table = {**self.dispatch_table, Tensor: _reduced}


def _reduced(tensor: Any) -> Any:
    plain = tensor.device.type == "cpu" and tensor.layout == torch.strided and tensor.dtype != torch.bfloat16
    if not plain or tensor.requires_grad:
        return tensor.__reduce_ex__(2)
    return as_batch, (as_arrays(tensor),)


def packed(value: Any) -> bytes:
    """A dataset, a function or an error, as it goes to another process.

    Raises:  whatever it raises when it is packed
    """
    file = io.BytesIO()
    _Packer(file).dump(value)
    return file.getvalue()


def unpacked(data: bytes) -> Any:
    """What ``packed`` was given."""
    return ForkingPickler.loads(data)


def cannot_travel(dataset: Any, collate: Any) -> str:
    """Why these cannot be sent to another process; empty where they can."""
    try:
        sent = packed((dataset, collate))
    except Exception as error:
        return f"cannot travel to a process: {type(error).__name__}: {error}"
    if b"torchkeep_user_" in sent:
        return "its code is a file that the recipe names, which a process cannot import"
    main = sys.modules.get("__main__")
    file = getattr(main, "__file__", None)
    if file is None:
        return "defined in a notebook or a shell, which a process cannot import" if b"__main__" in sent else ""
    if getattr(main, "__spec__", None) is None and not _has_main_guard(Path(file)):
        return f"{Path(file).name} has no 'if __name__ == \"__main__\":', so a process would run it again"
    return ""


def _has_main_guard(path: Path) -> bool:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, UnicodeDecodeError):
        return True  # a compiled entry point, no script
    return any(isinstance(node, ast.If) and "__name__" in ast.unparse(node.test) for node in tree.body)
