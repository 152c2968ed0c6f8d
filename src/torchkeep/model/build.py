"""Models by name: built-ins, and ``file.py:function`` of the user's own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from pydantic import Field as Setting
from torch import Tensor, nn

from ..contracts import Schema
from ..errors import ModelError, nearest
from ..settings import Settings
from ..usercode import is_reference


class ModelSettings(Settings):
    """[model]: which model, and what it is built with."""

    name: str
    """"convnet", "mlp", or file.py:function relative to the recipe."""
    args: dict[str, Any] = Setting(default_factory=dict)
    """Further arguments of the model, by name."""


class ConvNet(nn.Module):
    """A small convolutional net: stages of two 3×3 convolutions with batch norm, halved in size between stages.

    Shapes:  float (B, C, H, W) → logits (B, K)
    """

    def __init__(self, in_channels: int, num_classes: int, widths: Sequence[int] = (32, 64, 128), dropout: float = 0.1):
        super().__init__()
        stages: list[nn.Module] = []
        channels = in_channels
        for i, width in enumerate(widths):
            if i:
                stages.append(nn.MaxPool2d(2, ceil_mode=True))
            stages += [*_convolution(channels, width), *_convolution(width, width)]
            channels = width
        self.features = nn.Sequential(*stages)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(channels, num_classes)

    def forward(self, image: Tensor) -> Tensor:
        pooled = self.features(image).mean((2, 3))
        logits: Tensor = self.head(self.dropout(pooled))
        return logits


def _convolution(c_in: int, c_out: int) -> list[nn.Module]:
    return [nn.Conv2d(c_in, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU(inplace=True)]


class Mlp(nn.Module):
    """A multi-layer perceptron over numbers, with an embedding for each category where there are any.

    Shapes:  numbers float (B, …) and categories int64 (B, G) → (B, K)
    """

    def __init__(
        self,
        in_features: int,
        num_outputs: int,
        hidden: Sequence[int] = (128, 128),
        dropout: float = 0.0,
        cardinalities: Sequence[int] = (),
    ):
        super().__init__()
        # min(50, (n + 1) // 2): the width that fastai's tabular models use for n values
        self.embeddings = nn.ModuleList(nn.Embedding(n, min(50, (n + 1) // 2)) for n in cardinalities)
        width = in_features + sum(min(50, (n + 1) // 2) for n in cardinalities)
        layers: list[nn.Module] = []
        for size in hidden:
            layers += [nn.Linear(width, size), nn.ReLU(), *([nn.Dropout(dropout)] if dropout else [])]
            width = size
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(width, num_outputs)

    def forward(self, numbers: Tensor | None = None, categories: Tensor | None = None) -> Tensor:
        parts = [] if numbers is None else [numbers.flatten(1)]
        if categories is not None:
            parts += [embedding(categories[:, i]) for i, embedding in enumerate(self.embeddings)]
        logits: Tensor = self.head(self.layers(torch.cat(parts, 1) if len(parts) > 1 else parts[0]))
        return logits


def build_model(
    settings: ModelSettings, schema: Schema, cardinalities: Sequence[int], load: Callable[[str], Callable[..., Any]]
) -> nn.Module:
    """The model that the settings name, made for the data's shapes and classes.

    ``load`` turns ``file.py:function`` into the function; it decides what may run.

    Raises:  ModelError if there is no such model, or if its function does not give an nn.Module
    """
    if is_reference(settings.name):
        return _call(load(settings.name), settings, {"num_classes": num_outputs(schema)})
    builder = BUILT_IN.get(settings.name)
    if builder is None:
        raise ModelError(
            "there is no such model",
            where="model.name",
            got=repr(settings.name),
            expected=f"one of {', '.join(BUILT_IN)}, or file.py:function",
            fix=nearest(settings.name, list(BUILT_IN)),
        )
    return _call(builder, settings, _sizes(settings.name, schema, cardinalities))


def _sizes(name: str, schema: Schema, cardinalities: Sequence[int]) -> dict[str, Any]:
    inputs = {key: schema[key] for key in schema.inputs}
    image = next((field for field in inputs.values() if field.kind == "image"), None)
    if name == "convnet":
        if image is None or schema.preprocess is None:
            raise ModelError(
                "a convnet needs images",
                where="model.name",
                got=f"data with {', '.join(inputs) or 'no inputs'}",
                expected="images",
                fix='model.name = "mlp" takes numbers',
            )
        return {"in_channels": schema.preprocess.channels, "num_classes": num_outputs(schema)}
    shapes = [field.shape for key, field in inputs.items() if key != "categories"]
    if any(shape is None for shape in shapes):
        raise ModelError(
            "an mlp needs inputs of one known size",
            where="model.name",
            got="images of unknown size",
            expected="a size",
            fix="set data.image_size",
        )
    in_features = sum(_numel(shape) for shape in shapes if shape is not None)
    return {"in_features": in_features, "num_outputs": num_outputs(schema), "cardinalities": list(cardinalities)}


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def num_outputs(schema: Schema) -> int:
    """How many numbers the model gives for a sample: the classes of a label, or the numbers of a target."""
    targets = [schema[name] for name in schema.targets]
    if not targets:
        return 1
    if targets[0].kind == "label":
        return max(1, targets[0].num_classes)
    return _numel(targets[0].shape or ())


def _call(function: Callable[..., Any], settings: ModelSettings, sizes: dict[str, Any]) -> nn.Module:
    known = inspect.signature(function).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
    wrong = [name for name in settings.args if name not in known and not takes_any]
    if wrong:
        raise ModelError(
            "this model has no such argument",
            where=f"model.args.{wrong[0]}",
            got=repr(wrong[0]),
            expected=f"one of {', '.join(known)}",
            fix=nearest(wrong[0], list(known)),
        )
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
            "this function gives no model",
            where=f"model.name = {settings.name!r}",
            got=type(model).__name__,
            expected="a torch.nn.Module",
        )
    return model


BUILT_IN: dict[str, Callable[..., nn.Module]] = {"convnet": ConvNet, "mlp": Mlp}
