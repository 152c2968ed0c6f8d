"""Chance is a function of (seed, epoch, sample, operation)."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

from torchkeep.chance import ChanceKey, keyed_uniform
from torchkeep.data.augment import NAMES, Augmentations, check_augmentations, crop_box
from torchkeep.errors import DataError, SettingsError

IMAGE = np.random.default_rng(0).integers(0, 255, (24, 32, 3), dtype=np.uint8)


def augmented(names: tuple[str, ...], key: ChanceKey, ids: list[int], image: np.ndarray = IMAGE) -> list[np.ndarray]:
    chosen = Augmentations(names)
    draws = chosen.draw(key, np.array(ids))
    return [chosen.apply_named(image, draws, row, (24, 32)) for row in range(len(ids))]


@pytest.mark.parametrize("name", NAMES)
def test_the_same_sample_has_the_same_bits_in_any_batch(name: str) -> None:
    key = ChanceKey(3, 5)
    alone = [augmented((name,), key, [i])[0] for i in range(8)]
    together = augmented((name,), key, list(range(8)))
    reversed_order = augmented((name,), key, list(range(7, -1, -1)))[::-1]
    for one, two, three in zip(alone, together, reversed_order, strict=True):
        np.testing.assert_array_equal(one, two)
        np.testing.assert_array_equal(one, three)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("other", [ChanceKey(3, 6), ChanceKey(4, 5)])
def test_another_epoch_or_seed_draws_otherwise(name: str, other: ChanceKey) -> None:
    ids = list(range(16))
    pairs = zip(augmented((name,), ChanceKey(3, 5), ids), augmented((name,), other, ids), strict=True)
    assert any(not np.array_equal(one, two) for one, two in pairs)


def test_another_operation_beside_it_changes_no_draw() -> None:
    alone = Augmentations(("horizontal_flip",)).draw(ChanceKey(), np.arange(50))[0]
    beside = Augmentations(("random_shift", "horizontal_flip")).draw(ChanceKey(), np.arange(50))[1]
    np.testing.assert_array_equal(alone, beside)


def test_an_operation_named_twice_draws_twice() -> None:
    first, second = Augmentations(("horizontal_flip", "horizontal_flip")).draw(ChanceKey(), np.arange(50))
    assert not np.array_equal(first, second)


@pytest.mark.parametrize("names", [*permutations(NAMES, 3)])
@pytest.mark.parametrize("channels", [1, 3])
def test_any_order_keeps_size_and_type(names: tuple[str, ...], channels: int) -> None:
    for image in augmented(names, ChanceKey(), [0, 1, 2, 3], IMAGE[:, :, :channels]):
        assert image.shape == (24, 32, channels)
        assert image.dtype == np.uint8


@pytest.mark.parametrize("side", [1, 2, 3, 8])
@pytest.mark.parametrize("name", NAMES)
def test_tiny_images_can_be_augmented(side: int, name: str) -> None:
    chosen = Augmentations((name,))
    draws = chosen.draw(ChanceKey(), np.arange(1))
    assert chosen.apply_named(IMAGE[:side, :side], draws, 0, (side, side)).shape == (side, side, 3)


def test_flips_are_flips_of_half_the_samples() -> None:
    images = augmented(("horizontal_flip",), ChanceKey(), list(range(400)))
    flipped = sum(np.array_equal(image, IMAGE[:, ::-1]) for image in images)
    assert flipped + sum(np.array_equal(image, IMAGE) for image in images) == 400
    assert 160 < flipped < 240


def test_crops_lie_within_the_image_and_the_stated_areas_and_ratios() -> None:
    draws = keyed_uniform(ChanceKey(), "test", np.arange(500), 22)
    for row in draws:
        top, left, height, width = crop_box(300, 400, row)
        assert 0 <= top <= 300 - height
        assert 0 <= left <= 400 - width
        assert 0.079 < height * width / 120_000 <= 1
        assert 0.74 < width / height < 1.35


def test_a_crop_that_never_fits_is_the_middle() -> None:
    assert crop_box(10, 1000, np.full(22, 0.999)) == (0, 493, 10, 13)


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(SettingsError) as caught:
        check_augmentations(["horizontal_flp"])
    assert "horizontal_flip" in caught.value.fix


def test_a_callable_gets_the_sample_and_a_generator_of_its_own() -> None:
    def noise(sample: dict, rng: np.random.Generator) -> dict:
        return {**sample, "drawn": float(rng.random())}

    chosen = Augmentations(("horizontal_flip", noise, noise))
    seen = [chosen.apply_all({"id": "a"}, {"image": IMAGE}, ChanceKey(0, epoch), 7, (24, 32)) for epoch in (0, 0, 1)]
    assert seen[0]["drawn"] == seen[1]["drawn"] != seen[2]["drawn"]
    assert seen[0]["image"].shape == (3, 24, 32)
    assert seen[0]["id"] == "a"
    once = Augmentations((noise,)).apply_all({}, {"image": IMAGE}, ChanceKey(), 7, (24, 32))["drawn"]
    assert once != seen[0]["drawn"]


@pytest.mark.parametrize("wrong", [lambda s, r: None, lambda s, r: {**s, "image": s["image"] / 255}])
def test_a_callable_that_returns_no_sample_is_named(wrong: object) -> None:
    with pytest.raises(DataError) as caught:
        Augmentations((wrong,)).apply_all({}, {"image": IMAGE}, ChanceKey(), 0, (24, 32))
    assert "lambda" in caught.value.where
