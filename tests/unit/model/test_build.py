"""Models by name, made for the data: which sizes they get, and numbers in the target's own units."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from torchkeep.contracts import Field, Preprocess, Schema
from torchkeep.errors import ModelError
from torchkeep.model.build import LinearInUnits, ModelSettings, build_model
from torchkeep.model.tables import Mlp
from torchkeep.settings import check
from torchkeep.tensors import tensor_sha256

CLASSES = Field("label", (), ("a", "b", "c"), is_target=True)
NUMBER = Field("number", (), is_target=True, mean=200_000.0, std=100_000.0)
IMAGES = {"image": Field("image", (3, 16, 16))}
TEXTS = {"input_ids": Field("tokens", (None,), num_tokens=50)}
CLIPS = {"audio": Field("audio", (20, None))}
ROWS = {"numbers": Field("number", (4,))}


def build(name: str, inputs: dict[str, Field], target: Field, **args: Any) -> torch.nn.Module:
    key = "label" if target.kind in ("label", "multilabel") else "target"
    schema = Schema({**inputs, key: target}, Preprocess(channels=3) if "image" in inputs else None)
    return build_model(check(ModelSettings, {"name": name, "args": args}, "test"), schema, (), lambda _: None)


def example(inputs: dict[str, Field]) -> dict[str, torch.Tensor]:
    made = {
        "image": torch.rand(2, 3, 16, 16), "input_ids": torch.randint(0, 50, (2, 9)), "audio": torch.rand(2, 20, 30),
        "numbers": torch.rand(2, 4),
    }  # fmt: skip
    return {name: made[name] for name in inputs}


@pytest.mark.parametrize(
    ("name", "inputs"),
    [("convnet", IMAGES), ("resnet18", IMAGES), ("textconv", TEXTS), ("transformer", TEXTS), ("audioconv", CLIPS),
     ("mlp", ROWS)],
)  # fmt: skip
@pytest.mark.parametrize("target", [CLASSES, NUMBER, Field("multilabel", (5,), ("v", "w", "x", "y", "z"), True)])
def test_each_model_is_made_for_its_data(name: str, inputs: dict[str, Field], target: Field) -> None:
    model = build(name, inputs, target).eval()
    output = model(**example(inputs))
    assert output.shape == (2, {"label": 3, "number": 1, "multilabel": 5}[target.kind])
    if target is NUMBER:  # an untrained model is near the mean of the training targets, not near 0
        assert (output - 200_000).abs().max() < 1_000_000
        assert (output - 200_000).abs().min() > 0


@pytest.mark.parametrize(("name", "inputs", "fix"), [("convnet", ROWS, "mlp"), ("mlp", TEXTS, "textconv")])
def test_a_model_for_other_data_is_answered_with_one_that_fits(name: str, inputs: dict[str, Field], fix: str) -> None:
    with pytest.raises(ModelError) as caught:
        build(name, inputs, CLASSES)
    assert fix in caught.value.fix


def test_a_language_model_gives_logits_for_each_token() -> None:
    target = Field("tokens", (9,), num_tokens=50, is_target=True)
    model = build("transformer", {"input_ids": Field("tokens", (9,), num_tokens=50)}, target)
    assert model(torch.randint(0, 50, (2, 9))).shape == (2, 9, 50)


def test_units_keep_names_bits_and_what_half_precision_would_round() -> None:
    plain = Mlp(4, 1)
    layer = LinearInUnits(plain.head, 200_000.0, 3.0)
    assert set(layer.state_dict()) == {"weight", "bias", "mean", "std"}
    x = torch.rand(8, 128)
    torch.testing.assert_close(layer(x), plain.head(x) * 3 + 200_000)
    with torch.autocast("cpu", torch.bfloat16):  # bf16 has steps of 1,024 there
        assert (layer(x) - layer(x).mean()).abs().max() > 0
        assert (layer(x) - 200_000).abs().max() < 10
    assert tensor_sha256(dict(layer.state_dict())) == tensor_sha256(
        dict(LinearInUnits(plain.head, 200_000.0, 3.0).state_dict())
    )


def test_a_single_value_of_stride_0_has_an_identity() -> None:
    value = torch.tensor(1.5).expand(1)
    assert tensor_sha256({"x": value}) == tensor_sha256({"x": torch.tensor([1.5])})
