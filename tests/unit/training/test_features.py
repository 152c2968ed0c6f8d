"""What is kept of a frozen part is what it would make in each epoch, whatever became of batches, files and stores."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from torchkeep.chance import ChanceKey
from torchkeep.contracts import Batch
from torchkeep.data.dataset import Part
from torchkeep.data.images import ImageFolder
from torchkeep.errors import DataError
from torchkeep.store import Store
from torchkeep.training.features import CHUNK, Features, example_of, plan_views, row_bytes

SIZE = 70
FLIPS = ["horizontal_flip", "vertical_flip"]
CROP = ["random_resized_crop", "horizontal_flip"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for number in range(SIZE):
        path = folder / "ab"[number % 2] / f"{number:02}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (9, 12, 3), dtype=np.uint8)).save(path)
    return folder


def as_it_is(batch: Batch) -> dict[str, Any]:
    return {"feature.0": batch["image"], "label": batch["label"]}


class Counting:
    """A frozen part whose results tell which batches it saw, and how many."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __call__(self, batch: Batch) -> dict[str, Any]:
        self.sizes.append(len(batch["image"]))
        sums = batch["image"].double().sum((1, 2, 3))
        return {"feature.0": sums + len(batch["image"]), "label": batch["label"]}


def features(
    data: Any, compute: Callable[[Batch], dict[str, Any]] = as_it_is, *, views: int = 4, store: Path | None = None,
    **given: Any,
) -> Features:  # fmt: skip
    seen = plan_views(data, views)
    few = data.read_batch(np.arange(2), ChanceKey())
    example = example_of(compute(few), given.pop("dtype", "auto"))
    num = len(data) * seen.count
    held = Store.on_disk(store, num, 1 << 30, 1 << 22) if store else Store(num)
    return Features(data, seen, 5, compute, held, example, workers=0, **given)


def batch_of(data: Any, epoch: int, indices: list[int]) -> Batch:
    return dict(data.read_batch(np.array(indices), ChanceKey(5, epoch)))


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("augment", [[], FLIPS[:1], FLIPS])
def test_flips_are_kept_exactly(root: Path, tmp_path: Path, augment: list[str], in_memory: bool) -> None:
    data = ImageFolder(root, image_size=8, augment=augment)
    kept = features(data, store=tmp_path / "kept.store", in_memory=in_memory)
    assert (kept.views.count, kept.views.is_exact) == (2 ** len(augment), True)
    for epoch in range(6):
        indices = [int(i) for i in np.random.default_rng(epoch).permutation(SIZE)[:20]]
        wanted, found = batch_of(data, epoch, indices), batch_of(kept, epoch, indices)
        assert torch.equal(found["feature.0"], wanted["image"])
        assert torch.equal(found["label"], wanted["label"])
    assert kept.made == SIZE * kept.views.count


def test_other_draws_come_in_turn_and_are_called_an_approximation(root: Path) -> None:
    data = ImageFolder(root, image_size=8, augment=CROP)
    kept = features(data, views=3)
    assert (kept.views.count, kept.views.is_exact) == (3, False)
    assert "approximation" in kept.views.reason
    for epoch in range(7):
        wanted = batch_of(data, epoch % 3, [4, 0, 69])
        assert torch.equal(batch_of(kept, epoch, [4, 0, 69])["feature.0"], wanted["image"])


def test_a_part_of_the_data_keeps_the_chance_of_the_whole(root: Path) -> None:
    part = Part(ImageFolder(root, image_size=8, augment=FLIPS), np.arange(SIZE)[::-3].copy())
    kept = features(part)
    for epoch in range(4):
        assert torch.equal(batch_of(kept, epoch, [7, 1])["feature.0"], batch_of(part, epoch, [7, 1])["image"])


def test_it_is_computed_in_chunks_of_the_samples_order_whatever_is_asked_for(root: Path) -> None:
    compute = Counting()
    kept = features(ImageFolder(root, image_size=8), compute)
    compute.sizes.clear()
    batch_of(kept, 0, [SIZE - 1])
    assert compute.sizes == [CHUNK, CHUNK, SIZE - 2 * CHUNK]
    batch_of(kept, 1, [0, 5])
    assert len(compute.sizes) == 3


def test_a_second_run_finds_it_and_a_file_that_changed_is_made_anew(root: Path, tmp_path: Path) -> None:
    data, store = ImageFolder(root, image_size=8), tmp_path / "kept.store"
    first = features(data, store=store)
    wanted = batch_of(first, 0, list(range(SIZE)))
    first.store.close()
    again = features(data, store=store)
    assert again.share_found() == 1.0
    assert torch.equal(batch_of(again, 0, list(range(SIZE)))["feature.0"], wanted["feature.0"])
    assert again.made == 0
    again.store.close()
    os.utime(data.files_of(40)[0], (1, 1))
    changed = features(data, store=store)
    assert torch.equal(batch_of(changed, 0, list(range(SIZE)))["feature.0"], wanted["feature.0"])
    assert changed.made == CHUNK  # the one that it lies in
    changed.store.close()


def test_what_a_disk_has_damaged_is_made_anew_and_what_it_refuses_stays_in_memory(root: Path, tmp_path: Path) -> None:
    data, store = ImageFolder(root, image_size=8), tmp_path / "kept.store"
    first = features(data, store=store)
    wanted = batch_of(first, 0, list(range(SIZE)))["feature.0"]
    first.store.close()
    held = bytearray(store.read_bytes())
    held[held.index(wanted[10].contiguous().numpy().tobytes()) + 20] ^= 1
    store.write_bytes(held)
    again = features(data, store=store)
    assert torch.equal(batch_of(again, 0, list(range(SIZE)))["feature.0"], wanted)
    assert again.made == CHUNK
    again.store.close()
    nowhere = features(data)
    assert torch.equal(batch_of(nowhere, 0, list(range(SIZE)))["feature.0"], wanted)
    with pytest.raises(DataError, match="cannot be kept"):
        features(data, in_memory=False).ensure(0)


def test_another_result_is_found_by_computing_some_again(root: Path, tmp_path: Path) -> None:
    data, store = ImageFolder(root, image_size=8), tmp_path / "kept.store"
    features(data, store=store).ensure(0)

    def changed(batch: Batch) -> dict[str, Any]:
        made = as_it_is(batch)
        made["feature.0"] = made["feature.0"].clone()
        if "index" in batch:
            made["feature.0"][:, 0, 0, 0] += (batch["index"] == 3).to(torch.uint8)
        return made

    assert features(data, store=store).differing(8) == []
    assert features(data, changed, store=store).differing(SIZE) == [data.id_of(3)]


@pytest.mark.parametrize(
    ("dtype", "kind"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("auto", torch.float64)]
)
def test_the_type_that_is_kept_is_the_one_asked_for(
    root: Path, tmp_path: Path, dtype: str, kind: torch.dtype
) -> None:  # fmt: skip
    data = ImageFolder(root, image_size=8)
    kept = features(data, Counting(), dtype=dtype, store=tmp_path / "kept.store", in_memory=False)
    found = batch_of(kept, 0, [1, 2])["feature.0"]
    assert found.dtype == kind
    exact = features(data, Counting())
    assert torch.equal(found, batch_of(exact, 0, [1, 2])["feature.0"].to(kind))
    assert row_bytes(kept.example) == kind.itemsize + 8


def test_results_of_several_sizes_are_said(root: Path) -> None:
    def ragged(batch: Batch) -> dict[str, Any]:
        return {"feature.0": torch.zeros(len(batch["image"]), 2 + int(len(batch["image"]) == CHUNK))}

    with pytest.raises(DataError, match="several sizes"):
        features(ImageFolder(root, image_size=8), ragged).ensure(0)
