"""The state of one step, parted into JSON and tensors, and the memory that it is copied to while a step waits."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..contracts import Json, TensorTree
from ..tensors import pack, to_json, to_safetensors

FORMAT = 2
_OWN_FILES = ("model", "optimizer", "rng")
_EXTRA = "extra"


@dataclass(frozen=True)
class Snapshot:
    """A checkpoint that is not written yet: state.json, and for each file its tensors by name."""

    step: int
    head: Json
    tensors: dict[str, TensorTree]
    metrics: dict[str, float]

    @property
    def size_bytes(self) -> int:
        return sum(tensor.nbytes for tree in self.tensors.values() for tensor in tree.values())

    def files(self) -> Iterator[tuple[str, Sequence[bytes | memoryview]]]:
        """The names and bytes of its files."""
        for file, tree in self.tensors.items():
            yield f"{file}.safetensors", to_safetensors(tree)
        yield "state.json", [to_json(self.head, indent=True)]


def parted(step: int, state: dict[str, Any], metrics: dict[str, float], exact: bool) -> Snapshot:
    """A state whose tensors are still those that training changes.

    Raises:  CheckpointError where the state holds what is neither JSON nor a tensor
    """
    trees: dict[str, Any] = {}
    files: dict[str, str] = {}
    tensors: dict[str, TensorTree] = {}
    for part, value in state.items():
        file = part if part in _OWN_FILES else _EXTRA
        trees[part], found = pack(value, "" if file == part else part)
        if found:
            files[part] = file
            tensors.setdefault(file, {}).update(found)
    head = {"format": FORMAT, "step": step, "metrics": pack(metrics)[0], "exact": exact, "created": time.time(),
            "files": files, "state": trees}  # fmt: skip
    return Snapshot(step, head, tensors, dict(metrics))


class Memory:
    """Room for one state. What was copied to it stands until the next copy."""

    def __init__(self) -> None:
        self._room: dict[tuple[str, str], Tensor] = {}

    def copied(self, snapshot: Snapshot) -> Snapshot:
        """The same snapshot, of tensors that nothing changes."""
        names = [(file, name) for file, tree in snapshot.tensors.items() for name in tree]
        sources = [snapshot.tensors[file][name] for file, name in names]
        room = {name: self._room_for(name, source) for name, source in zip(names, sources, strict=True)}
        self._room = room
        with torch.no_grad():
            torch._foreach_copy_(list(room.values()), sources)
        copies = {file: {name: room[file, name] for name in tree} for file, tree in snapshot.tensors.items()}
        return replace(snapshot, tensors=copies)

    def _room_for(self, name: tuple[str, str], like: Tensor) -> Tensor:
        held = self._room.get(name)
        if held is not None and held.shape == like.shape and held.dtype == like.dtype:
            return held
        return torch.zeros(like.shape, dtype=like.dtype, pin_memory=like.device.type == "cuda")
