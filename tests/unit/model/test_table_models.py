"""The table models keep their weights' names, see short waves, and speak in the target's own units."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from torchkeep.model.tables import Mlp, Periodic


def seeded(in_features: int, num_outputs: int, **arguments: object) -> Mlp:
    torch.manual_seed(0)
    return Mlp(in_features, num_outputs, **arguments)  # type: ignore[arg-type]


def test_the_plain_model_keeps_its_names_and_shapes() -> None:
    model = Mlp(3, 2, hidden=(8, 4), cardinalities=(5, 200))
    assert {name: tuple(entry.shape) for name, entry in model.state_dict().items()} == {
        "embeddings.0.weight": (5, 3),
        "embeddings.1.weight": (200, 50),
        "layers.0.weight": (8, 56),
        "layers.0.bias": (8,),
        "layers.2.weight": (4, 8),
        "layers.2.bias": (4,),
        "head.weight": (2, 4),
        "head.bias": (2,),
    }


def test_the_plain_model_is_its_layers_one_after_another() -> None:
    model = seeded(2, 3, hidden=(8,), cardinalities=(4,))
    numbers, categories = torch.randn(5, 2), torch.tensor([[0], [1], [2], [3], [1]])
    joined = torch.cat((numbers, model.embeddings[0](categories[:, 0])), 1)
    torch.testing.assert_close(model(numbers, categories), model.head(model.layers(joined)), rtol=0, atol=0)


@pytest.mark.parametrize("waves", [0, 2])
def test_numbers_or_categories_may_be_absent(waves: int) -> None:
    categories = torch.tensor([[0], [2]])
    without_numbers = Mlp(0, 2, cardinalities=(3,), waves=waves)
    assert without_numbers(categories=categories).shape == (2, 2)
    assert all(parameter.numel() for parameter in without_numbers.parameters())
    assert Mlp(12, 2, waves=waves)(torch.randn(7, 3, 4)).shape == (7, 2)


def test_dropout_follows_each_hidden_layer_in_training_alone() -> None:
    model = seeded(4, 2, hidden=(16, 16), dropout=0.5)
    assert [type(layer) for layer in model.layers] == [nn.Linear, nn.ReLU, nn.Dropout] * 2
    numbers = torch.randn(6, 4)
    assert not torch.equal(model(numbers), model(numbers))
    model.eval()
    assert torch.equal(model(numbers), model(numbers))


def test_periodic_is_the_formula_of_the_paper() -> None:
    torch.manual_seed(0)
    periodic = Periodic(2, width=3, num_frequencies=4)
    numbers = torch.randn(5, 2)
    expected = []
    for i in range(2):
        turns = 2 * torch.pi * numbers[:, i : i + 1] * periodic.frequencies[i]
        waves = torch.cat((torch.sin(turns), torch.cos(turns)), 1)
        expected.append((waves @ periodic.weight[i] + periodic.bias[i]).relu())
    torch.testing.assert_close(periodic(numbers), torch.cat(expected, 1))


def test_sigma_is_the_spread_of_the_first_frequencies() -> None:
    torch.manual_seed(0)
    drawn = Mlp(500, 1, hidden=(), waves=1, sigma=3.0).waves
    assert drawn is not None
    assert drawn.frequencies.std().item() == pytest.approx(3.0, rel=0.05)


def error_on_a_short_wave(waves: int) -> float:
    model = seeded(1, 1, hidden=(32,), waves=waves)
    numbers = torch.linspace(-2, 2, 256)[:, None]
    target = torch.sin(12 * numbers)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(numbers), target).backward()
        optimizer.step()
    return nn.functional.mse_loss(model(numbers), target).item()


def test_waves_learn_what_a_plain_model_cannot_bend_to() -> None:
    assert error_on_a_short_wave(waves=8) < 0.05
    assert error_on_a_short_wave(waves=0) > 0.25
