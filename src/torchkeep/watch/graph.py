"""The graph of a model: the operations of one forward, in the modules that do them, joined by the tensors they hand on.

The forward itself is followed, so that whatever it decides, takes or gives is natural: dicts, outputs with attributes,
modules that are called twice, loops whose length depends on the data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..contracts import Json
from ..tensors import to_json
from .following import borrowed, plain, tensors_in
from .media import MediaStore

_MOST_NODES = 20_000
_NOWHERE = (-1, "")
_NO_STEPS = frozenset(("detach", "contiguous", "requires_grad_", "to", "type_as"))  # they hand on what they are given


@dataclass
class Node:
    """One operation, or an input, parameter or output. Names nest by "/"."""

    name: str
    op: str
    inputs: list[str] = field(default_factory=list)
    shapes: list[list[int]] = field(default_factory=list)
    dtype: str = ""

    def to_json(self) -> Json:
        return vars(self)


class Graph:
    """What was seen of a forward; ``how`` is "followed", or "modules" where the forward could not be."""

    def __init__(self, nodes: list[Node], how: str, note: str = ""):
        self.nodes, self.how, self.note = nodes, how, note

    def settle(self, media: MediaStore) -> dict[str, Json]:
        data = to_json({"nodes": [node.to_json() for node in self.nodes]})
        facts = {"num_nodes": len(self.nodes), "how": self.how, "note": self.note}
        return {"media": media.put(data, ".json"), **facts}


def graph(model: nn.Module, call: Callable[[], Any]) -> Graph:
    """The graph of ``model`` from one forward, which ``call`` makes. Nothing of the model is changed."""
    model = plain(model)
    scopes = _Scopes(model)
    if isinstance(model, torch.jit.ScriptModule):
        return Graph(_modules(model, []), "modules", "what is scripted cannot be followed")
    try:
        with borrowed(model), scopes, _Following(scopes) as seen:
            output = call()
            seen.end(output)
        if len(seen.nodes) > _MOST_NODES:
            return Graph(_modules(model, scopes.order), "modules", f"more than {_MOST_NODES:,} operations")
        return Graph(list(seen.nodes.values()), "followed")
    except Exception as error:
        return Graph(_modules(model, scopes.order), "modules", f"{type(error).__name__}: {str(error)[:300]}")


class _Scopes:
    """Which module is at work, by hooks that are taken away again."""

    def __init__(self, model: nn.Module):
        self._model = model
        self._names = {id(module): name for name, module in model.named_modules()}
        self._hooks: list[Any] = []
        self.stack: list[str] = []
        self.given: list[Tensor] = []
        self.order: list[str] = []

    def __enter__(self) -> _Scopes:
        for module in self._model.modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue  # it takes no hooks
            self._hooks.append(module.register_forward_pre_hook(self._begin, with_kwargs=True))
            self._hooks.append(module.register_forward_hook(self._finish, always_call=True))
        return self

    def __exit__(self, *error: Any) -> None:
        for hook in self._hooks:
            hook.remove()

    def _begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not self.stack:
            self.given += tensors_in([args, kwargs])
        self.stack.append(self.scope_of(self._names[id(module)]))
        self.order.append(self._names[id(module)])

    def _finish(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.stack.pop()

    def scope_of(self, name: str) -> str:
        parts = [part for part in name.split(".") if part not in ("", "_orig_mod")]
        return "/".join([type(self._model).__name__, *parts])


class _Following(TorchFunctionMode):
    """Notes each operation with where its tensors come from. Tensors are held, so that no number is given out twice.

    What is followed are the calls of torch's functions, as the model's author wrote them; the operations within, which
    a dispatch mode would see, are three times as many, and torch loads its compiler for them, a second of work.
    """

    def __init__(self, scopes: _Scopes):
        super().__init__()
        self.nodes: dict[str, Node] = {}
        self._scopes = scopes
        self._from: dict[int, tuple[int, str]] = {}
        self._written: dict[int, tuple[int, str]] = {}
        self._held: list[Tensor] = []
        self._times: dict[str, int] = {}
        model = scopes._model
        self._owned = {id(tensor): name for name, tensor in [*model.named_parameters(), *model.named_buffers()]}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        op = getattr(func, "__name__", "operation")
        made = list(tensors_in(args[0] if op == "__setitem__" else result))
        if not made:
            return result
        inputs = [self._source(tensor) for tensor in tensors_in([args, kwargs or {}])]
        if (op in _NO_STEPS or op == "__get__") and len(inputs) == 1:
            self._hand_on(made, inputs[0])
        elif len(self.nodes) <= _MOST_NODES:
            scope = self._scopes.stack[-1] if self._scopes.stack else self._scopes.scope_of("")
            writes = any(id(tensor) in self._from for tensor in made)
            self._hand_on(made, self._add(f"{scope}/{op.strip('_')}", op.strip("_"), inputs, made), writes)
        else:
            self._hand_on(made, inputs[0] if inputs else "")
        return result

    def _source(self, tensor: Tensor) -> str:
        """The operation that made a tensor or, where that is later, wrote to the memory that it shares with others."""
        known = max(self._from.get(id(tensor), _NOWHERE), self._written.get(_memory(tensor), _NOWHERE))
        return known[1] if known is not _NOWHERE else self._appears(tensor)

    def _appears(self, tensor: Tensor) -> str:
        """Note a tensor that no operation has made."""
        if owned := self._owned.get(id(tensor)):
            name = self._add(self._scopes.scope_of(owned), "parameter", [], tensor)
        elif not self._scopes.stack or any(tensor is given for given in self._scopes.given):
            name = self._add("input", "input", [], tensor)
        else:
            name = self._add(f"{self._scopes.stack[-1]}/constant", "constant", [], tensor)
        self._hand_on([tensor], name)
        return name

    def _hand_on(self, made: list[Tensor], name: str, writes: bool = False) -> None:
        for tensor in made:
            place = len(self._held), name
            self._held.append(tensor)
            self._from[id(tensor)] = place
            if writes:
                self._written[_memory(tensor)] = place

    def _add(self, name: str, op: str, inputs: list[str], value: Any) -> str:
        times = self._times[name] = self._times.get(name, -1) + 1
        unique = f"{name}_{times}" if times else name
        made = list(tensors_in(value))
        shapes = [list(map(int, tensor.shape)) for tensor in made]
        dtype = str(made[0].dtype).removeprefix("torch.") if made else ""
        self.nodes[unique] = Node(unique, op, list(dict.fromkeys(inputs)), shapes, dtype)
        return unique

    def end(self, output: Any) -> None:
        """Note what the forward gives."""
        for tensor in tensors_in(output):
            self._add("output", "output", [self._source(tensor)], tensor)


def _memory(tensor: Tensor) -> int:
    """What names the memory of a tensor; one without such memory, a sparse one for example, shares it with none."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return -1 - id(tensor)


def _modules(model: nn.Module, order: list[str]) -> list[Node]:
    """A node for each module that holds no other: joined in the order in which they ran, else as registered."""
    names = list(_leaves(model))
    ran = [name for name in dict.fromkeys(order) if name in names]
    before = ""
    nodes = []
    kinds = dict(model.named_modules())
    for name in [*ran, *(name for name in names if name not in ran)][:_MOST_NODES]:
        place = "/".join([type(model).__name__, *name.split(".")])
        nodes.append(Node(place, type(kinds[name]).__name__, [before] if before and name in ran else []))
        before = place if name in ran else before
    return nodes


def _leaves(model: nn.Module) -> Iterator[str]:
    for name, module in model.named_modules():
        if name and not any(True for _ in module.children()):
            yield name
