"""A package: a model's form, its parameters, how it is asked and what its answers mean, in one file that runs no code.

``architecture.json`` is the form, ``parameters.safetensors`` the tensors, ``preprocess.json`` how inputs are read,
``labels.json`` the classes and what an output means, ``metrics.json`` and ``provenance.json`` where it comes from,
``selftest.safetensors`` inputs with the outputs that they must give, ``README.md`` the card, ``base.json`` what a delta
leaves out. All is checked when it is loaded, and again before it is written.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field as Setting
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..archive import CARD, PARAMETERS, Archive, write_archive
from ..contracts import INDEX, Batch, Field, Json, KeyedDataset, Schema, TensorTree
from ..data.arrays import Columns
from ..data.foreign import as_dataset
from ..data.loader import Loader
from ..data.readers import TOKENIZER, Reader, reader_from_json, reader_to_json
from ..data.reading import valid_rows
from ..data.sources import DataSettings
from ..errors import ModelError, PackageError, SettingsError, TorchkeepError
from ..model.build import ModelSettings
from ..model.hub import HUB
from ..model.weights import tensors_of
from ..settings import Settings, check
from ..tensors import tensor_sha256, to_json, to_safetensors
from ..training.device import keep_freed_memory
from ..usercode import is_reference, read_reference
from .architecture import built, coded, files_of, without_ties
from .card import model_card
from .contract import Asked, Contract
from .graph import DTYPES, GraphModel
from .hub import open_archive

ARCHITECTURE, PREPROCESS, LABELS = "architecture.json", "preprocess.json", "labels.json"
METRICS, PROVENANCE, SELFTEST, BASE = "metrics.json", "provenance.json", "selftest.safetensors", "base.json"
_READING = "reading/"  # files that reading inputs takes, such as a tokenizer's

_NAMES = {ARCHITECTURE, PARAMETERS, PREPROCESS, LABELS, METRICS, PROVENANCE, SELFTEST, CARD, BASE, _READING + TOKENIZER}

_INPUT, _OUTPUT = "input", "output"
_EXAMPLES, _TOKENS, _LARGE = 2, 8, 1 << 16  # samples, tokens of each; numbers of one of which there is but one
_MOST_SAMPLES, _MOST_ASKED, _MOST_NESTED = 16, 1 << 26, 8  # of a self-test: samples, numbers, dicts in one another
_MOST_IN_BATCH = 1 << 31  # numbers
_ROOM, _GROWTH, _MOST_NUMBERS = 1 << 26, 1 << 6, 1 << 29  # in one tensor: always, for each one that is there, at all
_TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2, "fp16": 1e-2}
"""Largest difference, over the largest expected value: other kernels and other processors sum in other orders."""


@dataclass
class Contents:
    """What goes into a package. ``form`` is a registered form with its files; without it the model becomes a graph.

    ``example`` is a batch as the reader gives it, of which the first samples become the self-test. ``base`` names the
    weights that parameters equal to them are left out for.
    """

    name: str
    model: nn.Module
    contract: Contract
    example: Batch
    form: tuple[dict[str, Json], dict[str, bytes]] | None = None
    metrics: Json = field(default_factory=dict)
    provenance: Json = field(default_factory=dict)
    base: str | None = None
    rename: Mapping[str, str] = field(default_factory=dict)


class _Labels(Settings):
    classes: dict[str, list[str]] = Setting(default_factory=dict)
    loss: str = ""
    inputs: list[str] | str | None = None
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    batch_size: int = Setting(default=32, ge=1, le=1 << 20)
    calibration: dict[str, Any] = Setting(default_factory=dict)


class _Base(Settings):
    source: str
    sha256: str
    tensors: dict[str, tuple[str, list[int]]]
    rename: dict[str, str] = Setting(default_factory=dict)


class Package:
    """A package that was loaded: ``.model`` in eval mode, ``.contract``, ``.asked`` to ask it with batches."""

    def __init__(self, archive: Archive, model: nn.Module, contract: Contract, device: str | torch.device | None):
        self._archive, self._device = archive, device
        self.path, self.identity = archive.path, archive.identity
        self.name = str(archive.head.get("name", archive.path.stem))
        self.model, self.contract = model, contract

    @cached_property
    def architecture(self) -> Json:
        """The form of the model."""
        return self._archive.json(ARCHITECTURE)

    @cached_property
    def metrics(self) -> Json:
        """What was measured of it, by split and metric."""
        return self._optional(METRICS)

    @cached_property
    def provenance(self) -> Json:
        """The run it comes from: recipe, seed, data, code, environment, course."""
        return self._optional(PROVENANCE)

    @cached_property
    def card(self) -> str:
        """Its README.md."""
        return bytes(self._archive.read(CARD)).decode("utf-8", "replace") if CARD in self._archive.names else ""

    @cached_property
    def selftest(self) -> tuple[Batch, Tensor]:
        """A batch as the reader gives it, and the outputs expected of it, float32."""
        return _selftest_in(self._archive.tensors(SELFTEST))

    @cached_property
    def asked(self) -> Asked:
        """The model to be asked with batches, on the device that was named, else the best there is."""
        asked = Asked(self.model, self.contract, self._device)
        if asked.device.type == "cpu":
            keep_freed_memory()
        return asked

    def _optional(self, name: str) -> Json:
        return self._archive.json(name) if name in self._archive.names else {}


def load_package(
    source: str | Path, *, base: Any = None, trust_code: str | None = None, device: str | torch.device | None = None
) -> Package:
    """Open a package and see that its model gives the outputs that were stored with it. No code of others runs.

    ``source`` is a file, a folder, or ``hf:USER/NAME``. ``base`` is what a delta package was made against, as
    ``tk.load_weights`` takes it. ``trust_code`` is the sha256 of code that the package carries and the caller has read.

    Raises:  PackageError for whatever is damaged, hostile or does not fit; UntrustedCodeError for code without its hash
    """
    archive = open_archive(source)
    contract = contract_in(archive, device)
    tensors = archive.tensors(PARAMETERS)
    if BASE in archive.names:
        left_out = _left_out(archive, base)
        if twice := sorted(tensors.keys() & left_out.keys()):
            raise PackageError("a tensor is here and in the base", where=PARAMETERS, got=twice[0][:200],
                               expected="each in one of them")  # fmt: skip
        tensors = tensors | left_out
    if name := _not_finite(tensors):
        raise PackageError("a parameter holds NaN or infinity", where=name[:200], expected="finite numbers")
    model = built(archive.json(ARCHITECTURE), tensors, contract.schema, _members_of(archive), trust_code)
    package = Package(archive, model, contract, device)
    _check_selftest(model, contract, *package.selftest, str(archive.path), device or "cpu")
    return package


def _members_of(archive: Archive) -> Any:
    def member(name: str) -> bytes:
        if name not in archive.names:
            raise KeyError(name)
        return bytes(archive.read(name))

    return member


def contract_in(archive: Archive, device: str | torch.device | None = None) -> Contract:
    """What a package says of itself, nothing built: each member has the form that is written, and there is no other.

    Raises:  PackageError naming the member
    """
    more = sorted(set(archive.names) - _NAMES - files_of(archive.json(ARCHITECTURE)))
    if more:
        raise PackageError("a package of this form has no such member", where=f"{more[0]} in {archive.path}",
                           expected=", ".join(sorted(_NAMES)))  # fmt: skip
    if CARD in archive.names:
        archive.read(CARD)  # is it damaged?
    _check_origin(*(archive.json(name) if name in archive.names else {} for name in (METRICS, PROVENANCE)))
    if BASE in archive.names:
        _checked(_Base, archive.json(BASE), BASE)
    blobs = {
        name.removeprefix(_READING): bytes(archive.read(name)) for name in archive.names if name.startswith(_READING)
    }
    reader = reader_from_json(archive.json(PREPROCESS), blobs)
    said = _checked(_Labels, archive.json(LABELS), LABELS)
    stated = {name: list(reader.schema[name].classes) for name in reader.schema.targets}
    if said.classes != stated:
        raise PackageError("the classes are not those of the schema", where=LABELS, got=str(said.classes)[:200],
                           expected=str(stated)[:200])  # fmt: skip
    temperature = said.calibration.get("temperature", 1.0)
    if type(temperature) not in (int, float) or not 1e-3 <= temperature <= 1e3:
        raise PackageError("this is no temperature", where=LABELS, got=str(temperature)[:80], expected="about 1")
    shapes = [field.shape or () for field in reader.schema.values() if not field.is_target]
    numbers = max((math.prod(size or 1 for size in shape) for shape in shapes), default=1)
    if said.batch_size * numbers > _MOST_IN_BATCH:
        raise PackageError(
            "a batch of these inputs would fit into no memory", where=LABELS,
            got=f"batch_size {said.batch_size:,} of {numbers:,} numbers", expected=f"{_MOST_IN_BATCH:,} in all",
        )  # fmt: skip
    on_gpu = device is not None and torch.device(device).type == "cuda"
    precision = said.precision if on_gpu else "fp32"  # what a processor computes in half precision is slower
    return Contract(reader, said.loss, said.inputs, precision, said.batch_size, said.calibration)


def _checked(form: type[Any], data: Json, where: str) -> Any:
    try:
        return check(form, data, where)
    except SettingsError as error:
        raise PackageError("this member is not what was written", where=where, got=f"{error.where}: {error.got}"[:300],
                           expected=error.expected[:300]) from None  # fmt: skip


def _left_out(archive: Archive, base: Any) -> TensorTree:
    """What a delta package takes from its base."""
    said: _Base = _checked(_Base, archive.json(BASE), BASE)
    if base is None:
        raise PackageError(
            "this package holds only what was trained, and needs its base", where=archive.path,
            got="no base", expected=f"{said.source[:200]}, sha256 {said.sha256[:64]}",
            fix="base=… in load_package, or --base on the command line, names the weights it began with",
        )  # fmt: skip
    try:
        wanted = {name: torch.empty(shape, dtype=DTYPES[kind], device="meta")
                  for name, (kind, shape) in said.tensors.items()}  # fmt: skip
    except (RuntimeError, KeyError, OverflowError) as error:
        raise PackageError(
            "these are no tensors", where=BASE, got=str(error)[:200], expected="types and shapes"
        ) from None
    found = _from_base(base, wanted, said.rename)
    identity = tensor_sha256(found)
    if found.keys() != wanted.keys() or identity != said.sha256:
        raise PackageError(
            "this is not the base that the package was made against",
            where=base if isinstance(base, str | Path) else "base",
            got=f"sha256 {identity} of {len(found)} tensors", expected=f"sha256 {said.sha256[:64]} of {len(wanted)}",
            fix=f"it was made against {said.source[:200]}",
        )  # fmt: skip
    return found


def _from_base(base: Any, wanted: TensorTree, rename: Mapping[str, str]) -> TensorTree:
    """The base's tensors that have the model's names and shapes, in the model's types."""
    tensors, _ = tensors_of(base, wanted, rename)
    return {name: tensors[name].detach().to("cpu", own.dtype) for name, own in wanted.items()
            if name in tensors and tensors[name].shape == own.shape}  # fmt: skip


def _check_origin(metrics: Json, origin: Json) -> None:
    measured = metrics.get("values", metrics) if isinstance(metrics, dict) else None
    if not isinstance(measured, dict) or not all(type(value) in (int, float) for value in measured.values()):
        raise PackageError("these are no metrics", where=METRICS, got=str(metrics)[:200], expected="numbers by name")
    if not isinstance(origin, dict) or not isinstance(origin.get("code"), dict | None):
        raise PackageError("this is no origin", where=PROVENANCE, got=str(origin)[:200], expected="facts by name")


def _selftest_in(tensors: TensorTree) -> tuple[Batch, Tensor]:
    batch: Batch = {}
    try:
        for name in sorted(tensors.keys() - {_OUTPUT}):
            kind, *path, last = name.split("/")
            if kind != _INPUT or not last or len(path) > _MOST_NESTED or not 0 < len(tensors[name]) <= _MOST_SAMPLES:
                raise ValueError(name)
            place = batch
            for part in path:
                place = place.setdefault(part, {})
                if not isinstance(place, dict):
                    raise ValueError(name)
            place[last] = tensors[name]
        numbers = sum(tensor.numel() for tensor in tensors.values())
        if not batch or numbers > _MOST_ASKED:
            raise ValueError(f"{numbers:,} numbers")
        return batch, tensors[_OUTPUT]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        expected = f"{_INPUT}/NAME of 1 to {_MOST_SAMPLES} samples, and {_OUTPUT}"
        raise PackageError("this self-test is none", where=SELFTEST, got=str(error)[:200], expected=expected) from None


class _Bounded(TorchFunctionMode):
    """Looks at the size of what a layer gives before it is made: wide layers and a large input, which make a small
    file, would take any memory."""

    def __init__(self, most: int):
        super().__init__()
        self._most = most

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if len(args) > 1 and isinstance(args[0], Tensor) and isinstance(args[1], Tensor):
            self._check(_most_given(getattr(func, "__name__", ""), args, kwargs))
        made = func(*args, **kwargs)
        self._check(made.numel() if isinstance(made, Tensor) else 0)
        return made

    def _check(self, numbers: int) -> None:
        if numbers > self._most:
            raise ModelError("the model takes too much memory", got=f"{numbers:,} numbers in one tensor",
                             expected=f"at most {self._most:,} for such inputs and parameters")  # fmt: skip


def _most_given(name: str, args: Any, kwargs: Mapping[str, Any]) -> int:
    """How many numbers a layer gives, at most; 0 where it gives about what it takes."""
    given, other = args[:2]
    if name.startswith("conv") and given.ndim > 2:
        strides = args[3] if len(args) > 3 else kwargs.get("stride", 1)
        steps = math.prod(strides) if isinstance(strides, tuple | list) else strides ** (given.ndim - 2)
        return int(len(given) * given[0, 0].numel() * other.shape[0] // (1 if "transpose" in name else max(1, steps)))
    if name == "embedding":  # whichever of the two is the table
        return int(min(given.numel(), other.numel()) * max(given.shape[-1:] + other.shape[-1:]))
    axis = {"linear": 0, "scaled_dot_product_attention": -2, "matmul": -1, "bmm": -1}.get(name)
    if axis is None or min(given.ndim, other.ndim) < 2:
        return 0
    return int(given.numel() // max(1, given.shape[-1]) * other.shape[axis])


def _check_selftest(
    model: nn.Module, contract: Contract, batch: Batch, expected: Tensor, where: str, device: str | torch.device = "cpu"
) -> None:  # fmt: skip
    """Raises:  PackageError where the stored inputs do not give the stored outputs"""
    there = sum(tensor.numel() for tensor in (*_flat(batch).values(), *model.state_dict().values()))
    try:
        bounded = _Bounded(min(max(_ROOM, _GROWTH * there), _MOST_NUMBERS))
        guard: Any = contextlib.nullcontext() if isinstance(model, GraphModel) else bounded  # a graph looks for itself
        with warnings.catch_warnings(action="ignore"), guard:
            found = Asked(model, contract, device)(batch)
    except (TorchkeepError, RuntimeError, ValueError, TypeError, LookupError) as error:
        said = f"{error.what}: {error.got}" if isinstance(error, TorchkeepError) else f"{type(error).__name__}: {error}"
        raise PackageError("the self-test of this package fails", where=where, got=said[:400],
                           expected=getattr(error, "expected", "")[:300]) from None  # fmt: skip
    allowed = _TOLERANCE[contract.precision]
    got = f"outputs {tuple(found.shape)}"
    if found.shape == expected.shape and expected.is_floating_point():
        scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
        difference = float((found - expected).abs().max()) / scale if expected.numel() else 0.0
        if difference <= allowed:
            return
        got = f"outputs that differ by {difference:.3g} of the largest"
    raise PackageError(
        "the self-test of this package fails: the model answers otherwise than when it was packaged", where=where,
        got=got,
        expected=f"outputs {tuple(expected.shape)} within {allowed:g}",
        fix="it may be of another version: provenance.json has the versions that it was made with",
    )  # fmt: skip


# --- writing


def write_package(contents: Contents, path: Path, *, folder: bool = False) -> Archive:
    """Write a package durably, once it was built from what will be written and its self-test passed. Same contents,
    same bytes.

    Raises:  ModelError where the model has no form that can be kept; PackageError where the path is taken;
             StorageError where the disk refuses
    """
    model = contents.model
    asked = Asked(model, replace(contents.contract, precision="fp32"), "cpu")
    batch = _first_rows(contents.example, contents.contract.schema)
    expected = asked(batch)
    form, files, tensors = _formed(contents, asked, batch)
    least, _ = form.get("graph", {}).get("axes", {}).get("length", (_TOKENS + 1, None))
    if least <= _TOKENS:  # tokens, of which any number goes: the self-test takes few
        batch = {name: value[:, :_TOKENS] if value.ndim == 2 else value for name, value in batch.items()}
        expected = asked(batch)
    kept, tied = without_ties(tensors)
    form = form | ({"tied": tied} if tied else {})
    if name := _not_finite(kept):
        raise ModelError(
            "a parameter holds NaN or infinity, and is not handed on", where=name, expected="finite numbers",
            fix="package a checkpoint from before: --checkpoint STEP",
        )  # fmt: skip
    delta, base = _delta(kept, contents) if contents.base else (kept, None)
    rebuilt = built(form, kept, contents.contract.schema, files.__getitem__, form.get("sha256"))
    _selftest_in(_flat(batch) | {_OUTPUT: expected})
    _check_selftest(rebuilt, asked.contract, batch, expected, contents.name)
    _check_origin(contents.metrics, contents.provenance)
    preprocess, blobs = reader_to_json(contents.contract.reader.like, contents.contract.reader.settings)
    members: dict[str, Any] = {
        ARCHITECTURE: to_json(form), PREPROCESS: to_json(preprocess), LABELS: to_json(_labels_of(contents.contract)),
        PARAMETERS: to_safetensors(delta), SELFTEST: to_safetensors(_flat(batch) | {_OUTPUT: expected}), **files,
        **{_READING + name: data for name, data in blobs.items()},
        **{name: to_json(data, indent=True) for name, data in
           ((METRICS, contents.metrics), (PROVENANCE, contents.provenance), (BASE, base)) if data},
    }  # fmt: skip
    members[CARD] = model_card(_facts(contents, form, kept, base)).encode()
    write_archive(path, members, head={"name": contents.name}, folder=folder)
    return Archive.open(path)


def _first_rows(example: Batch, schema: Schema) -> Batch:
    """The inputs of a few samples: what the self-test asks. Texts are cut short, for every load pays for it."""
    is_text = any(schema[name].kind == "tokens" for name in schema.inputs)
    is_large = any(isinstance(value, Tensor) and value[:1].numel() > _LARGE for value in example.values())
    count = 1 if is_large else _EXAMPLES

    def cut(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: cut(inner) for name, inner in value.items()}
        if not isinstance(value, Tensor) or not value.ndim:
            return value
        value = value[:count, :_TOKENS] if is_text and value.ndim == 2 else value[:count]
        return value.detach().cpu().contiguous()

    inputs = {name: value for name, value in valid_rows(example).items() if name not in (*schema.targets, INDEX, "id")}
    return {name: cut(value) for name, value in inputs.items() if isinstance(value, Tensor | Mapping)}


def _flat(batch: Mapping[str, Any], place: str = _INPUT) -> TensorTree:
    found: TensorTree = {}
    for name, value in batch.items():
        found |= _flat(value, f"{place}/{name}") if isinstance(value, Mapping) else {f"{place}/{name}": value}
    return found


def _formed(contents: Contents, asked: Asked, batch: Batch) -> tuple[dict[str, Json], dict[str, bytes], TensorTree]:
    """The form, its files and its tensors; a graph where there is no name, or where the name gives another model."""
    from .exported import export_graph  # imports torch's exporter, .5 s that loading has no need of

    form, files = contents.form or ({}, {})
    tensors = _tensors_of(contents.model)
    kept, tied = without_ties(tensors)
    if form and form["kind"] != "code":
        with contextlib.suppress(PackageError):
            built(form | {"tied": tied}, kept, contents.contract.schema, files.__getitem__)
            return form, files, tensors
    try:
        graph, tensors = export_graph(contents.model, *_given(contents.model, asked, batch))
    except ModelError:
        if form.get("kind") != "code":
            raise
        return form, files, tensors
    others = {name: tensors[first] for name, first in tied.items() if first in tensors and name not in tensors}
    form = {"kind": "graph", "class_name": type(contents.model).__name__, "graph": graph}
    return form, {}, tensors | others  # a state dict has every name of a tied parameter


def _given(model: nn.Module, asked: Asked, batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the model's forward gets of a batch."""
    given: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    hook = model.register_forward_pre_hook(lambda _, args, kwargs: given.append((args, kwargs)), with_kwargs=True)
    try:
        asked(batch)
    finally:
        hook.remove()
    return given[0]


def _tensors_of(model: nn.Module) -> TensorTree:
    odd = [name for name, value in model.state_dict().items() if not isinstance(value, Tensor)]
    if odd:
        raise ModelError("this model keeps a state that is no tensor", where=odd[0], expected="parameters and buffers")
    return {name: value.detach() for name, value in model.state_dict().items()}


def _not_finite(tensors: TensorTree) -> str:
    """The first parameter that holds NaN or infinity; a mask may."""
    numbers = ((name, tensor) for name, tensor in tensors.items() if tensor.is_floating_point() and "mask" not in name)
    return next((name for name, tensor in numbers if not _is_finite(tensor)), "")


def _is_finite(tensor: Tensor) -> bool:
    tensor = tensor if tensor.element_size() > 1 else tensor.float()  # of 8 bits there are no sums
    # a sum shows NaN and infinity in one reading; that of very large numbers may be one though they are not
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


def _delta(tensors: TensorTree, contents: Contents) -> tuple[TensorTree, Json]:
    """What differs from the base, and what is left out for it."""
    held = _from_base(contents.base, tensors, contents.rename)
    same = {
        name: held[name]
        for name, own in tensors.items()
        if name in held and own.dtype in DTYPES.values() and torch.equal(held[name], own.cpu())
    }
    if not same:
        raise PackageError(
            "nothing in this model is as it is in the base", where=contents.base, got=f"{len(held)} names in common",
            expected="the weights that the model began with",
        )  # fmt: skip
    source = str(contents.base)
    rows = {name: [str(own.dtype).removeprefix("torch."), list(own.shape)] for name, own in same.items()}
    said = {"source": source if source.startswith(HUB) else Path(source).name, "sha256": tensor_sha256(same),
            "tensors": rows, "rename": dict(contents.rename)}  # fmt: skip
    return {name: tensor for name, tensor in tensors.items() if name not in same}, said


def _labels_of(contract: Contract) -> Json:
    schema, inputs = contract.schema, contract.inputs
    return {
        "classes": {name: list(schema[name].classes) for name in schema.targets}, "loss": contract.loss,
        "inputs": list(inputs) if isinstance(inputs, list | tuple) else inputs,
        "precision": contract.precision, "batch_size": contract.batch_size, "calibration": contract.calibration,
    }  # fmt: skip


def _facts(contents: Contents, form: Json, tensors: TensorTree, base: Json) -> Json:
    """What the card is made of."""
    parameters = {name for name, _ in contents.model.named_parameters()}
    count = sum(tensor.numel() for name, tensor in tensors.items() if name in parameters)
    said = {key: form.get(key) for key in ("kind", "name", "class_name") if form.get(key)}
    return {
        "name": contents.name, "architecture": said | {"num_parameters": count}, "schema": contents.contract.schema,
        "loss": contents.contract.loss, "calibration": contents.contract.calibration, "metrics": contents.metrics,
        "provenance": contents.provenance, "sha256": tensor_sha256(tensors), "base": base,
        "size_bytes": sum(tensor.nbytes for tensor in tensors.values()),
    }  # fmt: skip


def save_package(
    model: nn.Module, path: str | Path, example: Any = None, *, dataset: Any = None, classes: Sequence[str] = (),
    loss: str = "", inputs: Any = None, metrics: Mapping[str, float] | None = None, code: str | None = None,
    base: str | Path | None = None, name: str | None = None, folder: bool = False,
) -> Path:  # fmt: skip
    """Write a model of your own as a package that loads without its class: ``tk.load_package(path).model``.

    ``example``: what the model takes: a tensor (B, …), a tuple of arguments, or a dict of keywords. ``dataset`` in its
    place also keeps how inputs are read, so that the package predicts files and tables. ``classes`` name the outputs.
    ``code``: ``file.py:function`` whose call gives this model, carried along where the model cannot be a graph; it runs
    only by its hash. ``base``: weights that the model began with; what is equal to them is left out. ``metrics`` are
    stated as they are given.

    Raises:  ModelError where the example does not fit or no form can be kept; PackageError where the path is taken
    """
    data, batch = _data_of(model, example, dataset, tuple(classes))
    keys = None if isinstance(example, Tensor | Mapping) or example is None else tuple(batch)
    contract = Contract(Reader(data, check(DataSettings, {"train": ""}, "save_package")), loss or _loss_of(data.schema),
                        inputs or keys)  # fmt: skip
    form = None
    if code is not None:
        if not is_reference(code):
            raise SettingsError("this names no code", where="code=", got=repr(code), expected="file.py:function")
        form = coded(read_reference(code, Path.cwd()), ModelSettings(name=code), (), model)
    path = Path(path)
    source = str(base) if base is not None else None
    contents = Contents(name or path.stem, model, contract, batch, form, dict(metrics or {}), {}, source)
    return write_package(contents, path, folder=folder).path


def _loss_of(schema: Schema) -> str:
    kind = str(next((schema[name].kind for name in schema.targets), ""))
    return {"label": "cross_entropy", "multilabel": "binary_cross_entropy", "number": "mse"}.get(kind, "")


def _data_of(
    model: nn.Module, example: Any, dataset: Any, classes: tuple[str, ...]
) -> tuple[KeyedDataset, Batch]:  # fmt: skip
    """The dataset that tells how inputs are read, and a batch of it."""
    if dataset is not None:
        data = as_dataset(dataset)
        return data, Loader(data, batch_size=_EXAMPLES, workers=0).peek()
    batch = _named(model, example)
    fields = {key: Field("tensor", tuple(value.shape[1:])) for key, value in batch.items()}
    if classes:
        fields["label"] = Field("label", (), classes, is_target=True)
    none = Columns()
    none.columns, none.schema, none.where = {"": torch.empty(0)}, Schema(fields), "example"
    return none, batch


def _named(model: nn.Module, example: Any) -> Batch:
    if isinstance(example, Mapping):
        batch = dict(example)
    else:
        names = list(inspect.signature(model.forward).parameters) or ["input"]
        values = list(example) if isinstance(example, tuple | list) else [example]
        batch = {names[i] if i < len(names) else f"input_{i}": value for i, value in enumerate(values)}
    odd = [key for key, value in batch.items() if not isinstance(value, Tensor) or not value.ndim]
    if odd or not batch:
        raise ModelError("a package needs an example of what the model takes", where="save_package",
                         got=f"{', '.join(odd) or 'none'}: {type(example).__name__}",
                         expected="a tensor (B, …), a tuple of them, a dict of them, or dataset=…")  # fmt: skip
    return batch
