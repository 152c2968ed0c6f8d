"""Law 1 for the loader: the same batches whoever reads them, and the rest of an epoch from any place in it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from samples import Noisy, same, stack_inputs

import torchkeep as tk
from torchkeep.data.loader import Last

Make = Callable[[], Any]
NUM = 26


@pytest.fixture(scope="module")
def image_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for number in range(NUM):
        folder = root / ("ants", "bees")[number % 2]
        folder.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (20 + number % 5, 24, 3), np.uint8)).save(folder / f"{number}.png")
    return root


@pytest.fixture(params=["images", "arrays", "tuples", "draws"])
def make(request: pytest.FixtureRequest, image_root: Path) -> Make:
    """A function that makes the dataset anew."""
    x, y = torch.randn(NUM, 5, generator=torch.Generator().manual_seed(0)), torch.arange(NUM) % 3
    makers: dict[str, Make] = {
        "images": lambda: tk.ImageFolder(
            image_root, image_size=16, augment=["random_resized_crop", "horizontal_flip", "random_rotation"]
        ),
        "arrays": lambda: tk.Arrays(input=x, label=y),
        "tuples": lambda: [(x[i], int(y[i])) for i in range(NUM)],
        "draws": lambda: Noisy(size=NUM),
    }
    return makers[request.param]


def batches(loader: tk.Loader) -> list[dict[str, Any]]:
    return list(loader)


def all_same(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> bool:
    return len(one) == len(other) and all(map(same, one, other))


def test_any_number_and_kind_of_workers_gives_the_same_batches(make: Make) -> None:
    def two_epochs(**settings: Any) -> list[dict[str, Any]]:
        with closing(tk.Loader(make(), 4, shuffle=True, seed=5, **settings)) as loader:
            return batches(loader) + batches(loader)

    wanted = two_epochs(workers=0)
    assert len(wanted) == 14
    assert not torch.equal(wanted[0]["index"], wanted[7]["index"])
    if not isinstance(make(), Noisy | list):  # of foreign data a thread is given none: test_foreign_chance
        assert all_same(two_epochs(workers=1, backend="threads"), wanted)
        assert all_same(two_epochs(workers=3, backend="threads"), wanted)
        assert all_same(two_epochs(workers="auto"), wanted)
    assert all_same(two_epochs(workers=1, backend="processes"), wanted)


@pytest.mark.parametrize("last", ["keep", "drop", "pad"])
def test_the_rest_of_an_epoch_from_every_place(make: Make, last: Last) -> None:
    def fresh() -> tk.Loader:
        return tk.Loader(make(), 4, shuffle=True, last=last, workers=0)

    loader = fresh()
    first, second = batches(loader), batches(loader)
    loader = fresh()
    for epoch in (first, second):
        number = 0
        for number, _ in enumerate(loader, 1):
            resumed = fresh()
            resumed.load_state_dict(loader.state_dict())
            assert all_same(batches(resumed), epoch[number:])
        assert number == len(loader) == len(epoch)
    resumed = fresh()
    resumed.load_state_dict({**fresh().state_dict(), "epoch": 1})
    assert all_same(batches(resumed), second)


def test_threads_go_on_from_every_place_too(image_root: Path) -> None:
    def fresh(workers: int) -> tk.Loader:
        data = tk.ImageFolder(image_root, image_size=16, augment=["random_resized_crop"])
        return tk.Loader(data, 4, shuffle=True, workers=workers, collate=stack_inputs)

    wanted = batches(fresh(0))
    with closing(fresh(2)) as loader:
        assert loader.plan.backend == "threads"
        for number in range(len(wanted)):
            loader.load_state_dict({**loader.state_dict(), "epoch": 0, "delivered": number})
            assert all_same(batches(loader), wanted[number:])


@pytest.mark.parametrize("last", ["keep", "drop", "pad"])
def test_ranks_together_give_the_global_batches(make: Make, last: Last) -> None:
    alone = batches(tk.Loader(make(), 8, shuffle=True, seed=2, last=last))
    ranks = [tk.Loader(make(), 2, shuffle=True, seed=2, last=last, rank=rank, world_size=4) for rank in range(4)]
    assert {len(loader) for loader in ranks} == {len(alone)}
    for whole, *parts in zip(
        alone, *map(batches, ranks), strict=True
    ):  # 26 = 3 · 8 + 2: two ranks get one sample, two none
        for name in whole:
            assert torch.equal(torch.cat([part[name] for part in parts]), whole[name])


def test_another_number_of_ranks_goes_on_with_the_same_samples() -> None:
    data = tk.Arrays(input=torch.arange(64.0))
    wanted = batches(tk.Loader(data, 8, shuffle=True))
    state: dict[str, int] = {}
    for rank in range(2):
        loader = tk.Loader(data, 4, shuffle=True, rank=rank, world_size=2)
        begun = iter(loader)
        third = [next(begun) for _ in range(3)][2]
        state = loader.state_dict()
        assert torch.equal(third["index"], wanted[2]["index"][4 * rank : 4 * rank + 4])
    alone = tk.Loader(data, 8, shuffle=True)
    alone.load_state_dict(state)
    assert all_same(batches(alone), wanted[3:])
