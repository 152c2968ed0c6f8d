"""What came of training again: the same bits, or where two courses part, in which tensors, and what else differs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..contracts import Json, TensorTree
from ..errors import SettingsError
from ..settings import difference
from ..watch.comparing import Difference, Parting, cell_text, parting_text

PLACES = ("data.train", "data.valid", "data.test", "data.tokenizer", "model.name", "model.weights")
"""What may lie elsewhere than when the run was trained."""

_MACHINE = ("python", "platform", "processor", "cores", "gpu", "cuda")
_NO_BIT = ("settings.name", "settings.monitor.", "settings.checkpoint.")
_MAX_ROWS, _SHORT = 24, 12


@dataclass(frozen=True)
class Reproduced:
    """What came of training again up to ``step``: ``then`` and ``now`` are the sha256 of the parameters at it.

    ``tensors`` are those that differ, in the model's order, and ``largest`` is the largest difference of a number in
    them, None where the old ones are not at hand. ``now`` is empty where the new run ended before the step.
    """

    run: Path
    step: int
    then: str
    now: str
    num_tensors: int
    parting: Parting
    tensors: list[str] = field(default_factory=list)
    largest: float | None = None
    differences: list[tuple[str, Json, Json]] = field(default_factory=list)

    @property
    def is_same(self) -> bool:
        """Whether every number of the course and every bit of the parameters is the same."""
        return self.then == self.now and not self.tensors and self.parting.tag is None

    @property
    def verdict(self) -> str:
        """What came of it, in a line."""
        if self.is_same:
            return f"the same bits: {self.num_tensors:,} tensors and {self.parting.num_equal:,} numbers"
        parts = [parting_text(self.parting, "then")]
        if not self.now:
            parts.append(f"now ended before step {self.step:,}")
        elif self.tensors:
            size = "" if self.largest is None else f", by {self.largest:.3g} at most"
            count = f"{len(self.tensors):,} of {self.num_tensors:,} tensors"
            parts.append(f"{count} differ at step {self.step:,}, the first is {self.tensors[0]}{size}")
        return "other bits: " + "; ".join(parts)

    def rows(self) -> list[tuple[str, str, str]]:
        """A table: what was compared, then, now."""
        step, tag, values = self.parting.step, self.parting.tag, self.parting.values
        said = [repr(value) for value in values] if values else [f"{self.parting.num_equal:,} numbers", "the same"]
        course = f"{tag}, step {step:,}" if tag else f"course to step {step:,}"
        shown, left = self.differences[:_MAX_ROWS], len(self.differences) - _MAX_ROWS
        cut = [(f"and {left:,} more", "", "")] if left > 0 else []
        return [(course, said[0], said[1]),
                (f"parameters, step {self.step:,}", self.then[:16], self.now[:16] or "none"),
                *((key, _cell(key, then), _cell(key, now)) for key, then, now in shown), *cut]  # fmt: skip

    def to_json(self) -> Json:
        """All of it, with the verdict."""
        return {**asdict(self), "run": str(self.run), "same": self.is_same, "verdict": self.verdict}


def compared(
    run: Path, then: Json, now: Json, tensors_then: TensorTree | None = None, tensors_now: TensorTree | None = None
) -> Reproduced:
    """Compare two origins as ``origin_of`` gives them, the new one with all its numbers, and the tensors at hand."""
    point, reached = then["checkpoint"], now["checkpoint"]
    is_there = reached["step"] == point["step"]
    names = dict.fromkeys([*reached["tensors"], *point["tensors"]])
    others = [name for name in names if reached["tensors"].get(name) != point["tensors"].get(name)] if is_there else []
    return Reproduced(
        run, point["step"], point["sha256"], reached["sha256"] if is_there else "", len(names),
        _parting(then["course"], now["course"]), others, _largest(others, tensors_then or {}, tensors_now or {}),
        _differences(_facts(then), _facts(now)),
    )  # fmt: skip


def _differences(then: dict[str, Json], now: dict[str, Json]) -> list[tuple[str, Json, Json]]:
    """Row by row, in the sections' order; what changes no bit is left out."""
    rows = [row for section in then for row in difference({section: then[section]}, {section: now[section]})]
    return [row for row in rows if not row[0].startswith(_NO_BIT)]


def environment_differences(then: Json, now: Json) -> list[tuple[str, Json, Json]]:
    """What differs between two environments."""
    return difference(_machine(then, then["packages"]), _machine(now, now["packages"]))


def placements(data: Sequence[str]) -> list[str]:
    """``KEY=PATH`` as assignments to a recipe: a path that exists is one of the caller's folder.

    Raises:  SettingsError for a key that is no place
    """
    made = []
    for one in data:
        key, equals, path = one.partition("=")
        if key not in PLACES or not equals:
            raise SettingsError("this does not say where something lies", where=f"--data {one}", got=repr(key),
                                expected=f"KEY=PATH, with one of {', '.join(PLACES)}")  # fmt: skip
        is_here = Path(path.rpartition(".py:")[0] + ".py" if ".py:" in path else path).exists()
        made.append(f"{key}={Path(path).absolute() if is_here else path}")
    return made


def _parting(then: Mapping[str, Any], now: Mapping[str, Any]) -> Parting:
    """The first number that both have and that differs."""
    mine, its = ({(step, tag): value for tag, points in course.items() for step, value in points}
                 for course in (then, now))  # fmt: skip
    shared = sorted(mine.keys() & its.keys())
    for place, (step, tag) in enumerate(shared):
        if mine[step, tag] != its[step, tag]:
            return Parting("now", step, place, tag, (mine[step, tag], its[step, tag]))
    return Parting("now", shared[-1][0] if shared else 0, len(shared))


def _largest(names: Sequence[str], then: TensorTree, now: TensorTree) -> float | None:
    pairs = [(then[name], now[name]) for name in names if name in then and name in now]
    sizes = [
        float((a.double() - b.double()).abs().max())
        for a, b in pairs
        if a.shape == b.shape and a.numel() and not a.is_complex()
    ]
    return max(sizes, default=None)


def _facts(origin: Json) -> dict[str, Json]:
    """All that may explain a difference, by section."""
    environment = origin["environment"]
    lock = dict(line.partition("==")[::2] for line in environment.get("lock", []))
    return {
        "settings": origin["recipe"],
        "data": origin["data"]["fingerprints"],
        "weights": origin["weights"],
        "environment": _machine(environment, lock or environment["packages"]) | {"device": origin["device"]},
        "decisions": {row["name"]: row["value"] for row in origin["decisions"]},
        "attempts": {"changed": origin["attempts"]["changed"]},
        "code": {row["path"]: row["sha256"][:_SHORT] for row in origin["code_files"]} | _code(origin["code"] or {}),
    }


def _code(code: Json) -> dict[str, Json]:
    """The commit, the uncommitted changes by hash, and the untracked files of code: others change no training."""
    changes = code.get("diff") or ""
    return {
        "commit": (code.get("commit") or "")[:_SHORT] or None,
        "changes": hashlib.sha256(changes.encode()).hexdigest()[:_SHORT] if changes else None,
        "untracked": {name: (digest or "")[:_SHORT] for name, digest in code.get("untracked", {}).items()
                      if name.endswith(".py")},
    }  # fmt: skip


def _machine(environment: Json, packages: Json) -> dict[str, Json]:
    return {key: environment.get(key) for key in _MACHINE} | {"packages": packages}


def _cell(key: str, value: Json) -> str:
    return cell_text(Difference(key, {} if value is None else {"": value}), "")
