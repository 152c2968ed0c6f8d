"""States become strict JSON and tensors, and come back the same; anything else is refused by name."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from torchkeep.errors import CheckpointError
from torchkeep.tensors import pack, read_json, read_safetensors, tensor_sha256, to_json, to_safetensors, unpack


def round_trip(state: object, tmp_path: Path) -> object:
    tree, tensors = pack(state)
    (tmp_path / "tree.json").write_bytes(to_json(tree))
    (tmp_path / "t.safetensors").write_bytes(to_safetensors(tensors))
    return unpack(read_json(tmp_path / "tree.json"), read_safetensors(tmp_path / "t.safetensors"))


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    state = {
        "state": {0: {"step": 3.0}, 1: {"step": 4.0}},
        "betas": (0.9, 0.999),
        "best": math.inf,
        "nothing": None,
        "list": [1, "two", False, {}],
    }
    assert round_trip(state, tmp_path) == state
    assert math.isnan(round_trip({"x": math.nan}, tmp_path)["x"])  # type: ignore[index]


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]
)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (2, 3)])
def test_tensors_keep_type_shape_and_bits(dtype: torch.dtype, shape: tuple[int, ...], tmp_path: Path) -> None:
    tensor = torch.randn(shape).to(dtype)
    back = round_trip({"t": tensor}, tmp_path)["t"]  # type: ignore[index]
    assert back.dtype == dtype
    assert back.shape == shape
    assert torch.equal(back, tensor)


def test_names_that_meet_do_not_hide_each_other(tmp_path: Path) -> None:
    state = {"a.b": torch.zeros(1), "a": {"b": torch.ones(1)}}
    back = round_trip(state, tmp_path)
    assert float(back["a.b"]) == 0  # type: ignore[index]
    assert float(back["a"]["b"]) == 1  # type: ignore[index]


def test_views_of_one_storage_are_written_each(tmp_path: Path) -> None:
    whole = torch.arange(6.0)
    back = round_trip({"whole": whole, "tied": whole, "part": whole[2:4], "turned": whole.view(2, 3).T}, tmp_path)
    assert torch.equal(back["part"], whole[2:4])  # type: ignore[index]
    assert torch.equal(back["turned"], whole.view(2, 3).T)  # type: ignore[index]
    assert torch.equal(back["tied"], whole)  # type: ignore[index]


@pytest.mark.parametrize("value", [object(), {1, 2}, lambda: 0, {"deep": [b"bytes"]}, {1: 0, "mixed": 0}])
def test_what_json_cannot_hold_is_refused(value: object) -> None:
    with pytest.raises(CheckpointError):
        pack({"key": value})


@pytest.mark.parametrize("text", [b'{"a": NaN}', b"{", b"", b"\xff", b"[" * 100 + b"]" * 100])
def test_json_that_is_not_strict_is_refused(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(text)
    with pytest.raises(CheckpointError, match=r"x\.json"):
        read_json(tmp_path / "x.json")


def test_the_identity_of_tensors_is_names_types_shapes_and_bits() -> None:
    one = {"a": torch.zeros(2, 3), "b": torch.ones(1)}
    same = {"b": torch.ones(1), "a": torch.zeros(2, 3)}
    others = [
        {"a": torch.zeros(3, 2), "b": torch.ones(1)},
        {"a": torch.zeros(2, 3, dtype=torch.float64), "b": torch.ones(1)},
        {"c": torch.zeros(2, 3), "b": torch.ones(1)},
        {"a": -torch.zeros(2, 3), "b": torch.ones(1)},
    ]
    assert tensor_sha256(one) == tensor_sha256(same)
    assert len({tensor_sha256(other) for other in [one, *others]}) == 5
