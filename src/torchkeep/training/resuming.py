"""Before a run goes on: what has changed since its last attempt, and whether it still ends in the same bits."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from ..contracts import Json
from ..errors import CheckpointError
from ..folder import RunFolder
from ..settings import difference
from ..watch.console import Console
from ..watch.records import last_attempt_start
from .prepare import Prepared
from .provenance import environment
from .work import Work

CHANGES = ("data",)
"""What may be said to have changed: everything else either changes no bit, or is said and goes on best-effort."""

_CHANGES_NO_BIT = ("data.workers", "data.on_bad", "features.verify", "checkpoint.", "monitor.", "name")


@dataclass
class Changes:
    """What keeps a resume from being exact; empty for one that is, and for a new run."""

    reasons: list[str] = field(default_factory=list)
    data: bool = False

    @property
    def is_exact(self) -> bool:
        return not self.reasons


def changes_since(
    prepared: Prepared, folder: RunFolder, facts: Json, recorded: Json, allowed: Collection[str], console: Console
) -> Changes:
    """Say what changed since the last attempt.

    Raises:  CheckpointError for other data, unless ``allowed`` has "data"
    """
    work, found = prepared.work, Changes()
    changed = check_data(work, recorded, "data" in allowed)
    if changed:
        found.data = True
        found.reasons.append(f"the data of {', '.join(changed)} are others: the epoch begins anew with them")
        console.warn(found.reasons[-1])
    start = last_attempt_start(folder.records) or {}
    settings = start.get("settings") or recorded.get("recipe") or recorded.get("settings")
    rows = difference(settings, work.resolved)
    if facts.get("objects"):
        rows += difference(recorded["objects"], facts["objects"])
    rows += difference(recorded["environment"]["packages"], environment()["packages"])
    rows += difference({"device": recorded.get("device")}, {"device": str(prepared.device)})
    for key, old, new in rows:
        said = f"{key} was {old!r} and is {new!r} now"
        if not key.startswith(_CHANGES_NO_BIT):
            found.reasons.append(said)
            said += ": the resume is best-effort"
        if key in ("train.epochs", "train.max_steps"):
            said += f"; the schedule is stretched to {prepared.total_steps:,} steps from here on"
        console.warn(said)
    return found


def check_data(work: Work, recorded: Json, may_change: bool = False) -> list[str]:
    """The splits that are not those that the run began with.

    Raises:  CheckpointError naming them, unless they may change
    """
    now = work.fingerprints()
    then = recorded["data"]["fingerprints"]
    changed = [name for name in then if now.get(name) != then[name]]
    if changed and not may_change:
        raise CheckpointError(
            "the data are not those that the run began with",
            where=f"split {', '.join(changed)}",
            got=", ".join(str(now.get(name)) for name in changed),
            expected=", ".join(str(then[name]) for name in changed),
            fix="put the data back as they were, start a new run, or go on with them: --allow-change data",
        )
    return changed
