"""Decoded images that are kept are those that decoding gives, whatever became of files, stores and processes."""

from __future__ import annotations

import os
import pickle
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from torchkeep.chance import ChanceKey
from torchkeep.data import cache
from torchkeep.data.arrays import Arrays
from torchkeep.data.cache import (
    CachePlan,
    PictureCache,
    fill,
    free_memory_bytes,
    open_cache,
    plan_cache,
    recipe_of,
    room_bytes,
    store_path,
    to_short_side,
    with_cache,
)
from torchkeep.data.dataset import Part
from torchkeep.data.images import IdxImages, ImageFolder
from torchkeep.errors import SettingsError
from torchkeep.files import cache_root
from torchkeep.store import Store

MB = 1 << 20
CROP = ["random_resized_crop", "horizontal_flip"]
KEY = ChanceKey(3, 1)


@pytest.fixture(autouse=True)
def free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHKEEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "free_memory_bytes", lambda: 64 * MB)
    monkeypatch.setattr(cache, "_in_memory", weakref.WeakSet())


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for number in range(10):
        folder = tmp_path / "images" / ("ants" if number % 2 else "bees")
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 255, (90 + 5 * number, 120, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return tmp_path / "images"


def folder(root: Path, augment: list[str]) -> ImageFolder:
    return ImageFolder(root, image_size=56, augment=augment)


def batch(dataset: ImageFolder | Part) -> torch.Tensor:
    read = dataset.read_batch(np.arange(len(dataset)), KEY)
    assert read is not None
    return read["image"]


def pictures(seed: int, kind: type = np.uint8, channels: int = 3, has_mask: bool = False) -> dict[str, np.ndarray]:
    draws = np.random.default_rng(seed)
    found = {"image": draws.integers(0, np.iinfo(kind).max, (5, 7, channels), dtype=kind)}
    return found | ({"mask": draws.integers(0, 255, (5, 7, 1), dtype=np.uint8)} if has_mask else {})


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("has_mask", [False, True])
def test_pictures_come_back_as_they_were(kind: type, channels: int, has_mask: bool) -> None:
    kept = PictureCache(Store.in_memory(2, MB), None)
    given = pictures(0, kind, channels, has_mask)
    assert kept.get(1) is None
    assert kept.put(1, given)
    found = kept.get(1)
    assert found is not None
    assert found.keys() == given.keys()
    for name, picture in given.items():
        assert found[name].dtype == picture.dtype
        np.testing.assert_array_equal(found[name], picture)
        assert not found[name].flags.writeable
    assert (kept.hits, kept.misses) == (1, 1)


def test_a_changed_file_is_a_miss_in_the_next_process(tmp_path: Path) -> None:
    files = [tmp_path / "0", tmp_path / "1"]
    for path in files:
        path.write_bytes(b"encoded")

    def opened() -> PictureCache:
        return PictureCache(Store.on_disk(tmp_path / "a.store", 2, MB), None, lambda index: [files[index]])

    first = opened()
    for index in range(2):
        first.put(index, pictures(index))
    os.utime(files[0], ns=(1, 1))
    assert first.get(0) is not None  # each file is looked at once
    second = opened()
    assert second.get(0) is None
    np.testing.assert_array_equal(second.get(1)["image"], pictures(1)["image"])  # type: ignore[index]
    assert second.put(0, pictures(5))
    np.testing.assert_array_equal(opened().get(0)["image"], pictures(5)["image"])  # type: ignore[index]
    files[1].unlink()
    assert opened().get(1) is None


def test_hits_are_counted_exactly_from_many_threads() -> None:
    kept = PictureCache(Store.in_memory(4, MB), None)
    kept.put(0, pictures(0))
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda number: [kept.get(number % 2) for _ in range(50)], range(80)))
    assert (kept.hits, kept.misses) == (2000, 2000)


def test_a_cache_travels_as_its_store_does(tmp_path: Path) -> None:
    in_memory, on_disk = Store.in_memory(1, MB), Store.on_disk(tmp_path / "a.store", 1, MB)
    for held in (in_memory, on_disk):
        kept = PictureCache(held, 64)
        kept.put(0, pictures(0))
        handle = kept.fileno()
        assert (handle is None) == (held is on_disk)
        other = pickle.loads(pickle.dumps(kept))
        assert other.side == 64
        if handle is not None:
            assert other.get(0) is None
            other.attach(os.dup(handle))
        np.testing.assert_array_equal(other.get(0)["image"], pictures(0)["image"])


@pytest.mark.parametrize("size", [(100, 200), (200, 100), (31, 31), (40, 4000), (33, 32)])
def test_the_short_side_becomes_what_is_said_and_nothing_is_enlarged(size: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 5, (*size, 3), dtype=np.uint8) * 50
    small = to_short_side(image, 32)
    assert min(small.shape[:2]) == min(32, *size)
    assert small.shape[0] / small.shape[1] == pytest.approx(size[0] / size[1], rel=0.02)
    assert np.shares_memory(small, image) == (min(size) <= 32)
    mask = to_short_side(image[..., :1], 32, is_mask=True)
    assert mask.shape[:2] == small.shape[:2]
    assert set(np.unique(mask)) <= {0, 50, 100, 150, 200}


@pytest.mark.parametrize("wanted", ["ram", "disk"])
@pytest.mark.parametrize("augment", [[], ["horizontal_flip", "random_resized_crop"], CROP])
def test_batches_are_the_same_in_every_epoch_and_the_second_is_read_from_the_cache(
    root: Path, wanted: cache.Wanted, augment: list[str]
) -> None:
    plain = batch(folder(root, augment))
    data, plan = with_cache(folder(root, augment), wanted)
    assert plan.is_exact == (augment != CROP)
    first = batch(data)
    assert data.cache.hits == 0
    second = batch(data)
    assert data.cache.hits == len(data)
    assert torch.equal(first, second)
    if plan.is_exact:
        assert plan.said == wanted
        assert torch.equal(first, plain)
    else:
        assert plan.said == f"{wanted}, short side 64, pixels may differ"
        assert not torch.equal(first, plain)
        assert (first.float() - plain.float()).abs().mean() < 40
    later, _ = with_cache(folder(root, augment), wanted)
    assert torch.equal(batch(later), first)
    assert later.cache.hits == (len(data) if wanted == "disk" else 0)


def test_a_part_keeps_its_samples_in_the_whole_datas_cache(root: Path) -> None:
    part = Part(Part(folder(root, []), np.array([9, 3, 1, 7])), np.array([2, 0]))
    kept, plan = with_cache(part, "disk")
    assert plan.num_bytes == 2 * 56 * 56 * 3
    for _ in range(2):
        assert torch.equal(batch(kept), batch(part))
    held = kept.dataset.dataset.cache
    assert [held.get(index) is not None for index in range(10)] == [index in (1, 9) for index in range(10)]
    assert part.dataset.dataset.cache is None
    rest, _ = with_cache(Part(part.dataset.dataset, np.arange(10)), "disk")
    assert fill(rest, 1) == []
    assert (rest.dataset.cache.hits, rest.dataset.cache.store.count) == (2, 10)


def test_a_damaged_store_costs_time_and_no_pixel(root: Path, tmp_path: Path) -> None:
    data, _ = with_cache(folder(root, []), "disk")
    plain = batch(data)
    data.cache.store.close()
    (path,) = (tmp_path / "cache" / "pictures").iterdir()
    size = path.stat().st_size
    with path.open("r+b") as file:
        for place in range(5000, 120_000, 40_000):
            file.seek(place)
            file.write(b"damage")
    assert path.stat().st_size == size
    again, _ = with_cache(folder(root, []), "disk")
    assert torch.equal(batch(again), plain)
    assert again.cache.store.damaged == 3
    assert again.cache.hits == 7


def test_filling_reads_all_but_the_bad(root: Path) -> None:
    path = root / "bees" / "4.png"
    path.write_bytes(path.read_bytes()[:100])
    seen: list[tuple[int, int]] = []
    data, _ = with_cache(folder(root, CROP), "disk")
    (bad,) = fill(data, 2, lambda done, total: seen.append((done, total)))
    assert (bad.id, data.id_of(bad.index)) == ("bees/4.png", "bees/4.png")
    assert "100 bytes" in bad.reason
    assert seen[-1] == (10, 10)
    assert data.cache.store.count == 9
    fill(data, 2)
    assert data.cache.hits == 9


def test_filling_ends_where_the_budget_does(root: Path) -> None:
    data, _ = with_cache(folder(root, []), "ram", budget_bytes=40_000)
    assert fill(data, 1) == []
    assert 0 < data.cache.store.count < 10
    assert data.cache.misses == data.cache.store.count + 1


@pytest.mark.parametrize(
    ("free_bytes", "read_s", "budget", "kind", "said"),
    [
        (2 * MB, 1e9, None, "ram", "0.1 MB of decoded images fit into 1.0 MB, half of the free memory"),
        (2 * MB, 1e9, 500_000, "ram", "0.1 MB of decoded images fit into 0.5 MB, the budget"),
        (1000, 1e-9, None, "disk", "exceed 0.0 MB, half of the free memory; reading one takes 0.00 ms, decoding it"),
        (1000, 1e9, None, "off", "exceed 0.0 MB, half of the free memory; reading one takes"),
        (1000, 1e-9, 50_000, "off", "the disk has 0.1 MB for them"),
    ],
)
def test_auto_goes_by_memory_disk_and_decoding(
    root: Path, monkeypatch: pytest.MonkeyPatch,
    free_bytes: int, read_s: float, budget: int | None, kind: str, said: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(cache, "free_memory_bytes", lambda: free_bytes)
    monkeypatch.setattr(cache, "_read_seconds", lambda num_bytes: (read_s, True))
    plan = plan_cache("auto", folder(root, []), budget)
    assert plan.kind == kind
    assert said in plan.reason
    assert plan.num_bytes == 10 * 56 * 56 * 3
    assert (plan.side, plan.is_exact) == (None, True)


def test_a_disk_that_refuses_is_no_place_for_a_cache(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "free_memory_bytes", lambda: 0)
    (tmp_path / "cache").write_bytes(b"a file")
    assert plan_cache("auto", folder(root, [])).kind == "off"
    data, plan = with_cache(folder(root, CROP), "disk")  # as set: pixels are those of a cache, nothing is kept
    assert plan.kind == "disk"
    assert torch.equal(batch(data), batch(data))
    assert data.cache.hits == 0
    assert data.cache.store.refused


def test_what_reading_takes_is_measured_and_leaves_nothing(tmp_path: Path) -> None:
    room_bytes("disk")  # makes the folder
    seconds, _ = cache._read_seconds(150_000)
    assert 0 < seconds < 10
    assert list((tmp_path / "cache" / "pictures").iterdir()) == []


def test_data_without_decoded_images_have_no_cache(tmp_path: Path) -> None:
    numbers = Arrays(input=np.zeros((4, 2), np.float32), label=np.zeros(4, np.int64))
    assert with_cache(numbers, "auto") == (numbers, CachePlan("off", None, True, 0, "these data are no images"))
    with pytest.raises(SettingsError, match="only decoded images"):
        with_cache(numbers, "ram")
    raw = np.zeros((3, 8, 8), np.uint8)
    (tmp_path / "idx").write_bytes(b"\0\0\x08\x03" + np.array(raw.shape, ">u4").tobytes() + raw.tobytes())
    assert "in memory" in plan_cache("auto", IdxImages(tmp_path / "idx")).reason


def test_images_that_cannot_be_decoded_are_no_reason_for_a_cache(root: Path) -> None:
    for path in root.rglob("*.png"):
        path.write_bytes(b"nothing")
    plan = plan_cache("auto", folder(root, []))
    assert (plan.kind, plan.num_bytes) == ("off", 0)


def test_a_store_is_named_by_all_that_pixels_follow_from(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = folder(root, CROP)
    assert recipe_of(data, 64) == "short side 64, 3 channels, 8 bits"
    assert recipe_of(data, None) == "centre square 56, 3 channels, 8 bits"
    grey = ImageFolder(root, image_size=56, channels=1, bits=16)
    assert recipe_of(grey, None) == "centre square 56, 1 channels, 16 bits"
    names = {store_path("files", "recipe"), store_path("other files", "recipe"), store_path("files", "another")}
    for module, name in ((cv2, "__version__"), (Image, "__version__"), (cache.store, "VERSION"), (cache, "_RULES")):
        owner = cache.PIL if module is Image else module
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, "another")
            names.add(store_path("files", "recipe"))
    assert len(names) == 7
    assert store_path("files", "recipe") in names


def test_a_kept_budget_bounds_the_folder(root: Path, tmp_path: Path) -> None:
    for size in (56, 57, 58):
        data, plan = with_cache(ImageFolder(root, image_size=size), "disk", budget_bytes=260_000)
        fill(data, 1)
        assert data.cache.store.count == 10
        data.cache.store.close()
    taken = sum(512 * path.stat().st_blocks for path in (tmp_path / "cache" / "pictures").iterdir())
    assert taken <= 260_000
    assert plan.num_bytes <= taken


def test_without_a_home_nothing_is_kept(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "cache_root", lambda: None)
    kept = open_cache(CachePlan("disk", None, True, 0, ""), folder(root, []))
    assert not kept.put(0, pictures(0))
    assert kept.get(0) is None
    assert room_bytes("disk") == 0


def test_free_memory_is_that_of_the_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = SimpleNamespace(virtual_memory=lambda: SimpleNamespace(available=10 * MB))
    monkeypatch.setitem(sys.modules, "psutil", memory)
    monkeypatch.setattr(cache, "_CONTROL_GROUP", tmp_path)
    assert free_memory_bytes() == 10 * MB
    (tmp_path / "memory.stat").write_text(f"anon 5\ninactive_file {MB}\n")
    for limit, expected in (("max", 10 * MB), (str(8 * MB), 3 * MB), (str(100 * MB), 10 * MB), ("5", 0)):
        (tmp_path / "memory.max").write_text(limit + "\n")
        (tmp_path / "memory.current").write_text(f"{6 * MB}\n")
        assert free_memory_bytes() == expected
    monkeypatch.setitem(sys.modules, "psutil", None)
    with pytest.raises(SettingsError, match="pip install psutil"):
        free_memory_bytes()


@pytest.mark.parametrize(
    ("platform", "variable", "expected"),
    [
        ("linux", "", "HOME/.cache/torchkeep"),
        ("linux", "XDG_CACHE_HOME", "SAID/torchkeep"),
        ("darwin", "", "HOME/Library/Caches/torchkeep"),
        ("win32", "", "HOME/AppData/Local/torchkeep"),
        ("win32", "LOCALAPPDATA", "SAID/torchkeep"),
        ("linux", "TORCHKEEP_CACHE", "SAID"),
    ],
)
def test_caches_lie_where_the_system_keeps_them(
    platform: str, variable: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TORCHKEEP_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    home, other = tmp_path / "home", tmp_path / "said"
    monkeypatch.setattr(Path, "home", lambda: home)
    if variable:
        monkeypatch.setenv(variable, str(other))
    with monkeypatch.context() as patch:
        patch.setattr(sys, "platform", platform)
        found = cache_root()
    assert str(found) == expected.replace("HOME", str(home)).replace("SAID", str(other))


def test_masks_are_kept_with_their_images(root: Path, tmp_path: Path) -> None:
    for path in root.rglob("*.png"):
        mask = tmp_path / "masks" / path.relative_to(root)
        mask.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.asarray(Image.open(path))[..., 0] % 3).save(mask)
    for augment in ([], CROP):
        options = {"masks": tmp_path / "masks", "mask_classes": ["a", "b", "c"], "image_size": 56, "augment": augment}
        plain, (data, _) = ImageFolder(root, **options), with_cache(ImageFolder(root, **options), "ram")
        read = [held.read_batch(np.arange(10), KEY) for held in (data, data, plain)]
        assert data.cache.hits == 10
        for name in ("image", "mask"):
            assert torch.equal(read[0][name], read[1][name])
            assert torch.equal(read[0][name], read[2][name]) == (augment == [])


def test_memory_that_another_cache_will_take_is_not_promised_again(root: Path) -> None:
    first, plan = with_cache(folder(root, []), "ram")
    rest = 64 * MB - first.cache.store.budget_bytes
    assert plan.num_bytes < first.cache.store.budget_bytes < 2 * plan.num_bytes
    assert room_bytes("ram") == rest // 2
    fill(first, 1)
    assert first.cache.store.count == 10
    assert room_bytes("ram") > rest // 2  # what it has taken is measured as taken
    first.cache.store.close()
    assert room_bytes("ram") == 32 * MB
