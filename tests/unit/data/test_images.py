"""Folders and tables of images: what is read, in which order, under which chance."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from torchkeep.chance import ChanceKey
from torchkeep.contracts import Schema
from torchkeep.data.dataset import Part
from torchkeep.data.images import ImageFolder, ImageTable
from torchkeep.data.loader import Loader
from torchkeep.errors import BadSampleError, DataError

REAL = Path(__file__).parents[3] / "../shared/data/hymenoptera"
ALL = ("random_resized_crop", "horizontal_flip", "random_shift", "random_rotation")


def pixels(seed: int, height: int = 20, width: int = 24) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)


def png(seed: int, height: int = 20, width: int = 24) -> bytes:
    held = BytesIO()
    Image.fromarray(pixels(seed, height, width)).save(held, "PNG")
    return held.getvalue()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for number in range(12):
        folder = tmp_path / "images" / ("ants" if number % 3 else "bees")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:02}.png").write_bytes(png(number))
    return tmp_path / "images"


Make = Callable[..., ImageTable]


@pytest.fixture
def table(tmp_path: Path) -> Make:
    def write(images: list, labels: list, name: str = "t.parquet", metadata: dict | None = None) -> ImageTable:
        made = pa.table({"image": images, "label": labels}).replace_schema_metadata(metadata)
        pq.write_table(made, tmp_path / name)
        return ImageTable(tmp_path / name)

    return write


def same(one: dict, two: dict) -> None:
    torch.testing.assert_close(one["image"], two["image"], rtol=0, atol=0)
    assert int(one["label"]) == int(two["label"])


@pytest.mark.parametrize("size", [None, 16, 48])
@pytest.mark.parametrize("augment", [(), ALL, ("horizontal_flip", "random_resized_crop")])
def test_a_sample_in_a_batch_is_the_sample_read_alone(root: Path, size: int | None, augment: tuple) -> None:
    data, key = ImageFolder(root, image_size=size, augment=augment), ChanceKey(1, 2)
    indices = np.array([7, 0, 3, 11, 3])
    batch = data.read_batch(indices, key)
    assert batch is not None
    assert batch["image"].dtype == torch.uint8
    assert batch["image"].is_contiguous(memory_format=torch.channels_last)
    for row, index in enumerate(indices.tolist()):
        same({name: values[row] for name, values in batch.items()}, data.read(index, key))


def test_another_epoch_draws_otherwise_and_validation_draws_nothing(root: Path) -> None:
    data = ImageFolder(root, image_size=16, augment=ALL)
    indices = np.arange(12)
    first, second = (data.read_batch(indices, ChanceKey(0, epoch))["image"] for epoch in (0, 1))
    assert not torch.equal(first, second)
    plain = data.without_augmentation()
    first, second = (plain.read_batch(indices, ChanceKey(0, epoch))["image"] for epoch in (0, 1))
    assert torch.equal(first, second)
    assert data.augmentations.entries == ALL


def test_names_are_sorted_and_other_files_passed_over(root: Path) -> None:
    (root / "ants" / ".hidden.png").write_bytes(b"")
    (root / "ants" / "notes.txt").write_bytes(b"")
    (root / ".cache").mkdir()
    (root / "ants" / "deep").mkdir()
    (root / "ants" / "deep" / "Ünïcode 名.PNG").write_bytes(png(50))
    data = ImageFolder(root)
    ids = [data.id_of(i) for i in range(len(data))]
    assert ids == sorted(ids)
    assert len(data) == 13
    assert "ants/deep/Ünïcode 名.PNG" in ids
    sample = data[ids.index("ants/deep/Ünïcode 名.PNG")]
    np.testing.assert_array_equal(sample["image"].permute(1, 2, 0).numpy(), pixels(50))
    assert data.schema["label"].classes[sample["label"]] == "ants"


def test_the_schema_says_what_is_read_and_survives_json(root: Path) -> None:
    schema = ImageFolder(root, image_size=16, channels=1).schema
    assert schema.targets == ["label"]
    assert schema.inputs == ["image"]
    assert schema["image"].shape == (1, 16, 16)
    assert schema.preprocess is not None
    assert schema.preprocess.mean == (0.5,)
    assert Schema.from_json(orjson.loads(orjson.dumps(schema.to_json()))) == schema
    assert ImageFolder(root).schema["image"].shape == (3, 20, 24)


def test_like_takes_over_classes_and_preprocessing(root: Path, tmp_path: Path) -> None:
    train = ImageFolder(root, image_size=16, channels=1, mean=[0.3], std=[0.2])
    (tmp_path / "val" / "bees").mkdir(parents=True)
    (tmp_path / "val" / "bees" / "a.png").write_bytes(png(1))
    for like in (train, Part(train, np.arange(4))):
        valid = ImageFolder(tmp_path / "val", like=like)
        assert valid.schema == train.schema
        assert valid[0]["label"] == 1
    (tmp_path / "val" / "wasp").mkdir()
    (tmp_path / "val" / "wasp" / "a.png").write_bytes(png(1))
    with pytest.raises(DataError) as caught:
        ImageFolder(tmp_path / "val", like=train)
    assert "wasp" in caught.value.got


def test_an_image_of_another_size_needs_image_size(root: Path) -> None:
    (root / "bees" / "zz.png").write_bytes(png(1, 30, 30))
    with pytest.raises(BadSampleError) as caught:
        ImageFolder(root).read_batch(np.arange(13), ChanceKey())
    assert "image_size" in caught.value.fix
    assert "bees/zz.png" in caught.value.where
    assert ImageFolder(root, image_size=16).read_batch(np.arange(13), ChanceKey()) is not None


@pytest.mark.parametrize("data", [b"", b"17 bytes of rubbi", png(0)[:100]])
def test_a_damaged_image_is_named_with_sample_and_epoch(root: Path, data: bytes) -> None:
    (root / "ants" / "01.png").write_bytes(data)
    folder = ImageFolder(root)
    with pytest.raises(BadSampleError) as caught:
        folder.read_batch(np.arange(12), ChanceKey(0, 2))
    assert caught.value.where == f"{root}: ants/01.png (sample 0, epoch 3)"
    assert folder.read(1, ChanceKey())["image"].shape == (3, 20, 24)


def test_a_file_that_went_away_is_a_bad_sample(root: Path) -> None:
    data = ImageFolder(root)
    (root / "ants" / "01.png").unlink()
    with pytest.raises(BadSampleError):
        data.read(0, ChanceKey())


def test_torch_dataloader_and_our_loader_give_the_same_samples(root: Path) -> None:
    data = ImageFolder(root, image_size=16, augment=ALL)
    theirs = next(iter(DataLoader(data, batch_size=12)))
    ours = next(iter(Loader(data, batch_size=12, workers=2)))
    assert torch.equal(theirs["image"], ours["image"])
    assert torch.equal(theirs["label"], ours["label"])


def test_pickling_changes_nothing(root: Path) -> None:
    data = ImageFolder(root, image_size=16, augment=ALL)
    same(pickle.loads(pickle.dumps(data)).read(3, ChanceKey(1)), data.read(3, ChanceKey(1)))


def test_a_callable_is_applied_sample_by_sample_and_outside_threads(root: Path) -> None:
    def darken(sample: dict, rng: np.random.Generator) -> dict:
        return {**sample, "image": (sample["image"] * rng.random()).to(torch.uint8), "more": 1}

    data = ImageFolder(root, augment=[darken])
    assert data.read_batch(np.arange(2), ChanceKey()) is None
    assert data[0]["more"] == 1
    assert not data.threads
    assert data.without_augmentation().threads


def test_a_callable_may_not_change_the_size(root: Path) -> None:
    with pytest.raises(DataError):
        ImageFolder(root, augment=[lambda sample, rng: {**sample, "image": sample["image"][:, :5]}])[0]


def test_the_fingerprint_follows_the_data(root: Path) -> None:
    before = ImageFolder(root).fingerprint()
    assert ImageFolder(root, augment=ALL).fingerprint() == before
    (root / "ants" / "01.png").write_bytes(png(1) + b"0")
    changed = ImageFolder(root).fingerprint()
    assert changed != before
    (root / "ants" / "01.png").rename(root / "bees" / "01.png")
    assert ImageFolder(root).fingerprint() not in (before, changed)


def test_a_root_without_samples_says_why(tmp_path: Path) -> None:
    cases = {"missing": "missing", "empty": "empty", "loose": "class folders", "kinds": "no images", "splits": "splits"}
    (tmp_path / "empty").mkdir()
    for name in ("loose/a.png", "kinds/a/a.wav", "splits/train/a.png", "splits/val/a.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(png(0))
    for folder, said in cases.items():
        with pytest.raises(DataError, match=said):
            ImageFolder(tmp_path / folder)
    with pytest.raises(DataError) as caught:
        ImageFolder(tmp_path / "losse")
    assert "loose" in caught.value.fix


@pytest.mark.parametrize("form", ["bytes", "struct", "names"])
@pytest.mark.parametrize("labels", [["b", "a", "b"], [10, 9, 10]])
def test_a_table_holds_images_in_three_forms(table: Make, tmp_path: Path, form: str, labels: list) -> None:
    data = [png(number) for number in range(3)]
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(data[number])
    names = [f"{number}.png" for number in range(3)]
    held = {
        "bytes": data,
        "struct": [{"bytes": one, "path": name} for one, name in zip([*data[:2], None], names, strict=True)],
        "names": names,
    }
    made = table(held[form], labels)
    assert made.schema["label"].classes == (("a", "b") if labels[0] == "b" else ("9", "10"))
    assert made.labels.tolist() == [1, 0, 1]
    for number in range(3):
        np.testing.assert_array_equal(made[number]["image"].permute(1, 2, 0).numpy(), pixels(number))
    batch = made.read_batch(np.array([2, 0]), ChanceKey())
    assert batch is not None
    same({name: values[0] for name, values in batch.items()}, made[2])
    assert made.id_of(1) == ("row 1" if form == "bytes" else "1.png")


def test_a_csv_names_its_images(root: Path) -> None:
    (root / "t.csv").write_text("image, label\nants/01.png, ant\nbees/00.png, bee\n")
    data = ImageTable(root / "t.csv")
    assert [data[i]["label"] for i in range(2)] == [0, 1]
    assert data[0]["id"] == "ants/01.png"


def test_class_names_come_from_a_hugging_face_file(table: Make) -> None:
    described = {"info": {"features": {"label": {"names": ["cat", "dog", "eel"], "_type": "ClassLabel"}}}}
    made = table([png(0), png(1)], [2, 0], metadata={"huggingface": orjson.dumps(described).decode()})
    assert made.schema["label"].classes == ("cat", "dog", "eel")
    assert made.labels.tolist() == [2, 0]
    with pytest.raises(DataError, match="no name"):
        table([png(0)], [3], metadata={"huggingface": orjson.dumps(described).decode()})


def test_a_table_that_cannot_be_used_says_why(table: Make, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="label is missing"):
        table([png(0), png(1)], ["a", None])
    with pytest.raises(DataError, match="no labels"):
        table([png(0)], [b"bytes"])
    with pytest.raises(DataError, match="no images"):
        table([1], ["a"])
    table([png(0)], ["a"])
    with pytest.raises(DataError) as caught:
        ImageTable(tmp_path / "t.parquet", label="lable")
    assert "label" in caught.value.fix
    with pytest.raises(BadSampleError):
        table([png(0), None], ["a", "b"]).read(1, ChanceKey())


def test_a_tables_fingerprint_follows_bytes_and_labels(table: Make) -> None:
    made = [table([png(0), png(one)], ["a", label]) for one, label in [(1, "b"), (1, "b"), (2, "b"), (1, "a")]]
    prints = [one.fingerprint() for one in made]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


def test_images_need_no_labels(table: Make, tmp_path: Path) -> None:
    table([png(0), png(1)], ["a", "b"])
    data = ImageTable(tmp_path / "t.parquet", label=None)
    assert list(data.schema) == ["image", "id"]
    assert list(data.read_batch(np.array([1, 0]), ChanceKey()) or {}) == ["image"]


def test_real_photographs_are_read_with_train_and_validation_alike() -> None:
    if not REAL.is_dir():
        pytest.skip("the folder shared/data/hymenoptera beside the repository is missing")
    train = ImageFolder(REAL / "train", image_size=64, augment=ALL)
    valid = ImageFolder(REAL / "val", like=train)
    assert (len(train), len(valid)) == (244, 153)
    assert train.schema["label"].classes == ("ants", "bees")
    batch = train.read_batch(np.arange(0, 244, 31), ChanceKey())
    assert batch is not None
    assert batch["image"].shape == (8, 3, 64, 64)
    for row, index in enumerate(range(0, 244, 31)):
        same({name: values[row] for name, values in batch.items()}, train.read(index, ChanceKey()))
