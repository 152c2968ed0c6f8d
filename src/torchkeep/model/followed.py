"""One forward, followed module by module, and the graph that it leaves for backward."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from .. import gradients
from ..errors import ModelError
from .flow import memory, tensors, tree_map

LossFunction = Callable[..., Any]
LOSS = "(loss)"
MODEL = "(model)"


class Followed:
    """One run of the model on its own copy of the batch; hooks are taken away by ``untouched``."""

    def __init__(self, model: nn.Module, batch: Any, loss: LossFunction | None, targets: Any):
        self.model = model
        self.loss = loss
        self.batch = tree_map(_copied, dict(batch) if isinstance(batch, Mapping) else batch)
        self.targets = tree_map(_copied, targets)
        self.types = {name or MODEL: type(module).__name__ for name, module in model.named_modules()}
        self.owned = {memory(t): name for name, t in [*model.named_parameters(), *model.named_buffers()]}
        self._path: list[str] = []
        self._moves: list[tuple[int, str]] = [(-1, LOSS)]  # from which number of a node on which module runs
        self._is_forward = True

    @property
    def place(self) -> str:
        return self._path[-1] if self._path else LOSS

    @property
    def is_in_module(self) -> bool:
        return bool(self._path)

    def forward(self) -> Tensor:
        """The loss, one number."""
        for name, module in self.model.named_modules():
            module.register_forward_pre_hook(partial(self._enter, name or MODEL), prepend=True)
            module.register_forward_hook(self._leave, always_call=True)
        total = self.loss_of(call(self.model, self.batch))
        self._is_forward = False
        if not isinstance(total, Tensor) or not total.requires_grad:
            got = "a loss without a graph" if isinstance(total, Tensor) else f"a loss of type {type(total).__name__}"
            raise ModelError(
                "nothing that learns leads to the loss, so there is no backward", where="tk.trace_backward", got=got,
                expected="a tensor that depends on a parameter with requires_grad",
                fix="look for .detach(), .item(), torch.no_grad() and frozen parameters on the way",
            )  # fmt: skip
        return total.sum() if total.dim() else total

    def loss_of(self, output: Any) -> Any:
        """What goes backward of an output: as given, its own ``.loss``, or the sum of its parts' means."""
        if self.loss is not None:
            return self.loss(output) if self.targets is None else self.loss(output, self.targets)
        own = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if isinstance(own, Tensor):
            return own
        means = [t.mean() for t in tensors(output) if t.is_floating_point()]
        return sum(means[1:], means[0]) if means else None

    def _enter(self, name: str, *_: Any) -> None:
        self._path.append(name)
        self._move()

    def _leave(self, *_: Any) -> None:
        self._path.pop()
        self._move()

    def _move(self) -> None:
        if self._is_forward:
            self._moves.append((torch._C._autograd._get_sequence_nr(), self.place))

    def place_of(self, number: int) -> str:
        """The module that ran when the node of this number was made."""
        return self._moves[bisect_right(self._moves, number, key=lambda move: move[0]) - 1][1]

    @property
    def batch_size(self) -> int | None:
        return next((len(t) for t in tensors(self.batch) if t.dim()), None)


def _copied(tensor: Tensor) -> Tensor:
    """The same values, for the model to do with as it likes."""
    with torch.no_grad():
        return torch.empty_like(tensor, requires_grad=tensor.requires_grad).copy_(tensor)


def walk(total: Tensor) -> Iterator[tuple[Node, int]]:
    """Every node that backward reaches, with its number; a parameter's has that of one that leads to it."""
    waiting: list[tuple[Node, int]] = [(total.grad_fn, 0)] if total.grad_fn is not None else []
    seen: set[Node] = set()
    while waiting:
        node, caller = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        number = node._sequence_nr() if end_of(node) is None else caller
        yield node, number
        waiting += [(below, number) for below, _ in node.next_functions if below is not None]


def ruined_gradients(total: Tensor, ends: list[Tensor]) -> list[Tensor]:
    """Run backward: which gradients are not finite. Those that there were, of other models too, are put back."""
    before = [end.grad for end in ends]
    for end in ends:
        end.grad = None
    try:
        gradients.backward(total)
        return [end.grad for end in ends if end.grad is not None and not is_finite(end.grad)]
    finally:
        for end, gradient in zip(ends, before, strict=True):
            end.grad = gradient


def ends_of(nodes: list[tuple[Node, int]]) -> list[Tensor]:
    return [end for node, _ in nodes if (end := end_of(node)) is not None]


def end_of(node: Node) -> Tensor | None:
    """The tensor to whose gradient a node adds; None where it is no end of the graph."""
    return getattr(node, "variable", None) if name_of(node) == "AccumulateGrad" else None


def name_of(node: Node) -> str:
    return node.name().rpartition("::")[2]


def is_looked_at(tensor: Tensor) -> bool:
    is_float = (tensor.is_floating_point() or tensor.is_complex()) and tensor.element_size() > 1
    return is_float and tensor.layout == torch.strided and not tensor.is_meta


def is_ruined(tensor: Tensor) -> bool:
    return is_looked_at(tensor) and not bool(tensor.isfinite().all())


def is_finite(gradient: Tensor) -> bool:
    return not is_ruined(gradients.numbers_of(gradient))


def call(model: nn.Module, batch: Any) -> Any:
    """The model's output for a tensor, a tuple of arguments, or a dict of keywords."""
    if isinstance(batch, tuple | list):
        return model(*batch)
    return model(**batch) if isinstance(batch, Mapping) else model(batch)
