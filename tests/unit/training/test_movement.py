"""How far an update moves the parts of a model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from torchkeep.training.movement import Movement


def test_the_ratio_of_small_parts_is_exact() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    parameters = list(model.parameters())
    old = [p.detach().clone() for p in parameters]
    movement = Movement(model)
    held = movement.before(parameters)
    with torch.no_grad():
        for p in parameters:
            p.add_(0.01 * torch.randn_like(p))
    found = movement.after(held)
    assert list(found) == ["update_ratio/0", "update_ratio/2"]
    for part, rows in (("0", slice(0, 2)), ("2", slice(2, 4))):
        moved = torch.cat([(p.detach() - was).flatten() for p, was in zip(parameters[rows], old[rows], strict=True)])
        size = torch.cat([was.flatten() for was in old[rows]])
        assert float(found[f"update_ratio/{part}"]) == pytest.approx(float(moved.norm() / size.norm()), rel=1e-5)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_large_part_is_measured_on_a_sample_of_it(layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(64, 128, 3)).to(memory_format=layout)
    movement = Movement(model)
    held = movement.before(list(model.parameters()))
    assert all(len(was) <= 4096 for _, _, was in held)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.01)
    assert float(movement.after(held)["update_ratio/0"]) == pytest.approx(0.01, rel=1e-3)


def test_what_lies_in_pieces_and_what_is_empty() -> None:
    model = nn.Module()
    model.piece = nn.Parameter(torch.ones(6, 4)[:, ::2])
    model.scalar = nn.Parameter(torch.tensor(2.0))
    model.empty = nn.Parameter(torch.empty(0))
    movement = Movement(model)
    held = movement.before(list(model.parameters()))
    with torch.no_grad():
        model.piece.mul_(2), model.scalar.mul_(2)
    found = movement.after(held)
    assert {name: float(value) for name, value in found.items()} == {
        "update_ratio/piece": 1.0,
        "update_ratio/scalar": 1.0,
    }
    assert movement.after([]) == {}


def test_many_layers_are_told_by_what_holds_them() -> None:
    model = nn.ModuleDict({"trunk": nn.Sequential(*[nn.Linear(2, 2) for _ in range(30)]), "head": nn.Linear(2, 2)})
    movement = Movement(model)
    assert list(movement.after(movement.before(list(model.parameters())))) == [
        "update_ratio/trunk",
        "update_ratio/head",
    ]
