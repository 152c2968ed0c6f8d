"""What images may be: every form and depth, masks that move with their image, idx files, and what is refused."""

from __future__ import annotations

import gzip
import struct
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from torchkeep.chance import ChanceKey
from torchkeep.data.augment import NAMES
from torchkeep.data.decode import decode_image, decode_mask
from torchkeep.data.images import IdxImages, ImageFolder, ImageTable
from torchkeep.data.loader import Loader
from torchkeep.errors import BadSampleError, DataError
from torchkeep.training.device import Mover

WIDE = np.random.default_rng(0).integers(0, 65536, (12, 17, 3), dtype=np.uint16)
WIDE[0, :4, 0] = [0, 1, 65534, 65535]


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def raw_png(width: int, height: int, bits: int, colour: int, rows: bytes, more: bytes = b"") -> bytes:
    """A PNG of which each byte is known."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + more + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def png16(pixels: np.ndarray, orientation: int = 1) -> bytes:
    """(H, W, 1 or 3) uint16; the orientation in an eXIf chunk."""
    height, width, depth = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    exif = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01" + struct.pack(">HHI", orientation, 0, 0)
    more = chunk(b"eXIf", exif) if orientation > 1 else b""
    return raw_png(width, height, 16, 2 if depth == 3 else 0, rows, more)


def tiff16(pixels: np.ndarray, orientation: int = 1) -> bytes:
    """(H, W, 3) uint16, not compressed."""
    (height, width, depth), data = pixels.shape, pixels.astype("<u2").tobytes()
    rows = [(256, width), (257, height), (258, 0), (259, 1), (262, 2), (273, 8), (274, orientation), (277, depth),
            (278, height), (279, len(data)), (284, 1)]  # fmt: skip
    after = 8 + len(data) + 2 + 12 * len(rows) + 4
    tags = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in rows if tag != 258)
    bits = struct.pack("<HHII", 258, 3, 3, after)
    tags = tags[:24] + bits + tags[24:]
    head = struct.pack("<2sHI", b"II", 42, 8 + len(data))
    return head + data + struct.pack("<H", len(rows)) + tags + bytes(4) + struct.pack("<3H", 16, 16, 16)


def turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """As EXIF 2.32 says where the 0th row and the 0th column stand."""
    ways: dict[int, Callable[[np.ndarray], np.ndarray]] = {
        1: lambda x: x, 2: np.fliplr, 3: lambda x: np.rot90(x, 2), 4: np.flipud, 5: lambda x: x.transpose(1, 0, 2),
        6: lambda x: np.rot90(x, -1), 7: lambda x: np.rot90(x, 2).transpose(1, 0, 2), 8: np.rot90,
    }  # fmt: skip
    return ways[orientation](pixels)


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    held = BytesIO()
    image.save(held, form, **options)
    return held.getvalue()


# --- 16 bits


@pytest.mark.parametrize("make", [png16, tiff16])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_colours_of_16_bits_are_exact_whichever_way_they_are_turned(make: Any, orientation: int) -> None:
    data, expected = make(WIDE, orientation), turned(WIDE, orientation)
    np.testing.assert_array_equal(decode_image(data, "x", 3, 16), expected)
    eight = decode_image(data, "x", 3, 8)
    assert eight.dtype == np.uint8
    assert np.abs(eight - expected / 257).max() <= 1


@pytest.mark.parametrize("form", ["png", "tiff"])
def test_greys_of_16_bits_are_exact(form: str) -> None:
    grey = WIDE[..., :1]
    data = png16(grey) if form == "png" else encoded(Image.fromarray(grey[..., 0]), "TIFF")
    np.testing.assert_array_equal(decode_image(data, "x", 1, 16), grey)
    np.testing.assert_array_equal(decode_image(data, "x", 3, 16), np.repeat(grey, 3, 2))
    np.testing.assert_array_equal(decode_image(data, "x", 1, 8), np.round(grey / 257))


def test_8_bits_beside_16_have_the_same_white() -> None:
    data = encoded(Image.fromarray((WIDE // 257).astype(np.uint8)), "PNG")
    np.testing.assert_array_equal(decode_image(data, "x", 3, 16), WIDE // 257 * 257)


@pytest.mark.parametrize("values", [[70_000, 1], [-1, 1]])
def test_whole_numbers_that_16_bits_do_not_hold_are_refused(values: list[int]) -> None:
    data = encoded(Image.fromarray(np.array([values], np.int32)), "TIFF")
    with pytest.raises(BadSampleError) as caught:
        decode_image(data, "x", 1, 16)
    assert "16 bits hold" in caught.value.got


@pytest.mark.parametrize("size", [None, 12])
@pytest.mark.parametrize("augment", [(), NAMES])
def test_16_bits_stay_16_bits_up_to_the_device(tmp_path: Path, size: int | None, augment: tuple) -> None:
    pixels = WIDE[:, :12]
    (tmp_path / "a").mkdir()
    (tmp_path / "a/0.png").write_bytes(png16(pixels))
    data = ImageFolder(tmp_path, bits=16, image_size=size, augment=augment, mean=[0.2, 0.4, 0.5], std=[0.3, 0.5, 1])
    batch = data.read_batch(np.array([0, 0]), ChanceKey(1))
    assert batch is not None
    assert batch["image"].dtype == data[0]["image"].dtype == torch.uint16
    assert torch.equal(batch["image"][1], data.read(0, ChanceKey(1))["image"])
    assert next(iter(DataLoader(data)))["image"].dtype == torch.uint16
    moved = Mover(torch.device("cpu"), data.schema)(batch)["image"]
    white = batch["image"].double() / 65535
    expected = (white - torch.tensor([0.2, 0.4, 0.5]).view(3, 1, 1)) / torch.tensor([0.3, 0.5, 1]).view(3, 1, 1)
    torch.testing.assert_close(moved.double(), expected, atol=1e-6, rtol=1e-6)
    if not augment:
        np.testing.assert_array_equal(batch["image"][0].permute(1, 2, 0).numpy(), pixels)


# --- forms


FORMS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "JPEG": ("RGB", "JPEG", {"quality": 95}), "grey JPEG": ("L", "JPEG", {"quality": 95}),
    "CMYK JPEG": ("CMYK", "JPEG", {"quality": 95}), "PNG": ("RGB", "PNG", {}), "RGBA": ("RGBA", "PNG", {}),
    "grey and alpha": ("LA", "PNG", {}), "palette": ("P", "PNG", {}), "WebP": ("RGB", "WEBP", {"lossless": True}),
    "BMP": ("RGB", "BMP", {}), "GIF": ("P", "GIF", {}), "TIFF": ("RGB", "TIFF", {}), "1": ("1", "PNG", {}),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("channels", [1, 3])
def test_each_form_has_the_colours_that_pillow_shows(name: str, channels: int) -> None:
    ramp = np.stack(np.meshgrid(np.arange(0, 240, 6), np.arange(0, 240, 8)), -1)
    image = Image.fromarray(np.dstack([ramp, ramp[..., :1] // 2 + 60]).astype(np.uint8))
    mode, form, options = FORMS[name]
    data = encoded(image.convert(mode), form, **options)
    opened = Image.open(BytesIO(data))
    opened = opened.convert("RGBA") if "A" in opened.mode else opened
    shown = np.asarray(opened.convert("RGB").convert("RGB" if channels == 3 else "L")).reshape(30, 40, channels)
    np.testing.assert_allclose(decode_image(data, name, channels).astype(int), shown, atol=3)


def test_the_first_frame_of_a_moving_image_is_taken() -> None:
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "lime", "blue")]
    for form in ("GIF", "TIFF"):
        data = encoded(frames[0], form, save_all=True, append_images=frames[1:])
        assert decode_image(data, form)[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("data", [
    raw_png(100_000, 100_000, 8, 2, b""), raw_png(10_000, 9_000, 1, 0, b""),
    b"GIF89a" + struct.pack("<HH", 60_000, 60_000) + b"\0\0\0," + struct.pack("<4H", 0, 0, 9, 9) + b"\0\2\0;",
    b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 100_000, -100_000, 1, 24, 0, 0, 0, 0, 0, 0),
])  # fmt: skip
def test_an_image_that_claims_too_much_is_refused_before_it_has_memory(
    data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> Any:
        raise AssertionError("nothing is decoded")

    monkeypatch.setattr(cv2, "imdecode", never)
    for decode in (decode_image, decode_mask):
        with pytest.raises(BadSampleError) as caught:
            decode(data, "x")
        assert "limit" in caught.value.got
        assert "pixels" in caught.value.got


@pytest.mark.parametrize("ending", [".jpg", ".png", ".webp", ".bmp", ".gif", ".tiff"])
def test_a_misnamed_image_is_read_by_its_bytes(tmp_path: Path, ending: str) -> None:
    pixels = np.random.default_rng(1).integers(0, 255, (5, 6, 3), dtype=np.uint8)
    for name, form in (("a", "PNG"), ("b", "BMP"), ("c", "TIFF")):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"x{ending}").write_bytes(encoded(Image.fromarray(pixels), form))
    data = ImageFolder(tmp_path)
    for index in range(3):
        np.testing.assert_array_equal(data[index]["image"].permute(1, 2, 0).numpy(), pixels)


# --- idx


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


DIGITS = np.random.default_rng(2).integers(0, 256, (9, 6, 7), dtype=np.uint8)
IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    (tmp_path / IMAGES).write_bytes(idx(DIGITS))
    (tmp_path / f"{IMAGES}.gz").write_bytes(gzip.compress(idx(DIGITS)))
    (tmp_path / LABELS).write_bytes(idx(np.arange(9, dtype=np.uint8) % 4))
    (tmp_path / f"{LABELS}.gz").write_bytes(gzip.compress(idx(np.arange(9, dtype=np.uint8) % 4)))
    return tmp_path


OPTIONS: list[dict[str, Any]] = [
    {}, {"channels": 3}, {"bits": 16}, {"image_size": 5}, {"augment": ["random_shift", "vertical_flip"]},
    {"channels": 3, "bits": 16, "augment": ["random_resized_crop"], "image_size": 4},
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", [IMAGES, f"{IMAGES}.gz"])
def test_idx_images_are_those_of_files_read_one_by_one(digits: Path, name: str, options: dict[str, Any]) -> None:
    data, key = IdxImages(digits / name, **options), ChanceKey(1, 2)
    files = pa.table({"image": [encoded(Image.fromarray(image), "PNG") for image in DIGITS],
                      "label": [str(number % 4) for number in range(9)]})  # fmt: skip
    table = ImageTable(files, **{"channels": 1, **options})
    assert data.schema == table.schema
    indices = np.array([8, 0, 3, 3])
    batch, expected = data.read_batch(indices, key), table.read_batch(indices, key)
    assert batch is not None
    assert expected is not None
    for key_name in ("image", "label"):
        assert batch[key_name].dtype == expected[key_name].dtype
        assert torch.equal(batch[key_name], expected[key_name])
        for row, index in enumerate(indices.tolist()):
            assert torch.equal(torch.as_tensor(data.read(index, key)[key_name]), batch[key_name][row])
    theirs, ours = next(iter(DataLoader(data, batch_size=9))), next(iter(Loader(data, 9, workers=0)))
    assert all(torch.equal(theirs[key_name], ours[key_name]) for key_name in ("image", "label"))


def test_what_is_done_to_an_idx_sample_changes_no_data(digits: Path) -> None:
    data = IdxImages(digits / IMAGES)
    data[2]["image"].zero_()
    batch = data.read_batch(np.array([2]), ChanceKey())
    assert batch is not None
    batch["image"].zero_()
    np.testing.assert_array_equal(data[2]["image"][0].numpy(), DIGITS[2])


def test_idx_takes_after_the_training_data(digits: Path) -> None:
    train = IdxImages(digits / IMAGES, channels=3, mean=[0.1], std=[0.3], image_size=5)
    (digits / LABELS).write_bytes(idx(np.arange(9, dtype=np.uint8) % 3))  # without the last class
    valid = IdxImages(digits / IMAGES, like=train)
    assert valid.schema == train.schema
    assert torch.equal(valid[4]["image"], train[4]["image"])
    (digits / LABELS).write_bytes(idx(np.full(9, 7, np.uint8)))
    with pytest.raises(DataError, match="not among"):
        IdxImages(digits / IMAGES, like=train)


def test_idx_without_labels_has_none(digits: Path) -> None:
    (digits / LABELS).unlink()
    assert list(IdxImages(digits / IMAGES).schema) == ["image", "id"]
    named = IdxImages(digits / IMAGES, labels=digits / f"{LABELS}.gz")
    assert named.labels is not None
    assert named.labels.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0]


BROKEN: dict[str, bytes] = {
    "cut": idx(DIGITS)[:-1], "longer": idx(DIGITS) + b"0", "cut head": idx(DIGITS)[:9], "only a mark": idx(DIGITS)[:4],
    "empty": b"", "lying": idx(DIGITS)[:4] + struct.pack(">3I", 1 << 31, 1 << 20, 1 << 10) + bytes(100),
    "labels": idx(DIGITS[:, 0, 0]), "no images": idx(DIGITS[:0]), "no height": idx(DIGITS[:, :0]),
    "floats": bytes([0, 0, 13, 3]) + idx(DIGITS)[4:], "text": b"P5 6 7 255\n",
}  # fmt: skip


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_idx_file_is_said(tmp_path: Path, case: str, zipped: bool) -> None:
    path = tmp_path / ("t-images-idx3-ubyte" + (".gz" if zipped else ""))
    path.write_bytes(gzip.compress(BROKEN[case]) if zipped else BROKEN[case])
    with pytest.raises(DataError) as caught:
        IdxImages(path)
    assert str(path) in caught.value.where
    assert caught.value.got


def test_a_damaged_gz_is_said_wherever_it_is_damaged(tmp_path: Path) -> None:
    whole = gzip.compress(idx(DIGITS))
    path = tmp_path / "t-images-idx3-ubyte.gz"
    for place in range(10, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        with pytest.raises(DataError, match="idx"):
            IdxImages(path)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="idx"):
        IdxImages(path)


def test_labels_of_another_count_are_refused(digits: Path) -> None:
    (digits / LABELS).write_bytes(idx(np.arange(8, dtype=np.uint8)))
    with pytest.raises(DataError, match="not as many"):
        IdxImages(digits / IMAGES)


# --- tables


def test_a_table_of_several_labels_an_image(tmp_path: Path) -> None:
    files = [encoded(Image.fromarray(image), "PNG") for image in DIGITS[:4]]
    lists = ImageTable(pa.table({"image": files, "label": [["b", "a"], [], ["c"], ["a"]]}))
    texts = ImageTable(pa.table({"image": files, "label": ["b|a", "", "c", "a"]}), separator="|")
    expected = torch.tensor([[1, 1, 0], [0, 0, 0], [0, 0, 1], [1, 0, 0]]).float()
    for data in (lists, texts):
        assert data.schema["label"].kind == "multilabel"
        assert data.labels is None
        for loader in (DataLoader(data, batch_size=4), Loader(data, 4, workers=0)):
            assert torch.equal(next(iter(loader))["label"], expected)
    assert lists.schema == texts.schema
    valid = ImageTable(pa.table({"image": files[:1], "label": ["c"]}), separator="|", like=lists)
    assert valid[0]["label"].tolist() == [0, 0, 1]


def test_ids_and_other_columns_of_a_table() -> None:
    files = [encoded(Image.fromarray(image), "PNG") for image in DIGITS[:3]]
    frame = pa.table({"image": files, "label": ["a", "b", "a"], "name": ["x", "y", "z"], "patient": [7, 8, 7]})
    data = ImageTable(frame, id="name")
    assert [data[index]["id"] for index in range(3)] == ["x", "y", "z"]
    assert data.column("patient").tolist() == [7, 8, 7]
    with pytest.raises(DataError, match="no column 'image'"):
        data.column("image")
    with pytest.raises(DataError, match="does not name one sample"):
        ImageTable(frame, id="patient")


def test_a_number_to_predict_learns_its_scale_from_training_alone() -> None:
    from torchkeep.data.splits import split

    files = [encoded(Image.fromarray(image), "PNG") for image in DIGITS] * 4
    values = [float(number**2) for number in range(36)]
    train, valid = split(ImageTable(pa.table({"image": files, "label": values})), 0.25, 0)
    seen = np.array(values)[train.indices]
    for part in (train, valid):
        assert part.schema["target"].mean == pytest.approx(seen.mean())
        assert part.schema["target"].std == pytest.approx(seen.std())
