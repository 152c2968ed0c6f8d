"""Every way in which any file of a checkpoint can rot, to a bit: found by whoever looks, and never loaded."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from torchkeep.errors import DamagedError
from torchkeep.keep.checkpoint import Checkpoints, find_damage
from torchkeep.tensors import tensor_sha256

FILES = ["model.safetensors", "optimizer.safetensors", "rng.safetensors", "extra.safetensors", "state.json",
         "manifest.json"]  # fmt: skip
EVERY = 97  # bytes between two that are flipped: prime, so that every place of a word is met
PAGE = 4096


def state_of(step: int) -> dict[str, object]:
    draws = torch.Generator().manual_seed(step)
    return {
        "model": {"w": torch.randn(40, 40, generator=draws), "b": torch.randn(3, generator=draws)},
        "optimizer": {"state": {0: {"m": torch.randn(40, 40, generator=draws)}}, "rate": 0.1 / step},
        "rng": {"torch": torch.randint(1, 255, (300,), generator=draws, dtype=torch.uint8)},
        "objects": {"head": torch.randn(7, generator=draws)},
        "clock": {"step": step},
    }


class Rot:
    """Three checkpoints, of which the newest is damaged and mended again."""

    def __init__(self, folder: Path):
        self.folder, self.before, self.newest = folder, folder / "step-00000002", folder / "step-00000003"
        self.wanted = tensor_sha256(state_of(2)["model"])  # type: ignore[arg-type]

    def made(self) -> Rot:
        checkpoints = Checkpoints(self.folder, keep_last=3, metric="loss")
        for step in (1, 2, 3):
            checkpoints.save(step, state_of(step), {"loss": 1.0 / step})
        return self

    def copied(self, place: Path) -> Rot:
        return Rot(shutil.copytree(self.folder, place / "copy"))

    def assert_found(self) -> None:
        """That reader, loader and trainer see the damage, and that the trainer takes the one before."""
        said: list[str] = []
        checkpoints = Checkpoints(self.folder, metric="loss", warn=said.append)
        assert find_damage(self.newest)
        with pytest.raises(DamagedError):
            checkpoints.load(self.newest)
        for found in (checkpoints.latest(), checkpoints.best()):
            assert found is not None
            assert found.path == self.before
        assert checkpoints.rows()[-1].damage
        taken = Checkpoints(self.folder, warn=said.append).take_up()
        assert taken is not None
        assert taken[0].path == self.before
        assert tensor_sha256(taken[1]["model"]) == self.wanted
        assert "step-00000003 is damaged" in said[-1]
        assert not self.newest.exists()
        (self.folder / "damaged-step-00000003-1").rename(self.newest)  # set aside, not deleted


@pytest.fixture(scope="module")
def rot(tmp_path_factory: pytest.TempPathFactory) -> Rot:
    return Rot(tmp_path_factory.mktemp("rot")).made()


Damage = Iterator[bytes]


def truncated(data: bytes) -> Damage:
    yield from (data[:size] for size in {0, 1, 8, len(data) // 2, len(data) - 1} if size < len(data))


def grown(data: bytes) -> Damage:
    yield data + b"\0"


def flipped(data: bytes) -> Damage:
    # the manifest has no checksum of its own: each of its bytes must hold
    every = 1 if data.startswith(b"{") and b"xxh3_128" in data else EVERY
    for number, place in enumerate([*range(0, len(data), every), len(data) - 1]):
        yield data[:place] + bytes([data[place] ^ 1 << number % 8]) + data[place + 1 :]


def zeroed(data: bytes) -> Damage:
    yield from (data[:at] + bytes(min(PAGE, len(data) - at)) + data[at + PAGE :] for at in range(0, len(data), PAGE))


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", [truncated, grown, flipped, zeroed])
def test_rot_within_a_file_is_found(rot: Rot, damage: Callable[[bytes], Damage], file: str) -> None:
    path = rot.newest / file
    whole = path.read_bytes()
    for rotten in damage(whole):
        assert rotten != whole
        path.write_bytes(rotten)
        rot.assert_found()
    path.write_bytes(whole)
    assert not find_damage(rot.newest)


def deleted(file: Path, other: Path) -> None:
    file.unlink()


def swapped(file: Path, other: Path) -> None:
    file.write_bytes(other.read_bytes())


def linked_to_another_steps(file: Path, other: Path) -> None:
    file.unlink()
    file.symlink_to(other)


def linked_to_its_own_bytes(file: Path, other: Path) -> None:
    elsewhere = file.parent.parent / "elsewhere"
    file.replace(elsewhere)
    file.symlink_to(elsewhere)


def linked_to_nothing(file: Path, other: Path) -> None:
    file.unlink()
    file.symlink_to("nowhere")


def a_folder(file: Path, other: Path) -> None:
    file.unlink()
    file.mkdir()


@pytest.mark.skipif(sys.platform == "win32", reason="links need a right there")
@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize(
    "replaced",
    [deleted, swapped, linked_to_another_steps, linked_to_its_own_bytes, linked_to_nothing, a_folder],
)  # fmt: skip
def test_something_else_in_a_files_place_is_found(
    rot: Rot, replaced: Callable[[Path, Path], None], file: str, tmp_path: Path
) -> None:
    copy = rot.copied(tmp_path)
    replaced(copy.newest / file, copy.before / file)
    copy.assert_found()


def test_a_file_or_nothing_at_all_in_a_checkpoints_place_is_found(rot: Rot, tmp_path: Path) -> None:
    copy = rot.copied(tmp_path)
    shutil.rmtree(copy.newest)
    copy.newest.mkdir()
    copy.assert_found()
    copy.newest.rmdir()
    copy.newest.write_bytes(b"no folder")
    copy.assert_found()


def test_a_part_is_loaded_from_whole_files_only(rot: Rot) -> None:
    checkpoints = Checkpoints(rot.folder)
    saved = checkpoints.latest()
    assert saved is not None
    path = rot.newest / "optimizer.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(DamagedError):
        checkpoints.load_part(saved, "optimizer")
    assert tensor_sha256(checkpoints.model(saved)) == tensor_sha256(state_of(3)["model"])  # type: ignore[arg-type]
    path.write_bytes(whole)


def test_all_of_them_damaged_leaves_nothing_to_take_and_nothing_deleted(tmp_path: Path) -> None:
    Rot(tmp_path).made()
    for path in Checkpoints(tmp_path).steps():
        (path / "state.json").write_bytes(b"{")
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest() is checkpoints.best() is checkpoints.take_up() is None
    assert len(list(tmp_path.glob("damaged-step-*"))) == 3
