"""The verbs that look back: read, list, compare and send on what runs have recorded. None of them needs torch."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .errors import RunFolderError
from .folder import RECORDS_FILE, RunFolder
from .settings import override
from .watch.reading import RunRecord

if TYPE_CHECKING:
    from .watch.comparing import Comparison

RUNS = Path("runs")


def read_run(run_dir: str | Path) -> RunRecord:
    """The record of a run or of a ``Monitor``: a loop gives each record, ``.scalars()`` an Arrow table.

    Raises:  RunFolderError where there is none
    """
    path = Path(run_dir) / RECORDS_FILE
    if not path.is_file():
        raise RunFolderError(
            "there is no record of a run here", where=run_dir, got=f"no {RECORDS_FILE}", expected="a run's folder",
            fix="torchkeep runs lists the runs",
        )  # fmt: skip
    return RunRecord(path)


def runs(
    parent: str | Path = RUNS, *, where: str = "", sort: str = "", most: int | None = None
) -> list[dict[str, Any]]:
    """A row for each run under a folder, oldest first: name, status, attempts, metrics, settings by dotted keys.

    ``where="valid/accuracy > .9 and model.name = convnet"`` keeps those; ``sort="-valid/accuracy"`` puts the highest
    first; ``most`` keeps the newest, or the first of those sorted.

    Raises:  RunFolderError where there is no such folder, SettingsError for a condition that cannot be read
    """
    from .watch.index import RunIndex

    place = Path(parent)
    if not place.is_dir():
        if place == RUNS:
            return []
        raise RunFolderError("there is no such folder", where=place, fix="torchkeep runs FOLDER")
    with contextlib.closing(RunIndex(place)) as index:
        index.refresh()
        return index.query(where, sort, most)


def compare(*run_dirs: str | Path) -> Comparison:
    """What sets runs apart: metrics, settings, code, data, environment, and the first step at which they differ.

    Raises:  RunFolderError for a folder that is no run's
    """
    from .watch.comparing import compare as compare_runs

    return compare_runs([Path(run_dir) for run_dir in run_dirs])


def sync(run_dir: str | Path, to: Literal["wandb", "mlflow", "tensorboard"], *, set: Sequence[str] = ()) -> int:
    """Give a run's record to a view afterwards; how many records it took. What it has already is not sent again.

    ``set`` overrides keys of the view's section, ``["project=mine"]``.

    Raises:  RunFolderError while the run goes on, StorageError where the place is not reached
    """
    from .watch.afterwards import section_of
    from .watch.afterwards import sync as send

    folder = RunFolder(Path(run_dir))
    read_run(run_dir)
    return send(folder, to, override(section_of(folder, to), list(set)) if set else None)
