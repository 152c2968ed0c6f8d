"""Normalisation folded into the convolution before it gives what both give, and only where both are frozen."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from torchkeep.model.flow import patched
from torchkeep.model.folding import find_folds


def settled(model: nn.Module) -> nn.Module:
    """Frozen, in eval mode, with statistics and weights that are not those of a new one."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
            if module.affine:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    return model.requires_grad_(False).eval()


class Residual(nn.Module):
    """Normalisations that a function and an addition stand between."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm_one = nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.BatchNorm2d(4)
        self.two, self.norm_two = nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4, affine=False)
        self.last = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm_two(self.two(self.norm_one(self.one(x)).relu()))
        result: Tensor = self.last(x + y)
        return result


@pytest.mark.parametrize(
    ("model", "shape", "count"),
    [
        (nn.Sequential(nn.Conv2d(4, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU6(inplace=True)), (2, 4, 9, 9), 2),
        (nn.Sequential(nn.Conv1d(4, 6, 3, padding=2, padding_mode="circular"), nn.BatchNorm1d(6)), (2, 4, 9), 2),
        (Residual(), (2, 4, 8, 8), 4),
        (nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.BatchNorm2d(6)), (2, 4, 9, 9), 0),
    ],
    ids=["plain", "circular", "residual", "something between"],
)
def test_the_results_are_the_same(model: nn.Module, shape: tuple[int, ...], count: int) -> None:
    model, x = settled(model), torch.randn(shape)
    wanted = model(x)
    folds = find_folds(model, lambda: model(x))
    assert len(folds) == count
    with patched(folds):
        assert torch.allclose(model(x), wanted, atol=1e-5)
    assert torch.equal(model(x), wanted)


def test_what_learns_or_is_called_twice_is_left() -> None:
    x = torch.randn(2, 4, 8, 8)
    learning = settled(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
    learning[1].weight.requires_grad_(True)
    assert not find_folds(learning, lambda: learning(x))
    conv, norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
    twice = settled(nn.Sequential(conv, norm, conv, nn.BatchNorm2d(4)))
    assert not find_folds(twice, lambda: twice(x))
