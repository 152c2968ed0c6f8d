"""Histograms count each value in the bin whose edges it lies between, whatever its type, and tell NaN apart."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchkeep.errors import DataError
from torchkeep.watch.histograms import edges, histogram, histograms, rebinned
from torchkeep.watch.media import MediaStore

MEDIA = MediaStore(Path("unused"))
OUTERMOST = 1016


def payload(values: Any) -> dict[str, Any]:
    return histogram(values).settle(MEDIA)


def counted(values: np.ndarray[Any, Any]) -> dict[int, int]:
    """What NumPy counts between the edges: the end that is nearer to 0 belongs to a bin."""
    above = np.array([edges(number)[0] for number in range(1, OUTERMOST + 1)])
    sizes = np.searchsorted(above, np.abs(values.astype(np.float64)), side="right")
    bins, counts = np.unique(np.where(values < 0, -sizes, sizes), return_counts=True)
    return dict(zip(bins.tolist(), counts.tolist(), strict=True))


def test_edges_leave_no_gap_and_are_four_to_an_octave() -> None:
    ends = [edges(number) for number in range(-OUTERMOST, OUTERMOST + 1)]
    assert all(before[1] == after[0] for before, after in itertools.pairwise(ends))
    assert edges(0) == (-(2.0**-126), 2.0**-126)
    assert [edges(505 + number)[0] for number in range(5)] == [1.0, 1.25, 1.5, 1.75, 2.0]
    assert edges(OUTERMOST)[1] == 2.0**128


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(width=32), max_size=50))
def test_every_float_is_where_its_edges_are(values: list[float]) -> None:
    array = np.array(values, np.float32)
    finite = array[np.isfinite(array)]
    told = payload(array)
    assert dict(zip(told["bins"], told["counts"], strict=True)) == (counted(finite) if len(finite) else {})
    assert told["num"] == len(finite)
    assert (told["min"], told["max"]) == ((finite.min(), finite.max()) if len(finite) else (None, None))
    assert told["sum"] == pytest.approx(float(finite.astype(np.float64).sum()), rel=1e-9, abs=1e-30)
    assert told["nan"] == np.isnan(array).sum()
    assert told["positive_infinite"] == np.isposinf(array).sum()
    assert told["negative_infinite"] == np.isneginf(array).sum()


def test_a_nan_of_any_bits_is_no_infinity() -> None:
    bits = np.array([0x7F800001, 0xFF800001, 0x7FC00000, 0xFFFFFFFF, 0x7F800000, 0xFF800000], np.uint32)
    told = payload(bits.view(np.float32))
    assert (told["nan"], told["positive_infinite"], told["negative_infinite"], told["num"]) == (4, 1, 1, 0)


@pytest.mark.parametrize("size", [0, 1, 1023, 1024, 1025, (1 << 17) + 1, 300_000])
def test_sizes_around_those_that_are_counted_together(size: int) -> None:
    values = torch.randn(size, generator=torch.Generator().manual_seed(size))
    told = payload(values)
    assert told["num"] == sum(told["counts"]) == size
    assert dict(zip(told["bins"], told["counts"], strict=True)) == (counted(values.numpy()) if size else {})
    assert told["sum_squares"] == pytest.approx(float(values.double().square().sum()), rel=1e-12)
    assert told["nan"] == 0


KINDS = [
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.uint8, torch.int8, torch.int16, torch.int32,
    torch.int64, torch.uint16, torch.uint32, torch.uint64, torch.bool, torch.float8_e4m3fn,
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_types(kind: torch.dtype) -> None:
    values = (torch.arange(40) / 4).to(kind)
    wide = values.double().numpy()
    told = payload(values)
    assert dict(zip(told["bins"], told["counts"], strict=True)) == counted(wide)
    assert (told["min"], told["max"], told["sum"]) == (wide.min(), wide.max(), wide.sum())


def test_what_no_float32_holds_is_counted_in_the_outermost_bins() -> None:
    told = payload(np.array([-1e300, 1e300, 2.0**60 + 1, np.inf]))
    assert told["bins"][0] == -OUTERMOST
    assert told["bins"][-1] == OUTERMOST
    assert (told["num"], told["min"], told["max"], told["positive_infinite"]) == (3, -1e300, 1e300, 1)


def test_views_sparse_and_nested_things() -> None:
    base = torch.arange(24.0).view(2, 3, 4)
    for values in (base[:, ::2, 1:], base.permute(2, 0, 1), base.to_sparse(), base[:1].expand(5, 3, 4), base.tolist(),
                   base.numpy()[::-1], base.numpy().astype(">f4"), torch.nn.Parameter(base)):  # fmt: skip
        whole = values.to_dense() if isinstance(values, torch.Tensor) else torch.tensor(np.array(values, np.float32))
        told = payload(values)
        assert dict(zip(told["bins"], told["counts"], strict=True)) == counted(whole.detach().numpy())
    assert payload([base, torch.ones(3, dtype=torch.int64)])["num"] == 27
    frozen = np.ones(3)
    frozen.setflags(write=False)
    assert payload(frozen)["num"] == 3


def test_what_is_counted_is_what_was_there_at_the_call() -> None:
    values = torch.ones(10)
    late = histogram(values)
    values.fill_(5)
    assert late.settle(MEDIA)["max"] == 1
    assert late.settle(MEDIA) == late.settle(MEDIA)


def test_many_together_are_what_each_is_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    named: dict[str, Any] = {
        f"{place}": torch.randn(size, generator=generator).to(kind)
        for place, (size, kind) in enumerate([
            (3, torch.float32), (0, torch.float32), (200_000, torch.float32), (7, torch.float64),
            (5000, torch.bfloat16), (1, torch.int64), (140_000, torch.float32), (0, torch.int8),
        ])
    }  # fmt: skip
    named["array"] = np.array([1.0, np.nan])
    late = histograms(named)
    assert list(late) == list(named)
    for name, values in named.items():
        together, alone = late[name].settle(MEDIA), payload(values)
        assert together.pop("sum") == pytest.approx(alone.pop("sum"), rel=1e-12)
        assert together.pop("sum_squares") == pytest.approx(alone.pop("sum_squares"), rel=1e-12)
        assert together == alone
    assert histograms({}) == {}


@pytest.mark.parametrize(
    "values", [torch.zeros(2, dtype=torch.complex64), "text", None, [[1], [1, 2]], np.array(["a"]), object(),
               torch.zeros(2, device="meta")], ids=repr
)  # fmt: skip
def test_what_is_no_number_is_refused_by_name(values: Any) -> None:
    with pytest.raises(DataError, match="weights/a"):
        histograms({"weights/a": values})


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=30), st.integers(1, 100))
def test_rebinning_keeps_all(values: list[float], num: int) -> None:
    told = payload(np.array(values))
    ends, counts = rebinned(told, num)
    assert len(ends) == num + 1
    assert len(counts) == num
    assert counts.sum() == len(values)
    assert (counts >= 0).all()
    assert np.isfinite(ends).all()
    assert (ends[1:] >= ends[:-1]).all()
    if values and told["min"] < told["max"] and abs(told["min"]) < 1e300 > abs(told["max"]):
        assert ends[0] == pytest.approx(told["min"])
        assert ends[-1] == pytest.approx(told["max"])


def test_rebinned_is_near_to_what_was_counted() -> None:
    values = np.random.default_rng(0).normal(3, 1, 100_000)
    ends, counts = rebinned(payload(values), 32)
    exact = np.histogram(values, ends)[0]
    assert np.abs(counts - exact).sum() < 0.1 * len(values)
    alike = rebinned(payload(np.full(7, -2.0)), 4)
    assert alike[1].sum() == 7
    assert alike[0][0] < -2 < alike[0][-1]
    assert math.isfinite(alike[0][0])
