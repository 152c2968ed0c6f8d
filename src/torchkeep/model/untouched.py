"""A model lent to whoever wants to look: whatever is done with it meanwhile, it is as it was afterwards."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..generators import kept_generators

_SMALL_BYTES = 1 << 26


@contextlib.contextmanager
def untouched(model: nn.Module, *, parameters: bool = False) -> Iterator[None]:
    """Put back, bit for bit, buffers, gradients, modes, hooks and plain attributes, and all random generators.

    Without gradients at the start, so that a backward has them alone. Parameters are put back where ``parameters``:
    for whoever takes a step, at the price of a copy. Up to 64 MB of them always are: a forward may write to some, as
    one with a teacher that follows. Every tensor stays the object that it was. Attributes are followed through lists
    and dicts, not into objects of other types.
    """
    parameters = parameters or sum(p.nbytes for p in model.parameters() if not _is_lazy(p)) <= _SMALL_BYTES
    held = [_held(module) for module in model.modules() if not _waits(module)]
    tensors = _Tensors(model, parameters)
    with kept_generators():
        try:
            yield
        finally:
            for restore in held:
                restore()
            tensors.restore()


class _Tensors:
    """The parameters' gradients, and the values of all that may be written to in place."""

    def __init__(self, model: nn.Module, parameters: bool):
        self._gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
        watched = [*model.buffers(), *_plain_tensors(model), *(model.parameters() if parameters else ())]
        self._values = [(tensor, tensor.detach().clone()) for tensor in watched if not _is_lazy(tensor)]
        for parameter, _ in self._gradients:
            parameter.grad = None

    def restore(self) -> None:
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        with torch.no_grad():
            for tensor, value in self._values:
                if tensor.shape != value.shape:
                    tensor.set_(value)
                elif not torch.equal(tensor, value):  # a needless write would spoil graphs that others hold
                    tensor.copy_(value)


def _plain_tensors(model: nn.Module) -> Iterator[Tensor]:
    """What a module holds beside parameters and buffers: torch does not save it, but a forward may write to it."""
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor):
                yield value


def _is_lazy(tensor: Tensor) -> bool:
    return nn.parameter.is_lazy(tensor)


def _waits(module: nn.Module) -> bool:
    """Whether the first forward makes another of it, as of a LazyLinear: there is no way back from that."""
    own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    return any(map(_is_lazy, own))


def _held(module: nn.Module) -> Any:
    own = dict(vars(module))
    contents = [(value, _copied(value)) for value in own.values() if isinstance(value, dict | list | set | deque)]

    def restore() -> None:
        vars(module).clear()
        vars(module).update(own)
        for value, before in contents:
            _refill(value, before)

    return restore


def _copied(value: Any) -> Any:
    return value.copy()


def _refill(value: Any, before: Any) -> None:
    value.clear()
    if isinstance(value, dict | set):
        value.update(before)
    else:
        value.extend(before)
