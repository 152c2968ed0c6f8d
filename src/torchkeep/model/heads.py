"""The head: a model's last linear layer, found or named, and made anew where the data have other classes."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import nn

from ..errors import ModelError, nearest


def fit_head(model: nn.Module, num_outputs: int, name: str | None = None) -> tuple[str, bool, str]:
    """Make the head give ``num_outputs`` numbers: one of another width is replaced, drawn as torch draws a new layer.

    ``name`` is the head's dotted name, or that of a part whose last linear layer it is, such as "classifier"; without
    it, it is found. Gives its name, whether it was replaced, and how in words.

    Raises:  ModelError where there is no such part, or no linear layer in it
    """
    found = find_head(model, name)
    if not found:
        raise ModelError(
            "this model has no linear layer at its end", where=type(model).__name__,
            got=_end_text(model), expected="an nn.Linear or a 1×1 nn.Conv2d as the last layer with parameters",
            fix='model.head = "NAME" names the layer, or the part, that gives the outputs',
        )  # fmt: skip
    layer, how = model.get_submodule(found), "as named" if name else "the last linear layer"
    assert _is_linear(layer)
    width = layer.weight.shape[0]
    if width == num_outputs:
        return name or found, False, f"{how}, {width:,} outputs as the data have"
    model.set_submodule(found, _drawn_anew(layer, num_outputs))
    return name or found, True, f"{how}, drawn anew for {num_outputs:,} outputs instead of {width:,}"


def find_head(model: nn.Module, name: str | None = None) -> str | None:
    """The dotted name of the head's layer; None where nothing is named and the model does not end in a linear layer.

    Modules are taken in the order in which they were made. A linear layer that other parameters follow is no head.

    Raises:  ModelError where there is no part of this name, or no linear layer in it
    """
    layers = [(key, layer) for key, layer in _part(model, name).named_modules() if list(layer.parameters(False))]
    linear = [key for key, layer in layers if _is_linear(layer)]
    if name is None:
        return linear[-1] if linear and linear[-1] == layers[-1][0] else None
    if not linear:
        raise ModelError(
            "there is no linear layer in this part", where=f"model.head = {name!r}",
            got=type(_part(model, name)).__name__, expected="an nn.Linear or a 1×1 nn.Conv2d, or a part with one",
        )  # fmt: skip
    return ".".join(filter(None, (name, linear[-1])))


def within(name: str, part: str | None) -> bool:
    """Whether a parameter belongs to a part, by its dotted name."""
    return bool(part) and f"{name}.".startswith(f"{part}.")


def _part(model: nn.Module, name: str | None) -> nn.Module:
    try:
        return model.get_submodule(name or "")
    except AttributeError:
        known = [key for key, _ in model.named_modules() if key]
        last = ", ".join(key for key in known if "." not in key)
        raise ModelError(
            "the model has no such part", where=f"model.head = {name!r}", got=repr(name),
            expected=f"a dotted name below {last}" if last else "a model with parts", fix=nearest(name or "", known),
        ) from None  # fmt: skip


def _is_linear(layer: nn.Module) -> TypeGuard[nn.Linear | nn.Conv2d]:
    if isinstance(layer, nn.modules.lazy.LazyModuleMixin):
        return False
    is_pointwise = isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) and layer.groups == 1
    return isinstance(layer, nn.Linear) or is_pointwise


def _drawn_anew(layer: nn.Linear | nn.Conv2d, num_outputs: int) -> nn.Module:
    has_bias, dtype = layer.bias is not None, layer.weight.dtype
    device = torch.device("cpu") if layer.weight.is_meta else layer.weight.device
    if isinstance(layer, nn.Linear):
        return nn.Linear(layer.in_features, num_outputs, has_bias, device, dtype)
    stride: Any = layer.stride
    return nn.Conv2d(layer.in_channels, num_outputs, 1, stride, bias=has_bias, device=device, dtype=dtype)


def _end_text(model: nn.Module) -> str:
    layers = [
        f"{key} ({type(layer).__name__})" for key, layer in model.named_modules() if list(layer.parameters(False))
    ]
    return f"{layers[-1]} as the last" if layers else "no parameters"
