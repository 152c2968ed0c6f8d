"""A model without its class: runs a graph of allowed operations, which is JSON, over named tensors.

Nothing in a graph is code: its operations are looked up in one table, its arguments are JSON, and all of it is checked
before the first operation runs. Neither torch.export.load nor pickle has a part in it.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..contracts import Json, TensorTree
from ..errors import ModelError
from .operations import Argument, Operation, find_operation
from .shapes import by_shapes, empty

_MAX_NODES = 200_000
_MAX_DEPTH = 32
MAX_TEXT = 200
_MAX_ELEMENTS = 1 << 31  # of one tensor, whatever the inputs
_LEAST_ELEMENTS = 1 << 26  # that a graph may always use
_GROWTH = 1 << 12  # elements for each one of the inputs and parameters: attention has heads × tokens
_TENSORS_AT_ONCE = 4  # of the largest size
_MAX_SHAPES = 4096
LEAF, NODE, INPUT, TENSOR = "$leaf", "$node", "$input", "$tensor"
DTYPE, FORMAT, FLOAT = "$dtype", "$memory_format", "$float"
DTYPES = {
    str(kind).removeprefix("torch."): kind
    for kind in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
        torch.int8, torch.uint8, torch.bool,
    )
}  # fmt: skip
FORMATS = {
    str(kind).removeprefix("torch."): kind
    for kind in (torch.contiguous_format, torch.preserve_format, torch.channels_last, torch.channels_last_3d)
}
FLOATS = {"inf": float("inf"), "-inf": float("-inf"), "nan": float("nan")}


class GraphModel(nn.Module):
    """Runs a graph that ``export_graph`` wrote, under the model's own names of arguments and parameters.

    ``state_dict()`` holds the tensors as they are stored. It can be trained further; normalisation by the statistics of
    the training data stays as it was in evaluation, and nothing is dropped, in either mode.

    Raises:  ModelError where the graph is not of the form that is written, and nothing of it has run; on a call, where
             the inputs are others than the example's, or a tensor would outgrow what they may need
    """

    def __init__(self, graph: Json, tensors: TensorTree):
        super().__init__()
        try:
            self._plan = _Plan(graph, list(tensors))
            learned = graph["parameters"]
            _refuse(not isinstance(learned, list) or not set(learned) <= set(tensors), learned)
            self._held = [self._hold(name, tensor, name in set(learned)) for name, tensor in tensors.items()]
        except (ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError, RecursionError) as error:
            raise ModelError(
                "this is no graph that can be run", where="the graph", got=_short(error),
                expected="a graph as export_graph writes it",
            ) from None  # fmt: skip
        self._fitting: set[Any] = set()  # shapes of inputs that were found to fit in memory

    def _hold(self, name: str, tensor: Tensor, is_learned: bool) -> tuple[nn.Module | None, str, str]:
        """Register a tensor under its name; where it can be found, whatever ``to()`` and torch.func put there."""
        *path, last = name.split(".")
        _refuse(len(path) > _MAX_DEPTH, name)
        inner: nn.Module = self
        for part in path:
            if part not in inner._modules:
                inner.add_module(part, nn.Module())
            inner = inner.get_submodule(part)
        if is_learned:
            inner.register_parameter(last, nn.Parameter(tensor, requires_grad=tensor.is_floating_point()))
        else:
            inner.register_buffer(last, tensor)
        # not itself: a circle would keep its memory until the next collection
        return inner if path else None, "_parameters" if is_learned else "_buffers", last

    @property
    def forward(self) -> Callable[..., Any]:  # type: ignore[override]
        """The original model's call, under its names; a property, so that its signature is this graph's own."""
        return _Call(self._call, self._plan)

    def _call(self, plan: _Plan, *args: Any, **kwargs: Any) -> Any:
        leaves = plan.bound(args, kwargs)
        held = [(inner or self).__dict__[kind][name] for inner, kind, name in self._held]
        if not torch.compiler.is_compiling():
            self._check_sizes(leaves, held)
        device = held[0].device if held else leaves[0].device
        return plan.run([device, *leaves, *held])

    def _check_sizes(self, leaves: list[Tensor], held: list[Tensor]) -> None:
        """Go through the shapes alone, once for each shape of inputs, before anything is computed or allocated."""
        shapes = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
        if shapes in self._fitting:
            return
        if len(self._fitting) >= _MAX_SHAPES:
            self._fitting.clear()
        tensors = [*leaves, *held]
        most = min(_MAX_ELEMENTS, max(_LEAST_ELEMENTS, _GROWTH * sum(tensor.numel() for tensor in tensors)))
        with torch.no_grad():
            shaped = [empty(tensor.shape, tensor.dtype) for tensor in tensors]
            self._plan.run([torch.device("meta"), *shaped], _Ledger(most))
        self._fitting.add(shapes)


class _Call(functools.partial[Any]):
    """A model's call, with the signature of its graph; torch.export knows partial functions."""

    @property
    def __signature__(self) -> inspect.Signature:
        signature: inspect.Signature = self.args[0].signature
        return signature


@dataclass(frozen=True)
class _Row:
    """One operation with the constants that it takes by name, the slots that it takes, and the slot of its result."""

    operation: Operation
    constants: dict[str, Any]
    taken: list[int]
    place: int


_Step = tuple[Callable[..., Any], Callable[[list[Any]], Any], int, tuple[int, ...]]
_KEYS = {"batch", "axes", "inputs", "positional", "leaves", "parameters", "nodes", "outputs", "output"}


class _Plan:
    """The steps of a checked graph over slots: the device, the inputs, the tensors, results of nodes, and constants.

    A list that holds results is made by a step of its own, so that every argument of a step is one slot.
    """

    def __init__(self, graph: Json, names: Sequence[str]):
        _refuse(set(graph) != _KEYS, sorted(graph))
        self._leaves, self._axes = graph["leaves"], graph["axes"]
        _check_leaves(self._leaves, self._axes)
        _refuse(graph["batch"] != "any" and type(graph["batch"]) not in (int, type(None)), graph["batch"])
        _refuse(any(set(row) != {"name", "value"} for row in graph["inputs"]), "inputs")
        self._inputs, self._positional = {row["name"]: row["value"] for row in graph["inputs"]}, graph["positional"]
        self.signature = _signature([row["name"] for row in graph["inputs"]], graph["positional"])
        self._fixed: dict[str, Any] = {}  # inputs without a tensor: what the example had
        found: list[int] = []
        for name, tree in self._inputs.items():
            before = len(found)
            _check_tree(tree, len(self._leaves), found)
            if len(found) == before:
                self._fixed[name] = from_tree(tree, ())
        _refuse(sorted(found) != list(range(len(self._leaves))), found)
        nodes, count = graph["nodes"], len(self._leaves)
        _refuse(not isinstance(nodes, list) or len(nodes) > _MAX_NODES, f"a graph of {len(nodes):,} nodes")
        self._tensors = {name: 1 + count + i for i, name in enumerate(names)}
        self._first = 1 + count + len(names)
        self._end = self._first + len(nodes)
        self._kinds = ["device", *["tensor"] * (self._first - 1)]  # of the slots that are known so far
        self._constants: list[Any] = []
        self._lists: set[int] = set()
        self._raw: list[_Row] = []
        self._operations: dict[int, Operation] = {}
        for i, row in enumerate(nodes):
            try:
                self._add(row, self._first + i)
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise ValueError(f"node {i}: {_short(error)}") from None
        self._outputs = [self._reference(value, "Tensor") for value in graph["outputs"]]
        self._output = graph["output"]
        _check_tree(self._output, len(self._outputs), [])
        self._thrifty = self._compiled(is_thrifty=True)
        self._steps = self._compiled()
        self._shapes: list[_Step] = [
            (_called(row, by_shapes(row.operation)), *step[1:])
            for row, step in zip(self._raw, self._steps, strict=True)
        ]
        del self._raw, self._operations, self._kinds

    def __deepcopy__(self, memo: Any) -> _Plan:
        return self  # nothing of it changes

    def _add(self, row: Json, place: int) -> None:
        _refuse(not set(row) <= {"op", "args", "kwargs"}, row)
        operation, args, kwargs = find_operation(row["op"]), row["args"], row.get("kwargs", {})
        positional = operation.positional
        named = {argument.name: argument for argument in operation.arguments if argument.is_keyword}
        missing = [row.name for row in positional[len(args) :] if row.is_required]
        missing += [row.name for row in named.values() if row.is_required and row.name not in kwargs]
        _refuse(not isinstance(args, list) or len(args) > len(positional) or bool(missing), row)
        _check_chance(dict(zip((argument.name for argument in positional), args, strict=False)))
        taken = [self._slot(value, argument) for value, argument in zip(args, positional, strict=False)]
        constants = {name: _constant(value, named[name]) for name, value in kwargs.items()}
        self._raw.append(_Row(operation, constants, [0, *taken] if operation.is_placed else taken, place))
        self._operations[place] = operation
        self._kinds.append(operation.gives)

    def _slot(self, value: Json, argument: Argument) -> int:
        if argument.is_list and isinstance(value, list) and any(isinstance(item, dict) for item in value):
            item = _item_of(argument)
            slots = [self._slot(inner, item) for inner in value]
            place = self._keep(None)
            self._lists.add(place)
            self._raw.append(_Row(_LIST, {}, slots, place))
            return place
        if isinstance(value, dict) and set(value) <= {NODE, INPUT, TENSOR}:
            _refuse(argument.is_list, value)
            return self._reference(value, argument.kind)
        return self._keep(_constant(value, argument))

    def _keep(self, constant: Any) -> int:
        self._constants.append(constant)
        return self._end + len(self._constants) - 1

    def _reference(self, value: Json, kind: str) -> int:
        ((name, index),) = value.items()
        if name == TENSOR:
            slot = self._tensors[index]
        else:
            _refuse(name not in (NODE, INPUT) or type(index) is not int or index < 0, value)
            slot = index + (self._first if name == NODE else 1)
            _refuse(slot >= (len(self._kinds) if name == NODE else 1 + len(self._leaves)), value)
        gives = self._kinds[slot]
        fits = {"tensor": ("Tensor",), "tensors": ("tensors",), "int": ("int", "number", "Tensor")}[gives]
        _refuse(kind not in fits, value)
        return slot

    def _compiled(self, *, is_thrifty: bool = False) -> list[_Step]:
        """Each step with its arguments as one fetch, and the results that nothing later needs.

        Where ``is_thrifty``, an activation overwrites a result that is its alone, as most models do themselves: a new
        tensor of some MB costs more than the activation (MobileNetV2: a quarter of the whole).
        """
        uses = Counter(slot for row in self._raw for slot in row.taken) + Counter(self._outputs)
        needed, steps = set(self._outputs), []
        for row in reversed(self._raw):
            made = self._operations.get(row.taken[0]) if row.taken else None
            is_alone = made is not None and made.is_fresh and uses[row.taken[0]] == 1
            function = row.operation.in_place if is_thrifty and is_alone else None
            slots = {slot for slot in (*row.taken, row.place) if self._first <= slot < self._end or slot in self._lists}
            done = slots - needed
            needed |= done
            steps.append((_called(row, function), _fetch(row.taken), row.place, tuple(done)))
        return steps[::-1]

    def bound(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """The tensors of a call in order.

        Raises:  ModelError where they are others than the graph was written for
        """
        try:
            is_plain = not kwargs and len(args) == len(self._inputs) == self._positional
            given = dict(zip(self._inputs, args, strict=True)) if is_plain else self._bind(args, kwargs)
            leaves: list[Any] = [None] * len(self._leaves)
            for name, tree in self._inputs.items():
                _match(tree, given[name], leaves)
            self._check_inputs(leaves)
        except (TypeError, ValueError, KeyError) as error:
            raise ModelError(
                "this graph takes other inputs", where="forward", got=_short(error), expected=self._stated(),
                fix="export the model with such inputs as its example",
            ) from None  # fmt: skip
        return leaves

    def _bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        return {**self._fixed, **self.signature.bind_partial(*args, **kwargs).arguments}

    def _check_inputs(self, leaves: list[Tensor]) -> None:
        sizes: dict[str, int] = {}
        for leaf, stated in zip(leaves, self._leaves, strict=True):
            kind = DTYPES[stated["dtype"]]
            is_kind = leaf.dtype == kind or (leaf.is_floating_point() and kind.is_floating_point)
            is_shape = leaf.ndim == len(stated["shape"]) and all(
                size == (sizes.setdefault(axis, size) if isinstance(axis, str) else axis)
                for size, axis in zip(leaf.shape, stated["shape"], strict=True)
            )
            if not is_kind or not is_shape:
                raise ValueError(f"{leaf.dtype} {tuple(leaf.shape)}")
        for name, size in sizes.items():
            least, most = self._axes[name]
            if size < least or (most is not None and size > most):
                raise ValueError(f"{name} {size}")

    def _stated(self) -> str:
        rows = [f"{row['dtype']} ({', '.join(map(str, row['shape']))})" for row in self._leaves]
        return f"{', '.join(self._inputs)}: {'; '.join(rows)}; {self._axes}"[: 2 * MAX_TEXT]

    def run(self, values: list[Any], ledger: _Ledger | None = None) -> Any:
        """What the steps give for a device, the inputs and the tensors; with a ledger, for their shapes alone."""
        keeps = torch.is_grad_enabled() or torch.compiler.is_compiling()
        place, steps = 0, self._shapes if ledger else self._steps if keeps else self._thrifty
        values += [None] * (self._end - self._first) + self._constants
        try:
            for function, fetch, place, done in steps:
                values[place] = function(*fetch(values))
                if ledger is not None:
                    ledger.note(values[place], place, done)
                for slot in done:
                    values[slot] = None
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            where = f"node {place - self._first}"
            raise ModelError("an operation of the graph fails", where=where, got=_short(error)) from error
        return from_tree(self._output, [values[slot] for slot in self._outputs])


class _Ledger:
    """How many elements there are at once, and whether any tensor has more than is plausible."""

    def __init__(self, most: int):
        self._most, self._alive = most, 0
        self._sizes: dict[int, int] = {}

    def note(self, value: Any, place: int, done: tuple[int, ...]) -> None:
        """Raises:  ValueError where it is too much"""
        tensors = [item for item in (value if isinstance(value, list | tuple) else [value]) if isinstance(item, Tensor)]
        self._sizes[place] = sum(tensor.numel() for tensor in tensors)
        self._alive += self._sizes[place]
        if max(self._sizes[place], self._alive // _TENSORS_AT_ONCE) > self._most:
            raise ValueError(
                f"{self._alive:,} elements at once, where at most {self._most:,} in a tensor are plausible"
            )
        self._alive -= sum(self._sizes.pop(slot, 0) for slot in done)


def _check_leaves(leaves: Json, axes: Json) -> None:
    for least, most in axes.values():
        _refuse(type(least) is not int or not (most is None or type(most) is int), axes)
    for row in leaves:
        _refuse(row["dtype"] not in DTYPES or not isinstance(row["shape"], list), row)
        _refuse(not all(size in axes if isinstance(size, str) else type(size) is int for size in row["shape"]), row)


def _signature(names: list[str], positional: Json) -> inspect.Signature:
    _refuse(type(positional) is not int or not 0 <= positional <= len(names), positional)
    by_place, by_name = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    kinds = [by_place if i < positional else by_name for i in range(len(names))]
    return inspect.Signature([inspect.Parameter(name, kind) for name, kind in zip(names, kinds, strict=True)])


def _match(tree: Json, value: Any, leaves: list[Any]) -> None:
    """Put the tensors of a value of this structure to their places."""
    if not isinstance(tree, dict):
        return _refuse(type(value) is not type(tree) or value != tree, value)
    ((name, inner),) = tree.items()
    if name == LEAF:
        if not isinstance(value, Tensor):
            raise ValueError(type(value).__name__)
        leaves[inner] = value
    elif name == "dict":
        _refuse(not isinstance(value, Mapping) or set(value) != set(inner), type(value).__name__)
        for key, item in inner.items():
            _match(item, value[key], leaves)
    else:
        _refuse(not isinstance(value, list | tuple), type(value).__name__)
        for item, own in zip(inner, value, strict=True):
            _match(item, own, leaves)
    return None


def _check_chance(given: dict[str, Json]) -> None:
    """What is drawn by chance, and what would change statistics, is not for evaluation."""
    has_statistics = any(given.get(name) is not None for name in ("running_mean", "running_var"))
    _refuse(given.get("train", False) is not False or given.get("dropout_p", 0.0) != 0.0, "an operation that draws")
    for name in ("training", "use_input_stats"):
        _refuse(name in given and given[name] is not (not has_statistics), "statistics that would change")


def _item_of(argument: Argument) -> Argument:
    return Argument(argument.name, argument.kind, is_optional=argument.holds_none)


def _constant(value: Json, argument: Argument) -> Any:
    """Raises:  ValueError where the value is of another kind than the argument"""
    if value is None:
        return _refuse(not argument.is_optional, f"None as {argument.name}")
    if argument.is_list:
        _refuse(not isinstance(value, list), value)
        return [_constant(item, _item_of(argument)) for item in value]
    # torch takes a number for a tensor of no axes
    number = (bool, int, float)
    tags: dict[str, tuple[str, dict[str, Any]]] = {
        "ScalarType": (DTYPE, DTYPES), "MemoryFormat": (FORMAT, FORMATS), "float": (FLOAT, FLOATS),
        "number": (FLOAT, FLOATS), "Tensor": (FLOAT, FLOATS),
    }  # fmt: skip
    if isinstance(value, dict) and argument.kind in tags:
        tag, known = tags[argument.kind]
        _refuse(set(value) != {tag}, value)
        return known[value[tag]]
    kinds = {"int": (int,), "bool": (bool,), "float": (int, float), "number": number, "Tensor": number, "str": (str,)}
    _refuse(type(value) not in kinds.get(argument.kind, ()), value)
    is_long = len(value) > MAX_TEXT if isinstance(value, str) else abs(value) >= 1 << 63 and type(value) is int
    _refuse(is_long or value != value, value)
    return value


def _called(row: _Row, instead: Callable[..., Any] | None) -> Callable[..., Any]:
    function = instead or row.operation.function
    function = functools.partial(function, **row.constants) if row.constants else function
    return (lambda device, *args: function(*args, device=device)) if row.operation.is_placed else function


def _listed(*items: Any) -> list[Any]:
    return list(items)


_LIST = Operation("list", _listed, (), "tensors")


def _fetch(slots: list[int]) -> Callable[[list[Any]], Any]:
    """What takes the slots from the values, in one call of C."""
    if len(slots) > 1:
        return operator.itemgetter(*slots)
    return operator.itemgetter(slice(slots[0], slots[0] + 1) if slots else slice(0, 0))


def from_tree(tree: Json, leaves: Sequence[Any]) -> Any:
    if not isinstance(tree, dict):
        return tree
    ((name, inner),) = tree.items()
    if name == LEAF:
        return leaves[inner]
    if name == "dict":
        return {key: from_tree(item, leaves) for key, item in inner.items()}
    items = [from_tree(item, leaves) for item in inner]
    return tuple(items) if name == "tuple" else items


def _check_tree(tree: Json, num_leaves: int, found: list[int], depth: int = 0) -> None:
    """The leaves go to ``found``. Raises:  ValueError for what ``_to_tree`` does not make"""
    if depth > _MAX_DEPTH:
        raise ValueError(f"a nesting beyond {_MAX_DEPTH} levels")
    if not isinstance(tree, dict):
        return _refuse(not (tree is None or type(tree) in (bool, int, float, str)), tree)
    _refuse(len(tree) != 1, tree)
    ((name, inner),) = tree.items()
    if name == LEAF:
        _refuse(type(inner) is not int or not 0 <= inner < num_leaves, tree)
        return found.append(inner)
    _refuse(name not in ("dict", "tuple", "list") or isinstance(inner, dict) != (name == "dict"), tree)
    _refuse(not isinstance(inner, dict | list), tree)
    for item in inner.values() if isinstance(inner, dict) else inner:
        _check_tree(item, num_leaves, found, depth + 1)
    return None


def _refuse(is_wrong: bool, value: object) -> None:
    if is_wrong:
        raise ValueError(_short(value))


def _short(value: object) -> str:
    try:
        return repr(value)[:MAX_TEXT]
    except RecursionError:
        return "something nested too deeply"
