"""RandAugment and TrivialAugment, against torchvision's lists written out and Pillow's operations."""

from __future__ import annotations

import math
from collections.abc import Callable

import cv2
import numpy as np
import pytest
from distributions import NUM_DRAWS, chi_squared, draws_of, most_chi_squared
from PIL import Image, ImageEnhance, ImageOps

from torchkeep.data.geometry import Canvas
from torchkeep.data.policies import act, rand_augment, rand_choices, trivial_augment, trivial_choice

HEIGHT, WIDTH = 40, 48
NOISE = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
SMOOTH = cv2.normalize(cv2.GaussianBlur(NOISE, (0, 0), 2), None, 1, 250, cv2.NORM_MINMAX)

SIGNED = {"shear_x", "shear_y", "translate_x", "translate_y", "rotate", "brightness", "color", "contrast", "sharpness"}
Space = dict[str, np.ndarray]


def rand_space(height: int, width: int) -> Space:
    """torchvision RandAugment._augmentation_space(31, (height, width))"""
    return {
        "identity": np.zeros(31),
        "shear_x": np.linspace(0.0, 0.3, 31),
        "shear_y": np.linspace(0.0, 0.3, 31),
        "translate_x": np.linspace(0.0, 150.0 / 331.0 * width, 31),
        "translate_y": np.linspace(0.0, 150.0 / 331.0 * height, 31),
        "rotate": np.linspace(0.0, 30.0, 31),
        "brightness": np.linspace(0.0, 0.9, 31),
        "color": np.linspace(0.0, 0.9, 31),
        "contrast": np.linspace(0.0, 0.9, 31),
        "sharpness": np.linspace(0.0, 0.9, 31),
        "posterize": 8 - np.round(np.arange(31) / (30 / 4)),
        "solarize": np.linspace(255.0, 0.0, 31),
        "autocontrast": np.zeros(31),
        "equalize": np.zeros(31),
    }


def wide_space() -> Space:
    """torchvision TrivialAugmentWide._augmentation_space(31)"""
    return rand_space(0, 0) | {
        "shear_x": np.linspace(0.0, 0.99, 31),
        "shear_y": np.linspace(0.0, 0.99, 31),
        "translate_x": np.linspace(0.0, 32.0, 31),
        "translate_y": np.linspace(0.0, 32.0, 31),
        "rotate": np.linspace(0.0, 135.0, 31),
        "brightness": np.linspace(0.0, 0.99, 31),
        "color": np.linspace(0.0, 0.99, 31),
        "contrast": np.linspace(0.0, 0.99, 31),
        "sharpness": np.linspace(0.0, 0.99, 31),
        "posterize": 8 - np.round(np.arange(31) / (30 / 6)),
    }


def test_rand_augment_draws_two_operations_at_the_ninth_magnitude() -> None:
    space = rand_space(HEIGHT, WIDTH)
    names = list(space)
    pairs, negatives, signed = np.zeros((14, 14)), 0, 0
    for row in draws_of(4):
        choices = rand_choices(row, HEIGHT, WIDTH)
        pairs[names.index(choices[0][0]), names.index(choices[1][0])] += 1
        for name, magnitude in choices:
            assert math.isclose(abs(magnitude), space[name][9])
            signed += name in SIGNED
            negatives += magnitude < 0
            assert magnitude >= 0 or name in SIGNED
    assert chi_squared(pairs, NUM_DRAWS / 196) < most_chi_squared(195)
    assert abs(negatives / signed - 0.5) < 0.015


def test_trivial_augment_draws_one_operation_at_any_magnitude() -> None:
    space = wide_space()
    names = list(space)
    places, negatives, signed = np.zeros((14, 31)), 0, 0
    for row in draws_of(3):
        name, magnitude = trivial_choice(row)
        place = int(row[1] * 31)  # several magnitudes of posterize are one, and all of identity
        assert math.isclose(abs(magnitude), space[name][place], abs_tol=1e-9)
        places[names.index(name), place] += 1
        signed += name in SIGNED and place > 0
        negatives += magnitude < 0
        assert magnitude >= 0 or name in SIGNED
    assert chi_squared(places, NUM_DRAWS / 434) < most_chi_squared(433)
    assert abs(negatives / signed - 0.5) < 0.02


def reference_matrix(name: str, magnitude: float, width: int, height: int) -> tuple[float, ...]:
    """What torchvision's _apply_op gives Pillow: output pixel → input pixel, whose middle is at 0.5."""
    if name == "rotate":  # Image.rotate: anticlockwise
        turn = math.radians(magnitude)
        cosine, sine = math.cos(turn), math.sin(turn)
        x, y = width / 2, height / 2
        return cosine, -sine, x - cosine * x + sine * y, sine, cosine, y - sine * x - cosine * y
    if name == "shear_x":
        return 1, math.tan(math.atan(magnitude)), 0, 0, 1, 0
    if name == "shear_y":
        return 1, 0, 0, math.tan(math.atan(magnitude)), 1, 0
    if name == "translate_x":
        return 1, 0, -int(magnitude), 0, 1, 0
    return 1, 0, 0, 0, 1, -int(magnitude)


PILLOW: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "identity": lambda image, _: image,
    "brightness": lambda image, magnitude: ImageEnhance.Brightness(image).enhance(1 + magnitude),
    "color": lambda image, magnitude: ImageEnhance.Color(image).enhance(1 + magnitude),
    "contrast": lambda image, magnitude: ImageEnhance.Contrast(image).enhance(1 + magnitude),
    "sharpness": lambda image, magnitude: ImageEnhance.Sharpness(image).enhance(1 + magnitude),
    "posterize": lambda image, magnitude: ImageOps.posterize(image, int(magnitude)),
    "solarize": ImageOps.solarize,
    "autocontrast": lambda image, _: ImageOps.autocontrast(image),
    "equalize": lambda image, _: ImageOps.equalize(image),
}


def reference_op(image: Image.Image, name: str, magnitude: float) -> Image.Image:
    if name in PILLOW:
        return PILLOW[name](image, magnitude)
    matrix = reference_matrix(name, magnitude, *image.size)
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=0)


def all_choices() -> list[tuple[str, float]]:
    found = set()
    for space in (rand_space(HEIGHT, WIDTH), wide_space()):
        for name, magnitudes in space.items():
            for magnitude in magnitudes[[0, 1, 9, 15, 30]].tolist():
                found |= {(name, magnitude), (name, -magnitude if name in SIGNED else magnitude)}
    return sorted(found)


def painted(image: np.ndarray, name: str, magnitude: float, is_mask: bool = False) -> np.ndarray:
    canvas = Canvas(image, image.shape[:2], is_mask)
    act(canvas, name, magnitude)
    return canvas.pixels()


def read_places(name: str, magnitude: float) -> tuple[np.ndarray, np.ndarray]:
    a, b, c, d, e, f = reference_matrix(name, magnitude, WIDTH, HEIGHT)
    y, x = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    return a * x + b * y + c, d * x + e * y + f


@pytest.mark.parametrize(("name", "magnitude"), all_choices())
def test_an_operation_does_what_pillow_does(name: str, magnitude: float) -> None:
    ours = painted(SMOOTH, name, magnitude).astype(int)
    differs = np.abs(ours - np.asarray(reference_op(Image.fromarray(SMOOTH), name, magnitude)))
    if name in PILLOW:
        assert differs.max() <= 1
        assert (differs > 0).mean() < 0.01
        return
    x, y = read_places(name, magnitude)
    depth = np.minimum(np.minimum(x, WIDTH - x), np.minimum(y, HEIGHT - y))  # of the place that is read, in the image
    assert differs[depth > 0.51].max() <= 1
    # between its edge and the black beyond it OpenCV mixes, where Pillow takes one of both
    assert not ours[depth < -0.51].any()


@pytest.mark.parametrize(("name", "magnitude"), [choice for choice in all_choices() if abs(choice[1]) > 0])
def test_a_mask_follows_geometry_and_nothing_else(name: str, magnitude: float) -> None:
    mask = (SMOOTH[..., :1] > 128).astype(np.uint8)
    ours = painted(mask, name, magnitude, is_mask=True)
    if name in PILLOW:
        assert ours is mask
        return
    x, y = read_places(name, magnitude)
    inside = (x > 0) & (x < WIDTH) & (y > 0) & (y < HEIGHT)
    nearest = np.full((HEIGHT, WIDTH), 255)
    nearest[inside] = mask[y[inside].astype(int), x[inside].astype(int), 0]
    # what lies halfway between two pixels may go to either
    halfway = np.minimum(np.abs(x - np.round(x)), np.abs(y - np.round(y))) < 1e-3
    assert halfway.mean() < 0.2 or name.startswith(("shear", "translate"))
    np.testing.assert_array_equal(ours[..., 0][~halfway], nearest[~halfway])


@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_are_changed_as_eight_are(channels: int) -> None:
    small, wide = SMOOTH[..., :channels], SMOOTH[..., :channels].astype(np.uint16) * 257
    for name, magnitude in all_choices():
        if name in ("equalize", "posterize"):  # 65,536 levels are made even, and cut, more finely
            continue
        distance = np.abs(painted(wide, name, magnitude) / 257 - painted(small, name, magnitude))
        assert distance.max() <= 2, (name, magnitude)


@pytest.mark.parametrize("policy", ["rand", "trivial"])
def test_what_a_policy_makes_is_distributed_as_torchvisions(policy: str) -> None:
    rng = np.random.default_rng(5)
    image = SMOOTH[:12, :16]
    space = rand_space(12, 16) if policy == "rand" else wide_space()
    names, count = list(space), 2 if policy == "rand" else 1
    operation = rand_augment if policy == "rand" else trivial_augment
    ours, theirs = [], []
    for row in draws_of(4 if policy == "rand" else 3):
        canvas = Canvas(image, (12, 16))
        operation(canvas, row)
        ours.append(canvas.pixels())
        held = Image.fromarray(image)
        for _ in range(count):
            name = names[rng.integers(14)]
            magnitude = space[name][9 if policy == "rand" else rng.integers(31)]
            held = reference_op(held, name, -magnitude if name in SIGNED and rng.integers(2) else magnitude)
        theirs.append(np.asarray(held))
    one, other = (np.array(made)[:, 3:-3, 4:-4].reshape(NUM_DRAWS, -1).astype(float) for made in (ours, theirs))
    error = np.sqrt((one.var(axis=0) + other.var(axis=0)) / NUM_DRAWS)
    # 144 means, each within 4 of its errors; the edge, at which Pillow does not mix with black, is worth a level
    assert (np.abs(one.mean(axis=0) - other.mean(axis=0)) < 4 * error + 0.5).all()
    assert (np.abs(one.std(axis=0) / other.std(axis=0) - 1) < 0.05).all()
