"""Models by name, made for the data: which sizes they get, and numbers in the target's own units."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from torchkeep.contracts import Field, Preprocess, Schema
from torchkeep.errors import ModelError, SettingsError
from torchkeep.model.build import Built, LinearInUnits, ModelSettings, build_model
from torchkeep.model.images import MobileNetV2
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
    settings = check(ModelSettings, {"name": name, "args": args}, "test")
    return build_model(settings, schema, (), lambda _: None).model


def example(inputs: dict[str, Field]) -> dict[str, torch.Tensor]:
    made = {
        "image": torch.rand(2, 3, 16, 16), "input_ids": torch.randint(0, 50, (2, 9)), "audio": torch.rand(2, 20, 30),
        "numbers": torch.rand(2, 4),
    }  # fmt: skip
    return {name: made[name] for name in inputs}


@pytest.mark.parametrize(
    ("name", "inputs"),
    [("convnet", IMAGES), ("resnet18", IMAGES), ("vit", IMAGES), ("mobilenet_v2", IMAGES), ("textconv", TEXTS),
     ("transformer", TEXTS), ("audioconv", CLIPS), ("mlp", ROWS)],
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


def built(
    model: nn.Module | None, base: Path, target: Field = CLASSES, *, loads: bool = True, **settings: Any
) -> Built:  # fmt: skip
    """A model of one's own, or a built-in, for the images above."""
    torch.manual_seed(0)
    schema = Schema({**IMAGES, "label": target}, Preprocess(channels=3))
    checked = check(ModelSettings, {"name": "own.py:make", **settings}, "test")
    return build_model(checked, schema, (), lambda _: lambda: model, base, loads=loads)


def test_weights_lie_beside_the_recipe_and_the_head_is_drawn_anew(tmp_path: Path) -> None:
    torch.manual_seed(1)
    source = MobileNetV2(3, 10)
    torch.save({"state_dict": source.state_dict()}, tmp_path / "w.pth")
    made = built(None, tmp_path, name="mobilenet_v2", weights="w.pth")
    assert torch.equal(made.model.features[3].conv[0][0].weight, source.features[3].conv[0][0].weight)
    assert made.model.classifier[1].out_features == 3
    assert made.head == "classifier.1"
    assert made.report.trunk_share == 1.0
    assert set(made.report.reinitialised) == {"classifier.1.weight", "classifier.1.bias"}
    [(what, chosen, reason, setting)] = made.notes
    assert (what, chosen, setting) == ("weights", str(tmp_path / "w.pth"), "model.weights")
    assert reason == "in 'state_dict'; 100.0% of the parameters but the head's; the head classifier.1 is drawn anew"
    again = built(None, tmp_path / "elsewhere", name="mobilenet_v2", weights="w.pth", loads=False)
    assert (again.head, again.report, again.notes) == (made.head, None, [])
    assert list(again.model.state_dict()) == list(made.model.state_dict())


def test_a_part_of_the_trunk_that_begins_anew_is_named(tmp_path: Path) -> None:
    torch.save(MobileNetV2(1, 10).state_dict(), tmp_path / "grey.pth")
    [(_, _, reason, _)] = built(None, tmp_path, name="mobilenet_v2", weights="grey.pth").notes
    assert "not in them: features.0.0.weight (32, 1, 3, 3) in the file" in reason


def test_a_function_that_knows_nothing_of_the_data_gets_their_head(tmp_path: Path) -> None:
    torch.save(MobileNetV2(3, 10).state_dict(), tmp_path / "w.pth")
    made = built(MobileNetV2(3, 10), tmp_path, weights="w.pth")
    assert made.model.classifier[1].out_features == 3
    assert [row[:2] for row in made.notes] == [("weights", str(tmp_path / "w.pth")), ("head", "classifier.1")]
    assert set(made.report.reinitialised) == {"classifier.1.weight", "classifier.1.bias"}
    assert built(MobileNetV2(3, 10), tmp_path, weights="w.pth", loads=False).model.classifier[1].out_features == 3
    assert built(MobileNetV2(3, 10), tmp_path, head="classifier").model.classifier[1].out_features == 3


def test_a_functions_own_outputs_stand_where_nothing_is_asked(tmp_path: Path) -> None:
    made = built(MobileNetV2(3, 1), tmp_path)  # a single logit, as binary_cross_entropy takes it
    assert (made.model.classifier[1].out_features, made.head, made.notes) == (1, "classifier.1", [])
    assert built(nn.Sequential(nn.Flatten(), nn.ReLU()), tmp_path).head is None


def test_weights_come_before_units(tmp_path: Path) -> None:
    source = built(None, tmp_path, NUMBER, name="mobilenet_v2").model
    torch.save(source.state_dict(), tmp_path / "w.pth")
    other = Field("number", (), is_target=True, mean=5.0, std=2.0)
    made = built(None, tmp_path, other, name="mobilenet_v2", weights="w.pth")
    head, old = made.model.classifier[1], source.classifier[1]
    assert isinstance(head, LinearInUnits)
    assert torch.equal(head.weight, old.weight)
    assert (head.mean.item(), head.std.item()) == (5.0, 2.0)  # the data's own, not those of the weights
    assert made.report.share("matched") == 1.0
    own = built(MobileNetV2(3, 1), tmp_path, NUMBER, weights="w.pth").model
    assert type(own.classifier[1]) is nn.Linear  # a function's own units stand


def test_a_rule_without_weights_is_a_slip() -> None:
    with pytest.raises(SettingsError, match="cannot be used") as caught:
        check(ModelSettings, {"name": "convnet", "rename": {"a.": "b."}}, "test")
    assert "model.weights" in caught.value.expected


def test_images_that_are_not_square_are_said_before_a_vit_is_made() -> None:
    with pytest.raises(ModelError, match="square images"):
        build("vit", {"image": Field("image", (3, 16, 20))}, CLASSES)


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
