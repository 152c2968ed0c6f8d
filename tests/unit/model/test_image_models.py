"""The image models keep the names and shapes that their weights are saved under."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from torchkeep.errors import ModelError
from torchkeep.model.images import ConvNet, MobileNetV2, ResNet18, Stem, VisionTransformer
from torchkeep.usercode import load_function, read_reference

SHARED = Path(__file__).parents[3] / "../shared"


def norm_shapes(name: str, width: int) -> dict[str, tuple[int, ...]]:
    parts = ("weight", "bias", "running_mean", "running_var")
    return {f"{name}.{part}": (width,) for part in parts} | {f"{name}.num_batches_tracked": ()}


def block_shapes(name: str, c_in: int, c_out: int) -> dict[str, tuple[int, ...]]:
    shapes = {f"{name}.conv1.weight": (c_out, c_in, 3, 3), **norm_shapes(f"{name}.bn1", c_out)}
    shapes |= {f"{name}.conv2.weight": (c_out, c_out, 3, 3), **norm_shapes(f"{name}.bn2", c_out)}
    if c_in != c_out:
        shapes |= {f"{name}.downsample.0.weight": (c_out, c_in, 1, 1), **norm_shapes(f"{name}.downsample.1", c_out)}
    return shapes


def resnet18_shapes(channels: int, num_classes: int, kernel: int) -> dict[str, tuple[int, ...]]:
    """The entries of torchvision's resnet18, in its order."""
    shapes: dict[str, tuple[int, ...]] = {"conv1.weight": (64, channels, kernel, kernel), **norm_shapes("bn1", 64)}
    c_in = 64
    for stage, width in enumerate((64, 128, 256, 512), start=1):
        shapes |= block_shapes(f"layer{stage}.0", c_in, width)
        shapes |= block_shapes(f"layer{stage}.1", width, width)
        c_in = width
    return shapes | {"fc.weight": (num_classes, 512), "fc.bias": (num_classes,)}


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(entry.shape) for name, entry in model.state_dict().items()}


@pytest.mark.parametrize(("stem", "kernel"), [("large", 7), ("small", 3)])
def test_resnet18_has_the_entries_of_torchvision_in_their_order(stem: Stem, kernel: int) -> None:
    found = shapes_of(ResNet18(3, 1000, stem))
    assert list(found.items()) == list(resnet18_shapes(3, 1000, kernel).items())
    assert len(found) == 122


def test_resnet18_has_as_many_parameters_as_torchvision_counts() -> None:
    assert sum(p.numel() for p in ResNet18(3, 1000).parameters()) == 11_689_512


@pytest.mark.parametrize("stem", ["large", "small"])
@pytest.mark.parametrize("size", [(16, 16), (28, 28), (33, 47), (64, 64)])
def test_resnet18_takes_images_of_any_size(stem: Stem, size: tuple[int, int]) -> None:
    model = ResNet18(1, 7, stem).eval()
    assert model(torch.randn(2, 1, *size)).shape == (2, 7)


@pytest.mark.parametrize(("stem", "size"), [("large", (2, 2)), ("small", (8, 8))])
def test_resnet18_halves_as_often_as_its_stem_says(stem: Stem, size: tuple[int, int]) -> None:
    model = ResNet18(3, 2, stem).eval()
    seen: list[torch.Size] = []
    model.layer4.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    model(torch.randn(1, 3, 64, 64))
    assert seen == [torch.Size((1, 512, *size))]


def test_a_residual_block_without_its_branch_is_the_way_around() -> None:
    block = ResNet18(3, 2).eval().get_submodule("layer1.1")
    nn.init.zeros_(block.get_submodule("bn2").weight)
    x = torch.rand(2, 64, 8, 8)
    assert torch.equal(block(x), x)


def test_an_unknown_stem_is_named() -> None:
    with pytest.raises(ModelError, match="no such stem"):
        ResNet18(3, 2, "tiny")  # type: ignore[arg-type]


def test_mobilenet_v2_has_the_names_and_the_bits_of_the_usual_file() -> None:
    if not (SHARED / "models/mobilenet_v2.py").is_file():
        pytest.skip("the folders shared/models and shared/data beside the repository are missing")
    reference = load_function(read_reference("models/mobilenet_v2.py:build", SHARED))()
    weights = torch.load(SHARED / "data/weights/mobilenet_v2.pth", weights_only=True, mmap=True)
    model = MobileNetV2(3, 1000)
    assert [(name, value.shape) for name, value in model.state_dict().items()] == [
        (name, value.shape) for name, value in weights.items()
    ]
    model.load_state_dict(weights)
    reference.load_state_dict(weights)
    image = torch.randn(2, 3, 96, 96)
    assert torch.equal(model.eval()(image), reference.eval()(image))


def test_mobilenet_v2_has_as_many_parameters_as_torchvision_counts() -> None:
    assert sum(p.numel() for p in MobileNetV2(3, 1000).parameters()) == 3_504_872


@pytest.mark.parametrize(("size", "patch", "tokens"), [(16, None, 16), (96, None, 36), (28, 7, 16)])
def test_a_vit_parts_an_image_into_patches(size: int, patch: int | None, tokens: int) -> None:
    model = VisionTransformer(3, 5, size, patch, width=24, depth=1).eval()
    assert model.positions.shape == (1, tokens, 24)
    assert model(torch.randn(2, 3, size, size)).shape == (2, 5)


@pytest.mark.parametrize("options", [{"image_size": 30}, {"image_size": 28, "heads": 5}])
def test_a_vit_says_what_does_not_part_evenly(options: dict[str, int]) -> None:
    with pytest.raises(ModelError, match="does not part evenly"):
        VisionTransformer(3, 5, **options)


def test_a_vit_sees_where_a_patch_is_and_all_of_it_learns() -> None:
    torch.manual_seed(0)
    model = VisionTransformer(3, 5, 16, width=24, depth=2).eval()
    image = torch.randn(2, 3, 16, 16)
    assert not torch.allclose(model(image), model(image.flip(3)), atol=1e-4)
    model(image).square().sum().backward()
    assert [name for name, p in model.named_parameters() if not p.grad.abs().sum()] == []


@pytest.mark.parametrize("size", [(5, 5), (28, 28), (33, 47)])
@pytest.mark.parametrize("widths", [(8,), (8, 16), (4, 8, 16)])
def test_a_convnet_takes_images_of_any_size(size: tuple[int, int], widths: tuple[int, ...]) -> None:
    assert ConvNet(3, 5, widths).eval()(torch.randn(2, 3, *size)).shape == (2, 5)


def test_a_convnet_keeps_its_names() -> None:
    found = shapes_of(ConvNet(1, 10))
    kernels = {name: shape for name, shape in found.items() if len(shape) == 4}
    assert kernels == {
        "features.0.weight": (32, 1, 3, 3),
        "features.3.weight": (32, 32, 3, 3),
        "features.7.weight": (64, 32, 3, 3),
        "features.10.weight": (64, 64, 3, 3),
        "features.14.weight": (128, 64, 3, 3),
        "features.17.weight": (128, 128, 3, 3),
    }
    assert found["head.weight"] == (10, 128)
    assert len(found) == 6 * 6 + 2
