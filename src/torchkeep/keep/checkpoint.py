"""Checkpoints: what outlives the process. Durable when acknowledged, checked before use, no code needed to read them.

A checkpoint is a folder ``step-00001200`` with ``model``, ``optimizer`` and ``rng`` as safetensors, ``state.json`` for
everything that is no tensor, and ``manifest.json``, written last, with each file's size and checksum. ``last.json``
and ``best.json`` are hints for people and programs; a scan of the folders rebuilds them.
"""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field as Setting
from pydantic import field_validator

from ..contracts import Json, TensorTree
from ..errors import CheckpointError, DamagedError, StorageError
from ..files import (
    DurableFolder,
    Receipt,
    make_folder,
    read_with_receipt,
    receipt_of,
    remove_folder,
    set_aside,
    sweep,
    write_durable,
)
from ..settings import Settings
from ..tensors import pack, read_json, read_safetensors, to_json, unpack
from .snapshot import FORMAT, Memory, Snapshot, parted
from .stopping import Mode, better_mode

_STATE = "state.json"
MANIFEST = "manifest.json"
_MOST_HELD_BYTES = 64 << 20
_MOSTMANIFEST_BYTES = 1 << 20  # one has a few names: with a million someone wants to keep a reader busy
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
    keep_every: int | None = Setting(default=None, ge=1)
    """Of each so many steps the first checkpoint stays for ever."""
    on_error: Literal["save", "leave"] = "save"
    """Whether a step that fails for another reason than a loss that is no number is followed by a save."""
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
    is_exact: bool = True


class Checkpoints:
    """The checkpoints of one folder.

    >>> checkpoints = Checkpoints("folder", metric="valid/accuracy", mode="max")
    >>> checkpoints.save(100, {"model": model.state_dict(), "optimizer": optimizer.state_dict()}, metrics)
    >>> state = checkpoints.load(checkpoints.latest())
    """

    def __init__(
        self, folder: str | Path, keep_last: int = 2, keep_best: int = 1, metric: str | None = None,
        mode: Mode | None = None, keep_every: int | None = None, warn: Callable[[str], None] | None = None,
    ):  # fmt: skip
        self.folder = Path(folder)
        self.keep_last, self.keep_best, self.keep_every, self.metric = keep_last, keep_best, keep_every, metric
        self.mode: Mode = mode or better_mode(metric or "loss")
        self._warn = warn or (lambda text: None)
        self.before_visible: Callable[[], object] = lambda: None  # run by whoever writes, before a checkpoint appears
        self.after_visible: Callable[[Path], object] = lambda path: None
        self._memory = Memory()
        self._writer: threading.Thread | None = None
        self._error: BaseException | None = None
        self._held: list[Snapshot] = []
        self._whole: dict[Path, dict[str, float]] = {}
        self._source: Path | None = None

    def save(
        self, step: int, state: dict[str, Any], metrics: dict[str, float] | None = None, *, wait: bool = True,
        exact: bool = True,
    ) -> Path:  # fmt: skip
        """Write a checkpoint; it is durable when this returns. What was held is written before it.

        With ``wait=False`` this returns when the state is copied to memory, and a thread writes. One save is under way
        at a time: a second one waits for the first. What goes wrong in the thread is raised by the next call of
        ``save``, ``join`` or ``check``. ``exact=False`` marks a state from which a run can go on, but not to the same
        bits. One of the same step is replaced.

        Raises:  StorageError where the disk refuses, every older checkpoint then stands as it was; CheckpointError
                 where the folder holds a later step: it belongs to another course
        """
        self.join()
        path = self.folder / f"step-{step:08d}"
        snapshot = parted(step, state, metrics or {}, exact)
        held, self._held = self._held, []
        if wait:
            self._write_all([*held, snapshot])
        else:
            task = [*held, self._memory.copied(snapshot)]
            # no daemon: a program that ends waits for what it has begun to save
            self._writer = threading.Thread(target=self._write_all_noted, args=(task,), name="torchkeep-checkpoint")
            self._writer.start()
        return path

    @property
    def is_busy(self) -> bool:
        """Whether a save is under way."""
        return self._writer is not None and self._writer.is_alive()

    def check(self) -> None:
        """Raises:  what went wrong in a save that nobody waited for"""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def join(self) -> None:
        """Wait for the save under way. Raises:  as ``check`` does"""
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        self.check()

    def reserve(self, state: dict[str, Any]) -> None:
        """Touch the memory that saves without waiting will copy to: new memory costs four times as much."""
        self._memory.copied(parted(0, state, {}, True))

    def hold(self, step: int, state: dict[str, Any], metrics: dict[str, float]) -> bool:
        """Keep a best in memory until the next save, where saves are rarer than improvements; whether it is kept.

        A kill before that loses nothing: the run goes on from an older checkpoint and meets the same best again. The
        ``keep_best`` best of those held stay. A state above 64 MB is not held: it would double the run's memory.
        """
        snapshot = parted(step, state, metrics, True)
        if snapshot.size_bytes > _MOST_HELD_BYTES:
            return False
        if len(self._held) >= self.keep_best:
            worst = max(self._held, key=lambda held: self._cost(held.metrics))
            if self._cost(metrics) >= self._cost(worst.metrics):
                return True
            self._held.remove(worst)
        self._held.append(Memory().copied(snapshot))
        return True

    def _cost(self, metrics: dict[str, float]) -> float:
        value = metrics.get(self.metric or "", math.nan)
        return math.inf if math.isnan(value) else value if self.mode == "min" else -value

    @property
    def has_held(self) -> bool:
        return bool(self._held)

    def release(self) -> None:
        """Write what is held."""
        self.join()
        held, self._held = self._held, []
        self._write_all(held)

    def _write_all_noted(self, snapshots: list[Snapshot]) -> None:
        try:
            self._write_all(snapshots)
        except BaseException as error:  # the thread has nobody else to tell
            self._error = error

    def _write_all(self, snapshots: list[Snapshot]) -> None:
        for snapshot in snapshots:
            self._write(snapshot)

    def _write(self, snapshot: Snapshot) -> None:
        path = self.folder / f"step-{snapshot.step:08d}"
        make_folder(self.folder)
        later = [found for found in self.steps() if _step_of(found) > snapshot.step]
        if later and not find_damage(later[-1]):
            raise CheckpointError(
                "this folder holds a later checkpoint", where=self.folder,
                got=f"{later[-1].name}, while step {snapshot.step} is saved", expected="steps that grow",
                fix="go on from latest(), or save in another folder",
            )  # fmt: skip
        if later:
            self.repair()  # what this course went back over was damaged
        with DurableFolder(path, replace=True) as folder:
            for name, parts in snapshot.files():
                folder.write(name, *parts)
            self.before_visible()
        self._whole[path] = dict(snapshot.metrics)
        self._point()
        self._retire()
        self.after_visible(path)

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

    def at(self, step: int) -> Saved:
        """The checkpoint of a step.

        Raises:  CheckpointError where there is none, or it is damaged
        """
        held = {_step_of(path): path for path in self.steps()}
        damage = find_damage(held[step]) if step in held else "no such checkpoint"
        if damage:
            raise CheckpointError(
                f"there is no whole checkpoint of step {step:,}", where=self.folder, got=damage,
                expected=f"one of {', '.join(map(str, held)) or 'none'}",
            )  # fmt: skip
        return self._saved(held[step])

    def repair(self) -> None:
        """Clear what attempts left half done, and set damaged checkpoints aside; nothing is deleted that was whole.

        Only for the one process that trains in this folder, before it begins.
        """
        sweep(self.folder)
        for path in self.steps():
            damage = find_damage(path)
            if damage:
                self._set_aside(path, damage)

    def _set_aside(self, path: Path, damage: str) -> None:
        moved = set_aside(path)
        self._whole.pop(path, None)
        self._warn(f"checkpoint {path.name} is damaged ({damage}); it was set aside as {moved.name}")

    def take_up(self) -> tuple[Saved, dict[str, Any]] | None:
        """The newest whole checkpoint and its state, read once; damaged ones that are newer are set aside.

        It stays as long as this object saves. Only for the one process that trains in this folder, before it begins.
        """
        sweep(self.folder)
        for path in reversed(self.steps()):
            try:
                state = self.load(path)
            except DamagedError as error:
                self._set_aside(path, error.got)
                continue
            self._source = path
            return self._saved(path), state
        return None

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
        head, files = _read_whole(saved.path if isinstance(saved, Saved) else Path(saved), None)
        return {part: _part_of(head, files, part) for part in head["state"]}

    def model(self, saved: Saved) -> TensorTree:
        """Only the model's tensors."""
        tensors: TensorTree = self.load_part(saved, "model")
        return tensors

    def load_part(self, saved: Saved, part: str) -> Any:
        """One part of the state, without reading the others' tensors.

        Raises:  CheckpointError where what is read is damaged
        """
        return _part_of(*_read_whole(saved.path, part), part)

    def rows(self) -> list[Row]:
        """What there is, oldest first, each read and checked: without the module's code, and nothing is changed."""
        return [row for path in self.steps() if (row := _row_of(path))]

    def _saved(self, path: Path) -> Saved:
        return Saved(path, _step_of(path), self._metrics(path), _head_of(path)["exact"])

    def _metrics(self, path: Path) -> dict[str, float]:
        if path not in self._whole:
            self._whole[path] = _head_of(path)["metrics"]
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
        steps = self.steps()
        kept = {*steps[-self.keep_last :], *self._by_merit()[: self.keep_best], self._source}
        if self.keep_every:
            every = self.keep_every
            kept |= {path for before, path in pairwise([None, *steps])
                     if path and _step_of(path) // every > (_step_of(before) // every if before else 0)}  # fmt: skip
        for path in self.steps():
            if path not in kept:
                self._whole.pop(path, None)
                remove_folder(path)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


@dataclass(frozen=True)
class Row:
    """A checkpoint as a table shows it; ``damage`` is empty where it is whole."""

    name: str
    step: int
    epoch: int | None
    metrics: dict[str, float]
    size_bytes: int
    created: float
    is_exact: bool
    damage: str


def _row_of(path: Path) -> Row | None:
    """None for one that was retired meanwhile by the process that trains."""
    damage = find_damage(path)
    try:
        size = sum(file.lstat().st_size for file in path.glob("*"))  # none where a file is in the folder's place
        modified = path.lstat().st_mtime
        head = _head_of(path)
    except FileNotFoundError:
        return None
    except CheckpointError as error:
        row = Row(path.name, _step_of(path), None, {}, size, modified, False, damage or error.what)
        return row if path.exists() else None
    clock = head["state"].get("clock")
    epoch = clock.get("epoch") if isinstance(clock, dict) else None
    return Row(path.name, _step_of(path), epoch, head["metrics"], size, head["created"] or modified, head["exact"],
               damage)  # fmt: skip


def _read_whole(path: Path, part: str | None) -> tuple[Json, dict[str, np.ndarray[Any, Any]]]:
    """state.json and the bytes of the files of one part, or of all, each as its manifest says it was written.

    Raises:  DamagedError where one is not, CheckpointError for another format
    """
    files = _manifest_of(path)
    damage = _damage_of(path, _STATE, files)
    if damage:
        raise _damaged(path, damage)
    head = _head_of(path)
    wanted = {file for of, file in head["files"].items() if part in (None, of)}
    if part is None and {f"{file}.safetensors" for file in wanted} != files.keys() - {_STATE}:
        raise _damaged(path, f"{MANIFEST} and {_STATE} name other files")
    held = {}
    for file in wanted:
        name = f"{file}.safetensors"
        if damage := _misfit_of(path, name, files):
            raise _damaged(path, damage)
        held[file], found = read_with_receipt(path / name)
        if found != files[name]:
            raise _damaged(path, f"{name} has other content than was written")
    return head, held


def _part_of(head: Json, files: dict[str, np.ndarray[Any, Any]], part: str) -> Any:
    file = head["files"].get(part)
    return unpack(head["state"][part], read_safetensors(files[file]) if file else {})


_HELD = {"state": dict, "files": dict, "metrics": dict, "exact": bool, "created": float | None}
_HELD_WITHIN = {"files": str, "metrics": int | float}


def _head_of(path: Path) -> Json:
    """state.json in today's format, as every reader relies on it, with its metrics unpacked.

    Raises:  CheckpointError where it is another, whatever its checksum
    """
    head = _migrated(read_json(path / _STATE), path)
    misnaming = _misnaming_of(path)
    if misnaming:
        raise _damaged(path, misnaming)
    head["metrics"] = unpack(head.get("metrics"), {})
    wrong = [key for key, kind in _HELD.items() if not isinstance(head.get(key), kind)]
    wrong = wrong or [
        key for key, kind in _HELD_WITHIN.items() if not all(isinstance(value, kind) for value in head[key].values())
    ]
    if wrong or not head["files"].keys() <= head["state"].keys():
        raise CheckpointError(
            "this is not the state of a checkpoint", where=path / _STATE,
            got=f"{', '.join(wrong) or 'files'} of another form", expected="what tk.Checkpoints writes",
        )  # fmt: skip
    return head


def _misnaming_of(path: Path) -> str:
    """Whether a folder has the name of another step than it holds; a state of another form is said by who reads it."""
    try:
        head = read_json(path / _STATE)
    except CheckpointError:
        return ""
    step = head.get("step") if isinstance(head, dict) else None
    is_other = _NAME.fullmatch(path.name) and isinstance(step, int) and step != _step_of(path)
    return f"it holds step {step}" if is_other else ""


def _migrated(head: Json, path: Path) -> Json:
    """What state.json says, in today's format.

    Raises:  CheckpointError for a format that is not known
    """
    while isinstance(head, dict) and isinstance(head.get("format"), int) and head["format"] in _MIGRATIONS:
        head = _MIGRATIONS[head["format"]](head)
    if not isinstance(head, dict) or head.get("format") != FORMAT:
        got = head.get("format") if isinstance(head, dict) else type(head).__name__
        raise CheckpointError(
            "this checkpoint was written in another format", where=path / _STATE, got=f"format {got}",
            expected=f"format 1 to {FORMAT}", fix="pip install --upgrade torchkeep",
        )  # fmt: skip
    return head


_MIGRATIONS: dict[int, Callable[[Json], Json]] = {1: lambda head: {**head, "format": 2, "exact": True, "created": None}}


def _manifest_of(path: Path) -> dict[str, Receipt]:
    """Raises:  DamagedError where it is none"""
    file = path / MANIFEST
    if file.is_symlink() or not file.is_file():
        raise _damaged(path, f"{MANIFEST} is missing")
    if file.stat().st_size > _MOSTMANIFEST_BYTES:
        raise _damaged(path, f"{MANIFEST} has {file.stat().st_size:,} bytes")
    try:
        manifest = read_json(file)
        if manifest["format"] != 1:
            raise ValueError(f"format {manifest['format']}")
        files = {name: Receipt(int(row["size_bytes"]), row["xxh3_128"]) for name, row in manifest["files"].items()}
    except (CheckpointError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(path, f"its manifest cannot be read: {str(error).splitlines()[0]}") from None
    strange = next((name for name in files if Path(name).name != name), None)
    if strange is not None:
        raise _damaged(path, f"{strange!r} is no plain file name")
    if _STATE not in files:
        raise _damaged(path, f"{_STATE} is missing")
    return files


def _damaged(path: Path, damage: str) -> DamagedError:
    return DamagedError("this checkpoint is damaged", where=path, got=damage, expected="what its manifest says")


def find_damage(path: Path) -> str:
    """What is wrong with a checkpoint's files; empty where every size and checksum is as it was written."""
    try:
        files = _manifest_of(path)
        damage = next((damage for name in files if (damage := _damage_of(path, name, files))), "")
        return damage or _misnaming_of(path)
    except DamagedError as error:
        return error.got
    except OSError as error:
        return str(error)


def _damage_of(path: Path, name: str, files: dict[str, Receipt]) -> str:
    damage = _misfit_of(path, name, files)
    same = damage or receipt_of(path / name) == files[name]
    return damage if same else f"{name} has other content than was written"


def _misfit_of(path: Path, name: str, files: dict[str, Receipt]) -> str:
    """What is wrong with a file before it is read, however large it is."""
    file = path / name
    if name not in files or file.is_symlink() or not file.is_file():
        return f"{name} is missing"
    size = file.stat().st_size
    return "" if size == files[name].size_bytes else f"{name} has {size:,} bytes instead of {files[name].size_bytes:,}"
