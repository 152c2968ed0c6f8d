"""How far an update moves each part of a model, against how large the part is."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

_MOST_ELEMENTS = 4096  # of each parameter: the norms of so many evenly spaced ones stand for all, to within 2 %
_MOST_PARTS = 16


class Movement:
    """The ratio |update| / |weights| of each part, around 1e-3 where a rate is well chosen, measured on a sample.

    Source:  Karpathy, "Yes you should understand backprop" course notes CS231n, "Ratio of weights:updates"
    """

    def __init__(self, model: nn.Module):
        self._names = {id(p): name for name, p in model.named_parameters()}

    def before(self, parameters: Sequence[nn.Parameter]) -> list[tuple[str, Tensor, Tensor]]:
        """Some elements of each parameter as they are, and the places where they will be."""
        here = [(self._names[id(p)], _sample(p)) for p in parameters if id(p) in self._names and p.numel()]
        depth = _depth([name for name, _ in here])
        return [(".".join(name.split(".")[:depth]), place, place.clone()) for name, place in here]

    def after(self, held: list[tuple[str, Tensor, Tensor]]) -> dict[str, Tensor]:
        """The ratio of each part, on the device."""
        if not held:
            return {}
        old = [was for _, _, was in held]
        moved = torch._foreach_norm(torch._foreach_sub([now for _, now, _ in held], old))
        sizes = torch._foreach_norm(old)
        parts: dict[str, list[int]] = {}
        for number, (part, _, _) in enumerate(held):
            parts.setdefault(part, []).append(number)
        return {
            f"update_ratio/{part}": _joint(moved, rows) / _joint(sizes, rows).clamp_min(1e-12)
            for part, rows in parts.items()
        }


def _joint(norms: Sequence[Tensor], rows: list[int]) -> Tensor:
    joint: Tensor = torch.linalg.vector_norm(torch.stack([norms[row] for row in rows]).float())
    return joint


def _sample(parameter: Tensor) -> Tensor:
    """Evenly spaced elements as a view, in the order in which they lie in memory, however that is."""
    flat = parameter.detach()
    size = flat.numel()
    stride = -(-size // _MOST_ELEMENTS)
    is_dense = flat.is_contiguous() or (flat.ndim == 4 and flat.is_contiguous(memory_format=torch.channels_last))
    if is_dense:
        return flat.as_strided((-(-size // stride),), (stride,), flat.storage_offset())
    return flat[..., ::stride] if flat.ndim else flat


def _depth(names: Sequence[str]) -> int:
    """How many parts of a name tell as many parts of the model apart as a person can read."""
    most = max((name.count(".") for name in names), default=0)
    for depth in range(most, 1, -1):
        if len({".".join(name.split(".")[:depth]) for name in names}) <= _MOST_PARTS:
            return depth
    return 1
