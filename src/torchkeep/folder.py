"""The layout of a run's folder: names, ids, status. See DESIGN: relative names, no links, a format version."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import orjson

from .errors import RunFolderError
from .files import FolderLock, new_folder, write_durable

FORMAT = 1
RUN_FILE = "run.json"
RECORDS_FILE = "records.jsonl"
CHECKPOINTS = "checkpoints"
TENSORBOARD = "tensorboard"

# what every run.json holds besides its format, and as what
_HELD = {"created": float, "decisions": list, "data": dict, "environment": dict}

Status = Literal["running", "finished", "failed", "interrupted", "killed"]


@dataclass(frozen=True)
class RunFolder:
    """Where everything of one run lies."""

    path: Path

    @property
    def run_file(self) -> Path:
        return self.path / RUN_FILE

    @property
    def records(self) -> Path:
        return self.path / RECORDS_FILE

    @property
    def checkpoints(self) -> Path:
        return self.path / CHECKPOINTS

    @property
    def tensorboard(self) -> Path:
        return self.path / TENSORBOARD

    @property
    def name(self) -> str:
        return self.path.name

    def write_run(self, facts: dict[str, Any]) -> None:
        """Write run.json, once, before step 1."""
        head = {"format": FORMAT, "id": self.name, "created": time.time()}
        write_durable(self.run_file, orjson.dumps({**head, **facts}, option=orjson.OPT_INDENT_2))

    def read_run(self) -> dict[str, Any]:
        """run.json as written.

        Raises:  RunFolderError if this is no run's folder, or one of a newer format
        """
        try:
            facts = orjson.loads(self.run_file.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            found = "no run.json in it" if self.path.is_dir() else "a file" if self.path.exists() else "no such folder"
            raise RunFolderError(
                "this is not the folder of a run", where=self.path, got=found,
                expected="a folder that torchkeep train or tk.fit has made", fix="torchkeep runs lists the runs",
            ) from None  # fmt: skip
        except (orjson.JSONDecodeError, OSError) as error:
            raise RunFolderError("run.json cannot be read", where=self.run_file, got=error) from None
        if not isinstance(facts, dict) or facts.get("format") != FORMAT:
            got = facts.get("format") if isinstance(facts, dict) else type(facts).__name__
            raise RunFolderError(
                "this run was written in another format", where=self.run_file, got=f"format {got}",
                expected=f"format {FORMAT}", fix="pip install --upgrade torchkeep",
            )  # fmt: skip
        lacking = [key for key, kind in _HELD.items() if not isinstance(facts.get(key), kind)]
        if lacking:
            raise RunFolderError(
                "run.json is not whole", where=self.run_file, got=f"no {', '.join(lacking)} as a run has it",
                expected="the file as it was written when the run began",
            )  # fmt: skip
        return facts

    def status(self) -> Status:
        """What became of the run: from its last record, and from whether a process holds it."""
        if FolderLock.is_held(self.path):
            return "running"
        last = _last_turn(self.records)
        if last is None or last["kind"] != "run_end":
            return "killed"
        status: Status = last.get("status", "killed")
        return status


def create_run_folder(name: str, runs: Path) -> tuple[RunFolder, FolderLock]:
    """A new folder for a run under ``runs``, locked; a number is added where the name is taken.

    Raises:  RunFolderError where a file is in the way, StorageError where the disk refuses
    """
    place = next((path for path in (runs, *runs.parents) if path.exists()), runs)
    if place.exists() and not place.is_dir():
        raise RunFolderError(
            "the folder for runs cannot be made", where=runs, got=f"{place} is a file",
            expected="a folder, or nothing yet", fix="move that file, or choose another folder with --run-dir",
        )  # fmt: skip
    path, lock = new_folder(runs, name)
    return RunFolder(path), lock


def open_run_folder(path: str | Path) -> RunFolder:
    """The folder of a run that exists.

    Raises:  RunFolderError if it does not
    """
    folder = RunFolder(Path(path))
    folder.read_run()
    return folder


def list_runs(parent: Path) -> list[RunFolder]:
    """Every run directly under ``parent``, oldest first."""
    found = [RunFolder(path.parent) for path in parent.glob(f"*/{RUN_FILE}")]
    return sorted(found, key=lambda run: run.run_file.stat().st_mtime)


def _last_turn(path: Path) -> dict[str, Any] | None:
    """How the run last began or ended. Threads that look at the machine or feed a view may record after its end."""
    try:
        with path.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - 65536))
            lines = file.read().splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        try:
            row = orjson.loads(line)
        except orjson.JSONDecodeError:
            continue
        if isinstance(row, dict) and row.get("kind") in ("run_end", "attempt_start"):
            return row
    return None
