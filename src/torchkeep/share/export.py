"""A model in the forms of others: ONNX, torch.export's program, a folder of transformers', plain tensors.

Each form answers as the model does before it is written: the package's self-test, at other sizes too.
"""

from __future__ import annotations

import contextlib
import copy
import io
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from .. import __version__, gradients
from ..archive import Archive, write_archive
from ..contracts import Batch
from ..data.readers import reader_to_json
from ..errors import ModelError, SettingsError, TorchkeepError
from ..files import DurableFolder, write_durable
from ..generators import kept_generators
from ..model.freeze import evaluating
from ..model.hub import HUB, open_model
from ..packages import package_of
from ..tensors import parse_json, to_json, to_safetensors
from ..training.binding import Binding
from ..training.objective import prediction_of
from .architecture import CONFIG, PREPROCESSOR, without_ties
from .contract import Asked, Contract
from .exported import free_axes, plainly, quiet
from .hub import open_archive
from .package import Package

_TOLERANCE = 1e-3  # of the largest output: other kernels sum in other orders
_MOST_BYTES = (1 << 31) - (1 << 24)  # of tensors in one protobuf
_ENDINGS: dict[str, tuple[str, ...]] = {
    "onnx": (".onnx",), "torch-export": (".pt2",), "transformers": (), "state-dict": (".pt", ".pth"),
    "safetensors": (".safetensors",),
}  # fmt: skip


@dataclass(frozen=True)
class Exported:
    """What was written. ``inputs`` (none of a folder of transformers') and ``outputs`` are types and shapes by name;
    ``largest_difference`` is that of any output from the model's own."""

    path: Path
    size_bytes: int
    largest_difference: float
    inputs: dict[str, str]
    outputs: dict[str, str]
    opset: int | None = None


def check_place(path: Path, form: str) -> None:
    """Whether a form can be written there, before anything is computed.

    Raises:  SettingsError where its ending is another, its folder is missing, or something else is in its place
    """
    endings = _ENDINGS[form]
    if not path.absolute().parent.is_dir():
        raise SettingsError("the folder of the output is missing", where=path, expected="a folder that exists")
    if endings and path.suffix not in endings:
        raise SettingsError("this form has another ending", where=path, got=path.suffix, expected=" or ".join(endings))
    if path.is_dir() if endings else path.exists():
        raise SettingsError(f"something else is where {form} should be written", where=path, expected="no such path")


def export_onnx(
    asked: Asked, example: Batch, path: Path, *, opset: int | None = None, preprocess: bool = False,
    probabilities: bool = False, identity: str = "",
) -> Exported:  # fmt: skip
    """Write a model as ONNX, once onnxruntime gives what the model gives.

    ``example`` is a batch as the reader gives it. With ``preprocess`` the graph takes images as they are decoded and
    resized, uint8 (B, C, H, W), else normalised ones; with ``probabilities`` it gives these, calibrated, else what the
    model gives. The batch may have any size, and texts any length, that the model's code allows.

    Raises:  SettingsError for a path, an option or an opset that cannot be; ModelError where the model has no such
             form, or answers otherwise in it; StorageError where the disk refuses
    """
    check_place(path, "onnx")
    with quiet():
        onnx, _, runtime = (package_of(name, "onnx", "ONNX") for name in ("onnx", "onnxscript", "onnxruntime"))
    traced = _Traced(asked, example, preprocess, probabilities)
    if (size := sum(tensor.nbytes for tensor in traced.program.state_dict.values())) > _MOST_BYTES:
        raise ModelError("an ONNX file cannot hold this model", where=path, got=f"{size:,} bytes",
                         expected=f"at most {_MOST_BYTES:,}", fix="--to torch-export has no such bound")  # fmt: skip
    with _explained("torch.onnx"):
        made: Any = torch.onnx.export(
            traced.program, (), input_names=list(traced.inputs), output_names=list(traced.outputs),
            opset_version=opset, dynamic_shapes=(traced.free,), verbose=False,
        )  # fmt: skip
        proto = made.model_proto
    found = next(row.version for row in proto.opset_import if not row.domain)
    if opset not in (None, found):
        raise SettingsError("this model cannot be had in this opset", where=f"opset {opset}", got=f"opset {found}",
                            expected="one that torch.onnx can make", fix="without it torch chooses")  # fmt: skip
    proto.producer_name, proto.producer_version = "torchkeep", __version__
    onnx.helper.set_model_props(proto, _facts(asked.contract, identity))
    data: bytes = proto.SerializeToString()
    difference = traced.compared(_onnx_runner(runtime, data))
    write_durable(path, data)
    return Exported(path, len(data), difference, traced.inputs, traced.outputs, found)


def _onnx_runner(runtime: Any, data: bytes) -> Callable[[Batch], Tensor]:
    options = runtime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, torch.get_num_threads()
    with _explained("onnxruntime"):
        session = runtime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return lambda batch: torch.from_numpy(session.run(None, {name: batch[name].numpy() for name in batch})[0])


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
    facts = {"torchkeep.json": to_json(_facts(asked.contract, identity)).decode()}
    with _explained("torch.export"):
        torch.export.save(traced.program, file, extra_files=facts)
        file.seek(0)
        again = torch.export.load(file).module()
    difference = traced.compared(again)
    write_durable(path, file.getbuffer())
    return Exported(path, file.getbuffer().nbytes, difference, traced.inputs, traced.outputs)


def export_transformers(package: Package, folder: Path) -> Exported:
    """Write a model of transformers' as a folder that its ``from_pretrained`` loads, once it answers the same.

    The configuration names the classes; a tokenizer and a preprocessor's configuration go with it where there are any.

    Raises:  ModelError for any other model; SettingsError where something is in the folder's place
    """
    form, contract = package.architecture, package.contract
    if form["kind"] != "hf" or not hasattr(package.model, "save_pretrained"):
        raise ModelError(
            "transformers does not know this model", where=package.path, got=f"{form['kind']} {form.get('name', '')}",
            expected="a model of hf: with a head of its own", fix="--to onnx, or --to torch-export",
        )  # fmt: skip
    check_place(folder, "transformers")
    batch, expected = package.selftest
    archive, names = Archive.open(package.path), contract.classes
    with tempfile.TemporaryDirectory(prefix="torchkeep-", ignore_cleanup_errors=True) as place:
        with _explained("save_pretrained"):
            package.model.save_pretrained(place)  # type: ignore[operator]
        if PREPROCESSOR in archive.names:
            Path(place, Path(PREPROCESSOR).name).write_bytes(archive.read(PREPROCESSOR))
        again = open_model(HUB + place, Path(), contract.schema, expected.shape[-1], {}, reads=True).model
        difference = _difference(Asked(again.eval(), contract, "cpu")(batch), expected)
        files = {file.name: file.read_bytes() for file in Path(place).iterdir()}
    config = parse_json(files[Path(CONFIG).name])
    if names:
        config |= {"id2label": dict(zip(map(str, range(len(names))), names, strict=True)),
                   "label2id": dict(zip(names, range(len(names)), strict=True))}  # fmt: skip
    files[Path(CONFIG).name] = to_json(config, indent=True)
    files |= reader_to_json(contract.reader.like, contract.reader.settings)[1]  # the tokenizer
    with DurableFolder(folder, manifest=False) as made:
        for name, data in sorted(files.items()):
            made.write(name, data)
    return Exported(folder, sum(map(len, files.values())), difference, {}, {"logits": _type_text(expected, {})})


def unpack(source: str | Path, folder: Path) -> Path:
    """Write a package as a folder, member by member, with the same identity. Nothing is built, no code runs.

    Raises:  PackageError where the package is damaged, or something else is in the folder's place
    """
    archive = open_archive(source)
    archive.verify()
    write_archive(folder, {name: archive.read(name) for name in archive.names}, head=archive.head, folder=True)
    return folder


def write_tensors(model: nn.Module, path: Path, form: str) -> Path:
    """Write a plain state dict, which ``torch.load(path, weights_only=True)`` reads, or the same as "safetensors"; a
    tied parameter has each of its names.

    Raises:  SettingsError for a path that cannot be; StorageError where the disk refuses
    """
    check_place(path, form)
    tensors = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    if form == "safetensors":
        write_durable(path, *to_safetensors(tensors))
        return path
    kept, tied = without_ties(tensors)
    copies = {name: tensor.clone() for name, tensor in kept.items()}  # a mapped one would drag its file along
    file = io.BytesIO()
    torch.save({name: copies[tied.get(name, name)] for name in tensors}, file)
    write_durable(path, file.getbuffer())
    return path


# --- a model as one program


class _Answering(nn.Module):
    """The model as a function of the tensors that it takes of a batch, and nothing else."""

    def __init__(self, model: nn.Module, steps: list[Callable[[Any], Any]]):
        super().__init__()
        self.model, self._steps = model, steps

    def forward(self, batch: Batch) -> Any:
        value: Any = batch
        for step in self._steps:
            value = step(value)
        return value


class _Traced:
    """torch.export's program of a model, and the batches on which what is made of it is compared with the model.

    ``free`` has the axes of each input whose size is free, with their names.
    """

    def __init__(self, asked: Asked, example: Batch, preprocess: bool, probabilities: bool):
        model = asked.model if asked.device.type == "cpu" else copy.deepcopy(asked.model)
        contract = asked.contract
        self._asked = Asked(model, replace(contract, precision="fp32"), "cpu")
        self._is_raw = preprocess and _can_prepare(contract)
        self._after = _probabilities(contract) if probabilities else _float
        inputs = {name: value for name, value in example.items() if name not in contract.schema.targets}
        binding = Binding(model, inputs, (), contract.inputs, ())
        self._example = {name: inputs[name] for name in binding.keys}
        if odd := [name for name, value in self._example.items() if not isinstance(value, Tensor)]:
            raise ModelError("only tensors can go into an exported model", where=odd[0], expected="a tensor")
        given, before = self._given(self._example), [self._asked.mover] if self._is_raw else []
        answering = _Answering(model, [*before, binding.call, prediction_of, _float, self._after]).eval()
        axes = dict(zip(given, free_axes(list(given.values()))[1], strict=True))
        shapes = {name: dict.fromkeys(own, Dim.AUTO) for name, own in axes.items()}
        with _explained("torch.export"), kept_generators(), evaluating(model), gradients.none_needed():
            self.program = torch.export.export(answering, (given,), dynamic_shapes=(shapes,), strict=False)
        self._describe(axes, "probabilities" if probabilities else _output_name(contract))

    def _describe(self, axes: dict[str, dict[int, str]], answer: str) -> None:
        """Which sizes stayed free, and what goes in and out."""
        signature, limits = self.program.graph_signature, self.program.range_constraints
        nodes = {node.name: node.meta["val"] for node in self.program.graph.nodes if "val" in node.meta}
        leaves = dict(zip(axes, (nodes[name] for name in signature.user_inputs), strict=True))
        self.free: dict[str, dict[int, str]] = {name: {} for name in axes}
        self._least, words = {}, {}
        for name, axis, word in ((name, *row) for name, own in axes.items() for row in own.items()):
            size = leaves[name].shape[axis]
            limit = limits.get(size.node.expr) if isinstance(size, torch.SymInt) else None
            if limit is not None:  # else the model's code fixes it
                self.free[name][axis], self._least[word] = word, int(limit.lower)
                words[str(size)] = word if limit.upper >= 1 << 31 else f"{word} to {limit.upper}"
        self.inputs = {name: _type_text(leaf, words) for name, leaf in leaves.items()}
        self.outputs = {answer: _type_text(nodes[str(signature.user_outputs[0])], words)}

    def _given(self, batch: Batch) -> Batch:
        """What a form takes of a batch as the reader gives it."""
        found = batch if self._is_raw else self._asked.mover(batch)
        return {name: found[name] for name in self._example}

    def compared(self, run: Callable[[Batch], Tensor]) -> float:
        """The largest difference of what ``run`` gives from what the model gives.

        Raises:  ModelError where it is more than the order of sums explains
        """
        with kept_generators(), gradients.none_needed():
            return max(_difference(*self._answers(run, batch)) for batch in self._batches())

    def _answers(self, run: Callable[[Batch], Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
        with _explained("the self-test"):
            found = run(self._given(batch))  # first: whatever draws has then drawn, and the model will draw otherwise
        return found, self._after(self._asked(batch))

    def _batches(self) -> Iterator[Batch]:
        """The example, one and three samples of it, and half of the text: where these sizes are free."""
        yield self._example
        for word, count in (("batch", 1), ("batch", 3), ("length", 0)):
            if word in self._least:
                yield {
                    name: self._resized(value, self.free[name], word, count) for name, value in self._example.items()
                }

    def _resized(self, value: Tensor, axes: dict[int, str], word: str, count: int) -> Tensor:
        for axis in (axis for axis, name in axes.items() if name == word):
            size = value.shape[axis]
            value = value.index_select(axis, torch.arange(count or max(size // 2, self._least[word])) % size)
        return value


@contextlib.contextmanager
def _explained(where: str) -> Iterator[None]:
    """Whatever the libraries say, as the one error, and nothing of it on the terminal."""
    try:
        with quiet():
            yield
    except TorchkeepError:
        raise
    except Exception as error:
        raise ModelError(
            "this model cannot be had in this form", where=where, got=plainly(error),
            expected="operations on tensors that it knows, whose order depends on no value",
            fix="another --opset, or another form with --to",
        ) from error  # fmt: skip


def _type_text(tensor: Tensor, words: dict[str, str]) -> str:
    sizes = ", ".join(words.get(str(size), str(size)) for size in tensor.shape)
    return f"{str(tensor.dtype).removeprefix('torch.')} ({sizes})"


def _output_name(contract: Contract) -> str:
    return "logits" if contract.classes or "cross_entropy" in contract.loss else "value"


def _facts(contract: Contract, identity: str) -> dict[str, str]:
    """What is known of a model beside its tensors, as text by name."""
    said = {"classes": list(contract.classes), "temperature": contract.temperature, "schema": contract.schema.to_json()}
    return {"identity": identity} | {name: to_json(value).decode() for name, value in said.items()}


def _can_prepare(contract: Contract) -> bool:
    schema = contract.schema
    if schema.preprocess is None or all(schema[name].kind != "image" for name in schema.inputs):
        raise SettingsError("there is nothing here that a graph could prepare", where="preprocess",
                            got=f"inputs {', '.join(schema.inputs)}", expected="images")  # fmt: skip
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
    allowed = _TOLERANCE * max(1.0, expected[expected.isfinite()].abs().max().item())
    if not gap <= allowed:
        raise ModelError(
            "what was exported answers otherwise than the model, and was not written", where="the self-test",
            got=f"a difference of {gap:.3g}" if is_same else f"outputs {tuple(getattr(found, 'shape', ()))}",
            expected=f"outputs {tuple(expected.shape)} within {allowed:.3g}",
        )  # fmt: skip
    return gap
