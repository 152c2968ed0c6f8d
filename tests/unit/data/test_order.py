"""Orders of an epoch: each is a permutation or a draw, found from any place; buckets pad less and lose nobody."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchkeep.chance import ChanceKey
from torchkeep.data import order as order_module
from torchkeep.data.foreign import Foreign
from torchkeep.data.loader import Loader
from torchkeep.data.order import Order, bucketed_order, plain_order, running_weights, shuffled_order, weighted_order
from torchkeep.data.samples import padded
from torchkeep.data.text import TextTable
from torchkeep.errors import SettingsError

KEYS = st.builds(ChanceKey, st.integers(0, 99), st.integers(0, 99))


def lengths_of(size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).gamma(2.0, 50.0, size).astype(np.int64) + 1


def orders(key: ChanceKey, size: int, batch_size: int) -> dict[str, Order]:
    shuffled = shuffled_order(key, size)
    return {
        "plain": plain_order(size),
        "shuffled": shuffled,
        "weighted": weighted_order(key, np.cumsum(np.arange(1.0, size + 1))),
        "buckets": bucketed_order(key, shuffled, lengths_of(size), size, batch_size),
    }


@given(KEYS, st.integers(1, 700), st.integers(1, 5), st.data())
@settings(deadline=None, max_examples=40)
def test_an_order_is_the_same_from_any_place(key: ChanceKey, size: int, batch_size: int, data: st.DataObject) -> None:
    """Chunks of 128 and stretches of 64 batches: each is crossed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order_module, "_CHUNK", 128)
        for name, order in orders(key, size, batch_size).items():
            listed = [order(start, min(start + batch_size, size)) for start in range(0, size, batch_size)]
            whole = np.concatenate(listed)
            assert whole.dtype == np.int64
            if name == "weighted":
                assert ((whole >= 0) & (whole < size)).all()
            else:
                assert np.array_equal(np.sort(whole), np.arange(size))
            fresh = orders(key, size, batch_size)[name]
            for _ in range(3):
                start = data.draw(st.integers(0, size - 1))
                stop = data.draw(st.integers(start, size))
                assert np.array_equal(fresh(start, stop), whole[start:stop])


def batches_of(size: int, batch_size: int, buckets: bool, **settings: Any) -> list[np.ndarray]:
    class Long(Foreign):
        lengths = lengths_of(size)

    loader = Loader(Long(list(range(size))), batch_size, shuffle=True, buckets=buckets, workers=0, **settings)
    return [batch["index"].numpy() for batch in loader]


@pytest.mark.parametrize("batch_size", [8, 32])
def test_buckets_pad_less_and_give_every_sample_once(batch_size: int) -> None:
    lengths = lengths_of(3000)

    def waste(batches: list[np.ndarray]) -> float:
        full = sum(lengths[batch].max() * len(batch) for batch in batches)
        return float(full / lengths.sum() - 1)

    plain, buckets = (batches_of(3000, batch_size, flag) for flag in (False, True))
    for batches in (plain, buckets):
        assert sorted(np.concatenate(batches).tolist()) == list(range(3000))
    assert waste(plain) > 0.7
    assert waste(buckets) < 0.12
    spreads = [np.ptp(lengths[batch]) for batch in buckets if len(batch) == batch_size]
    assert np.median(spreads) < 15
    means = np.array([lengths[batch].mean() for batch in buckets[:60]])
    assert abs(np.corrcoef(means, np.arange(60))[0, 1]) < 0.4  # short and long ones are mixed again


def test_buckets_differ_by_epoch_and_seed() -> None:
    found = [np.concatenate(batches_of(500, 8, True, seed=seed)).tolist() for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]
    order = orders(ChanceKey(0, 1), 500, 8)["buckets"]
    assert order(0, 500).tolist() != found[0]


def test_dropping_the_last_batch_does_not_always_leave_out_the_longest() -> None:
    """Fewer than 64 batches are sorted together; what is over must be anybody."""
    lengths = lengths_of(35)
    left_out: Counter[int] = Counter()
    for epoch in range(60):
        order = bucketed_order(ChanceKey(0, epoch), shuffled_order(ChanceKey(0, epoch), 35), lengths, 35, 8)
        left_out.update(order(32, 35).tolist())
    assert len(left_out) > 30
    assert max(left_out.values()) < 20  # of 60; 5 on average


@pytest.mark.parametrize("world_size", [1, 2])
def test_texts_go_on_in_buckets_from_any_batch(world_size: int) -> None:
    rng = np.random.default_rng(0)
    texts = ["w" * int(count) for count in rng.integers(1, 200, 157)]
    data = TextTable(pa.table({"text": texts, "label": ["a"] * 157}), tokenizer="bytes", max_length=64)

    def fresh() -> Loader:
        return Loader(data, 4, shuffle=True, seed=2, workers=0, world_size=world_size, rank=world_size - 1)

    loader = fresh()
    assert loader.has_buckets
    wanted = list(loader)
    for number in range(len(wanted)):
        resumed = fresh()
        resumed.load_state_dict({**resumed.state_dict(), "delivered": number})
        rest = list(resumed)
        assert len(rest) == len(wanted) - number
        for one, other in zip(rest, wanted[number:], strict=True):
            assert all(torch.equal(one[name], other[name]) for name in other)


def test_buckets_are_only_where_the_order_is_free() -> None:
    data = TextTable(pa.table({"text": ["a", "bc"] * 4, "label": ["a", "b"] * 4}), tokenizer="bytes")
    assert not Loader(data, 2, workers=0).has_buckets
    assert not Loader(data, 2, shuffle=True, buckets=False, workers=0).has_buckets
    assert Loader(data, 2, weights="balanced", workers=0).has_buckets
    for wrong in ({}, {"shuffle": False}):
        with pytest.raises(SettingsError):
            Loader(data, 2, buckets=True, workers=0, **wrong)


# --- weights


def test_balanced_weights_draw_each_class_as_often() -> None:
    labels = np.array([0] * 900 + [2] * 90 + [1] * 10)
    cumulative = running_weights("balanced", 1000, labels)
    assert cumulative is not None
    drawn = Counter(labels[weighted_order(ChanceKey(1), cumulative)(0, 1000)].tolist())
    for epoch in range(1, 30):
        drawn.update(labels[weighted_order(ChanceKey(1, epoch), cumulative)(0, 1000)].tolist())
    for label in range(3):
        assert drawn[label] / 30_000 == pytest.approx(1 / 3, abs=0.012)  # four deviations
    within = Counter(weighted_order(ChanceKey(2), cumulative)(0, 1000).tolist())
    assert set(within) - set(range(900))  # and every member of a class alike
    rare = [within[index] for index in range(990, 1000)]
    assert min(rare) > 10


@pytest.mark.parametrize(("weights", "labels"), [
    ("balanced", None), ("equal", np.zeros(3, np.int64)), ([1.0, 2.0], None), ([[1.0], [1.0], [1.0]], None),
    ([0.0, 0.0, 0.0], None), ([1.0, -1.0, 1.0], None), ([1.0, float("inf"), 1.0], None),
])  # fmt: skip
def test_weights_that_cannot_be_are_refused(weights: Any, labels: np.ndarray | None) -> None:
    with pytest.raises(SettingsError, match="cannot be used"):
        running_weights(weights, 3, labels)


@given(st.lists(st.sampled_from([0.0, 0.25, 1.0, 7.0]), min_size=1, max_size=40).filter(any), KEYS)
def test_a_weight_of_0_is_never_drawn(weights: list[float], key: ChanceKey) -> None:
    cumulative = running_weights(torch.tensor(weights), len(weights), None)
    assert cumulative is not None
    drawn = weighted_order(key, cumulative)(0, len(weights))
    assert all(weights[index] > 0 for index in drawn)


# --- padding


@given(
    st.sampled_from([np.uint16, np.int32, np.int64, np.float32, np.float64]),
    st.lists(st.integers(0, 6), min_size=1, max_size=5),
    st.sampled_from([(), (2,), (2, 3)]),
)
def test_padding_keeps_what_is_there_and_fills_the_end(kind: Any, sizes: list[int], axes: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    values = [rng.integers(0, 99, (*axes, size)).astype(kind) for size in sizes]
    held = padded(values, 7)
    assert held.shape == (len(sizes), *axes, max(sizes))
    assert held.dtype == (torch.float32 if np.dtype(kind).kind == "f" else torch.int64)
    for row, value in zip(held, values, strict=True):
        np.testing.assert_array_equal(row[..., : value.shape[-1]].numpy(), value)
        assert (row[..., value.shape[-1] :] == 7).all()
