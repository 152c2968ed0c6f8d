"""The proof that a resume is exact: a stretch between two checkpoints, trained again, compared bit for bit."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..contracts import Json, TensorTree
from ..errors import CheckpointError
from ..folder import RunFolder
from ..keep.checkpoint import Checkpoints, Row
from ..tensors import pack
from ..watch.console import Console
from ..watch.recorder import Recorder
from .loop import load_model
from .prepare import Prepared
from .signals import Signals


@dataclass(frozen=True)
class Replay:
    """What a stretch that was trained again ends in; ``differs`` names what is not as it was saved."""

    first_step: int
    last_step: int
    num_tensors: int
    differs: list[str]


class _Nowhere(Checkpoints):
    """Saves nothing: a replay leaves the run's folder as it is."""

    def save(self, step: int, state: dict[str, Any], *given: Any, **named: Any) -> Path:
        return self.folder

    def hold(self, step: int, state: dict[str, Any], metrics: dict[str, float]) -> bool:
        return True

    def reserve(self, state: dict[str, Any]) -> None: ...


def replay(prepared: Prepared, folder: RunFolder) -> Replay:
    """Train again from the last checkpoint but one to the last, in memory, and compare everything that was saved.

    Raises:  CheckpointError where there are not two whole checkpoints of one course
    """
    held = Checkpoints(folder.checkpoints)
    first, last = _stretch(held.rows(), folder)
    state = held.load(held.folder / first.name)
    load_model(prepared.work.model, state["model"])
    prepared.shorten(lambda _: None, state["clock"]["epoch"])
    with tempfile.TemporaryDirectory() as place:
        nowhere = _Nowhere(place, metric=prepared.best_metric, mode=prepared.best_mode)
        recorder = Recorder(Path(place) / "records.jsonl", attempt=0)
        try:
            training = prepared.training(nowhere, recorder, Console(quiet=True), Signals(), "")
            training.load_state_dict(state)
            training.replay_to(last.step)
        finally:
            recorder.close()
        found, wanted = pack(training.state_dict()), pack(held.load(held.folder / last.name))
    differs = [*_other_values(found[0], wanted[0]), *_other_tensors(found[1], wanted[1])]
    return Replay(first.step, last.step, len(wanted[1]), differs)


def _stretch(rows: list[Row], folder: RunFolder) -> tuple[Row, Row]:
    whole = [row for row in rows if not row.damage and row.is_exact]
    if len(whole) < 2:
        raise CheckpointError(
            "there is no stretch to train again", where=folder.checkpoints, got=f"{len(whole)} whole checkpoints",
            expected="two", fix="checkpoint.keep_last = 2 or more",
        )  # fmt: skip
    return whole[-2], whole[-1]


def _other_values(found: Json, wanted: Json, path: str = "") -> list[str]:
    if isinstance(found, dict) and isinstance(wanted, dict):
        keys = dict.fromkeys([*wanted, *found])
        return [name for key in keys for name in _other_values(found.get(key), wanted.get(key), f"{path}.{key}")]
    if isinstance(found, list) and isinstance(wanted, list) and len(found) == len(wanted):
        pairs = enumerate(zip(found, wanted, strict=True))
        return [name for i, (one, other) in pairs for name in _other_values(one, other, f"{path}.{i}")]
    return [] if found == wanted else [path.strip(".")]


def _other_tensors(found: TensorTree, wanted: TensorTree) -> list[str]:
    def same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
        if one is None or other is None or one.dtype != other.dtype or one.shape != other.shape:
            return False
        as_bytes = [tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)]
        return torch.equal(*as_bytes)

    return [name for name in dict.fromkeys([*wanted, *found]) if not same(found.get(name), wanted.get(name))]
