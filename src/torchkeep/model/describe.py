"""The module tree with shapes and parameters, found by one forward that leaves no trace."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .freeze import evaluating


@dataclass(frozen=True)
class ModuleRow:
    """One module: its place in the tree, what went in and came out, and what it holds by itself and below.

    ``seconds``, of its forward in the example, are those of the processor that runs Python.
    """

    name: str
    type_name: str
    depth: int
    inputs: str
    outputs: str
    num_parameters: int
    num_learning: int
    num_buffers: int
    seconds: float = 0.0


def describe(model: nn.Module, forward: Callable[[], Any] | None = None) -> list[ModuleRow]:
    """A row for each module, in the order of the tree; the first is the model itself.

    ``forward`` runs the model once on an example; without it the shapes stay empty. Modes and random states are as
    before afterwards, and batch statistics do not move, for the model is in eval mode meanwhile.
    """
    seen: dict[str, tuple[str, str, float]] = {}
    if forward is not None:
        _run_watched(model, forward, seen)
    return [_row(name, module, *seen.get(name, ("", "", 0.0))) for name, module in model.named_modules()]


def _run_watched(model: nn.Module, forward: Callable[[], Any], seen: dict[str, tuple[str, str, float]]) -> None:
    begun: dict[str, float] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            seconds = time.perf_counter() - begun[name] + (seen[name][2] if name in seen else 0.0)
            seen[name] = (shape_text([*args, *kwargs.values()]), shape_text(output), seconds)

        return hook

    def start(name: str) -> Any:
        return lambda *_: begun.update({name: time.perf_counter()})

    hooks = [m.register_forward_hook(watch(name), with_kwargs=True) for name, m in model.named_modules()]
    hooks += [m.register_forward_pre_hook(start(name)) for name, m in model.named_modules()]
    devices = range(torch.cuda.device_count())
    try:
        with torch.random.fork_rng(devices), torch.no_grad(), evaluating(model):
            forward()
    finally:
        for hook in hooks:
            hook.remove()


def _row(name: str, module: nn.Module, inputs: str, outputs: str, seconds: float) -> ModuleRow:
    parameters = list(module.parameters())
    return ModuleRow(
        name=name or "(model)",
        type_name=type(module).__name__,
        depth=name.count(".") + 1 if name else 0,
        inputs=inputs,
        outputs=outputs,
        num_parameters=sum(p.numel() for p in parameters),
        num_learning=sum(p.numel() for p in parameters if p.requires_grad),
        num_buffers=sum(b.numel() for b in module.buffers()),
        seconds=seconds,
    )


def shape_text(value: Any) -> str:
    """Shapes in words: ``(32, 3, 224, 224)``, several joined, dicts by name."""
    if isinstance(value, Tensor):
        return str(tuple(value.shape))
    if isinstance(value, Mapping):
        parts = [f"{name} {shape_text(item)}" for name, item in value.items() if shape_text(item)]
        return ", ".join(parts)
    if isinstance(value, list | tuple):
        return ", ".join(text for text in map(shape_text, value) if text)
    return ""
