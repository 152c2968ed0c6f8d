"""Models by name: built-ins, and ``file.py:function`` of the user's own."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from pydantic import Field as Setting
from torch import Tensor, nn

from ..contracts import Schema
from ..errors import ModelError, nearest
from ..settings import Settings
from ..usercode import is_reference
from .audio import AudioConv
from .images import ConvNet, ResNet18
from .tables import Mlp
from .text import TextConv, Transformer


class ModelSettings(Settings):
    """[model]: which model, and what it is built with."""

    name: str
    """"convnet", "resnet18", "mlp", "textconv", "transformer", "audioconv", or file.py:function beside the recipe."""
    args: dict[str, Any] = Setting(default_factory=dict)
    """Further arguments of the model, by name."""


class LinearInUnits(nn.Linear):
    """A last layer whose outputs are in the target's own units: what it computes is standardised.

    Shapes:  (B, C) → (B, K), times ``std`` plus ``mean``
    """

    mean: Tensor
    std: Tensor

    def __init__(self, layer: nn.Linear, mean: float, std: float):
        super().__init__(layer.in_features, layer.out_features)
        self.load_state_dict(layer.state_dict())
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("std", torch.tensor(std))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).float() * self.std + self.mean  # half precision would round the target's units


def build_model(
    settings: ModelSettings, schema: Schema, cardinalities: Sequence[int], load: Callable[[str], Callable[..., Any]]
) -> nn.Module:
    """The model that the settings name, made for the data's shapes and classes.

    ``load`` turns ``file.py:function`` into the function; it decides what may run.

    Raises:  ModelError if there is no such model, or if its function does not give an nn.Module
    """
    sizes = _sizes(schema, cardinalities)
    if is_reference(settings.name):
        return _call(load(settings.name), settings, sizes | {"num_classes": sizes["num_outputs"]})
    builder = BUILT_IN.get(settings.name)
    if builder is None:
        raise ModelError(
            "there is no such model", where="model.name", got=repr(settings.name),
            expected=f"one of {', '.join(BUILT_IN)}, or file.py:function",
            fix=nearest(settings.name, list(BUILT_IN)),
        )  # fmt: skip
    _check_inputs(settings.name, schema, sizes)
    return _in_units(_call(builder, settings, sizes | {"num_classes": sizes["num_outputs"]}), schema)


def _in_units(model: nn.Module, schema: Schema) -> nn.Module:
    """A number is predicted in its own units: the last layer knows its mean and deviation."""
    target = next((schema[name] for name in schema.targets), None)
    if target is not None and target.kind == "number" and (target.mean, target.std) != (0.0, 1.0):
        name = "fc" if hasattr(model, "fc") else "head"
        setattr(model, name, LinearInUnits(getattr(model, name), target.mean, target.std))
    return model


def _sizes(schema: Schema, cardinalities: Sequence[int]) -> dict[str, Any]:
    """What models are built with, as far as the data have it."""
    inputs = {key: schema[key] for key in schema.inputs}
    by_kind = {field.kind: field for field in inputs.values()}
    sizes: dict[str, Any] = {"num_outputs": num_outputs(schema), "cardinalities": list(cardinalities)}
    if schema.preprocess is not None:
        sizes["in_channels"] = schema.preprocess.channels
    if "tokens" in by_kind:
        sizes["num_tokens"] = by_kind["tokens"].num_tokens
        sizes["per_token"] = any(schema[name].kind == "tokens" for name in schema.targets)
    if "audio" in by_kind and len(by_kind["audio"].shape or ()) == 2:
        sizes["num_mels"] = (by_kind["audio"].shape or (None,))[0]
    shapes = [field.shape for key, field in inputs.items() if key != "categories"]
    known = [shape for shape in shapes if shape is not None and None not in shape]
    if len(known) == len(shapes):
        sizes["in_features"] = sum(_numel(shape) for shape in known)
    return sizes


_NEEDS = {
    "convnet": ("in_channels", "images"),
    "resnet18": ("in_channels", "images"),
    "textconv": ("num_tokens", "texts"),
    "transformer": ("num_tokens", "texts"),
    "audioconv": ("num_mels", "recordings as log-mels"),
    "mlp": ("in_features", "inputs of one known size"),
}


def _check_inputs(name: str, schema: Schema, sizes: dict[str, Any]) -> None:
    size, what = _NEEDS[name]
    if size in sizes:
        return
    fits = [other for other, (needed, _) in _NEEDS.items() if needed in sizes]
    raise ModelError(
        f"{name} needs {what}", where="model.name", got=f"data with {', '.join(schema.inputs) or 'no inputs'}",
        expected=what, fix=f'model.name = "{fits[0]}"' if fits else "set data.image_size" if name == "mlp" else "",
    )  # fmt: skip


def _numel(shape: tuple[int | None, ...]) -> int:
    return math.prod(size or 0 for size in shape)


def num_outputs(schema: Schema) -> int:
    """How many numbers the model gives for a sample: the classes of a label, or the numbers of a target."""
    targets = [schema[name] for name in schema.targets]
    if not targets:
        return 1
    if targets[0].kind in ("label", "mask"):
        return max(1, targets[0].num_classes)
    if targets[0].kind == "tokens":
        return targets[0].num_tokens
    return _numel(targets[0].shape or ())


def _call(function: Callable[..., Any], settings: ModelSettings, sizes: dict[str, Any]) -> nn.Module:
    known = inspect.signature(function).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
    wrong = [name for name in settings.args if name not in known and not takes_any]
    if wrong:
        raise ModelError(
            "this model has no such argument", where=f"model.args.{wrong[0]}", got=repr(wrong[0]),
            expected=f"one of {', '.join(known)}", fix=nearest(wrong[0], list(known)),
        )  # fmt: skip
    given = {name: value for name, value in sizes.items() if name in known} | settings.args
    try:
        model = function(**given)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            "this model cannot be built",
            where=f"model.name = {settings.name!r}",
            got=f"{type(error).__name__}: {error}",
            expected=f"a function that takes {', '.join(given) or 'nothing'}",
        ) from error
    if not isinstance(model, nn.Module):
        raise ModelError(
            "this function gives no model", where=f"model.name = {settings.name!r}", got=type(model).__name__,
            expected="a torch.nn.Module",
        )  # fmt: skip
    return model


BUILT_IN: dict[str, Callable[..., nn.Module]] = {
    "convnet": ConvNet,
    "resnet18": ResNet18,
    "mlp": Mlp,
    "textconv": TextConv,
    "transformer": Transformer,
    "audioconv": AudioConv,
}
