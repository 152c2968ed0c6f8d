"""What the names of a recipe's [data] section mean."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from torchkeep.chance import ChanceKey
from torchkeep.data.dataset import whole
from torchkeep.data.images import ImageFolder, ImageTable
from torchkeep.data.sources import DataSettings, open_data
from torchkeep.data.tables import Table
from torchkeep.errors import DataError, ModelError, SettingsError
from torchkeep.settings import check
from torchkeep.usercode import CodeReference


def settings(**data: Any) -> DataSettings:
    return check(DataSettings, data, "recipe.toml")


def png(seed: int) -> bytes:
    held = BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(held, "PNG")
    return held.getvalue()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    for part in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / part / name).mkdir(parents=True)
            for number in range(5):
                (tmp_path / part / name / f"{number}.png").write_bytes(png(number))
    pq.write_table(pa.table({"image": [png(0), png(1)], "label": ["x", "y"]}), tmp_path / "images.parquet")
    (tmp_path / "numbers.csv").write_text("x,label\n" + "".join(f"{i},{'np'[i % 2]}\n" for i in range(20)))
    (tmp_path / "names.csv").write_text("file,label\ntrain/a/0.png,a\ntrain/b/0.png,b\n")
    (tmp_path / "data.py").write_text("")
    return tmp_path


def test_folders_are_images_and_only_training_is_augmented(base: Path) -> None:
    opened = open_data(settings(train="train", valid="val", test="val", augment=["random_shift"]), base, 0)
    assert isinstance(opened.train, ImageFolder)
    assert opened.train.augmentations.entries == ("random_shift",)
    for other in (opened.valid, opened.test):
        assert isinstance(other, ImageFolder)
        assert other.augmentations.entries == ()
        assert other.schema == opened.train.schema


def test_a_fraction_is_set_apart_without_augmentation(base: Path) -> None:
    opened = open_data(settings(train="train", valid_fraction=0.2, test="val", augment=["random_shift"]), base, 0)
    assert opened.valid is not None
    assert opened.test is not None
    assert (len(opened.train), len(opened.valid), len(opened.test)) == (8, 2, 10)
    one, two = (opened.valid.read(0, ChanceKey(0, epoch))["image"] for epoch in (0, 1))
    assert (one == two).all()


def test_tables_hold_images_or_numbers(base: Path) -> None:
    assert isinstance(open_data(settings(train="images.parquet"), base, 0).train, ImageTable)
    assert isinstance(open_data(settings(train="names.csv", image="file"), base, 0).train, ImageTable)
    opened = open_data(settings(train="numbers.csv", target="label", valid_fraction=0.2, test="numbers.csv"), base, 0)
    tables = [whole(part) for part in (opened.train, opened.valid, opened.test)]
    assert all(isinstance(table, Table) for table in tables)
    assert tables[0].encoding == tables[1].encoding == tables[2].encoding
    assert (len(opened.train), len(opened.valid), len(opened.test)) == (16, 4, 20)
    with pytest.raises(DataError) as caught:
        open_data(settings(train="numbers.csv"), base, 0)
    assert "columns x, label" in caught.value.got


def test_code_is_run_by_the_caller_and_told_the_split(base: Path) -> None:
    asked: list[tuple[str, str]] = []

    def load(reference: CodeReference) -> Any:
        def plain() -> list:
            return [(np.zeros(2, np.float32), 0)] * 4

        def with_split(split: str) -> list:
            asked.append((reference.function, split))
            return plain()

        return with_split if reference.function == "parts" else plain

    opened = open_data(settings(train="data.py:parts", valid="data.py:parts", test="data.py:whole"), base, 0, load)
    assert asked == [("parts", "train"), ("parts", "valid")]
    assert opened.test is not None
    assert len(opened.train) == len(opened.test) == 4
    with pytest.raises(DataError, match="code"):
        open_data(settings(train="data.py:parts"), base, 0)
    with pytest.raises(ModelError, match="missing"):
        open_data(settings(train="other.py:parts"), base, 0, load)


@pytest.mark.parametrize("source", ["hf:mnist", "data.py", "trian", "imags.parquet"])
def test_a_name_that_means_nothing_is_answered(base: Path, source: str) -> None:
    with pytest.raises(DataError) as caught:
        open_data(settings(train=source), base, 0)
    assert caught.value.where
    assert caught.value.got
    assert caught.value.expected
    near = {"trian": "train", "imags.parquet": "images.parquet"}.get(source, "")
    assert near in caught.value.fix


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"train": "x", "valid": "y", "valid_fraction": 0.1},
        {"train": "x", "valid_fraction": 1.0},
        {"train": "x", "batch_size": 0},
        {"train": "x", "channels": 2},
        {"train": "x", "mean": [0.1, 0.2]},
        {"train": "x", "std": [0.0]},
        {"train": "x", "workers": -1},
        {"train": "x", "workers": "many"},
        {"train": "x", "augment": ["horizontal_flop"]},
        {"train": "x", "trian": "y"},
    ],
)
def test_settings_are_checked_before_anything_opens(data: dict[str, Any]) -> None:
    with pytest.raises(SettingsError):
        settings(**data)


def test_every_setting_is_described() -> None:
    for name, field in DataSettings.model_fields.items():
        assert field.description, name
