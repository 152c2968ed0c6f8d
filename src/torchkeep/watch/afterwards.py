"""Sends the record of a run that has ended to where it is shown: what was not reached then, or a new place."""

from __future__ import annotations

import contextlib
import shutil
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from ..errors import RunFolderError, StorageError
from ..files import FolderLock
from ..folder import RunFolder
from ..settings import Settings, check
from .feeds import View
from .media import MediaStore
from .mlflow import MlflowSettings, MlflowView
from .records import Record, kept_records, last_attempt_start, next_attempt, read_records
from .wandb import WandbSettings, WandbView

Place = Literal["wandb", "mlflow", "tensorboard"]
_BATCH_RECORDS = 1000
_NO_ATTEMPT = -1


def sync(run: RunFolder | str | Path, to: Place, settings: Settings | dict[str, Any] | None = None) -> int:
    """Give a view the whole record, which shows what it lacks and nothing twice; how many records that were.

    ``settings`` are the view's own section; left out, those that the run was started with. TensorBoard's folder is
    made anew.

    Raises:  RunFolderError without a record or while the run goes on, StorageError where the place is not reached,
             SettingsError where the client is missing
    """
    folder = RunFolder(run.path if isinstance(run, RunFolder) else Path(run))
    if FolderLock.is_held(folder.path):
        raise RunFolderError(
            "this run goes on, and feeds its views itself", where=folder.path, got="a process that holds it",
            expected="a run that has ended", fix="wait for its end; monitor.views names where it is shown",
        )  # fmt: skip
    records = kept_records(folder.records) if to == "tensorboard" else read_records(folder.records)
    first = next(records, None)  # a record that cannot be read ends here, before anything is opened
    if first is None:
        return 0
    view, media = _view(folder, to, settings), MediaStore(folder.path)
    count, batch = 0, [first]
    try:
        while batch:
            count += _write(view, batch, media)
            batch = list(islice(records, _BATCH_RECORDS))
        view.flush()
        view.close()
    except (OSError, StorageError) as error:
        with contextlib.suppress(Exception):
            view.close()
        raise _unreached(folder, to, error) from error
    return count


def _write(view: View, batch: list[Record], media: MediaStore) -> int:
    """Give a view a batch; one record that it cannot show is left out, as a run's feed does."""
    try:
        view.write(batch, media)
    except (OSError, StorageError):
        raise
    except Exception:
        return sum(_write(view, [record], media) for record in batch) if len(batch) > 1 else 0
    return len(batch)


def _view(folder: RunFolder, to: Place, settings: Settings | dict[str, Any] | None) -> View:
    if to == "tensorboard":
        from .tensorboard import TensorBoardView

        shutil.rmtree(folder.tensorboard, ignore_errors=True)
        return TensorBoardView(folder.tensorboard, next_attempt(folder.records) - 1)
    given = settings if settings is not None else section_of(folder, to)
    data = given.model_dump() if isinstance(given, Settings) else given
    if to == "mlflow":
        return MlflowView(folder.path, _NO_ATTEMPT, folder.name, check(MlflowSettings, data, "sync"))
    chosen = check(WandbSettings, {**data, "mode": "online"}, "sync")
    return WandbView(folder.path, _NO_ATTEMPT, folder.name, chosen)


def section_of(folder: RunFolder, to: Place) -> dict[str, Any]:
    """What the run itself has said of this view."""
    place: Any = last_attempt_start(folder.records)
    for key in ("settings", "monitor", to):
        place = place.get(key) if isinstance(place, dict) else None
    return place if isinstance(place, dict) else {}


def _unreached(folder: RunFolder, to: Place, error: Exception) -> StorageError:
    has_no_key = to == "wandb" and "API key" in str(error)
    return StorageError(
        f"{to} has not taken all of the record", where=folder.path, got=error, expected="a server that answers",
        fix="wandb login" if has_no_key else f"torchkeep sync {folder.path} --to {to} sends what is left",
    )  # fmt: skip
