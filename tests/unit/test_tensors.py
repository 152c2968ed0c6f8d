"""States become strict JSON and tensors, and come back the same; anything else is refused by name."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from torchkeep.errors import CheckpointError
from torchkeep.tensors import pack, read_json, read_safetensors, tensor_sha256, to_json, to_safetensors, unpack


def round_trip(state: object, tmp_path: Path) -> object:
    tree, tensors = pack(state)
    (tmp_path / "tree.json").write_bytes(to_json(tree))
    (tmp_path / "t.safetensors").write_bytes(b"".join(to_safetensors(tensors)))
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
    "dtype",
    [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool, torch.uint16,
     torch.complex64, torch.complex128],
)  # fmt: skip
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
    assert back["tied"] is back["whole"]  # type: ignore[index]


def test_others_read_what_is_written_and_the_other_way_round(tmp_path: Path) -> None:
    tensors = {
        "wide": torch.randn(3, 2, dtype=torch.float64),
        "odd": torch.tensor([True] * 3),
        "none": torch.empty(0, 2),
        "half": torch.randn(5).bfloat16(),
    }
    (tmp_path / "ours").write_bytes(b"".join(to_safetensors(tensors)))
    theirs = safetensors.torch.load_file(tmp_path / "ours")
    assert tensor_sha256(theirs) == tensor_sha256(tensors)
    safetensors.torch.save_file(tensors, tmp_path / "theirs", {"made": "elsewhere"})
    assert tensor_sha256(read_safetensors(tmp_path / "theirs")) == tensor_sha256(tensors)


def head(**rows: Any) -> bytes:
    text = json.dumps(rows).encode()
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80\x04pickle",
        struct.pack("<Q", 1 << 62) + b"{}",
        struct.pack("<Q", 200 << 20) + b"{}",
        head(a={"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}) + b"1234",
        head(a={"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}) + b"12341234",
        head(a={"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}) + b"12345",
        head(
            a={"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
            b={"dtype": "U8", "shape": [2], "data_offsets": [2, 4]},
        )
        + b"1234",
        head(a={"dtype": "OBJ", "shape": [1], "data_offsets": [0, 4]}) + b"1234",
        head(a={"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}),
        head(a=[1]),
        struct.pack("<Q", 14) + b'{"a":1,"a":2} ',
        struct.pack("<Q", 200_000) + b"[" * 200_000,
    ],
)  # fmt: skip
def test_what_is_no_safetensors_file_is_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        read_safetensors(tmp_path / "x")


@pytest.mark.parametrize("value", [object(), {1, 2}, lambda: 0, {"deep": [b"bytes"]}, {1: 0, "mixed": 0}])
def test_what_json_cannot_hold_is_refused(value: object) -> None:
    with pytest.raises(CheckpointError):
        pack({"key": value})


@pytest.mark.parametrize(
    "text", [b'{"a": NaN}', b'{"a": 1, "a": 1}', b"[" * 200_000, b"{", b"", b"\xff", b"[" * 100 + b"]" * 100]
)
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
