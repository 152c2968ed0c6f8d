"""Segmentation: a mask goes the way of its image, and its numbers stay classes."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from torchkeep.chance import ChanceKey
from torchkeep.data.augment import NAMES
from torchkeep.data.decode import decode_mask
from torchkeep.data.images import ImageFolder, ImageTable
from torchkeep.data.loader import Loader
from torchkeep.errors import BadSampleError, DataError

GEOMETRY = tuple(name for name in NAMES if name.endswith(("crop", "flip", "shift", "rotation", "affine")))
FIVE = tuple(name for name in GEOMETRY if name != "random_affine")
POLICIES = ("rand_augment", "trivial_augment")
CLASSES = tuple(f"c{number}" for number in range(255))
# 5 rows down or 8 columns right are 40 more: whatever moves the one and not the other is seen
RAMP = (8 * np.arange(20)[:, None] + 5 * np.arange(18)).astype(np.uint8)


def png(pixels: np.ndarray) -> bytes:
    held = BytesIO()
    Image.fromarray(pixels).save(held, "PNG")
    return held.getvalue()


def folders(root: Path, masks: Sequence[np.ndarray], images: Sequence[np.ndarray] | None = None) -> Path:
    for number, mask in enumerate(masks):
        for folder, pixels in (("images", mask if images is None else images[number]), ("masks", mask)):
            path = root / folder / f"part{number % 2}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(pixels))
    return root


def opened(root: Path, classes: Sequence[str] = CLASSES, **options: Any) -> ImageFolder:
    return ImageFolder(root / "images", masks=root / "masks", mask_classes=classes, **options)


@pytest.mark.parametrize("size", [None, 13, 18, 40])
@pytest.mark.parametrize("augment", [(), *((name,) for name in GEOMETRY), FIVE, FIVE[::-1], GEOMETRY, GEOMETRY[::-1]])
def test_a_mask_moves_as_its_image_does(tmp_path: Path, size: int | None, augment: tuple[str, ...]) -> None:
    """The image's pixels are its mask's numbers: between two pixels the image is a mean, and the mask the nearer."""
    data = opened(folders(tmp_path, [RAMP, RAMP[::-1], RAMP[:, ::-1], 255 - RAMP // 2 - 1]), image_size=size,
                  augment=augment, channels=1)  # fmt: skip
    indices = np.array([3, 0, 1, 2, 0])
    for epoch in range(3):
        batch = data.read_batch(indices, ChanceKey(4, epoch))
        assert batch is not None
        assert batch["mask"].dtype == torch.int64
        assert batch["mask"].shape == batch["image"].shape[:1] + batch["image"].shape[2:]
        away = (batch["image"][:, 0].long() - batch["mask"]).abs()
        if set(augment) <= {"horizontal_flip", "vertical_flip", "random_shift"} and size in (None, 18):
            assert away.max() == 0
        # of 237: two and a half pixels down, where several operations each take the nearest; a sixth adds half a pixel
        assert away.max() <= (24 if len(augment) > len(FIVE) else 20)
        assert away.float().mean() < 5
        for row, index in enumerate(indices.tolist()):
            alone = data.read(index, ChanceKey(4, epoch))
            assert torch.equal(alone["mask"], batch["mask"][row])
            assert torch.equal(alone["image"], batch["image"][row])


@pytest.mark.parametrize("size", [None, 9, 40])
@pytest.mark.parametrize("augment", [(), *((name,) for name in NAMES)])
def test_no_class_arises_between_two_others(tmp_path: Path, size: int | None, augment: tuple[str, ...]) -> None:
    data = opened(folders(tmp_path, [np.where(RAMP // 8 % 2, 0, 200).astype(np.uint8)]), image_size=size,
                  augment=augment)  # fmt: skip
    for epoch in range(3):
        batch = data.read_batch(np.array([0]), ChanceKey(0, epoch))
        assert batch is not None
        moved_in = {-100} if set(augment) & set(POLICIES) else set()  # no class
        assert {0, 200} <= set(batch["mask"].unique().tolist()) <= {0, 200} | moved_in


def test_masks_are_read_by_any_loader_and_by_threads(tmp_path: Path) -> None:
    data = opened(folders(tmp_path, [RAMP, RAMP[::-1], RAMP[:, ::-1]]), augment=NAMES)
    theirs = next(iter(DataLoader(data, batch_size=3)))
    for workers in (0, 2):
        loader = Loader(data, 3, workers=workers)
        ours = next(iter(loader))
        loader.close()
        assert torch.equal(theirs["image"], ours["image"])
        assert torch.equal(theirs["mask"], ours["mask"])
    assert list(data.schema) == ["image", "mask", "id"]
    assert data.schema.targets == ["mask"]
    assert data.schema["mask"].shape == (20, 18)


@pytest.mark.parametrize("ignored", [False, True])
def test_255_is_no_class_and_others_need_names(tmp_path: Path, ignored: bool) -> None:
    mask = np.array([[0, 1, 2], [2, 255 if ignored else 1, 0]], np.uint8)
    root = folders(tmp_path, [mask])
    expected = [[0, 1, 2], [2, -100 if ignored else 1, 0]]
    assert opened(root, ("a", "b", "c"))[0]["mask"].tolist() == expected
    data = opened(root, ("a", "b"))
    for read in (lambda: data[0], lambda: data.read_batch(np.array([0]), ChanceKey())):
        with pytest.raises(BadSampleError, match="no name") as caught:
            read()
        assert "class 2" in caught.value.got
        assert "part0/0.png" in caught.value.where
    with pytest.raises(DataError, match="not named"):
        opened(root, ())


def test_a_palette_gives_its_numbers_not_its_colours(tmp_path: Path) -> None:
    numbers = np.array([[0, 1], [15, 255]], np.uint8)
    image = Image.frombytes("P", (2, 2), numbers.tobytes())
    image.putpalette([value for number in range(256) for value in (255 - number, 0, number)])
    held = BytesIO()
    image.save(held, "PNG")
    assert decode_mask(held.getvalue(), "x")[..., 0].tolist() == numbers.tolist()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


@pytest.mark.parametrize("colour", [0, 3])
@pytest.mark.parametrize(("bits", "row", "classes"), [
    (1, 0b01100000, [0, 1, 1, 0]), (2, 0b00011011, [0, 1, 2, 3]), (4, 0x1F, [1, 15]), (8, 0x07, [7]),
])  # fmt: skip
def test_pixels_of_few_bits_are_their_numbers(colour: int, bits: int, row: int, classes: list[int]) -> None:
    head = struct.pack(">IIBBBBB", len(classes), 1, bits, colour, 0, 0, 0)
    palette = chunk(b"PLTE", bytes(range(3 * 2**bits)) if bits < 8 else bytes(768)) if colour == 3 else b""
    body = chunk(b"IDAT", zlib.compress(bytes([0, row]))) + chunk(b"IEND", b"")
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + palette + body
    assert decode_mask(data, "x")[0, :, 0].tolist() == classes


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "I;16"])
def test_a_mask_of_colours_or_16_bits_is_refused(mode: str) -> None:
    held = BytesIO()
    image = Image.fromarray(np.ones((2, 2), np.uint16)) if mode == "I;16" else Image.new(mode, (2, 2))
    image.save(held, "PNG")
    with pytest.raises(BadSampleError, match="mask cannot be decoded") as caught:
        decode_mask(held.getvalue(), "x")
    assert mode[0] in caught.value.got


@pytest.mark.parametrize("size", [None, 16])
def test_a_mask_of_another_size_is_named(tmp_path: Path, size: int | None) -> None:
    data = opened(folders(tmp_path, [RAMP[:, :-1]], [RAMP]), image_size=size)
    with pytest.raises(BadSampleError, match="mask is of another size") as caught:
        data.read(0, ChanceKey())
    assert (caught.value.got, caught.value.expected) == ("17 × 20 pixels", "18 × 20 pixels, as its image")
    assert "part0/0.png" in caught.value.where


def test_a_missing_or_damaged_mask_is_named(tmp_path: Path) -> None:
    root = folders(tmp_path, [RAMP, RAMP, RAMP])
    (root / "masks/part1/1.png").unlink()
    (root / "masks/part0/2.png").write_bytes(b"")
    data = opened(root)
    assert [data.id_of(index) for index in range(3)] == ["part0/0.png", "part0/2.png", "part1/1.png"]
    assert data[0]["mask"].shape == (20, 18)
    for index, name in ((1, "part0/2.png"), (2, "part1/1.png")):
        with pytest.raises(BadSampleError) as caught:
            data.read(index, ChanceKey())
        assert f"{name} (sample {index}, epoch 1), its mask" in caught.value.where


def test_masks_in_a_table_are_bytes_or_names(tmp_path: Path) -> None:
    root = folders(tmp_path, [RAMP, RAMP[::-1]])
    names = ["part0/0.png", "part1/1.png"]
    held: dict[str, Any] = {
        "bytes": ([png(RAMP), png(RAMP[::-1])], [png(RAMP), png(RAMP[::-1])]),
        "names": ([f"images/{name}" for name in names], [f"masks/{name}" for name in names]),
    }
    wanted = opened(root, augment=NAMES).read_batch(np.arange(2), ChanceKey(3))
    assert wanted is not None
    prints = set()
    for images, masks in held.values():
        frame = pa.table({"image": images, "mask": masks, "label": ["a", "b"]})
        data = ImageTable(frame, mask="mask", root=root, mask_classes=CLASSES, augment=NAMES)
        batch = data.read_batch(np.arange(2), ChanceKey(3))
        assert batch is not None
        assert all(torch.equal(batch[name], wanted[name]) for name in ("image", "mask"))
        assert "label" not in batch  # the mask is what is to be predicted
        assert data.column("label").tolist() == ["a", "b"]
        prints.add(data.fingerprint())
        other = frame.set_column(1, "mask", pa.array(masks[::-1]))
        prints.add(ImageTable(other, mask="mask", root=root, mask_classes=CLASSES).fingerprint())
    assert len(prints) == 4


def test_validation_takes_over_the_names_of_the_classes(tmp_path: Path) -> None:
    root = folders(tmp_path, [np.array([[0, 1]], np.uint8)])
    train = opened(root, ("sky", "sea"), augment=NAMES)
    valid = ImageFolder(root / "images", masks=root / "masks", like=train)
    assert valid.schema == train.schema
    assert valid[0]["mask"].tolist() == [[0, 1]]


def test_a_callable_gets_the_mask_and_may_not_part_it_from_its_image(tmp_path: Path) -> None:
    root = folders(tmp_path, [RAMP])

    def transpose(sample: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        return {**sample, **{name: sample[name].flip(2) for name in ("image", "mask")}}

    sample = opened(root, augment=[transpose])[0]
    assert torch.equal(sample["image"][0].long(), sample["mask"])
    assert torch.equal(sample["mask"], torch.from_numpy(RAMP.astype(np.int64)).flip(1))
    for name in ("image", "mask"):

        def cut(sample: dict[str, Any], rng: np.random.Generator, name: str = name) -> dict[str, Any]:
            return {**sample, name: sample[name][:, 1:]}

        with pytest.raises(DataError, match=f"changed the size of the {name}"):
            opened(root, augment=[cut])[0]
