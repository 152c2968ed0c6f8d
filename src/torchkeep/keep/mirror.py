"""A run's second place, such as a mounted drive: its checkpoints are copied there as they appear, and found there.

A rename may not be atomic on such a place, and a copy may be cut: each checkpoint's own checksums decide what is whole.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from ..errors import StorageError
from ..files import copy_file, copy_folder, make_folder, remove_folder
from .checkpoint import Checkpoints, find_damage

_BESIDE = ("run.json", "records.jsonl")


class Mirror:
    """Copies the run in ``run`` to ``place/NAME`` while it trains. What goes wrong there is said, and stops nothing."""

    def __init__(self, run: Path, place: Path, warn: Callable[[str], None] | None = None):
        self.run, self.copy = run, place / run.name
        self._warn = warn or (lambda text: None)
        self._thread: threading.Thread | None = None
        self._is_due = False

    def begin(self, path: Path) -> None:
        """Bring the copy up to date in the background; where one is under way, once more after it."""
        if self._thread is not None and self._thread.is_alive():
            self._is_due = True
            return
        self._thread = threading.Thread(target=self._update_while_due, name="torchkeep-mirror")
        self._thread.start()

    def join(self) -> None:
        """Wait until the copy is what the run is."""
        if self._thread is not None:
            self._thread.join()

    def _update_while_due(self) -> None:
        while True:
            self._is_due = False
            try:
                self.update()
            except (StorageError, OSError) as error:
                self._warn(f"the mirror {self.copy} could not be written: {getattr(error, 'got', error)}")
            if not self._is_due:
                return

    def update(self) -> None:
        """Copy what is new, the newest checkpoint first, and remove from the copy what the run no longer keeps."""
        ours, theirs = Checkpoints(self.run / "checkpoints"), Checkpoints(self.copy / "checkpoints")
        make_folder(theirs.folder)
        for name in _BESIDE:
            if (self.run / name).is_file():
                copy_file(self.run / name, self.copy / name)
        kept = {path.name for path in ours.steps()}
        for path in reversed(ours.steps()):
            target = theirs.folder / path.name
            if find_damage(target) and path.is_dir():  # it may be retired meanwhile
                copy_folder(path, target)
        for path in theirs.steps():
            if path.name not in kept and ours.steps():
                remove_folder(path)

    def fetch(self) -> bool:
        """Bring back what the copy has and the run lacks; whether there was anything newer.

        Only for the one process that trains in this folder, before it begins.
        """
        ours, theirs = Checkpoints(self.run / "checkpoints"), Checkpoints(self.copy / "checkpoints", warn=self._warn)
        newest = theirs.latest()
        if newest is None or not (self.copy / "run.json").is_file():
            return False
        here = ours.latest()
        if here is not None and here.step >= newest.step:
            return False
        make_folder(ours.folder)
        for name in _BESIDE:
            if (self.copy / name).is_file() and (name != "run.json" or not (self.run / name).exists()):
                copy_file(self.copy / name, self.run / name)
        for path in theirs.steps():
            if not find_damage(path) and find_damage(ours.folder / path.name):
                copy_folder(path, ours.folder / path.name)
        return True
