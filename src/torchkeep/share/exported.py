"""Writes a model as a graph of allowed operations, which ``graph.py`` runs without its class."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import operator
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import Node

from ..contracts import Json, TensorTree
from ..errors import ModelError
from ..generators import kept_generators
from ..model.freeze import evaluating
from .graph import DTYPE, DTYPES, FLOAT, FORMAT, INPUT, LEAF, MAX_TEXT, NODE, TENSOR, GraphModel, from_tree
from .operations import ITEM, NAMES, SIZE_MATHS, Operation, find_operation

_HOW = 'give its source with code = "…", or use a model that is known by name'


def export_graph(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None, *, dynamic_batch: bool = True
) -> tuple[Json, TensorTree]:
    """The model in evaluation as a graph of allowed operations, and its tensors, which it goes on sharing.

    Axis 0 of the inputs may then have any size, and axis 1 of inputs of tokens (B, T) too, where the model's own code
    allows both; where not, the sizes are those of the example, as ``axes`` and ``batch`` of the JSON say. What the
    model changes of its inputs is not repeated. Modes and random state of the model are left as they were.

    Raises:  ModelError where its code depends on values, draws by chance, keeps a state, or asks for another operation
    Source:  https://docs.pytorch.org/docs/stable/export.html
    """
    with quiet(), kept_generators(), evaluating(model), torch.no_grad():
        traced, example = _traced(model, args, dict(kwargs or {}))
        return _written(traced, example, dynamic_batch)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without warnings and prints of torch.export, and without attention's fast path, which is one closed operation."""
    was_fast, was_disabled = torch.backends.mha.get_fastpath_enabled(), logging.root.manager.disable
    torch.backends.mha.set_fastpath_enabled(False)
    logging.disable(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(action="ignore"),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            yield
    finally:
        logging.disable(was_disabled)
        torch.backends.mha.set_fastpath_enabled(was_fast)


class _Traced(nn.Module):
    """The model as a function of its tensors alone, that gives tensors alone."""

    def __init__(self, model: nn.Module, inputs: list[Json], positional: int, unasked: dict[str, Any]):
        super().__init__()
        self.model, self.inputs, self.positional, self.unasked = model, inputs, positional, unasked
        self.output: Json = None

    def structure(self, leaves: list[Tensor]) -> tuple[Json, int]:
        """That of the output for such inputs, and how many tensors it has."""
        found: list[Any] = []
        return _to_tree(self.call(*(leaf.clone() for leaf in leaves)), found, "output"), len(found)

    def call(self, *leaves: Any) -> Any:
        given = {row["name"]: from_tree(row["value"], leaves) for row in self.inputs}
        args = list(given.values())[: self.positional]
        return self.model(*args, **dict(list(given.items())[self.positional :]), **self.unasked)

    def forward(self, *leaves: Any) -> tuple[Any, ...]:
        found: list[Any] = []
        _to_tree(self.call(*leaves), found, "output")
        return tuple(found)


def _traced(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[_Traced, list[Tensor]]:
    try:
        signature = inspect.signature(model.forward)
        bound = signature.bind(*args, **kwargs)
    except (TypeError, ValueError) as error:
        raise ModelError("the example does not fit the model", where="forward", got=error) from None
    named: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            named |= {f"{name}_{i}": item for i, item in enumerate(value)}
        else:
            named |= value if kind is inspect.Parameter.VAR_KEYWORD else {name: value}
    leaves: list[Any] = []
    inputs = [{"name": name, "value": _to_tree(value, leaves, "input")} for name, value in named.items()]
    # a cache of keys and values is for generating token by token, and is no tensor
    is_cached = "use_cache" in signature.parameters and "use_cache" not in named
    traced = _Traced(model, inputs, len(bound.args), {"use_cache": False} if is_cached else {})
    traced.output, count = traced.structure(leaves)
    if not leaves or not count:
        raise ModelError(
            "a graph leads from tensors to tensors", where="the example", got=f"{len(leaves)} in, {count} out"
        )
    return traced, leaves


_Axes = list[dict[int, str]]
_LENGTH = re.compile(r"length = Dim\('length'(?:, min=(\d+))?(?:, max=(\d+))?\)")


def _written(traced: _Traced, example: list[Tensor], dynamic_batch: bool) -> tuple[Json, TensorTree]:
    """The graph with as many sizes free as the model's code allows; else the last attempt's reason."""
    batch, length = free_axes(example)
    tries = [(length, False)] * (length != batch) + [(batch, False), (batch, True)] if dynamic_batch else []
    reason: Exception | None = None
    none: _Axes = [{} for _ in example]
    for axes, strict in [*tries, (none, False)]:
        try:
            return _attempt(traced, example, axes, strict)
        except Exception as error:  # torch.export raises what it likes
            reason = error
    raise ModelError(
        "this model cannot be written as a graph", where=type(traced.model).__name__, got=plainly(reason),
        expected="operations on tensors whose order depends on no value, without chance and without memory", fix=_HOW,
    ) from reason  # fmt: skip


def plainly(reason: Exception | None) -> str:
    """One line of what torch.export says in fifty."""
    if isinstance(reason, ModelError):
        return f"{reason.what}: {reason.got or reason.where}"
    return next(iter(str(reason).strip().splitlines()), type(reason).__name__)[:MAX_TEXT]


def free_axes(example: list[Tensor]) -> tuple[_Axes, _Axes]:
    """The axes of the batch, and those with the tokens' too; one of another size than the first's is something else."""
    size = next((leaf.shape[0] for leaf in example if leaf.ndim), 0)
    batch = [{0: "batch"} if leaf.ndim and leaf.shape[0] == size else {} for leaf in example]
    rows = list(zip(example, batch, strict=True))
    widths = [leaf.shape[1] if axes and leaf.ndim == 2 and not leaf.is_floating_point() else 0 for leaf, axes in rows]
    width = next((width for width in widths if width > 1), -1)
    return batch, [{**axes, 1: "length"} if own == width else axes for axes, own in zip(batch, widths, strict=True)]


def _attempt(
    traced: _Traced, example: list[Tensor], axes: _Axes, strict: bool, limits: tuple[int, int | None] = (1, None)
) -> tuple[Json, TensorTree]:  # fmt: skip
    dims = {"batch": Dim("batch"), "length": Dim("length", min=limits[0], max=limits[1])}
    shapes = [{axis: dims[name] for axis, name in own.items()} for own in axes]
    # an axis of size 1 would be taken for one that is always 1
    pairs = zip(example, axes, strict=True)
    seen = tuple(torch.cat([leaf, leaf]) if own and leaf.shape[0] == 1 else leaf for leaf, own in pairs)
    try:
        program = torch.export.export(traced, seen, dynamic_shapes=(tuple(shapes),), strict=strict)
    except Exception as error:
        found = _LENGTH.search(str(error))
        if found is None or limits != (1, None):
            raise
        stated = (int(found[1] or 1), int(found[2]) if found[2] else None)  # as of learned positions
        return _attempt(traced, example, axes, strict, stated)
    twice = [torch.cat([leaf, leaf]) if own else leaf for leaf, own in zip(example, axes, strict=True)]
    if strict and traced.structure(twice)[0] != traced.output:  # strict tracing takes a size for a constant
        raise ModelError("the structure of the output depends on the batch", where="the model's output")
    used = {name for own in axes for name in own.values()}
    sizes = {"batch": [1, None], "length": list(limits)}
    written, tensors = _Writer(traced.model, _functional(program)).written()
    leaves = [
        {"dtype": _name_of(leaf.dtype), "shape": [own.get(axis, size) for axis, size in enumerate(leaf.shape)]}
        for leaf, own in zip(example, axes, strict=True)
    ]
    first = next((leaf.shape[0] for leaf in example if leaf.ndim), None)
    head = {"batch": "any" if "batch" in used else first, "axes": {name: sizes[name] for name in sorted(used)}}
    call = {"inputs": traced.inputs, "positional": traced.positional, "output": traced.output}
    graph = {**head, **call, "leaves": leaves, **written}
    GraphModel(graph, tensors)  # what is written can be read
    return graph, tensors


def _functional(program: ExportedProgram) -> ExportedProgram:
    """The program without operations that change a tensor in place, and otherwise as the model calls them.

    A change of a fresh tensor that nothing else looks into is the same operation with a result of its own. The others
    torch takes apart, at the cost of copies.
    """
    order = {node: i for i, node in enumerate(program.graph.nodes)}
    for node in [node for node in order if node.op == "call_function" and _changes_something(node)]:
        twin = _twin(node, order)
        if twin is None:
            decomposed: ExportedProgram = program.run_decompositions({})  # untyped
            return decomposed
        source = cast("Node", node.args[0])
        node.target = twin
        later = [user for user in source.users if order[user] > order[node]]
        for user in later:
            user.replace_input_with(source, node)
    return program


def _changes_something(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _twin(node: Node, order: dict[Node, int]) -> Callable[..., Any] | None:
    """The operation with a result of its own, where it means the same."""
    name, source = str(node.target), cast("Node", node.args[0])
    twin = name.replace("_.", ".")
    is_known = twin != name and twin in NAMES and source.op == "call_function"
    if not is_known or not _is_fresh(source):
        return None
    seen_before = [user for user in source.users if order[user] < order[node]]
    others = [other.meta["val"].dtype for other in node.all_input_nodes if isinstance(other.meta["val"], Tensor)]
    is_same = all(kind == source.meta["val"].dtype for kind in others)  # else the result would have a wider type
    return find_operation(twin).function if is_same and all(map(_is_fresh, seen_before)) else None


def _is_fresh(node: Node) -> bool:
    return str(node.target) in NAMES and find_operation(str(node.target)).is_fresh


# what is its first argument, in evaluation or by nature
_SAME = {
    "aten.dropout.default", "aten.feature_dropout.default", "aten.alpha_dropout.default",
    "aten.feature_alpha_dropout.default", "aten.lift_fresh_copy.default", "aten.lift_fresh.default",
    "aten.alias.default",
}  # fmt: skip
# neither has a gradient
_NORM, _OWN_NORM = "aten._native_batch_norm_legit_no_training.default", "aten._native_batch_norm_legit.no_stats"
_SIZES: dict[Any, str] = {function: name for name, function in SIZE_MATHS.items()}


class _Writer:
    """The nodes of an exported program as JSON, and its tensors under the model's own names."""

    def __init__(self, model: nn.Module, program: ExportedProgram):
        self._program = program
        self._nodes: list[Json] = []
        self._kept: dict[Node, Json] = {}
        self._names: dict[Any, str] = {}
        self.tensors: TensorTree = {}
        for name, value in model.state_dict().items():
            if isinstance(value, Tensor):
                self._store(name, value)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        self._parameters = [name for name in self.tensors if name in parameters]

    def _store(self, name: str, tensor: Tensor) -> str:
        """Its name, which is another one's where both are the same memory, as tied parameters are."""
        place = (tensor.device, tensor.dtype, tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
        key: Any = place if tensor.numel() else name
        if key not in self._names:
            while name in self.tensors:
                name += "_"
            self._names[key] = name
            self.tensors[name] = tensor.detach()
        return self._names[key]

    def written(self) -> tuple[Json, TensorTree]:
        signature = self._program.graph_signature
        if signature.buffers_to_mutate:
            changed = ", ".join(signature.buffers_to_mutate.values()).removeprefix("model.")
            raise ModelError("the model changes its own state in evaluation", where=changed)
        self._inputs()
        outputs = [node for node, row in self._outputs() if row.kind.name == "USER_OUTPUT"]
        needed = self._needed(outputs)
        for node in self._program.graph.nodes:
            if node.op != "placeholder" and node in needed:
                self._kept[node] = self._row(node)
        names = {"parameters": self._parameters, "nodes": self._nodes}
        return {**names, "outputs": [self._encode(node) for node in outputs]}, self.tensors

    def _inputs(self) -> None:
        program, count = self._program, 0
        placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
        for node, row in zip(placeholders, program.graph_signature.input_specs, strict=True):
            if row.kind.name == "USER_INPUT":
                self._kept[node] = {INPUT: count}
                count += 1
            elif row.kind.name in ("PARAMETER", "BUFFER", "CONSTANT_TENSOR"):
                value = program.state_dict.get(row.target, program.constants.get(row.target))
                self._kept[node] = {TENSOR: self._store(row.target.removeprefix("model."), value)}

    def _outputs(self) -> list[tuple[Any, Any]]:
        (output,) = (node for node in self._program.graph.nodes if node.op == "output")
        return list(zip(output.args[0], self._program.graph_signature.output_specs, strict=True))

    def _needed(self, outputs: list[Any]) -> set[Node]:
        needed = {node for node in outputs if isinstance(node, Node)}
        for node in reversed(list(self._program.graph.nodes)):
            if node in needed:
                needed.update(node.all_input_nodes)
        return needed

    def _row(self, node: Node) -> Json:
        """What stands for the node in the others' arguments: a reference to its row, or to another's."""
        name, args, kwargs = str(node.target), list[Any](node.args), dict(node.kwargs)
        if name in _SAME and args[-1] is not True:
            return self._encode(args[0])
        if name == _NORM:
            name, args = "aten.batch_norm.default", [*args[:5], False, *args[5:], True]
        elif name == _OWN_NORM:
            name, args = "aten.batch_norm.default", [*args[:3], None, None, *args[3:], True]
        elif node.target is operator.getitem:
            source = args[0]
            if str(source.target) in (_NORM, _OWN_NORM):
                return self._encode(source)
            name = ITEM
        elif name in ("aten.to.device", "aten.to.dtype_layout"):  # where tensors are is the reader's affair
            kind = args[2] if name == "aten.to.device" else kwargs.get("dtype")
            if kind is None:
                return self._encode(args[0])
            name, args, kwargs = "aten.to.dtype", [args[0], kind], {}
        name = _SIZES.get(node.target, name)
        self._nodes.append({"op": name, **self._call(find_operation(name), args, kwargs)})
        return {NODE: len(self._nodes) - 1}

    def _call(self, operation: Operation, args: list[Any], kwargs: dict[str, Any]) -> Json:
        positional = operation.positional
        given = dict(zip((row.name for row in positional), args, strict=False)) | kwargs
        last = max((i for i, row in enumerate(positional) if row.name in given), default=-1)
        args = [given.get(row.name, row.default) for row in positional[: last + 1]]
        keywords = [row for row in operation.arguments if row.is_keyword and row.name in given]
        named = {
            row.name: self._encode(given[row.name])
            for row in keywords
            if row.is_required or given[row.name] is not None
        }
        encoded = [self._encode(value) for value in args]
        for i, row in enumerate(positional[: len(encoded)]):
            if row.is_list and encoded[i] is not None and not isinstance(encoded[i], list):
                encoded[i] = [encoded[i]]
        return {"args": encoded, **({"kwargs": named} if named else {})}

    def _encode(self, value: Any) -> Json:
        if isinstance(value, Node):
            return self._kept[value]
        if isinstance(value, list | tuple):
            return [self._encode(item) for item in value]
        if isinstance(value, torch.dtype):
            return {DTYPE: _name_of(value)}
        if isinstance(value, torch.memory_format):
            return {FORMAT: str(value).removeprefix("torch.")}
        if isinstance(value, float) and value - value != 0:
            return {FLOAT: repr(value)}
        if value is None or type(value) in (bool, int, float, str):
            return value
        raise ModelError("a graph cannot hold this argument", where="an operation", got=type(value).__name__)


def _name_of(kind: torch.dtype) -> str:
    name = str(kind).removeprefix("torch.")
    if name not in DTYPES:
        raise ModelError("a graph has no such type", where="dtype", got=name, expected=", ".join(DTYPES))
    return name


def _to_tree(value: Any, leaves: list[Any], where: str) -> Json:
    """The structure of a value as JSON; its tensors go to ``leaves``."""
    if isinstance(value, Tensor):
        leaves.append(value)
        return {LEAF: len(leaves) - 1}
    if value is None or type(value) in (bool, int, str) or (type(value) is float and value - value == 0):
        return value
    if isinstance(value, tuple | list):
        name = "list" if isinstance(value, list) else "tuple"
        return {name: [_to_tree(item, leaves, where) for item in value]}
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):  # a ModelOutput too
        return {"dict": {key: _to_tree(item, leaves, where) for key, item in value.items()}}
    if is_dataclass(value):
        return {"dict": {row.name: _to_tree(getattr(value, row.name), leaves, where) for row in fields(value)}}
    raise ModelError(
        "a graph cannot hold this", where=f"the model's {where}", got=type(value).__name__,
        expected="tensors, numbers and text in tuples, lists and dicts with text for keys", fix=_HOW,
    )  # fmt: skip
