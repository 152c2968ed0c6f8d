"""Where pixels go, against torchvision's definitions written out in NumPy, and Pillow's own warps."""

from __future__ import annotations

import math
from collections.abc import Callable

import cv2
import numpy as np
import pytest
from distributions import KS_BOUND, NUM_DRAWS, draws_of, ks_distance
from PIL import Image

from torchkeep.chance import ChanceKey
from torchkeep.data.augment import Augmentations
from torchkeep.data.geometry import (
    Canvas,
    about,
    affine_matrix,
    crop_box,
    random_affine,
    random_erasing,
    random_rotation,
    random_shift,
)

HEIGHT, WIDTH = 24, 32

rows, columns = np.mgrid[:HEIGHT, :WIDTH]
PLACES = np.stack([columns * 1500 + 8000, rows * 1500 + 8000, 0 * rows], axis=2).astype(np.uint16)


def reference_box(
    rng: np.random.Generator, height: int, width: int, scale: tuple, ratio: tuple, is_crop: bool
) -> tuple[int, int, int, int] | None:
    """torchvision RandomResizedCrop.get_params (ratio is width / height) and RandomErasing.get_params (its inverse)."""
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        long, short = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        box_height, box_width = (short, long) if is_crop else (long, short)
        fits = box_height <= height and box_width <= width if is_crop else box_height < height and box_width < width
        if fits and box_height and box_width:
            top, left = rng.integers(0, height - box_height + 1), rng.integers(0, width - box_width + 1)
            return int(top), int(left), box_height, box_width
    return None


def test_crops_are_distributed_as_torchvisions() -> None:
    rng = np.random.default_rng(1)
    ours = np.array([crop_box(300, 400, row) for row in draws_of(22)])
    found = [reference_box(rng, 300, 400, (0.08, 1.0), (3 / 4, 4 / 3), True) for _ in range(NUM_DRAWS)]
    # torchvision's middle for what fits in none of ten tries: the whole, at a ratio of 4 / 3
    theirs = np.array([box or (0, 0, 300, 400) for box in found])
    for part in range(4):
        assert ks_distance(ours[:, part], theirs[:, part]) < KS_BOUND
    assert ks_distance(ours[:, 2] * ours[:, 3], theirs[:, 2] * theirs[:, 3]) < KS_BOUND
    assert ks_distance(ours[:, 3] / ours[:, 2], theirs[:, 3] / theirs[:, 2]) < KS_BOUND


def test_erased_boxes_are_distributed_as_torchvisions() -> None:
    rng = np.random.default_rng(2)
    white = np.full((40, 60, 1), 255, np.uint8)
    ours = []
    for row in draws_of(23, 2 * NUM_DRAWS):
        erased = random_erasing(white, row)[..., 0] == 0
        if erased.any():
            high, wide = np.flatnonzero(erased.any(1)), np.flatnonzero(erased.any(0))
            ours.append((high[0], wide[0], len(high), len(wide)))
            assert erased.sum() == len(high) * len(wide)
            assert len(high) < 40
            assert len(wide) < 60
    assert abs(len(ours) / (2 * NUM_DRAWS) - 0.5) < 0.015
    found = [reference_box(rng, 40, 60, (0.02, 0.33), (0.3, 3.3), False) for _ in range(NUM_DRAWS)]
    theirs, held = np.array([box for box in found if box]), np.array(ours)
    for part in range(4):
        assert ks_distance(held[:, part], theirs[:, part]) < KS_BOUND
    assert ks_distance(held[:, 2] * held[:, 3], theirs[:, 2] * theirs[:, 3]) < KS_BOUND


@pytest.mark.parametrize(("name", "axis"), [("horizontal_flip", 1), ("vertical_flip", 0)])
def test_half_of_the_samples_are_flipped(name: str, axis: int) -> None:
    chosen = Augmentations((name,))
    draws = chosen.draw(ChanceKey(), np.arange(NUM_DRAWS))
    small = PLACES[:2, :2]
    flipped = [
        np.array_equal(chosen.apply_named(small, draws, row, (2, 2)), np.flip(small, axis)) for row in range(NUM_DRAWS)
    ]
    assert abs(np.mean(flipped) - 0.5) < 0.015


def test_each_shift_within_an_eighth_is_equally_frequent() -> None:
    image, seen = PLACES[:16, :24], []
    padded = np.pad(image, ((2, 2), (3, 3), (0, 0)), mode="reflect")
    windows = {
        padded[top : top + 16, left : left + 24].tobytes(): (top, left) for top in range(5) for left in range(7)
    }  # fmt: skip
    for row in draws_of(2):
        canvas = Canvas(image, (16, 24))
        random_shift(canvas, row)
        seen.append(windows[np.ascontiguousarray(canvas.pixels()).tobytes()])
    shares = np.unique(np.array(seen), axis=0, return_counts=True)[1] / NUM_DRAWS
    assert len(shares) == 35
    assert np.abs(shares - 1 / 35).max() < 5 * math.sqrt(1 / 35 / NUM_DRAWS)


def effect(operation: Callable[[Canvas, np.ndarray], None], draws: np.ndarray) -> np.ndarray:
    """The matrix by which an operation reads, seen in what it does to an image that holds its own coordinates."""
    canvas = Canvas(PLACES, (HEIGHT, WIDTH))
    operation(canvas, draws)
    read = (canvas.pixels()[..., :2].astype(float) - 8000) / 1500
    middle = read[HEIGHT // 2, WIDTH // 2]
    along, down = read[HEIGHT // 2, WIDTH // 2 + 1] - middle, read[HEIGHT // 2 + 1, WIDTH // 2] - middle
    return np.array([*along, *down, *middle])


def reference_inverse(
    center: tuple, angle: float, translate: tuple, scale: float, shear: tuple
) -> tuple[float, float, float, float, float, float]:
    """torchvision.transforms.functional._get_inverse_affine_matrix: degrees, clockwise."""
    rot, sx, sy = math.radians(angle), math.radians(shear[0]), math.radians(shear[1])
    a = math.cos(rot - sy) / math.cos(sy)
    b = -math.cos(rot - sy) * math.tan(sx) / math.cos(sy) - math.sin(rot)
    c = math.sin(rot - sy) / math.cos(sy)
    d = -math.sin(rot - sy) * math.tan(sx) / math.cos(sy) + math.cos(rot)
    inverse = np.array([[d, -b], [-c, a]]) / scale
    offset = inverse @ (-np.array(center) - np.array(translate)) + np.array(center)
    return (*inverse[0], offset[0], *inverse[1], offset[1])


def reference_effect(angle: float, translate: tuple, scale: float, shear: tuple) -> np.ndarray:
    a, b, c, d, e, f = reference_inverse(((WIDTH - 1) / 2, (HEIGHT - 1) / 2), angle, translate, scale, shear)
    x, y = WIDTH // 2, HEIGHT // 2
    return np.array([a, d, b, e, a * x + b * y + c, d * x + e * y + f])


def test_affine_matrices_are_distributed_as_torchvisions() -> None:
    rng = np.random.default_rng(3)
    ours = np.array([effect(random_affine, row) for row in draws_of(5)])
    theirs = []
    for _ in range(NUM_DRAWS):  # RandomAffine.get_params
        angle = rng.uniform(-15, 15)
        shift = tuple(round(rng.uniform(-0.1 * side, 0.1 * side)) for side in (WIDTH, HEIGHT))
        theirs.append(reference_effect(angle, shift, rng.uniform(0.9, 1.1), (rng.uniform(-10, 10), 0.0)))
    for part in range(6):
        # a ramp of 1,500 a pixel is read to 1/1,500
        assert ks_distance(np.round(ours[:, part], 2), np.round(np.array(theirs)[:, part], 2)) < KS_BOUND


def test_rotations_are_distributed_as_torchvisions() -> None:
    rng = np.random.default_rng(4)
    ours = np.array([effect(random_rotation, row) for row in draws_of(1)])
    theirs = [reference_effect(rng.uniform(-15, 15), (0, 0), 1.0, (0, 0)) for _ in range(NUM_DRAWS)]
    for part in range(6):
        assert ks_distance(np.round(ours[:, part], 2), np.round(np.array(theirs)[:, part], 2)) < KS_BOUND


@pytest.mark.parametrize("shear", [(0.0, 0.0), (10.0, 0.0), (7.0, -20.0)])
@pytest.mark.parametrize("scale", [0.9, 1.3])
def test_a_matrix_is_torchvisions(shear: tuple, scale: float) -> None:
    radians = math.radians(33), (math.radians(shear[0]), math.radians(shear[1]))
    matrix = about(15.5, 11.5, affine_matrix(radians[0], (2, -5), scale, radians[1]))
    inverse = reference_inverse((15.5, 11.5), 33, (2, -5), scale, shear)
    np.testing.assert_allclose(np.linalg.inv(matrix)[:2].ravel(), inverse, atol=1e-12)


def smooth(height: int, width: int) -> np.ndarray:
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return cv2.normalize(cv2.GaussianBlur(noise, (0, 0), 2), None, 1, 255, cv2.NORM_MINMAX)


@pytest.mark.parametrize("number", range(8))
def test_a_warp_reads_the_pixels_that_pillow_reads(number: int) -> None:
    image, row = smooth(40, 52), draws_of(5)[number]
    canvas = Canvas(image, (40, 52))
    random_affine(canvas, row)
    shift = tuple(round((2 * drawn - 1) * 0.1 * side) for drawn, side in ((row[1], 52), (row[2], 40)))
    turned = 15 * (2 * row[0] - 1), shift, 0.9 + 0.2 * row[3], (10 * (2 * row[4] - 1), 0.0)
    a, b, c, d, e, f = reference_inverse((26.0, 20.0), *turned)  # Pillow's pixels have their middle at 0.5
    data, way = (a, b, c, d, e, f), Image.Resampling.BILINEAR
    theirs = np.array(Image.fromarray(image).transform((52, 40), Image.Transform.AFFINE, data, way))
    y, x = np.mgrid[:40, :52] + 0.5
    read_x, read_y = a * x + b * y + c, d * x + e * y + f
    inside = (read_x > 1) & (read_x < 51) & (read_y > 1) & (read_y < 39)
    assert inside.mean() > 0.6
    assert np.abs(canvas.pixels().astype(int) - theirs)[inside].max() <= 1


WARPS = ("random_rotation", "random_affine")


@pytest.mark.parametrize("warp", WARPS)
@pytest.mark.parametrize("is_mask", [False, True])
@pytest.mark.parametrize("key", [ChanceKey(0, epoch) for epoch in range(4)])
def test_flips_around_a_warp_are_one_reading(
    warp: str, is_mask: bool, key: ChanceKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = smooth(24, 32)[..., : 1 if is_mask else 3]
    names = ("horizontal_flip", "vertical_flip", warp, "horizontal_flip", "vertical_flip")
    draws = Augmentations(names).draw(key, np.arange(16))
    warps, real = [], cv2.warpAffine
    monkeypatch.setattr(cv2, "warpAffine", lambda *given, **more: warps.append(1) or real(*given, **more))
    for row in range(16):
        together = Augmentations(names).apply_named(image, draws, row, (24, 32), is_mask)
        assert len(warps) == 1
        apart = image
        for name, drawn in zip(names, draws, strict=True):
            apart = Augmentations((name,)).apply_named(apart, [drawn], row, (24, 32), is_mask)
        differs = together != apart
        # a coordinate is rounded otherwise from the other side: one level, or in a mask the other of two equally near
        assert differs.mean() < 0.02
        assert is_mask or np.abs(together.astype(int) - apart).max() <= 1
        warps.clear()


@pytest.mark.parametrize("names", [WARPS, ("random_affine", "horizontal_flip", "random_rotation")])
def test_two_warps_stay_two(names: tuple[str, ...]) -> None:
    draws = Augmentations(names).draw(ChanceKey(), np.arange(8))
    for row in range(8):
        apart = smooth(24, 32)
        for name, drawn in zip(names, draws, strict=True):
            apart = Augmentations((name,)).apply_named(apart, [drawn], row, (24, 32))
        together = Augmentations(names).apply_named(smooth(24, 32), draws, row, (24, 32))
        assert np.abs(together.astype(int) - apart).max() <= 1


@pytest.mark.parametrize("name", ["horizontal_flip", "vertical_flip", "random_shift", *WARPS, "random_resized_crop"])
def test_a_mask_moves_with_its_image(name: str) -> None:
    mask = np.zeros((48, 64, 1), np.uint8)
    mask[10:30, 20:58] = 1
    image = np.repeat(mask * 255, 3, axis=2)
    chosen = Augmentations((name,))
    draws = chosen.draw(ChanceKey(), np.arange(200))
    moved = 0
    for row in range(200):
        image_of, mask_of = (chosen.apply_named(held, draws, row, (48, 64), held is mask) for held in (image, mask))
        pure = (image_of[..., 0] == 0) | (image_of[..., 0] == 255)
        assert pure.mean() > 0.8
        assert np.array_equal(image_of[..., :1][pure] == 255, mask_of[pure] == 1)
        moved += not np.array_equal(mask_of, mask)
    assert moved > 60
