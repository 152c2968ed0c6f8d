"""Models by name: built-ins, ``file.py:function`` of the user's own, and those of hubs, with their weights and head."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field as Setting
from pydantic import model_validator
from torch import Tensor, nn

from ..contracts import Schema
from ..errors import ModelError, nearest
from ..settings import Settings
from ..usercode import is_reference
from . import hub
from .audio import AudioConv
from .heads import find_head, fit_head
from .images import ConvNet, MobileNetV2, ResNet18, VisionTransformer
from .tables import Mlp
from .text import TextConv, Transformer
from .weights import LoadReport, check_finite, check_share, load_weights, report_of

NO_WEIGHTS = "none"


class ModelSettings(Settings):
    """[model]: which model, what it is built with, and which weights it begins with."""

    name: str
    """A built-in such as "convnet", file.py:function, hf:NAME, timm:NAME or torchvision:NAME."""
    args: dict[str, Any] = Setting(default_factory=dict)
    """Further arguments of the model, by name."""
    weights: str | None = None
    """A file, the folder of a run or checkpoint, or hf:NAME; "none": as drawn; not set: a hub's model has its own."""
    weights_share: float = Setting(default=0.9, ge=0, le=1)
    """The least share of the parameters, but for the head's, that must be in the weights."""
    rename: dict[str, str] = Setting(default_factory=dict)
    """Prefixes of names in the weights, and what they become."""
    preprocess: Literal["stated", "own"] = "stated"
    """"stated": where the weights say how inputs are prepared, [data] may not say otherwise; "own": it may."""
    head: str | None = None
    """The layer, or the part, that gives the outputs; not set: the last linear layer."""

    @model_validator(mode="after")
    def _renames_something(self) -> ModelSettings:
        if self.rename and self.weights in (None, NO_WEIGHTS):
            raise ValueError("model.weights beside model.rename")
        return self


@dataclass
class Built:
    """A model, the name of its head where it has one, what was loaded, and rows for the table of decisions."""

    model: nn.Module
    head: str | None = None
    report: LoadReport | None = None
    notes: list[tuple[str, str, str, str]] = field(default_factory=list)


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
    settings: ModelSettings, schema: Schema, cardinalities: Sequence[int], load: Callable[[str], Callable[..., Any]],
    base: Path | None = None, *, loads: bool = True,
) -> Built:  # fmt: skip
    """The model that the settings name, made for the data's shapes and classes, with its weights.

    ``load`` turns ``file.py:function`` into the function; it decides what may run. Names of files and folders are
    relative to ``base``. Without ``loads``, as for a run that goes on, the same model is made and no weights are read.

    Raises:  ModelError if there is no such model, if its function does not give an nn.Module, or if weights do not fit
    """
    sizes, base, is_code = _sizes(schema, cardinalities), base or Path(), is_reference(settings.name)
    held = None
    if is_code:
        model = _call(load(settings.name), settings, sizes)
    elif hub.is_hub_name(settings.name):
        reads = loads and settings.weights is None
        held = hub.open_model(settings.name, base, schema, sizes["num_outputs"], settings.args, reads=reads)
        model = held.model
    else:
        model = _built_in(settings, schema, sizes)
    built = Built(model)
    # a function made its own outputs, and may mean them: a single logit for two classes
    begins_with = settings.weights not in (None, NO_WEIGHTS)
    is_fitted = not is_code or settings.head or (begins_with and find_head(model))
    if is_fitted and len(schema.targets) == 1:
        _fit(built, held, sizes["num_outputs"], settings.head)
    else:
        built.head = settings.head or find_head(model)
    if loads:
        _load(built, held, settings, base)
    if not is_code:
        _put_in_units(built, schema)
    return built


def build_alone(settings: ModelSettings, load: Callable[[str], Callable[..., Any]]) -> nn.Module:
    """The model of ``file.py:function`` without data. A number of outputs that it must be given is 10.

    Raises:  ModelError as ``build_model``
    """
    function = load(settings.name)
    needed = [name for name, given in inspect.signature(function).parameters.items() if given.default is given.empty]
    return _call(function, settings, {name: 10 for name in ("num_classes", "num_outputs") if name in needed})


def _built_in(settings: ModelSettings, schema: Schema, sizes: dict[str, Any]) -> nn.Module:
    builder = BUILT_IN.get(settings.name)
    if builder is None:
        raise ModelError(
            "there is no such model", where="model.name", got=repr(settings.name),
            expected=f"one of {', '.join(BUILT_IN)}, file.py:function, hf:NAME, timm:NAME or torchvision:NAME",
            fix=nearest(settings.name, list(BUILT_IN)),
        )  # fmt: skip
    _check_inputs(settings.name, schema, sizes)
    return _call(builder, settings, sizes)


def _fit(built: Built, held: hub.HubModel | None, num_outputs: int, name: str | None) -> None:
    """The head for the data's outputs; where it is new, nothing of it was loaded."""
    built.head, was_replaced, reason = fit_head(built.model, num_outputs, name)
    if was_replaced:
        built.notes.append(("head", built.head, reason, "model.head"))
        if held is not None and held.absent is not None:
            layer = find_head(built.model, built.head)
            held.absent |= {f"{layer}.weight": "", f"{layer}.bias": ""}


def _load(built: Built, held: hub.HubModel | None, settings: ModelSettings, base: Path) -> None:
    if settings.weights not in (None, NO_WEIGHTS):
        source = hub.placed(settings.weights or "", base)
        built.report = load_weights(
            built.model, source, rename=settings.rename, least_share=settings.weights_share, head=built.head
        )
    elif held is not None and held.absent is not None:
        built.report = report_of(built.model, settings.name, held.absent, held.unexpected, built.head)
        check_share(built.report, settings.weights_share)
        check_finite(built.model.named_parameters(), settings.name)
    if built.report is not None:
        report = built.report
        said = [*report.found, f"{report.trunk_share:.1%} of the parameters but the head's"]
        if report.missing or report.other_shape:
            said.append(f"not in them: {report.listed('missing', 'other_shape')}")
        if report.reinitialised:
            said.append(f"the head {built.head} is drawn anew")
        built.notes.insert(0, ("weights", report.source, "; ".join(said), "model.weights"))


def stated(settings: ModelSettings, base: Path | None) -> dict[str, Any]:
    """What the model, or a hub's weights for it, say of their preprocessing, as keys of [data]; empty: nothing.

    Raises:  ModelError where the library that knows it is missing
    """
    name = settings.name if hub.is_hub_name(settings.name) else settings.weights or ""
    is_stated = name == settings.name or name.startswith(hub.HUB)
    return hub.stated(name, base or Path()) if is_stated else {}


def _put_in_units(built: Built, schema: Schema) -> None:
    """A number is predicted in its own units: the head knows its mean and deviation."""
    target = next((schema[name] for name in schema.targets), None)
    if target is None or target.kind != "number" or (target.mean, target.std) == (0.0, 1.0):
        return
    name = find_head(built.model, built.head) or ""
    layer = built.model.get_submodule(name)
    if isinstance(layer, nn.Linear):
        built.model.set_submodule(name, LinearInUnits(layer, target.mean, target.std))


def _sizes(schema: Schema, cardinalities: Sequence[int]) -> dict[str, Any]:
    """What models are built with, as far as the data have it."""
    inputs = {key: schema[key] for key in schema.inputs}
    by_kind = {field.kind: field for field in inputs.values()}
    outputs = num_outputs(schema)
    sizes: dict[str, Any] = {"num_outputs": outputs, "num_classes": outputs, "cardinalities": list(cardinalities)}
    if schema.preprocess is not None:
        sizes["in_channels"] = schema.preprocess.channels
    if "tokens" in by_kind:
        sizes["num_tokens"] = by_kind["tokens"].num_tokens
        sizes["per_token"] = any(schema[name].kind == "tokens" for name in schema.targets)
    if "audio" in by_kind and len(by_kind["audio"].shape or ()) == 2:
        sizes["num_mels"] = (by_kind["audio"].shape or (None,))[0]
    image = by_kind["image"].shape or () if "image" in by_kind else ()
    if len(image) == 3 and image[1] is not None and image[1] == image[2]:
        sizes["image_size"] = image[1]
    shapes = [field.shape for key, field in inputs.items() if key != "categories"]
    known = [shape for shape in shapes if shape is not None and None not in shape]
    if len(known) == len(shapes):
        sizes["in_features"] = sum(_numel(shape) for shape in known)
    return sizes


_NEEDS = {
    "convnet": ("in_channels", "images"),
    "resnet18": ("in_channels", "images"),
    "mobilenet_v2": ("in_channels", "images"),
    "vit": ("image_size", "square images of one size"),
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
    "mobilenet_v2": MobileNetV2,
    "vit": VisionTransformer,
    "mlp": Mlp,
    "textconv": TextConv,
    "transformer": Transformer,
    "audioconv": AudioConv,
}
