"""The head: found where a model ends in a linear layer, replaced by a fresh one of its kind, kept where it fits."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from torchkeep.errors import ModelError
from torchkeep.model.heads import find_head, fit_head, within
from torchkeep.model.images import MobileNetV2, ResNet18
from torchkeep.model.tables import Mlp
from torchkeep.model.text import TextConv, Transformer

SQUEEZED = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 10, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1))


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (ResNet18(3, 5), "fc"),
        (MobileNetV2(3, 5), "classifier.1"),
        (Mlp(4, 5), "head"),
        (TextConv(20, 5), "head"),
        (Transformer(20, 5), "head"),
        (SQUEEZED, "2"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_head_is_found(model: nn.Module, expected: str) -> None:
    assert find_head(model) == expected


def test_a_trunk_without_a_head_has_none() -> None:
    resnet = ResNet18(3, 5)
    resnet.fc = nn.Identity()
    assert find_head(resnet) is None  # the 1×1 convolution of its last stage is followed by a normalisation
    with pytest.raises(ModelError, match="no linear layer at its end") as caught:
        fit_head(resnet, 2)
    assert "layer4.1.bn2 (BatchNorm2d)" in caught.value.got
    assert "model.head" in caught.value.fix


@pytest.mark.parametrize("name", [None, "classifier", "classifier.1"])
def test_a_head_of_another_width_is_drawn_anew_and_the_rest_stays(name: str | None) -> None:
    torch.manual_seed(0)
    model = MobileNetV2(3, 1000)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found, was_replaced, reason = fit_head(model, 2, name)
    assert (found, was_replaced) == (name or "classifier.1", True)
    assert "2 outputs instead of 1,000" in reason
    head = model.classifier[1]
    assert head.weight.shape == (2, 1280)
    assert 0 < head.weight.abs().max() <= 1280**-0.5  # torch's own bound for a new nn.Linear
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items() if "classifier" not in key)


def test_a_head_that_fits_stays() -> None:
    model = ResNet18(3, 5)
    weight = model.fc.weight
    assert fit_head(model, 5)[:2] == ("fc", False)
    assert model.fc.weight is weight


def test_a_pointwise_convolution_is_replaced_by_one() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 10, 1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert fit_head(model, 4)[:2] == ("1", True)
    assert model(torch.rand(2, 3, 9, 9)).shape == (2, 4)
    assert model[1].bias is None


def test_a_head_from_the_meta_device_gets_memory() -> None:
    with torch.device("meta"):
        model = Mlp(4, 10)
    fit_head(model, 3)
    assert model.head.weight.device.type == "cpu"
    assert model.head.weight.abs().max() > 0


def test_a_wrong_name_is_answered_with_a_near_one() -> None:
    with pytest.raises(ModelError, match="no such part") as caught:
        fit_head(MobileNetV2(3, 5), 2, "clasifier")
    assert "'classifier'" in caught.value.fix
    with pytest.raises(ModelError, match="no linear layer in this part"):
        fit_head(ResNet18(3, 5), 2, "layer1.0.bn1")


def test_a_part_ends_at_a_dot() -> None:
    assert within("head.weight", "head")
    assert within("head.1.weight", "head")
    assert not within("header.weight", "head")
    assert not within("head.weight", None)
