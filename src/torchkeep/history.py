"""The verbs that look back: read, list, compare and send on what runs have recorded. None of them needs torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from .errors import RunFolderError
from .folder import RECORDS_FILE
from .watch.comparing import Comparison
from .watch.comparing import compare as compare_runs
from .watch.index import RunIndex
from .watch.reading import RunRecord

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
    """A row for each run under a folder, oldest first or sorted: name, status, attempts, best metrics, settings.

    ``where="valid/accuracy > .9 and model.name = convnet"`` keeps those; ``sort="-valid/accuracy"`` puts the highest
    first; ``most`` keeps the newest, or the first.

    Raises:  SettingsError for a condition that cannot be read
    """
    index = RunIndex(Path(parent))
    index.refresh()
    return index.query(where, sort, most)


def compare(*run_dirs: str | Path) -> Comparison:
    """What sets runs apart: metrics, settings, code, data, environment, and the first step at which they differ.

    Raises:  RunFolderError for a folder that is no run's
    """
    return compare_runs([Path(run_dir) for run_dir in run_dirs])


def sync(run_dir: str | Path, to: Literal["wandb", "mlflow", "tensorboard"], *, set: Sequence[str] = ()) -> int:
    """Give a run's record to a view afterwards: how many records it took. What it has already is not sent again.

    ``set`` overrides keys of the run's [monitor], ``["monitor.wandb.project=mine"]``.
    """
    from .watch.afterwards import sync as send

    return send(Path(run_dir), to, set)
