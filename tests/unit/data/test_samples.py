"""Samples of any form become a batch, a schema and a checksum."""

from __future__ import annotations

from collections import OrderedDict, UserDict, namedtuple
from typing import Any

import numpy as np
import pytest
import torch

from torchkeep.data.samples import digest_of, named_sample, schema_of, stack
from torchkeep.errors import DataError

Pair = namedtuple("Pair", ["left", "right"])


def read_only(values: Any) -> np.ndarray:
    made = np.asarray(values)
    made.flags.writeable = False
    return made


@pytest.mark.parametrize(("values", "expected"), [
    ([1, 2], torch.tensor([1, 2])), ([True, False], torch.tensor([True, False])),
    ([1.5, 2.0], torch.tensor([1.5, 2.0])), ([np.float64(1.5), np.float64(2)], torch.tensor([1.5, 2]).double()),
    ([np.uint16(65535), np.uint16(1)], torch.tensor([65535, 1], dtype=torch.uint16)),
    ([np.bool_(True), np.bool_(False)], torch.tensor([True, False])),
    ([read_only([1, 2]), read_only([3, 4])], torch.tensor([[1, 2], [3, 4]])),
    ([torch.ones(2), np.zeros(2, np.float32)], torch.tensor([[1.0, 1.0], [0.0, 0.0]])),
    ([np.zeros(2, np.float32), torch.ones(2)], torch.tensor([[0.0, 0.0], [1.0, 1.0]])),
    ([(1, 2), (3, 4)], torch.tensor([[1, 2], [3, 4]])),
    ([[torch.ones(1)], [torch.zeros(1)]], torch.tensor([[1.0], [0.0]])),
])  # fmt: skip
def test_numbers_and_arrays_are_stacked(values: list[Any], expected: torch.Tensor) -> None:
    held = stack([{"x": value} for value in values])["x"]
    assert held.dtype == expected.dtype
    assert torch.equal(held.reshape(expected.shape), expected)


@pytest.mark.parametrize("values", [
    ["a", "b"], [np.str_("a"), np.str_("b")], [None, None], [b"a", b"b"], [[], [1]],
    [np.array(["a"]), np.array(["b"])], [np.array([None]), np.array([{}])], [np.datetime64("2026-01-01")] * 2,
])  # fmt: skip
def test_what_is_no_number_stays_a_list(values: list[Any]) -> None:
    held = stack([{"x": value} for value in values])["x"]
    assert isinstance(held, list)
    assert all(one is other for one, other in zip(held, values, strict=True))


def test_samples_within_samples_are_stacked_too() -> None:
    held = stack([{"x": {"y": torch.ones(2), "z": "a"}}] * 3)
    assert held["x"]["y"].shape == (3, 2)
    assert held["x"]["z"] == ["a"] * 3


@pytest.mark.parametrize(("samples", "where"), [
    ([{"x": torch.ones(2)}, {"x": torch.ones(3)}], "key 'x'"), ([{"x": (1, 2)}, {"x": (1,)}], "key 'x'"),
    ([{"x": 1, "y": 1}, {"x": 1}], "y"), ([{"x": 1}, {"x": 1, "mask": 1}], "mask"),
    ([{"x": {"a": 1}}, {"x": {"b": 1}}], "a, b"), ([{"x": 1}, {"x": None}], "key 'x'"),
    ([{"x": torch.ones(2)}, {"x": None}], "key 'x'"), ([{"x": 1}, {"x": "a"}], "key 'x'"),
    ([{"x": {"a": 1}}, {"x": 2}], "key 'x'"), ([{"x": 1}, {"x": 1 << 70}], "key 'x'"),
])  # fmt: skip
def test_samples_that_do_not_fit_are_said(samples: list[dict[str, Any]], where: str) -> None:
    with pytest.raises(DataError, match="cannot be stacked") as caught:
        stack(samples)
    assert where in caught.value.where
    assert "collate=" in caught.value.fix


@pytest.mark.parametrize(("sample", "names", "keys"), [
    (1, None, ["input"]), ("text", None, ["input"]), ((1, 2), None, ["input", "target"]),
    (Pair(1, 2), ("a", "b"), ["a", "b"]), ([1, 2, 3], ("a", "b", "c"), ["a", "b", "c"]),
    (OrderedDict(b=1, a=2), None, ["b", "a"]), (UserDict(b=1), ("x", "y"), ["b"]),
])  # fmt: skip
def test_any_sample_gets_names(sample: Any, names: Any, keys: list[str]) -> None:
    assert list(named_sample(sample, names, "t")) == keys


@pytest.mark.parametrize(("sample", "names"), [((1, 2, 3), None), ((), None), ((1, 2), ("a",)), (1, ("a", "b"))])
def test_parts_without_names_are_said(sample: Any, names: Any) -> None:
    with pytest.raises(DataError, match="need names"):
        named_sample(sample, names, "t")


def test_a_schema_tells_images_labels_texts_and_numbers() -> None:
    sample = {"image": torch.zeros(3, 4, 5, dtype=torch.uint8), "label": 1, "age": 2.0, "text": "a", "id": "b",
              "y": np.float32(1), "x": np.zeros((2, 3)), "other": None}  # fmt: skip
    schema = schema_of(sample)
    kinds = {name: field.kind for name, field in schema.items()}
    assert kinds == {"image": "image", "label": "label", "age": "number", "text": "text", "id": "object",
                     "y": "number", "x": "tensor", "other": "object"}  # fmt: skip
    assert schema.targets == ["label", "y"]
    assert schema.preprocess is not None
    assert schema.preprocess.channels == 3
    assert schema_of({"image": torch.zeros(3, 4, 5)}).preprocess is None  # floats are left as they are


def test_a_checksum_follows_every_part_of_a_sample() -> None:
    made = [
        {"x": 1}, {"x": 2}, {"y": 1}, {"x": 1.0}, {"x": "1"}, {"x": [1, 2]}, {"x": torch.tensor([1.0])},
        {"x": torch.tensor([2.0])}, {"x": np.array([3.0])}, {"x": {"y": 5}}, {"x": None}, {"x": True}, {"x": b"1"},
        {"x": torch.zeros(2, dtype=torch.bfloat16)}, {"x": torch.zeros(3, dtype=torch.bool)}, {"x": "\udcff"},
    ]  # fmt: skip
    prints = [digest_of(sample) for sample in made]
    assert prints == [digest_of(sample) for sample in made]
    assert len(set(prints)) == len(made)
