"""Arrays in memory are gathered, shared and described."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from torchkeep.chance import ChanceKey
from torchkeep.data.arrays import Arrays, open_arrays
from torchkeep.data.loader import Loader
from torchkeep.errors import DataError

KEY = ChanceKey()


def test_a_batch_is_its_samples() -> None:
    data = Arrays(x=np.random.default_rng(0).normal(size=(20, 5)), y=np.arange(20) % 4)
    indices = np.array([3, 19, 3])
    batch = data.read_batch(indices, KEY)
    assert batch["x"].dtype == torch.float32
    assert batch["y"].dtype == torch.int64
    for row, index in enumerate(indices.tolist()):
        assert torch.equal(batch["x"][row], data[index]["x"])
        assert int(batch["y"][row]) == data[index]["y"] == index % 4
    assert data.schema["y"].classes == ("0", "1", "2", "3")
    assert data.schema.inputs == ["x"]
    assert data.schema.targets == ["y"]


@pytest.mark.parametrize("shape", [(6, 8, 8), (6, 1, 8, 8), (6, 3, 8, 9)])
def test_images_get_channels_and_a_preprocess(shape: tuple[int, ...]) -> None:
    data = Arrays(image=np.zeros(shape, np.uint8), label=np.zeros(6, np.uint8))
    channels = 3 if shape[1:] == (3, 8, 9) else 1
    assert data.schema["image"].shape == (channels, *shape[-2:])
    assert data.schema.preprocess is not None
    assert data.schema.preprocess.mean == (0.5,) * channels
    assert data.schema.preprocess.image_size == (8 if shape[-1] == 8 else None)
    assert data.read_batch(np.arange(2), KEY)["image"].shape == (2, channels, *shape[-2:])


def test_memory_is_shared_where_it_can_be_even_if_it_is_read_only() -> None:
    x = np.arange(12, dtype=np.float32).reshape(6, 2)
    x.flags.writeable = False
    data = Arrays(x=x)
    assert data.columns["x"].data_ptr() == x.ctypes.data
    assert Arrays(x=x[::-1].astype(">f4")).columns["x"][0].tolist() == [10.0, 11.0]


def test_targets_by_their_type() -> None:
    assert Arrays(target=np.zeros(3)).schema["target"].kind == "number"
    assert Arrays(target=torch.zeros(3, 2)).schema["target"].kind == "vector"
    assert Arrays(label=np.array([True, False])).schema["label"].classes == ("0", "1")
    named = Arrays(label=np.array(["bee", "ant", "bee"]))
    assert named.schema["label"].classes == ("ant", "bee")
    assert named.columns["label"].tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({}, "no columns"),
        ({"x": np.zeros(3), "y": np.zeros(4)}, "different lengths"),
        ({"x": np.zeros((0, 2))}, "empty"),
        ({"x": [1, 2]}, "no array"),
        ({"x": np.array(["a"])}, "no array of numbers"),
        ({"y": np.array([0, -1])}, "below 0"),
        ({"image": np.zeros((5, 8, 8, 3), np.uint8)}, "channels last"),
    ],
)
def test_columns_that_cannot_be_used_say_why(columns: dict, said: str) -> None:
    with pytest.raises(DataError, match=said):
        Arrays(**columns)


def test_the_fingerprint_follows_names_types_and_bytes() -> None:
    x = np.arange(6, dtype=np.float32)
    made = [Arrays(x=x), Arrays(z=x), Arrays(x=x + 1), Arrays(x=x.reshape(6, 1)), Arrays(x=x.astype(np.int32))]
    assert len({data.fingerprint() for data in made}) == 5
    assert Arrays(x=x.copy()).fingerprint() == made[0].fingerprint()


def test_loaders_work_on_it() -> None:
    data = Arrays(x=torch.arange(10.0)[:, None], y=torch.arange(10) % 2)
    theirs = next(iter(DataLoader(data, batch_size=4)))
    ours = next(iter(Loader(data, batch_size=4)))
    assert torch.equal(theirs["x"], ours["x"])
    assert torch.equal(theirs["y"], ours["y"])
    assert len(list(data)) == 10


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_npz_is_its_arrays_and_mapped_where_it_can_be(tmp_path: Path, save: Any, monkeypatch: Any) -> None:
    x = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    save(tmp_path / "all.npz", input=x, target=np.arange(50) % 4, turned=np.asfortranarray(x))
    mapped: list[str] = []
    monkeypatch.setattr(np, "memmap", lambda *a, made=np.memmap, **k: mapped.append("one") or made(*a, **k))
    data = open_arrays(tmp_path / "all.npz")
    assert mapped == (["one"] * 3 if save is np.savez else [])
    assert torch.equal(data.columns["input"], torch.from_numpy(x))
    assert torch.equal(data.columns["turned"], torch.from_numpy(x))
    assert data.labels is not None
    assert data.labels.tolist() == (np.arange(50) % 4).tolist()


def test_arrays_of_objects_and_damaged_ones_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "objects.npz", x=np.array([{}, []], dtype=object))
    np.savez(tmp_path / "cut.npz", x=np.zeros(1000))
    whole = (tmp_path / "cut.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[:600])
    np.save(tmp_path / "x.npy", np.zeros(5))
    (tmp_path / "x.npy").write_bytes(b"no array")
    for name in ("objects.npz", "cut.npz", "x.npy"):
        with pytest.raises(DataError, match="cannot be read"):
            open_arrays(tmp_path / name)
