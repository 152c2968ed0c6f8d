"""Where a package comes from: what was trained, on what, by which code, and how it went; no word of whose machine."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, model_validator
from pydantic import Field as Setting

from ..contracts import Json, TensorTree
from ..folder import RunFolder
from ..keep.checkpoint import Checkpoints, Saved
from ..settings import Settings, check, difference
from ..tensors import tensor_sha256
from ..watch.records import DETERMINISTIC_KINDS, Record, kept_batches, records_of

MAX_POINTS = 2_000
"""Most points of a curve in a package."""
_MAX_NUMBERS = 200_000
_KEPT_AS_TEXT = ("diff", "label_pattern", "rename", "separator")  # no paths, though they may look like some
_OF_A_USER = ("views", "wandb", "mlflow")  # of [monitor]: accounts and servers
_PATH = re.compile(r"(?<![\w.~/\\])(?:[A-Za-z]:)?[/\\](?:[^\s/\\'\":;,]+[/\\])+([^\s/\\'\":;,]*)")
_DECIDED = {
    "threads": r"[1-9]\d{0,3}", "log_every": r"[1-9]\d{0,8}", "precision": "fp32|bf16|fp16",
    "fused update": "True|False", "cache": r"(off|ram|disk)\b.*", "feeding": r"\d{1,2} \w+|\D.*",
}  # fmt: skip
"""What a decision that is replayed may be."""


class _Decision(Settings):
    name: str
    value: bool | int | float | str | None
    reason: str = ""
    override: str = ""

    @model_validator(mode="after")
    def _can_be_replayed(self) -> _Decision:
        if self.name in _DECIDED and not re.fullmatch(_DECIDED[self.name], str(self.value)):
            raise ValueError(f"{self.name} that can be replayed")
        return self


class _File(Settings):
    path: str
    function: str
    sha256: str


class _Code(Settings):
    commit: str | None
    diff: str
    diff_is_whole: bool
    untracked: dict[str, str | None]


class _Data(Settings):
    fingerprints: dict[str, str]


class _Attempts(Settings):
    from_steps: list[int]
    changed: list[str]
    exact: bool


class _Environment(Settings):
    model_config = ConfigDict(extra="allow")
    packages: dict[str, str]
    lock: list[str] = Setting(default_factory=list)


class _Checkpoint(Settings):
    step: int = Setting(ge=0)
    epoch: int
    metrics: dict[str, float | str]
    sha256: str
    tensors: dict[str, str]


class _Origin(Settings):
    recipe: dict[str, Any] | None
    settings: dict[str, Any] | None
    objects: dict[str, Any] | None
    batch_size: int | None
    seed: int
    decisions: list[_Decision]
    data: _Data
    weights: dict[str, Any] | None
    code: _Code | None
    code_files: list[_File]
    environment: _Environment
    device: str | None
    command: list[str]
    attempts: _Attempts
    checkpoint: _Checkpoint
    course: dict[str, list[tuple[int, float | str]]]


def read_origin(data: Json, where: object) -> Json:
    """What a package says of its origin, once it has the form that ``origin_of`` gives.

    Raises:  SettingsError naming the key
    """
    return check(_Origin, data, where).model_dump(mode="json")


def origin_of(folder: RunFolder, saved: Saved, most: int | None = MAX_POINTS) -> Json:
    """The origin of a run's checkpoint: recipe, seed, data, code, environment, attempts, parameters and the course.

    The course has at most ``most`` [step, value] of each number that the inputs alone decide; all of them with None.
    Paths are relative to the recipe, or only names; the home folder is ``~``. The same run gives the same.

    Raises:  CheckpointError or RunFolderError where the checkpoint or the record is damaged
    """
    facts = folder.read_run()
    # later attempts have not made this checkpoint
    starts = [row for row in records_of(folder.records, "attempt_start") if _began(row) < max(saved.step, 1)]
    settings = (starts[-1].get("settings") if starts else None) or facts.get("recipe") or facts.get("settings")
    is_recipe, start = facts.get("recipe") is not None, next(records_of(folder.records, "run_start"), {})
    command = [str(word) for word in facts.get("command", [])]
    said = {
        "recipe": _portable(settings) if is_recipe else None,
        "settings": None if is_recipe else _portable(settings),
        "objects": facts.get("objects"),
        "batch_size": facts.get("batch_size"),
        "seed": facts.get("seed", 0),
        "decisions": facts["decisions"],
        "data": {"fingerprints": facts["data"]["fingerprints"]},
        "weights": _weights(facts.get("weights")),
        "code": facts.get("code"),
        "code_files": facts.get("code_files", []),
        "environment": {**facts["environment"], **start.get("environment", {})},
        "device": facts.get("device"),
        "command": [Path(word).name if place == 0 else word for place, word in enumerate(command)],
        "attempts": _attempts(starts, saved),
        "checkpoint": _checkpoint(folder, saved),
    }
    anonymous: dict[str, Json] = _without_places(said, Path(facts["base"]) if facts.get("base") else None)
    return anonymous | {"course": _course(folder.records, most)}


def parameters_of(folder: RunFolder, saved: Saved) -> TensorTree:
    """The tensors that a package of this checkpoint has: the model's, or their moving average."""
    checkpoints = Checkpoints(folder.checkpoints)
    return checkpoints.model(saved) | (checkpoints.load_part(saved, "optimizer")["average"] or {})


def _began(start: Record) -> int:
    return int(start["from_step"] if "from_step" in start else start["step"])


def _portable(settings: Json) -> Json:
    """The settings but for where a run is shown, which changes no bit."""
    monitor = {key: value for key, value in (settings.get("monitor") or {}).items() if key not in _OF_A_USER}
    return {**settings, "monitor": monitor}


def _weights(report: Json) -> Json:
    return {key: report[key] for key in ("source", "found", "trunk_share") if key in report} if report else None


def _attempts(starts: Sequence[Record], saved: Saved) -> Json:
    """How often the run went on, and what its settings had that the first attempt's had not."""
    changed = {row[0] for start in starts for row in difference(starts[0].get("settings"), start.get("settings"))}
    return {"from_steps": [_began(start) for start in starts], "changed": sorted(changed),
            "exact": saved.is_exact and not changed}  # fmt: skip


def _checkpoint(folder: RunFolder, saved: Saved) -> Json:
    tensors = parameters_of(folder, saved)
    epoch = Checkpoints(folder.checkpoints).load_part(saved, "clock")["epoch"]
    return {
        "step": saved.step, "epoch": epoch, "metrics": {tag: _number(value) for tag, value in saved.metrics.items()},
        "sha256": tensor_sha256(tensors),
        "tensors": {name: tensor_sha256({name: tensor}) for name, tensor in tensors.items()},
    }  # fmt: skip


def _course(records: Path, most: int | None) -> dict[str, Json]:
    """The deterministic numbers by tag, each [step, value] in order; the first and the last of many always stay."""
    found: dict[str, dict[int, Json]] = {}
    for batch in kept_batches(records, DETERMINISTIC_KINDS):
        for record in batch:
            for tag, value in record["values"].items():
                found.setdefault(tag, {})[record["step"]] = _number(value)
    limit = min(most, max(2, _MAX_NUMBERS // max(1, len(found)))) if most is not None else None
    return {tag: _thinned(sorted(found[tag].items()), limit) for tag in sorted(found)}


def _thinned(points: list[tuple[int, Json]], most: int | None) -> Json:
    if most is None or len(points) <= most:
        return [list(point) for point in points]
    return [list(points[place * (len(points) - 1) // (most - 1)]) for place in range(most)]


def _number(value: Any) -> Json:
    """A number as JSON has it; one that is not finite as text, which is equal to itself."""
    return value if not isinstance(value, float) or math.isfinite(value) else repr(value)


def _without_places(value: Json, base: Path | None, key: str = "") -> Json:
    """The same with no absolute path in it."""
    if isinstance(value, Mapping):
        return {name: _without_places(inner, base, str(name)) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_places(inner, base, key) for inner in value]
    if not isinstance(value, str):
        return value
    for place in dict.fromkeys((base, base.resolve()) if base is not None else ()):
        value = re.sub(rf"(?<![\w.~/\\]){re.escape(str(place))}(?:[/\\]|(?!\w))", "", value)
    if key not in _KEPT_AS_TEXT:
        scheme, path = ("hf:", value[3:]) if value.startswith("hf:") else ("", value)
        is_path = Path(path).is_absolute() and len(Path(path).parts) > 2
        value = scheme + (Path(path).name if is_path else _PATH.sub(r"\1", path))
    home = str(Path.home())
    return re.sub(rf"{re.escape(home)}(?!\w)", "~", value) if len(Path(home).parts) > 1 else value
