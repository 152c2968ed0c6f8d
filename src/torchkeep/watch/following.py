"""One forward of a model with nothing of it changed: how its graph and its activations are looked at."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn


def plain(model: nn.Module) -> nn.Module:
    """The model behind torch.compile."""
    inner = getattr(model, "_orig_mod", model)
    return inner if isinstance(inner, nn.Module) else model


@contextlib.contextmanager
def borrowed(model: nn.Module) -> Iterator[None]:
    """In evaluation, without gradients; modes, buffers, attributes and random states are put back bit for bit.

    Of an attribute that is a list or another object, it is the object that is put back, not what is in it.
    """
    modules = [(module, module.training, vars(module).copy(), _buffers(module).copy()) for module in model.modules()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    has_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    on_gpu = torch.cuda.get_rng_state_all() if has_gpu else []
    try:
        for module, *_ in modules:
            module.training = False
        with torch.no_grad(), _uncompiled():
            yield
    finally:
        for module, mode, attributes, named in modules:
            _put_back(vars(module), attributes)
            _put_back(_buffers(module), named)
            module.training = mode
        with torch.no_grad():
            for buffer, was in buffers:
                if not torch.equal(buffer, was):
                    buffer.copy_(was)
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if on_gpu:
            torch.cuda.set_rng_state_all(on_gpu)


def _buffers(module: nn.Module) -> dict[str, torch.Tensor | None]:
    named: Any = vars(module).get("_buffers")
    return named if isinstance(named, dict) else {}  # a scripted module keeps its own elsewhere


def _put_back(now: dict[str, Any], was: dict[str, Any]) -> None:
    now.clear()
    now.update(was)


def _uncompiled() -> contextlib.AbstractContextManager[Any]:
    """What torch.compile has made cannot be followed, and does not see hooks."""
    if "torch._dynamo" in sys.modules:  # nothing has been compiled without it, and it takes a second to load
        eager: contextlib.AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
        return eager
    return contextlib.nullcontext()


def tensors_in(value: Any, depth: int = 0) -> Iterator[torch.Tensor]:
    """Every tensor of nested lists, tuples, dicts and outputs with attributes."""
    if isinstance(value, torch.Tensor):
        yield value
    elif depth < 8 and isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item, depth + 1)
    elif depth < 8 and isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item, depth + 1)
    elif depth < 8 and hasattr(value, "__dataclass_fields__"):
        for item in vars(value).values():
            yield from tensors_in(item, depth + 1)
