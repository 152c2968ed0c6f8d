"""Chance is a function of (seed, epoch, sample, operation)."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchkeep.chance import ChanceKey, keyed_uniform
from torchkeep.data.augment import NAMES, Augmentations, check_augmentations
from torchkeep.data.geometry import crop_box
from torchkeep.errors import BadSampleError, DataError, SettingsError

IMAGE = np.random.default_rng(0).integers(0, 255, (24, 32, 3), dtype=np.uint8)


WIDE = IMAGE.astype(np.uint16) * 257


def augmented(names: tuple[str, ...], key: ChanceKey, ids: list[int], image: np.ndarray = IMAGE) -> list[np.ndarray]:
    chosen = Augmentations(names)
    draws = chosen.draw(key, np.array(ids))
    kept = image.copy()
    kept.setflags(write=False)  # what is done to a sample must not change a cache
    return [chosen.apply_named(kept, draws, row, (24, 32)) for row in range(len(ids))]


@given(
    names=st.lists(st.sampled_from(NAMES), min_size=1, max_size=4).map(tuple),
    ids=st.lists(st.integers(0, 2**40), min_size=1, max_size=6),
    image=st.sampled_from([IMAGE, IMAGE[..., :1], WIDE]),
)
@settings(max_examples=300, deadline=None)
def test_the_same_sample_has_the_same_bits_in_any_batch(
    names: tuple[str, ...], ids: list[int], image: np.ndarray
) -> None:
    key = ChanceKey(3, 5)
    together = augmented(names, key, ids, image)
    for number, one in zip(ids, together, strict=True):
        np.testing.assert_array_equal(one, augmented(names, key, [number], image)[0])
        sample = Augmentations(names).apply_all({}, {"image": image}, key, number, (24, 32))
        np.testing.assert_array_equal(one, sample["image"].permute(1, 2, 0).numpy())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("other", [ChanceKey(3, 6), ChanceKey(4, 5)])
def test_another_epoch_or_seed_draws_otherwise(name: str, other: ChanceKey) -> None:
    ids = list(range(16))
    pairs = zip(augmented((name,), ChanceKey(3, 5), ids), augmented((name,), other, ids), strict=True)
    assert any(not np.array_equal(one, two) for one, two in pairs)


@pytest.mark.parametrize("name", NAMES)
def test_another_operation_beside_it_changes_no_draw(name: str) -> None:
    alone = Augmentations((name,)).draw(ChanceKey(), np.arange(50))[0]
    for other in NAMES:
        if other != name:
            beside = Augmentations((other, name, other)).draw(ChanceKey(), np.arange(50))[1]
            np.testing.assert_array_equal(alone, beside)


@pytest.mark.parametrize("name", NAMES)
def test_an_operation_named_twice_draws_twice(name: str) -> None:
    first, second = Augmentations((name, name)).draw(ChanceKey(), np.arange(50))
    assert not (first == second).any()


@pytest.mark.parametrize("names", [*permutations(NAMES, 2)])
@pytest.mark.parametrize("image", [IMAGE, IMAGE[..., :1], WIDE])
def test_any_order_keeps_size_and_type(names: tuple[str, ...], image: np.ndarray) -> None:
    for made in augmented(names, ChanceKey(), [0, 1, 2, 3], image):
        assert made.shape == image.shape
        assert made.dtype == image.dtype


@pytest.mark.parametrize("side", [1, 2, 3, 8])
@pytest.mark.parametrize("name", NAMES)
def test_tiny_images_can_be_augmented(side: int, name: str) -> None:
    chosen = Augmentations((name,))
    draws = chosen.draw(ChanceKey(), np.arange(64))
    for row in range(64):
        assert chosen.apply_named(IMAGE[:side, :side], draws, row, (side, side)).shape == (side, side, 3)


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


def test_a_callable_that_fails_is_named_with_the_sample_and_its_line() -> None:
    def broken(sample: dict, rng: np.random.Generator) -> dict:
        return sample["no such key"]

    with pytest.raises(BadSampleError) as caught:
        Augmentations(("horizontal_flip", broken)).apply_all(
            {"id": "ants/1.jpg"}, {"image": IMAGE}, ChanceKey(0, 2), 7, (24, 32)
        )
    line = broken.__code__.co_firstlineno + 1
    assert caught.value.where == f"ants/1.jpg (sample 7, epoch 2) ({__file__}, line {line})"
    assert "no such key" in caught.value.got


@pytest.mark.parametrize("name", ["color_jitter", "gaussian_blur", "random_erasing"])
def test_what_changes_colours_leaves_a_mask_alone(name: str) -> None:
    mask = IMAGE[..., :1]
    chosen = Augmentations((name,))
    draws = chosen.draw(ChanceKey(), np.arange(16))
    assert all(chosen.apply_named(mask, draws, row, (24, 32), is_mask=True) is mask for row in range(16))
