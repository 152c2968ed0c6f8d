"""Checkpoints: what outlives the process. Durable when acknowledged, checked before use, no code needed to read them.

A checkpoint is a folder ``step-00001200`` with ``model``, ``optimizer`` and ``rng`` as safetensors, ``state.json`` for
everything that is no tensor, and ``manifest.json``, written last, with each file's size and checksum. ``last.json``
and ``best.json`` are hints for people and programs; a scan of the folders rebuilds them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field as Setting
from pydantic import field_validator

from ..contracts import TensorTree
from ..errors import CheckpointError, StorageError
from ..files import DurableFolder, make_folder, receipt_of, remove_folder, set_aside, sweep, write_durable
from ..settings import Settings
from ..tensors import pack, read_json, read_safetensors, to_json, to_safetensors, unpack
from .stopping import Mode, better_mode

FORMAT = 1
_STATE = "state.json"
_MANIFEST = "manifest.json"
_OWN_FILES = ("model", "optimizer", "rng")
_EXTRA = "extra"
_NAME = re.compile(r"step-(\d{8,})")
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(s|m|h)")


class CheckpointSettings(Settings):
    """[checkpoint]: when to save and what to keep."""

    every: Literal["epoch"] | int | str = "epoch"
    """"epoch", a number of steps, or a time such as "10m"; epochs shorter than 10 s are saved every 10 s."""
    keep_last: int = Setting(default=2, ge=1)
    """How many of the newest stay."""
    keep_best: int = Setting(default=1, ge=0)
    """How many of the best stay."""
    metric: str | None = None
    """What makes one the best; none: the first metric on the validation split, else a loss."""
    mode: Literal["auto", "min", "max"] = "auto"
    """Whether less or more is better; "auto" knows it from the name."""

    @field_validator("every")
    @classmethod
    def _known_period(cls, every: int | str) -> int | str:
        if isinstance(every, int) and every < 1:
            raise ValueError("a number of steps from 1")
        if isinstance(every, str) and every != "epoch" and not _DURATION.fullmatch(every):
            raise ValueError('"epoch", a number of steps, or a time such as "90s", "10m", "1h"')
        return every

    def period_s(self) -> float | None:
        """The time between two saves where one was set."""
        match = _DURATION.fullmatch(self.every) if isinstance(self.every, str) else None
        return float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]] if match else None


@dataclass(frozen=True)
class Saved:
    """A checkpoint on the disk that was found whole."""

    path: Path
    step: int
    metrics: dict[str, float]


class Checkpoints:
    """The checkpoints of one folder.

    >>> checkpoints = Checkpoints("folder", metric="valid/accuracy", mode="max")
    >>> checkpoints.save(100, {"model": model.state_dict(), "optimizer": optimizer.state_dict()}, metrics)
    >>> state = checkpoints.load(checkpoints.latest())
    """

    def __init__(
        self, folder: str | Path, keep_last: int = 2, keep_best: int = 1, metric: str | None = None,
        mode: Mode | None = None, warn: Callable[[str], None] | None = None,
    ):  # fmt: skip
        self.folder = Path(folder)
        self.keep_last, self.keep_best, self.metric = keep_last, keep_best, metric
        self.mode: Mode = mode or better_mode(metric or "loss")
        self._warn = warn or (lambda text: None)
        self._held: list[tuple[int, dict[str, bytes], dict[str, float]]] = []
        self._whole: dict[Path, dict[str, float]] = {}

    def save(self, step: int, state: dict[str, Any], metrics: dict[str, float] | None = None) -> Path:
        """Write a checkpoint; it is durable when this returns. What was held is written before it.

        One of the same step is replaced. Raises:  StorageError where the disk refuses, every older checkpoint then
        stands as it was; CheckpointError where the folder holds a later step: it belongs to another course
        """
        self.release()
        return self._write(step, encode(step, state, metrics or {}), metrics or {})

    def hold(self, step: int, state: dict[str, Any], metrics: dict[str, float]) -> None:
        """Keep a best in memory until the next save, where saves are rarer than improvements.

        A kill before that loses nothing: the run goes on from an older checkpoint and meets the same best again. The
        ``keep_best`` best of those held stay.
        """
        if len(self._held) >= self.keep_best:
            worst = max(self._held, key=lambda held: self._cost(held[2]))
            if self._cost(metrics) >= self._cost(worst[2]):
                return
            self._held.remove(worst)
        self._held.append((step, encode(step, state, metrics), metrics))

    def _cost(self, metrics: dict[str, float]) -> float:
        value = metrics.get(self.metric or "", math.nan)
        return math.inf if math.isnan(value) else value if self.mode == "min" else -value

    @property
    def has_held(self) -> bool:
        return bool(self._held)

    def release(self) -> None:
        """Write what is held."""
        while self._held:
            self._write(*self._held.pop(0))

    def _write(self, step: int, files: dict[str, bytes], metrics: dict[str, float]) -> Path:
        path = self.folder / f"step-{step:08d}"
        make_folder(self.folder)
        later = [found for found in self.steps() if _step_of(found) > step]
        if later and not find_damage(later[-1]):
            raise CheckpointError(
                "this folder holds a later checkpoint", where=self.folder,
                got=f"{later[-1].name}, while step {step} is saved", expected="steps that grow",
                fix="go on from latest(), or save in another folder",
            )  # fmt: skip
        if later:
            self.repair()  # what this course went back over was damaged
        with DurableFolder(path, replace=True) as folder:
            for name, data in files.items():
                folder.write(name, data)
        self._whole[path] = dict(metrics)
        self._point()
        self._retire()
        return path

    def steps(self) -> list[Path]:
        """The folders that look like checkpoints, oldest first, unchecked."""
        if not self.folder.is_dir():
            return []
        return sorted((path for path in self.folder.iterdir() if _NAME.fullmatch(path.name)), key=_step_of)

    def latest(self) -> Saved | None:
        """The newest whole checkpoint. A damaged one is named, and the one before it is taken. Nothing is changed."""
        return self._first_whole(list(reversed(self.steps())))

    def best(self) -> Saved | None:
        """The whole checkpoint with the best metric; the newest where none has the metric."""
        return self._first_whole(self._by_merit()) or self.latest()

    def repair(self) -> None:
        """Clear what attempts left half done, and set damaged checkpoints aside; nothing is deleted that was whole.

        Only for the one process that trains in this folder, before it begins.
        """
        sweep(self.folder)
        for path in self.steps():
            damage = find_damage(path)
            if damage:
                moved = set_aside(path)
                self._whole.pop(path, None)
                self._warn(f"checkpoint {path.name} is damaged ({damage}); it was set aside as {moved.name}")

    def _first_whole(self, paths: list[Path]) -> Saved | None:
        for path in paths:
            damage = find_damage(path)
            if not damage:
                return self._saved(path)
            if path.exists():  # else it was retired meanwhile by the process that trains
                self._warn(f"checkpoint {path.name} is damaged ({damage}); the one before it is taken")
        return None

    def hint(self, name: Literal["last", "best"]) -> dict[str, Any]:
        """What last.json or best.json says, without a look at the checkpoint itself; empty where there is none."""
        try:
            hint = unpack(read_json(self.folder / f"{name}.json"), {})
        except CheckpointError:
            return {}
        return hint if isinstance(hint, dict) else {}

    def load(self, saved: Saved | Path | None) -> dict[str, Any]:
        """The state that was saved, tensors on the CPU.

        Raises:  CheckpointError where a file is damaged, missing or of another format
        """
        if saved is None:
            raise CheckpointError("there is no whole checkpoint", where=self.folder, expected="a folder step-…")
        path = saved.path if isinstance(saved, Saved) else Path(saved)
        damage = find_damage(path)
        if damage:
            raise CheckpointError(
                "this checkpoint is damaged", where=path, got=damage, expected="what its manifest says"
            )
        data = read_json(path / _STATE)
        if data.get("format") != FORMAT:
            raise CheckpointError(
                "this checkpoint was written in another format", where=path / _STATE,
                got=f"format {data.get('format')}", expected=f"format {FORMAT}",
                fix="pip install --upgrade torchkeep",
            )  # fmt: skip
        state = {}
        for part, tree in data["state"].items():
            file = path / f"{data['files'].get(part)}.safetensors"
            state[part] = unpack(tree, read_safetensors(file) if data["files"].get(part) else {})
        return state

    def model(self, saved: Saved) -> TensorTree:
        """Only the model's tensors."""
        tensors: TensorTree = self.load_part(saved, "model")
        return tensors

    def load_part(self, saved: Saved, part: str) -> Any:
        """One part of the state, without reading the others' tensors."""
        data = read_json(saved.path / _STATE)
        file = data["files"].get(part)
        return unpack(data["state"][part], read_safetensors(saved.path / f"{file}.safetensors") if file else {})

    def _saved(self, path: Path) -> Saved:
        return Saved(path, _step_of(path), self._metrics(path))

    def _metrics(self, path: Path) -> dict[str, float]:
        if path not in self._whole:
            data = read_json(path / _STATE)
            self._whole[path] = unpack(data.get("metrics", {}), {})
        return self._whole[path]

    def _by_merit(self) -> list[Path]:
        """Folders that have the metric, best first; of equals the earlier one."""
        rated: list[tuple[float, Path]] = []
        for path in self.steps():
            try:
                rated.append((self._cost(self._metrics(path)), path))
            except CheckpointError:
                continue
        return [path for cost, path in sorted(rated, key=lambda pair: (pair[0], pair[1].name)) if cost < math.inf]

    def _point(self) -> None:
        paths, best = self.steps(), self._by_merit()
        for name, path in [("last", paths[-1]), ("best", best[0] if best else paths[-1])]:
            hint = {"format": FORMAT, "folder": path.name, "metrics": pack(self._metrics(path))[0]}
            try:
                write_durable(self.folder / f"{name}.json", to_json(hint, indent=True))
            except StorageError as error:  # the checkpoint itself is durable, and a scan finds it
                self._warn(f"{name}.json could not be written: {error.got}")

    def _retire(self) -> None:
        kept = {*self.steps()[-self.keep_last :], *self._by_merit()[: self.keep_best]}
        for path in self.steps():
            if path not in kept:
                self._whole.pop(path, None)
                remove_folder(path)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def encode(step: int, state: dict[str, Any], metrics: dict[str, float]) -> dict[str, bytes]:
    """The files of a checkpoint, as bytes: one snapshot, taken now.

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
    data = {f"{file}.safetensors": to_safetensors(found) for file, found in tensors.items()}
    head = {"format": FORMAT, "step": step, "metrics": pack(metrics)[0], "files": files, "state": trees}
    return {**data, _STATE: to_json(head, indent=True)}


def find_damage(path: Path) -> str:
    """What is wrong with a checkpoint's files; empty where every size and checksum is as it was written."""
    try:
        manifest = read_json(path / _MANIFEST)
        files = manifest["files"]
        for name, expected in files.items():
            if Path(name).name != name:
                return f"{name!r} is no plain file name"
            file = path / name
            if file.is_symlink() or not file.is_file():
                return f"{name} is missing"
            found = receipt_of(file)
            if found.size_bytes != expected["size_bytes"]:
                return f"{name} has {found.size_bytes:,} bytes instead of {expected['size_bytes']:,}"
            if found.checksum != expected["xxh3_128"]:
                return f"{name} has other content than was written"
    except (CheckpointError, KeyError, TypeError, AttributeError, OSError) as error:
        return f"its manifest cannot be read: {str(error).splitlines()[0]}"
    return "" if _STATE in files else f"{_STATE} is missing"
