"""What each tensor of one forward depends on: the samples, frozen parameters, or something that learns."""

from __future__ import annotations

import contextlib
import enum
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

_SIMPLE = (Tensor, type(None), bool, int, float, complex, str, bytes, slice, range, type, enum.Enum, torch.Size,
           torch.dtype, torch.device, torch.layout, torch.memory_format)  # fmt: skip
_TELLING = {
    "__get__", "__len__", "__hash__", "size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset",
    "element_size", "is_floating_point", "is_complex", "is_signed", "is_contiguous", "is_same_size", "is_inference",
    "result_type", "can_cast",
}  # fmt: skip


class Refused(BaseException):
    """A module that cannot be skipped as a whole (what is inside may be); with a ``reason`` nothing may be.

    No error: it passes a user's ``except Exception``.
    """

    def __init__(self, path: str, reason: str = ""):
        self.path, self.reason = path, reason


@dataclass(eq=False)
class Event:
    """What gave tensors that nothing learning went into: a skipped module, a function, or the batch (no parents).

    ``func`` is (path, number of the call), a torch function, or a key. ``is_heavy``: with frozen parameters;
    ``is_frozen``: such went into it or into what it was made from, so that there is something to save.
    """

    func: Any
    place: str
    parents: list[Node]
    keys: frozenset[str]
    is_heavy: bool
    is_frozen: bool
    leaves: list[Any]
    spec: pytree.TreeSpec

    @property
    def is_call(self) -> bool:
        return isinstance(self.func, tuple)

    @property
    def constants(self) -> list[Any]:
        return [leaf for leaf in self.leaves if not isinstance(leaf, Tensor)]


@dataclass(eq=False)
class Node:
    """A tensor that was made of the samples; without an event it depends on what learns, or on chance."""

    tensor: Tensor
    event: Event | None
    version: int  # a later one says that something wrote into it


class Flow(TorchFunctionMode):
    """Watches one forward, in which all that learns has ``requires_grad``.

    A call of a module is one event where its parameters are frozen, all its modules in eval mode and without hooks, and
    nothing that goes in or on inside learns. All else is followed function by function. ``used`` are the tensors that
    must really be there: what learns, Python or hooks use them. ``limits`` say why something is not frozen, and whether
    what went in was.
    """

    def __init__(self, model: nn.Module, refused: set[str]):
        super().__init__()
        self.modules: dict[str, nn.Module] = dict(model.named_modules())
        self.nodes: list[Node] = []
        self.events: list[Event] = []
        self.used: list[Node] = []
        self.limits: list[tuple[str, bool]] = []
        self.inputs: dict[str, Event] = {}
        self.calls: Counter[str] = Counter()
        self._skippable = _skippable(model) - refused
        self._buffers = set(map(id, model.buffers()))
        self._learning = {parameter.data_ptr() for parameter in model.parameters() if parameter.requires_grad}
        self._by_id: dict[int, Node] = {}
        self._writers: dict[int, tuple[Node, int]] = {}  # memory → what was last written into it, and that version
        self._path = [""]
        self._skipping = ""

    def run(self, forward: Callable[[Any], Any], batch: dict[str, Any], keys: Sequence[str]) -> Flow:
        given = tree_map(Tensor.clone, batch)
        for key in keys:
            leaves, spec = pytree.tree_flatten(given[key])
            self.inputs[key] = Event(key, "input", [], frozenset([key]), False, False, leaves, spec)
            for tensor in tensors(leaves):
                self._add(tensor, self.inputs[key])
        forwards = {module: partial(self._call, path, module.forward) for path, module in self.modules.items()}
        with torch.enable_grad(), patched(forwards):
            with self:
                output = forward(given)
            self._use(output)
        return self

    def _add(self, tensor: Tensor, event: Event | None) -> Node:
        self._by_id[id(tensor)] = node = Node(tensor, event, tensor._version)
        self.nodes.append(node)
        return node

    def _node(self, tensor: Tensor) -> Node | None:
        """What is known of a tensor. One that was written into goes by an older name: then the write is really done."""
        node, (writer, version) = self._by_id.get(id(tensor)), self._writers.get(memory(tensor), (None, 0))
        if writer is None or writer is node or (node is not None and node.version >= version):
            return node
        if writer.event is not None:
            if writer.event.is_call:
                raise Refused(writer.event.place)
            self.used += writer.event.parents
        return writer

    def _nodes(self, tree: Any) -> list[Node]:
        with torch._C.DisableTorchFunction():
            return [node for tensor in tensors(tree) if (node := self._node(tensor)) is not None]

    def _use(self, tree: Any) -> None:
        self.used += [node for node in self._nodes(tree) if node.event is not None]

    def _call(self, path: str, forward: Any, *args: Any, **kwargs: Any) -> Any:
        if self._skipping:
            return forward(*args, **kwargs)
        self._path.append(path)
        self.calls[path] += 1
        try:
            nodes = self._nodes((args, kwargs)) if path in self._skippable and _is_plain((args, kwargs)) else []
            if nodes and all(node.event is not None for node in nodes):
                return self._skip(path, nodes, forward, args, kwargs)
            result = forward(*args, **kwargs)
            if _is_hooked(self.modules[path]):
                self._use((args, kwargs, result))
            return result
        finally:
            self._path.pop()

    def _skip(self, path: str, parents: list[Node], forward: Any, args: Any, kwargs: Any) -> Any:
        given, buffers = _versions((args, kwargs)), _buffer_ids(self.modules[path])
        self._skipping = path
        try:
            result = forward(*args, **kwargs)
        finally:
            self._skipping = ""
        if not _is_plain(result) or _buffer_ids(self.modules[path]) != buffers:
            raise Refused(path)
        with torch._C.DisableTorchFunction():
            return self._event((path, self.calls[path] - 1), path, parents, given, result)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given, drawn = _versions((args, kwargs)), _generators()
        result = func(*args, **(kwargs or {}))
        outputs, written = tensors(result), _written(given)
        if not outputs and is_telling(func):
            return result
        nodes = self._nodes([tensor for tensor, _ in given])
        is_still = all(map(torch.equal, drawn, _generators()))
        cause = self._cause(func, args, kwargs or {}, [*outputs, *written], is_still)
        is_learning = bool(cause) or any(node.event is None for node in nodes)
        if self._skipping:
            if is_learning:
                raise Refused(self._skipping)
        elif is_learning:
            self._learn(nodes, cause, written, outputs)
        elif nodes and not outputs and not written:
            self.used += nodes  # Python reads the values
        elif nodes:
            return self._event(func, f"{self._path[-1] or 'model'}:{name_of(func)}", nodes, given, result)
        return result

    def _cause(self, func: Any, args: Any, kwargs: Any, made: list[Tensor], is_still: bool) -> str:
        """Why what a function gives is not frozen, beyond what went in."""
        given, path = tensors((args, kwargs)), self._path[-1]
        place = f"{path or 'the model'} ({type(self.modules[path]).__name__})"
        if any(tensor.requires_grad for tensor in [*given, *made]) or any(
            isinstance(tensor, nn.Parameter) and tensor.data_ptr() in self._learning for tensor in given
        ):
            return f"{place} learns"
        if func is F.batch_norm and kwargs.get("training", args[5] if len(args) > 5 else False):
            is_frozen = any(isinstance(tensor, nn.Parameter) for tensor in given)
            if is_frozen and all(node.event is not None for node in self._nodes(given)):
                raise Refused("", f"{place} is frozen and in train mode: it takes the statistics of each batch")
            return f"{place} is in train mode"
        if any(id(tensor) in self._buffers for tensor in made):
            return f"{place} changes a buffer"
        return "" if is_still else f"{place} draws random numbers ({name_of(func)})"

    def _learn(self, nodes: list[Node], cause: str, written: list[Tensor], outputs: list[Tensor]) -> None:
        before = [node.event for node in nodes if node.event is not None]
        if cause and before:
            self.limits.append((cause, any(event.is_frozen for event in before)))
        shared = set(map(memory, written))  # what shares memory with something written shows the write too
        used = [*nodes, *(node for node in self.nodes if shared and memory(node.tensor) in shared)]
        self.used += [node for node in used if node.event is not None]
        for tensor in [*outputs, *written]:
            self._add(tensor, None)
        self._writers |= {memory(tensor): (self._by_id[id(tensor)], tensor._version) for tensor in written}

    def _event(self, func: Any, place: str, parents: list[Node], given: list[tuple[Tensor, int]], result: Any) -> Any:
        """What is frozen, or as good as the input. What is written in place gets a new name: by which is it used?"""
        is_call, old = isinstance(func, tuple), {id(tensor) for tensor, _ in given}
        is_heavy = is_call or any(isinstance(tensor, nn.Parameter) for tensor, _ in given)
        before = [node.event for node in parents if node.event is not None]
        keys: frozenset[str] = frozenset().union(*(event.keys for event in before))
        is_frozen = is_heavy or any(event.is_frozen for event in before)
        leaves, spec = pytree.tree_flatten(result)
        leaves = [t.detach() if isinstance(t, Tensor) and (is_call or id(t) in old) else t for t in leaves]
        event = Event(func, place, parents, keys, is_heavy, is_frozen, leaves, spec)
        self.events.append(event)
        made = [self._add(leaf, event) for leaf in tensors(leaves)]
        for tensor in _written(given):
            self._writers[memory(tensor)] = made[0] if made else self._add(tensor, event), tensor._version
        return pytree.tree_unflatten(leaves, spec)


def _versions(tree: Any) -> list[tuple[Tensor, int]]:
    return [(tensor, tensor._version) for tensor in tensors(tree)]


def _written(given: list[tuple[Tensor, int]]) -> list[Tensor]:
    return [tensor for tensor, version in given if tensor._version != version]


def _skippable(model: nn.Module) -> set[str]:
    """Modules with parameters of which none learns, in eval mode and without hooks."""

    def is_frozen(module: nn.Module) -> bool:
        learns = [parameter.requires_grad for parameter in module.parameters()]
        return bool(learns) and not any(learns) and not any(m.training or _is_hooked(m) for m in module.modules())

    return {path for path, module in model.named_modules() if is_frozen(module)}


def _is_hooked(module: nn.Module) -> bool:
    """By others than transformers, whose models put sleeping hooks into themselves."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return any(getattr(hook, "__module__", "") != "transformers.utils.output_capturing" for hook in hooks)


def _is_plain(tree: Any) -> bool:
    leaves = pytree.tree_leaves(tree)
    return all(isinstance(leaf, _SIMPLE) for leaf in leaves) and not any(t.requires_grad for t in tensors(leaves))


def _buffer_ids(module: nn.Module) -> list[int]:
    return [id(buffer) for buffer in module.buffers()]


def _generators() -> list[Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if torch.cuda.is_available() else [])]


def memory(tensor: Tensor) -> int:
    """What tells whether two tensors share their memory."""
    return id(tensor) if tensor.layout != torch.strided else int(tensor.untyped_storage()._cdata)


def tensors(tree: Any) -> list[Tensor]:
    """The tensors of a tree, and those that lie in attributes of an object in it."""
    leaves = pytree.tree_leaves(tree)
    hidden = [vars(leaf) for leaf in leaves if not isinstance(leaf, _SIMPLE) and hasattr(leaf, "__dict__")]
    return [leaf for leaf in [*leaves, *pytree.tree_leaves(hidden)] if isinstance(leaf, Tensor)]


def tree_map(function: Callable[[Tensor], Any], tree: Any) -> Any:
    return pytree.tree_map_only(Tensor, function, tree)


def name_of(func: Any) -> str:
    return f"{func[0]} (call {func[1]})" if isinstance(func, tuple) else str(getattr(func, "__name__", func))


def is_telling(func: Any) -> bool:
    """Whether a function without tensors in its result tells of a tensor without reading its values."""
    return getattr(func, "__name__", "") in _TELLING


@contextlib.contextmanager
def patched(forwards: dict[nn.Module, Any]) -> Iterator[None]:
    """Other forwards for some modules; the model is as before afterwards."""
    before = {module: module.__dict__.get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.__dict__["forward"] = forward
        yield
    finally:
        for module, own in before.items():
            module.__dict__.pop("forward", None)
            module.__dict__.update({} if own is None else {"forward": own})
