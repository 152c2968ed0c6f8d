"""What the units of a model do with a batch: the distribution of what they answer, and which never answer at all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .following import borrowed, plain
from .histograms import histogram
from .media import Late

_RECTIFIERS = (nn.ReLU, nn.ReLU6, nn.Hardswish, nn.Threshold)
_ACTIVATIONS = (*_RECTIFIERS, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.GELU, nn.SiLU, nn.Hardtanh, nn.Mish,
                nn.Softplus, nn.Tanh, nn.Sigmoid, nn.GLU)  # fmt: skip
_ENOUGH = 16  # samples: of features of which each is 0 nine times in ten, a fifth are 0 sixteen times
_WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.Embedding, nn.MultiheadAttention)


@dataclass(frozen=True)
class Activity:
    """What one layer answers; ``dead_fraction`` () on the device: channels that are 0 throughout, None if not known.

    It is known of rectifiers, in a batch of 16 samples or more.
    """

    histogram: Late
    dead_fraction: Tensor | None


def activities(model: nn.Module, call: Callable[[], Any], *, most: int = 64) -> dict[str, Activity]:
    """What the activations answer in one forward, which ``call`` makes; of a model without them, the weighted layers.

    At most ``most`` layers, evenly chosen. Nothing of the model is changed; a forward that fails gives nothing.
    """
    model = plain(model)
    leaves = [(name, module) for name, module in model.named_modules() if not any(True for _ in module.children())]
    chosen = [row for row in leaves if isinstance(row[1], _ACTIVATIONS)]
    chosen = chosen or [row for row in leaves if isinstance(row[1], _WEIGHTED)]
    stride = -(-len(chosen) // most) or 1
    found: dict[str, Activity] = {}
    hooks = [module.register_forward_hook(_noting(name, module, found)) for name, module in chosen[::stride]]
    try:
        with borrowed(model):
            call()
    except Exception:
        return {}
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _noting(name: str, module: nn.Module, found: dict[str, Activity]) -> Callable[[Any, Any, Any], None]:
    def note(_: Any, inputs: Any, output: Any) -> None:
        answer = output[0] if isinstance(output, tuple | list) and output else output
        if isinstance(answer, Tensor) and answer.is_floating_point() and answer.numel():
            dead = _dead_fraction(answer) if isinstance(module, _RECTIFIERS) else None
            key = name if name not in found else f"{name} again"
            found[key] = Activity(histogram(answer), dead)

    return note


def _dead_fraction(answer: Tensor) -> Tensor | None:
    """The share of channels without an answer to any sample. Shapes: (B, F), (B, C, H, W), (B, T, F)"""
    if answer.ndim < 2 or answer.shape[0] < _ENOUGH:
        return None
    channel = 1 if answer.ndim == 4 or answer.ndim == 2 else answer.ndim - 1
    rest = [axis for axis in range(answer.ndim) if axis != channel]
    return (answer.abs().amax(rest) == 0).float().mean()


def as_numbers(parts: dict[str, Tensor | None]) -> dict[str, float]:
    """Numbers on the device, brought from there at once."""
    known = {name: part for name, part in parts.items() if part is not None}
    if not known:
        return {}
    return dict(zip(known, torch.stack(list(known.values())).tolist(), strict=True))
