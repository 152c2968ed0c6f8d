"""A model in the forms of others: ONNX, torch.export's program, a folder of transformers', plain tensors.

Each form answers as the model does before it is written: the package's self-test, at other sizes too.
"""

from __future__ import annotations

import copy
import io
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from .. import __version__, gradients
from ..archive import Archive, write_archive
from ..contracts import Batch, TensorTree
from ..data.generators import kept_generators
from ..data.readers import reader_to_json
from ..errors import ModelError, SettingsError
from ..files import DurableFolder, write_durable
from ..model.freeze import evaluating
from ..model.hub import HUB, open_model
from ..packages import package_of
from ..tensors import read_json, to_json, to_safetensors
from ..training.binding import Binding
from ..training.objective import prediction_of
from .architecture import CONFIG, PREPROCESSOR, without_ties
from .contract import Asked, Contract
from .exported import _free_axes, _plainly, _quiet
from .hub import fetched
from .package import Package

_TOLERANCE = 1e-3  # of the largest output: other kernels sum in other orders
_MOST_BYTES = (1 << 31) - (1 << 24)  # of tensors in one protobuf
_ENDINGS: dict[str, tuple[str, ...]] = {
    "onnx": (".onnx",), "torch-export": (".pt2",), "transformers": (), "state-dict": (".pt", ".pth"),
    "safetensors": (".safetensors",),
}  # fmt: skip
_SIZES: tuple[dict[str, int], ...] = ({}, {"batch": 1}, {"batch": 3})  # {}: the example's own


@dataclass(frozen=True)
class Exported:
    """What was written. ``inputs`` and ``outputs`` are types and shapes by name; ``largest_difference`` is that of any
    output from the model's own."""

    path: Path
    size_bytes: int
    largest_difference: float
    inputs: dict[str, str]
    outputs: dict[str, str]
    opset: int | None = None


def export_onnx(
    asked: Asked, example: Batch, path: Path, *, opset: int | None = None, preprocess: bool = False,
    probabilities: bool = False, identity: str = "",
) -> Exported:  # fmt: skip
    """Write a model as ONNX, once onnxruntime gives what the model gives.

    ``example`` is a batch as the reader gives it. With ``preprocess`` the graph takes images as they are decoded and
    resized, uint8 (B, C, H, W), else normalised ones; with ``probabilities`` it gives these, calibrated, else what the
    model gives. The batch may have any size, and texts any length that the model's code allows.

    Raises:  SettingsError for a path, an option or an opset that cannot be; ModelError where the model has no such
             form, or answers otherwise in it; StorageError where the disk refuses
    """
    check_place(path, "onnx")
    where = "export to ONNX"
    with _quiet():
        onnx, _, runtime = (package_of(name, "onnx", where) for name in ("onnx", "onnxscript", "onnxruntime"))
    traced = _Traced(asked, example, preprocess, probabilities)
    if traced.num_bytes > _MOST_BYTES:
        raise ModelError("an ONNX file cannot hold this model", where=path, got=f"{traced.num_bytes:,} bytes",
                         expected=f"at most {_MOST_BYTES:,}", fix="--to torch-export has no such bound")  # fmt: skip
    try:
        with _quiet():
            made: Any = torch.onnx.export(
                traced.program, (), input_names=list(traced.inputs), output_names=list(traced.outputs),
                opset_version=opset, dynamic_shapes=traced.axes_by_name, verbose=False,
            )  # fmt: skip
            proto = made.model_proto
    except Exception as error:  # whatever the exporter brings
        raise _inexpressible(traced, "ONNX", error) from error
    found = next(row.version for row in proto.opset_import if not row.domain)
    if opset not in (None, found):
        raise SettingsError(
            "this model cannot be had in this opset", where=f"opset {opset}", got=f"opset {found} of torch's exporter",
            expected=f"{found} or above, at most {onnx.defs.onnx_opset_version()}", fix="without it torch chooses",
        )  # fmt: skip
    proto.producer_name, proto.producer_version = "torchkeep", __version__
    onnx.helper.set_model_props(proto, _facts(asked.contract, identity))
    data: bytes = proto.SerializeToString()
    difference = traced.compared(_onnx_runner(runtime, data))
    write_durable(path, data)
    return Exported(path, len(data), difference, traced.inputs, traced.outputs, found)


def _onnx_runner(runtime: Any, data: bytes) -> Callable[[Batch], Tensor]:
    options = runtime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, torch.get_num_threads()

    def run(batch: Batch) -> Tensor:
        found = session.run(None, {name: value.numpy() for name, value in _named(batch).items()})[0]
        return torch.from_numpy(found)

    try:
        session = runtime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise _refused("onnxruntime", error) from error
    return run


def export_program(
    asked: Asked, example: Batch, path: Path, *, preprocess: bool = False, probabilities: bool = False,
    identity: str = "",
) -> Exported:  # fmt: skip
    """Write a model as torch.export's program, once that gives, loaded again, what the model gives.

    ``torch.export.load(path).module()`` is then called with a dict of the inputs. Options as in ``export_onnx``.

    Raises:  as ``export_onnx`` does
    Source:  https://docs.pytorch.org/docs/stable/export.html
    """
    check_place(path, "torch-export")
    traced, file = _Traced(asked, example, preprocess, probabilities), io.BytesIO()
    facts = to_json(_facts(asked.contract, identity)).decode()
    try:
        with _quiet():
            torch.export.save(traced.program, file, extra_files={"torchkeep.json": facts})
            file.seek(0)
            again = torch.export.load(file).module()
    except Exception as error:
        raise _inexpressible(traced, "torch.export's form", error) from error
    difference = traced.compared(again)
    write_durable(path, file.getbuffer())
    return Exported(path, file.getbuffer().nbytes, difference, traced.inputs, traced.outputs)


def export_transformers(package: Package, folder: Path) -> Exported:
    """Write a model of transformers' as a folder that its ``from_pretrained`` loads, once it answers the same.

    The configuration names the classes; a tokenizer and a preprocessor's configuration go with it where there are any.

    Raises:  ModelError for any other model; SettingsError where something is in the folder's place
    """
    form, model, schema = package.architecture, package.model, package.contract.schema
    if form["kind"] != "hf" or not hasattr(model, "save_pretrained"):
        got = form.get("name") or form.get("class_name") or form["kind"]
        raise ModelError(
            "transformers does not know this model", where=package.path, got=f"{form['kind']} {got}",
            expected="a model of hf: with a head of its own", fix="--to onnx, or --to torch-export",
        )  # fmt: skip
    check_place(folder, "transformers")
    batch, expected = package.selftest
    with tempfile.TemporaryDirectory(prefix="torchkeep-", ignore_cleanup_errors=True) as place, _quiet():
        model.save_pretrained(place)  # type: ignore[operator]
        files = {file.name: file.read_bytes() for file in Path(place).iterdir()}
        files[Path(CONFIG).name] = _with_classes(read_json(Path(place, "config.json")), package.contract.classes)
        again = open_model(HUB + place, Path(), schema, expected.shape[-1], {}, reads=True)
        if again.absent or again.unexpected:
            raise _refused("transformers", f"it misses {list(again.absent or again.unexpected)[:3]}")
        difference = _difference(Asked(again.model.eval(), package.contract, "cpu")(batch), expected)
    archive, reader = Archive.open(package.path), package.contract.reader
    if PREPROCESSOR in archive.names:
        files[Path(PREPROCESSOR).name] = bytes(archive.read(PREPROCESSOR))
    files |= reader_to_json(reader.like, reader.settings)[1]  # the tokenizer
    with DurableFolder(folder, manifest=False) as made:
        for name, data in sorted(files.items()):
            made.write(name, data)
    size = sum(map(len, files.values()))
    shapes = {name: _type_text(value, {}) for name, value in _named(batch).items()}
    return Exported(folder, size, difference, shapes, {"logits": _type_text(expected, {})})


def _with_classes(config: Any, classes: Sequence[str]) -> bytes:
    by_id = {str(i): name for i, name in enumerate(classes)}
    by_name = {name: i for i, name in enumerate(classes)}
    return to_json(config | ({"id2label": by_id, "label2id": by_name} if classes else {}), indent=True)


def unpack(source: str | Path, folder: Path) -> Path:
    """Write a package as a folder, member by member, with the same identity. Nothing is built, no code runs.

    Raises:  PackageError where the package is damaged, or something else is in the folder's place
    """
    archive = Archive.open(fetched(str(source)) if str(source).startswith(HUB) else Path(source))
    archive.verify()
    write_archive(folder, {name: archive.read(name) for name in archive.names}, head=archive.head, folder=True)
    return folder


def write_state_dict(model: nn.Module, path: Path) -> Path:
    """Write a plain state dict, which ``torch.load(path, weights_only=True)`` reads; a tied parameter has each name.

    Raises:  SettingsError for a path that cannot be; StorageError where the disk refuses
    """
    check_place(path, "state-dict")
    tensors, file = _tensors_of(model), io.BytesIO()
    kept, tied = without_ties(tensors)
    copies = {name: tensor.clone() for name, tensor in kept.items()}  # a mapped one would drag its file along
    torch.save({name: copies[tied.get(name, name)] for name in tensors}, file)
    write_durable(path, file.getbuffer())
    return path


def write_safetensors(model: nn.Module, path: Path) -> Path:
    """Write the same as a safetensors file.

    Raises:  as ``write_state_dict`` does
    """
    check_place(path, "safetensors")
    write_durable(path, *to_safetensors(_tensors_of(model)))
    return path


def _tensors_of(model: nn.Module) -> TensorTree:
    return {name: value.detach().cpu() for name, value in model.state_dict().items()}


# --- a model as one program


class _Answering(nn.Module):
    """The model as a function of the tensors that it takes of a batch, and nothing else."""

    def __init__(self, model: nn.Module, steps: list[Callable[[Any], Any]]):
        super().__init__()
        self.model, self._steps = model, steps

    def forward(self, batch: Batch) -> Tensor:
        value: Any = batch
        for step in self._steps:
            value = step(value)
        answer: Tensor = value
        return answer


class _Traced:
    """torch.export's program of a model with free sizes, and the batches on which its forms are compared with it."""

    def __init__(self, asked: Asked, example: Batch, preprocess: bool, probabilities: bool):
        model = asked.model if asked.device.type == "cpu" else copy.deepcopy(asked.model)
        contract = asked.contract
        self._asked = Asked(model, replace(contract, precision="fp32"), "cpu")
        self._mover = self._asked.mover
        self._is_raw = _checked_preprocess(contract) if preprocess else False
        self._after = _probabilities(contract) if probabilities else _float
        inputs = {name: value for name, value in example.items() if name not in contract.schema.targets}
        binding = Binding(model, inputs, (), contract.inputs, ())
        self._example = {name: inputs[name] for name in binding.keys}
        leaves, self._tree = pytree.tree_flatten(self._given(self._example))
        before = [self._mover] if self._is_raw else []
        answering = _Answering(model, [*before, binding.call, prediction_of, _float, self._after]).eval()
        free = _free_axes(leaves)[1]
        shapes = self._tree.unflatten([dict.fromkeys(own, Dim.AUTO) for own in free])
        try:
            with _quiet(), kept_generators(), evaluating(model), gradients.none_needed():
                given = (self._given(self._example),)
                self.program = torch.export.export(answering, given, dynamic_shapes=(shapes,), strict=False)
        except Exception as error:  # torch.export raises what it likes
            raise _inexpressible(self, "torch.export's form", error) from error
        self.num_bytes = sum(tensor.nbytes for tensor in self.program.state_dict.values())
        self._describe(free, probabilities)

    def _describe(self, free: list[dict[int, str]], probabilities: bool) -> None:
        """Which sizes stayed free, and what goes in and out."""
        nodes = {node.name: node.meta["val"] for node in self.program.graph.nodes if "val" in node.meta}
        signature = self.program.graph_signature
        leaves = [nodes[name] for name in signature.user_inputs]
        self._free: list[dict[int, str]] = []
        self._ranges, names = {}, {}
        for leaf, own in zip(leaves, free, strict=True):
            self._free.append({})
            for axis, name in own.items():
                size = leaf.shape[axis]
                found = self.program.range_constraints.get(size.node.expr) if isinstance(size, torch.SymInt) else None
                if found is not None:  # else the model's code fixes it
                    self._free[-1][axis], self._ranges[name], names[str(size)] = name, found, name
        self.axes_by_name = (self._tree.unflatten([dict(own) for own in self._free]),)
        given = _named(self._tree.unflatten(leaves))
        self.inputs = {name: _type_text(leaf, names) for name, leaf in given.items()}
        longest = getattr(self._ranges.get("length"), "upper", None)
        if longest is not None and longest < 1 << 31:
            self.inputs = {name: text.replace("length", f"length to {longest}") for name, text in self.inputs.items()}
        (answer,) = (nodes[str(name)] for name in signature.user_outputs)
        self.outputs = {_output_name(self._asked.contract, probabilities): _type_text(answer, names)}

    @property
    def model_name(self) -> str:
        """The model's class."""
        return type(self._asked.model).__name__

    def _given(self, batch: Batch) -> Batch:
        """What a form takes of a batch as the reader gives it."""
        found = batch if self._is_raw else self._mover(batch)
        return {name: found[name] for name in self._example}

    def compared(self, run: Callable[[Batch], Tensor]) -> float:
        """The largest difference of what ``run`` gives from what the model gives.

        Raises:  ModelError where it is more than the order of sums explains
        """
        with kept_generators(), gradients.none_needed():
            return max(_difference(*self._answers(run, batch)) for batch in self._batches())

    def _answers(self, run: Callable[[Batch], Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
        try:
            found = run(self._given(batch))  # first: whatever draws has then drawn, and the model will draw otherwise
        except Exception as error:
            raise _refused("what was exported", error) from error
        return found, self._after(self._asked(batch))

    def _batches(self) -> Iterator[Batch]:
        shorter: tuple[dict[str, int], ...] = ()
        if "length" in self._ranges:
            length = next(leaf.shape[1] for leaf in pytree.tree_leaves(self._example) if leaf.ndim == 2)
            shorter = ({"length": max(length // 2, int(self._ranges["length"].lower))},)
        for sizes in (*_SIZES, *shorter):
            if sizes.keys() <= self._ranges.keys():
                yield self._resized(sizes)

    def _resized(self, sizes: Mapping[str, int]) -> Batch:
        leaves = list(pytree.tree_leaves(self._example))
        for place, own in enumerate(self._free):
            for axis, name in own.items():
                old = leaves[place].shape[axis]
                wanted = torch.arange(sizes.get(name, old)) % old
                leaves[place] = leaves[place].index_select(axis, wanted)
        batch: Batch = self._tree.unflatten(leaves)
        return batch


def _named(batch: Batch) -> TensorTree:
    """The tensors of a batch, one in a dict of the batch by both names."""
    rows = pytree.tree_leaves_with_path(batch)
    return {".".join(str(getattr(key, "key", key)) for key in path): leaf for path, leaf in rows}


def _type_text(tensor: Tensor, names: Mapping[str, str]) -> str:
    sizes = ", ".join(names.get(str(size), str(size)) for size in tensor.shape)
    return f"{str(tensor.dtype).removeprefix('torch.')} ({sizes})"


def _output_name(contract: Contract, probabilities: bool) -> str:
    if probabilities:
        return "probabilities"
    is_logits = contract.loss in ("cross_entropy", "binary_cross_entropy") or bool(contract.classes)
    return "logits" if is_logits else "value"


def _facts(contract: Contract, identity: str) -> dict[str, str]:
    """What is known of a model beside its tensors, as text by name."""
    schema = to_json(contract.schema.to_json()).decode()
    classes = to_json(list(contract.classes)).decode()
    return {"identity": identity, "classes": classes, "temperature": repr(contract.temperature), "schema": schema}


def _checked_preprocess(contract: Contract) -> bool:
    schema = contract.schema
    kinds = [schema[name].kind for name in schema.inputs]
    if "image" not in kinds or schema.preprocess is None:
        raise SettingsError("there is nothing here that a graph could prepare", where="preprocess",
                            got=f"inputs of {', '.join(map(str, kinds))}", expected="images")  # fmt: skip
    return True


def _float(output: Tensor) -> Tensor:
    return output.float()


def _probabilities(contract: Contract) -> Callable[[Tensor], Tensor]:
    """Shapes:  logits (B, K) of classes, or those of yes or no → the same, calibrated"""
    temperature, target = contract.temperature, contract.target
    if contract.loss == "binary_cross_entropy":
        return lambda logits: logits.div(temperature).sigmoid()
    if contract.loss != "cross_entropy" or target is None or target.kind != "label":
        raise SettingsError("this model gives no probabilities of classes", where="probabilities",
                            got=f"loss {contract.loss!r}", expected="a model that tells classes apart")  # fmt: skip
    return lambda logits: logits.div(temperature).softmax(1)


def _difference(found: Any, expected: Tensor) -> float:
    """The largest difference.

    Raises:  ModelError where it is more than the order of sums explains
    """
    is_same = isinstance(found, Tensor) and found.shape == expected.shape
    gap = torch.where(found == expected, 0.0, (found - expected).abs()).max().item() if is_same else float("inf")
    scale = max(1.0, expected[expected.isfinite()].abs().max().item())
    if not gap <= _TOLERANCE * scale:
        raise ModelError(
            "what was exported answers otherwise than the model, and was not written", where="the self-test",
            got=f"a difference of {gap:.3g}" if is_same else f"outputs {tuple(getattr(found, 'shape', ()))}",
            expected=f"outputs {tuple(expected.shape)} within {_TOLERANCE * scale:.3g}",
        )  # fmt: skip
    return gap


def _inexpressible(traced: _Traced, form: str, error: Exception) -> ModelError:
    return ModelError(f"this model cannot be written in {form}", where=traced.model_name, got=_plainly(error),
                      expected="operations on tensors whose order depends on no value")  # fmt: skip


def _refused(by: str, said: object) -> ModelError:
    return ModelError(f"{by} cannot run this, and it was not written", where="the self-test",
                      got=str(said).strip().partition("\n")[0][:300], fix="another opset, or another form")  # fmt: skip


def check_place(path: Path, form: str) -> None:
    """Whether a form can be written there, before anything is computed.

    Raises:  SettingsError where its ending is another, its folder is missing, or something else is in its place
    """
    endings = _ENDINGS[form]
    if not path.absolute().parent.is_dir():
        raise SettingsError("the folder of the output is missing", where=path, expected="a folder that exists")
    if endings and path.suffix not in endings:
        raise SettingsError("a file of this form has another ending", where=path, got=repr(path.suffix),
                            expected=" or ".join(endings))  # fmt: skip
    if path.is_dir() if endings else path.exists():
        raise SettingsError(
            f"something else is where the {'file' if endings else 'folder'} should be written", where=path,
            expected="no such path", fix="give another path, or remove this one",
        )  # fmt: skip
