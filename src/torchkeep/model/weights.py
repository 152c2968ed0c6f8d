"""Weights from a file, a run or a hub into a model: all is checked, then all is copied, and a report says what.

The only place that reads a pickle, and only with ``weights_only=True`` (law 2).
"""

from __future__ import annotations

import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..archive import HEAD, PARAMETERS, Archive
from ..contracts import Json, TensorTree
from ..errors import CheckpointError, DamagedError, ModelError, nearest
from ..files import read_with_receipt
from ..folder import RunFolder
from ..tensors import read_json, read_safetensors, unpack
from .heads import find_head, within
from .hub import HUB, fetched

Part = Literal["matched", "missing", "other_shape", "reinitialised", "unexpected"]
Source = str | Path | Mapping[str, Any]

_WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "params")
_COMPILED = "_orig_mod."
_PICKLES = (".pth", ".pt", ".ckpt", ".bin")
_INDEX = ".index.json"
_IN_A_FOLDER = ("model.safetensors", f"model.safetensors{_INDEX}", "pytorch_model.bin", f"pytorch_model.bin{_INDEX}")
_PREFIX_DEPTH = 3
_SHOWN = 3
_PARTS: tuple[Part, ...] = get_args(Part)


@dataclass
class LoadReport:
    """What became of each parameter: its name, and how many numbers it has. Tied parameters are one.

    The first four parts are the model's, and add up to it: ``reinitialised`` are those of the head that the file does
    not have in this shape. ``unexpected`` are the file's own names. ``found`` says what was taken off the names.
    """

    source: str
    found: list[str] = field(default_factory=list)
    matched: dict[str, int] = field(default_factory=dict)
    missing: dict[str, int] = field(default_factory=dict)
    other_shape: dict[str, int] = field(default_factory=dict)
    reinitialised: dict[str, int] = field(default_factory=dict)
    unexpected: dict[str, int] = field(default_factory=dict)
    shapes: dict[str, str] = field(default_factory=dict)
    """Shapes in the file where the model has another."""
    missing_buffers: list[str] = field(default_factory=list)
    num_buffers: int = 0
    trunk_share: float = 1.0
    """The matched share of all parameters but the head's."""

    def share(self, part: Part) -> float:
        """The share of the model's parameters; of ``unexpected``, that of the file's."""
        own = sum(sum(getattr(self, name).values()) for name in ("missing", "other_shape", "reinitialised"))
        counted = sum(getattr(self, part).values())
        total = sum(self.matched.values()) + (counted if part == "unexpected" else own)
        return counted / total if total else 0.0

    def text(self) -> str:
        """A line for each part that is not empty."""
        rows = [f"weights  {self.source}" + (f" ({', '.join(self.found)})" if self.found else "")]
        for part in _PARTS:
            if names := getattr(self, part):
                listed = "" if part == "matched" else self.listed(part)
                rows.append(f"  {_words(part):<15}{len(names):>5}  {self.share(part):>7.2%}  {listed}".rstrip())
        if self.num_buffers:
            rows.append(f"  {'buffers':<15}{self.num_buffers - len(self.missing_buffers):>5}  of {self.num_buffers}")
        return "\n".join(rows)

    def listed(self, *parts: Part) -> str:
        """The largest few of some parts, with the file's shapes where they differ."""
        sizes = {name: size for part in parts for name, size in getattr(self, part).items()}
        largest = sorted(sizes, key=lambda name: -sizes[name])
        texts = [f"{name} {self.shapes.get(name, '')}".rstrip() for name in largest[:_SHOWN]]
        return ", ".join(texts) + (f" and {len(sizes) - _SHOWN} more" if len(sizes) > _SHOWN else "")

    def to_json(self) -> Json:
        """All of it, with ``shares`` by part."""
        return {**asdict(self), "shares": {part: self.share(part) for part in _PARTS}}


def _words(part: Part) -> str:
    return part.replace("_", " ")


def load_weights(
    model: nn.Module, source: Source, *, rename: Mapping[str, str] | None = None, least_share: float = 0.9,
    head: str | None = None,
) -> LoadReport:  # fmt: skip
    """Load what fits into a model, in its own types and with its ties kept. Nothing is copied before all is checked.

    ``source``: a .safetensors, .pth, .pt or .ckpt file, a package (.tkp), a folder of a run, of one of its checkpoints
    (the best of a run) or of a hub's model, "hf:NAME", or a dict of tensors. ``rename`` turns prefixes of the file's
    names into others, the longest first. ``head`` may differ or be missing; without it: the last linear layer.

    Raises:  ModelError where less than ``least_share`` of the other parameters would be loaded, where a tensor holds
             NaN or infinity, or where the file is none that can be read safely; CheckpointError for a damaged one
    """
    where = _where(source)
    wanted = {name: value for name, value in model.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}
    tensors, found = tensors_of(source, wanted, rename or {})
    fitting = {name: value for name, value in tensors.items() if name in wanted and wanted[name].shape == value.shape}
    _check_values(fitting, wanted, where)
    other = {name: str(tuple(value.shape)) for name, value in tensors.items() if name not in fitting}
    absent = {name: other.get(name, "") for name in wanted if name not in fitting}
    unexpected = {name: tensors[name].numel() for name in other if name not in wanted}
    layer = find_head(model, head)  # also where it is named: a slip is said
    report = report_of(model, where, absent, unexpected, head or layer)
    report.found = found
    check_share(report, least_share)
    with torch.no_grad():
        for name, value in fitting.items():
            wanted[name].copy_(value)
    return report


def tensors_of(source: Source, wanted: TensorTree, rename: Mapping[str, str]) -> tuple[TensorTree, list[str]]:
    """All tensors of a source under the names that fit ``wanted`` best, and what was done to the names for it.

    Raises:  ModelError or CheckpointError where there are none that can be read safely
    """
    where = _where(source)
    tensors, found = _unwrapped(source if isinstance(source, Mapping) else _read(source), where)
    tensors, taken_off = _aligned(_renamed(tensors, rename, where), wanted, where)
    return tensors, found + taken_off


def _where(source: Source) -> str:
    return "a dict" if isinstance(source, Mapping) else str(source)


def report_of(
    model: nn.Module, source: str, absent: Mapping[str, str], unexpected: Mapping[str, int], head: str | None
) -> LoadReport:
    """The report of a load that left ``absent`` as they were: by name, the shape in the file or "" where not in it."""
    report = LoadReport(source, unexpected=dict(unexpected))
    names_of: dict[int, tuple[Tensor, list[str]]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names_of.setdefault(id(parameter), (parameter, []))[1].append(name)
    for tied, names in names_of.values():
        lacking = all(name in absent for name in names)
        shape = next((absent[name] for name in names if absent.get(name)), "")
        part: Part = "missing" if not shape else "other_shape"
        part = "matched" if not lacking else "reinitialised" if within(names[0], head) else part
        getattr(report, part)[names[0]] = tied.numel()
        if lacking and shape:
            report.shapes[names[0]] = f"{shape} in the file, {tuple(tied.shape)} in the model"
    parameters = {name for _, names in names_of.values() for name in names}
    buffers = [name for name, value in model.state_dict().items() if name not in parameters]
    report.num_buffers, report.missing_buffers = len(buffers), [name for name in buffers if name in absent]
    matched = sum(size for name, size in report.matched.items() if not within(name, head))
    trunk = matched + sum(report.missing.values()) + sum(report.other_shape.values())
    report.trunk_share = matched / trunk if trunk else 1.0
    return report


def check_share(report: LoadReport, least_share: float) -> None:
    """Raises:  ModelError where less than the stated share of the trunk was found"""
    if report.trunk_share >= least_share:
        return
    parts: tuple[Part, ...] = ("missing", "other_shape", "unexpected")
    lists = [f"{_words(part)}: {report.listed(part)}" for part in parts if getattr(report, part)]
    raise ModelError(
        "too little of these weights fits the model", where=report.source,
        got=f"{report.trunk_share:.1%} of the parameters but the head's; " + "; ".join(lists),
        expected=f"at least {least_share:.0%}",
        fix='model.rename = { "old." = "new." } renames, model.weights_share asks for less',
    )  # fmt: skip


def check_finite(tensors: Iterable[tuple[str, Tensor]], where: str) -> None:
    """Raises:  ModelError naming the first tensor with NaN or infinity in it"""
    for name, value in tensors:
        if value.is_floating_point() and not torch.isfinite(value.float()).all():
            raise ModelError(
                "these weights are no numbers", where=where, got=f"NaN or infinity in {name}",
                expected="finite numbers", fix="take another checkpoint",
            )  # fmt: skip


def _check_values(fitting: TensorTree, wanted: TensorTree, where: str) -> None:
    first: dict[int, str] = {}
    for name, value in fitting.items():
        target = wanted[name]
        if target.is_meta or target.is_floating_point() != value.is_floating_point():
            raise ModelError("the model cannot hold this tensor", where=f"{where}: {name}", got=value.dtype,
                             expected=f"{target.dtype} on the device {target.device}")  # fmt: skip
        other = first.setdefault(id(target), name)
        if other != name and not torch.equal(fitting[other], value):
            raise ModelError(
                "two parameters that the model ties have different values", where=where, got=f"{other} and {name}",
                expected="the same values", fix=f'model.rename = {{ "{name}" = "unused" }} leaves one out',
            )  # fmt: skip
    check_finite(fitting.items(), where)


def _unwrapped(data: Mapping[str, Any], where: str) -> tuple[TensorTree, list[str]]:
    """The tensors by name, and what they were wrapped in."""
    found: list[str] = []
    while inner := next((key for key in _WRAPPERS if _holds_tensors(data.get(key))), None):
        found.append(f"in {inner!r}")
        data = data[inner]
    tensors = dict(_flat(data, ""))
    if not tensors:
        raise ModelError(
            "there are no weights in this file", where=where,
            got=f"keys {', '.join(map(str, list(data)[:8]))}" if data else "nothing", expected="tensors by name",
        )  # fmt: skip
    if any(_COMPILED in name for name in tensors):
        found.append(f"{_COMPILED!r} taken off")
        tensors = {name.replace(_COMPILED, ""): value for name, value in tensors.items()}
    return tensors, found


def _holds_tensors(value: Any) -> bool:
    items = value.values() if isinstance(value, Mapping) else ()
    return any(isinstance(item, Tensor) or _holds_tensors(item) for item in items)


def _flat(data: Mapping[Any, Any], prefix: str) -> Iterable[tuple[str, Tensor]]:
    for key, value in data.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{key}", value
        elif isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")


def _renamed(tensors: TensorTree, rules: Mapping[str, str], where: str) -> TensorTree:
    ordered, used, made = sorted(rules, key=len, reverse=True), set(), {}
    for name, value in tensors.items():
        rule = next((old for old in ordered if name.startswith(old)), "")
        used.add(rule)
        new = rules[rule] + name.removeprefix(rule) if rule in rules else name
        if new in made:
            raise ModelError("two tensors get one name", where="model.rename", got=f"{new!r}, from {name!r} too")
        made[new] = value
    idle = next((old for old in ordered if old not in used), None)
    if idle is not None:
        starts = sorted({f"{name.split('.')[0]}." for name in tensors})
        raise ModelError(
            "a rule renames nothing", where=f"model.rename: {idle!r}", got=f"no name in {where} begins so",
            expected=f"one of {', '.join(starts[:12])}", fix=nearest(idle, starts),
        )  # fmt: skip
    return made


def _aligned(tensors: TensorTree, wanted: TensorTree, where: str) -> tuple[TensorTree, list[str]]:
    """The tensors under the names that fit the most of the model: one prefix less, one more, or both."""

    def moved(pair: tuple[str, str]) -> dict[str, str]:
        """New name → the file's; a name that another gets too, as "b" beside "a.b", gives way to it."""
        strip, add = pair
        in_turn = sorted(tensors, key=lambda name: name.startswith(strip))
        return {add + name.removeprefix(strip) if name.startswith(strip) else name: name for name in in_turn}

    def fit(pair: tuple[str, str]) -> int:
        fitting = (new for new, old in moved(pair).items() if new in wanted and wanted[new].shape == tensors[old].shape)
        return sum(wanted[new].numel() for new in fitting)

    pairs = list(product(_prefixes(tensors), _prefixes(wanted)))
    fits = {pair: fit(pair) for pair in pairs}
    strip, add = best = max(pairs, key=lambda pair: fits[pair])
    rival = next((pair[0] for pair in pairs if pair[1] == add and pair[0] != strip and fits[pair] == fits[best]), "")
    if rival and strip and not rival.startswith(strip):
        raise ModelError(
            "two sets of weights fit the model", where=where, got=f"those below {strip!r} and those below {rival!r}",
            expected="one of them", fix=f'model.rename = {{ "{strip}" = "" }} takes the first',
        )  # fmt: skip
    said = [f"{prefix!r} {what}" for prefix, what in ((strip, "taken off"), (add, "put before")) if prefix]
    return {new: tensors[old] for new, old in moved(best).items()}, said


def _prefixes(names: Iterable[str]) -> list[str]:
    """What at least half of the names begin with, up to three parts deep; "" first."""
    parts = [name.split(".")[:-1][:_PREFIX_DEPTH] for name in names]
    counts = Counter(".".join(part[: i + 1]) + "." for part in parts for i in range(len(part)))
    return ["", *(prefix for prefix, count in counts.items() if 2 * count >= len(parts))]


def _read(source: str | Path) -> Mapping[str, Any]:
    path = fetched(str(source)) if str(source).startswith(HUB) else Path(source).expanduser()
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        near = nearest(path.name, [file.name for file in path.parent.glob("*")]) if path.parent.is_dir() else ""
        raise ModelError(
            "there are no such weights", where=source, got=f"no file or folder {path}", fix=near,
            expected="a .safetensors, .pth, .pt, .ckpt or .tkp file, the folder of a run, or hf:NAME",
        )  # fmt: skip
    readers = {".safetensors": read_safetensors, ".json": _read_shards, ".tkp": _read_package,
               **dict.fromkeys(_PICKLES, _read_pickle)}  # fmt: skip
    if path.suffix not in readers:
        raise ModelError("this is no file of weights", where=path, got=f"a file that ends in {path.suffix!r}",
                         expected=", ".join(readers))  # fmt: skip
    return readers[path.suffix](path)


def _read_package(path: Path) -> Mapping[str, Any]:
    return Archive.open(path).tensors(PARAMETERS)


def _read_pickle(path: Path) -> Mapping[str, Any]:
    try:
        data = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        if isinstance(data, Mapping):
            return data
        said = f"a {type(data).__name__}"
    except Exception as error:  # what a broken or hostile file may raise is without end
        lines = [line.strip() for line in str(error).splitlines()] or [type(error).__name__]
        said = next((line for line in lines if "GLOBAL" in line), lines[0])
    raise ModelError(
        "this file cannot be read as tensors alone, and code in it is not run", where=path, got=said,
        expected="tensors by name, as torch.save(model.state_dict(), …) writes them",
        fix="write it so where it was made, or as .safetensors",
    )  # fmt: skip


def _read_shards(index: Path) -> Mapping[str, Any]:
    try:
        files = sorted(set(read_json(index)["weight_map"].values()))
        outside = [file for file in files if Path(file).name != file or file.endswith(".json")]
    except (KeyError, TypeError, AttributeError):
        files, outside = [], ["no weight_map"]
    if outside:
        raise ModelError("this is no index of weights", where=index, got=outside[0], expected="files beside it by name")
    return {name: value for file in files for name, value in _read(index.parent / file).items()}


def _read_folder(path: Path) -> Mapping[str, Any]:
    run = RunFolder(path)
    if run.run_file.is_file():
        steps = [manifest.parent for manifest in sorted(run.checkpoints.glob("step-*/manifest.json"))]
        if not steps:
            raise ModelError("this run has no checkpoint", where=path, fix="torchkeep resume trains on")
        hint = run.checkpoints / "best.json"
        named = str(read_json(hint)) if hint.is_file() else ""
        return _read_checkpoint(next((step for step in steps if step.name in named), steps[-1]))
    if (path / "manifest.json").is_file():
        return _read_checkpoint(path)
    if (path / HEAD).is_file():
        return _read_package(path)
    found = next((path / name for name in _IN_A_FOLDER if (path / name).is_file()), None)
    if found is None:
        raise ModelError(
            "there are no weights in this folder", where=path, got=f"{sum(1 for _ in path.iterdir())} files",
            expected=f"a run's folder, one of its checkpoints, or one with {' or '.join(_IN_A_FOLDER[::2])}",
        )  # fmt: skip
    return _read(found)


def _read_checkpoint(path: Path) -> Mapping[str, Any]:
    """A checkpoint's parameters, or their moving average where it has one, each file as its manifest says."""

    def whole(file: str) -> Any:
        data, receipt = read_with_receipt(path / file)
        if (receipt.size_bytes, receipt.checksum) != (files[file]["size_bytes"], files[file]["xxh3_128"]):
            raise DamagedError(
                "this checkpoint is damaged", where=path, got=f"{file} has other content than was written",
                expected="what its manifest says", fix="torchkeep checkpoints RUN lists the whole ones",
            )  # fmt: skip
        return data

    def part_of(part: str) -> Any:
        return unpack(head["state"][part], read_safetensors(whole(f"{head['files'][part]}.safetensors")))

    try:
        files, head = read_json(path / "manifest.json")["files"], read_json(path / "state.json")
        whole("state.json")
        model, optimizer = part_of("model"), head["state"].get("optimizer")
        has_average = isinstance(optimizer, dict) and optimizer.get("average")
        average = part_of("optimizer")["average"] if has_average else {}
        return {name: average.get(name, value) for name, value in model.items()}
    except (KeyError, TypeError, AttributeError, OSError) as error:
        raise CheckpointError("this is no checkpoint with a model", where=path, got=repr(error),
                              expected="one of a training, with a part called model") from None  # fmt: skip
