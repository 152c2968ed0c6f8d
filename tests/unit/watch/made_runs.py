"""Runs' folders as a training leaves them, made without training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torchkeep.folder import RECORDS_FILE, RunFolder
from torchkeep.watch.records import dump_record

SETTINGS = {
    "name": "made",
    "model": {"name": "convnet"},
    "data": {"train": "data/train"},
    "optimizer": {"name": "adamw", "learning_rate": 1e-3, "betas": [0.9, 0.999]},
    "train": {"epochs": 3, "deterministic": True, "clip_norm": None},
}


def changed(**values: Any) -> dict[str, Any]:
    """The settings with some changed: optimizer__learning_rate=0.1."""
    settings: dict[str, Any] = {key: dict(part) if isinstance(part, dict) else part for key, part in SETTINGS.items()}
    for key, value in values.items():
        section, _, name = key.partition("__")
        settings[section][name] = value
    return settings


def append(folder: Path, *records: dict[str, Any]) -> None:
    """Add records; what a record's head lacks is filled in."""
    head = {"kind": "scalars", "attempt": 0, "rank": 0, "seq": 0, "step": 0, "samples": 0, "epoch": 0, "time": 1000.0}
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / RECORDS_FILE).open("ab") as file:
        file.writelines(dump_record({**head, **record}) for record in records)


def scalars(step: int, attempt: int = 0, time: float | None = None, **values: float) -> dict[str, Any]:
    """One line; valid__loss stands for valid/loss."""
    tags = {tag.replace("__", "/"): value for tag, value in values.items()}
    at = 1000.0 + step if time is None else time
    return {"kind": "scalars", "attempt": attempt, "step": step, "epoch": step // 10, "time": at, "values": tags}


def make_run(
    folder: Path, created: float = 1.79e9, settings: Any = None, status: str | None = "finished",
    accuracies: tuple[float, ...] = (0.5, 0.9, 0.7), metrics: dict[str, float] | None = None, **facts: Any,
) -> Path:  # fmt: skip
    """A run whose validation went through ``accuracies``, ten steps apart."""
    folder.mkdir(parents=True)
    settings = settings or SETTINGS
    RunFolder(folder).write_run({
        "recipe": settings, "seed": 7, "code": None, "data": {"fingerprints": {"train": "aa"}}, "environment": {},
        "decisions": [{"name": "best", "value": "valid/accuracy (max)", "reason": "", "override": ""}],
        "created": created, **facts,
    })  # fmt: skip
    append(folder, {"kind": "attempt_start", "from_step": 0, "settings": settings})
    for place, accuracy in enumerate(accuracies, 1):
        step = 10 * place
        append(folder, scalars(step, train__loss=1 / place))
        append(folder, scalars(step, valid__loss=2 / place, valid__accuracy=accuracy))
    if status is not None:
        last = metrics or {"valid/accuracy": accuracies[-1] if accuracies else 0.0}
        step = 10 * len(accuracies)
        end = {"kind": "run_end", "step": step, "epoch": len(accuracies), "time": 1000.0 + step, "status": status}
        append(folder, {**end, "metrics": last})
    return folder
