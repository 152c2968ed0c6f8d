"""Hugging Face datasets, made here and read without a network: as any other table, and as streams."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import torchkeep as tk
from torchkeep.chance import ChanceKey
from torchkeep.data.dataset import whole
from torchkeep.data.hub import HubDataset, HubStream
from torchkeep.data.sources import DataSettings, open_data
from torchkeep.data.text import TextBlocks
from torchkeep.errors import DataError
from torchkeep.settings import check

datasets = pytest.importorskip("datasets")

SIZE = 70  # more than one table of a stream
PIXELS = np.random.default_rng(0).integers(0, 255, (SIZE, 6, 7, 3), dtype=np.uint8)


def png(number: int) -> bytes:
    held = BytesIO()
    Image.fromarray(PIXELS[number]).save(held, "PNG")
    return held.getvalue()


def wav(number: int) -> bytes:
    soundfile = pytest.importorskip("soundfile")
    held = BytesIO()
    soundfile.write(held, np.random.default_rng(number).uniform(-0.5, 0.5, 800), 8000, format="WAV")
    return held.getvalue()


def made(kind: str, size: int = SIZE, first: int = 0) -> Any:
    numbers = [(first + number) % SIZE for number in range(size)]
    classes = datasets.ClassLabel(names=["zebra", "ant", "bee"])
    labels = [number % 3 for number in numbers]
    if kind == "image":
        features = {"image": datasets.Image(), "label": classes}
        rows = {"image": [{"bytes": png(number), "path": f"{number}.png"} for number in numbers], "label": labels}
    elif kind == "audio":
        stored = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
        features = {"audio": stored, "label": classes}
        rows = {"audio": [{"bytes": wav(number), "path": None} for number in numbers], "label": labels}
    elif kind == "text":
        features = {"text": datasets.Value("string"), "label": classes}
        rows = {"text": [f"sample {number} " * (1 + number % 4) for number in numbers], "label": labels}
    else:
        features = {"x": datasets.Value("float32"), "n": datasets.Value("int64"), "target": datasets.Value("float64")}
        rows = {"x": [number / 3 for number in numbers], "n": numbers, "target": [number**2 / 7 for number in numbers]}
    data = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    return data.cast_column("audio", datasets.Audio()) if kind == "audio" else data


def saved(path: Path, kind: str) -> Path:
    splits = {"train": made(kind), "validation": made(kind, 9, 30), "test": made(kind, 5, 60)}
    datasets.DatasetDict(splits).save_to_disk(path)
    return path


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("hub")
    return {kind: saved(root / kind, kind) for kind in ("image", "audio", "text", "table")}


OPTIONS: dict[str, dict[str, Any]] = {
    "image": {"augment": ["horizontal_flip"]}, "audio": {"num_mels": 16}, "text": {"tokenizer": "bytes"}, "table": {},
}  # fmt: skip
KINDS = list(OPTIONS)


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_dataset_is_read_as_what_it_holds(folders: dict[str, Path], kind: str) -> None:
    data = HubDataset(f"hf:{folders[kind]}", **OPTIONS[kind])
    assert isinstance(data.dataset, {"image": tk.ImageTable, "audio": tk.AudioTable, "text": tk.TextTable,
                                     "table": tk.Table}[kind])  # fmt: skip
    assert len(data) == SIZE
    if kind != "table":
        assert data.schema["label"].classes == ("zebra", "ant", "bee")
        assert data.labels is not None
        assert data.labels.tolist() == [number % 3 for number in range(SIZE)]
    else:
        assert data.schema["target"].mean == pytest.approx(np.mean([number**2 / 7 for number in range(SIZE)]))
    if kind == "image":
        plain = data.without_augmentation()
        np.testing.assert_array_equal(plain[3]["image"].permute(1, 2, 0).numpy(), PIXELS[3])
        assert data.id_of(3) == "3.png"
    valid = HubDataset(folders[kind], "validation", like=data)  # the name may do without "hf:"
    assert len(valid) == 9
    assert valid.schema == data.schema
    assert HubDataset(f"hf:{folders[kind]}@test", like=data).fingerprint() != valid.fingerprint()
    batch = next(iter(tk.Loader(data, 4, shuffle=True, workers=0)))
    again = next(iter(tk.Loader(HubDataset(folders[kind], **OPTIONS[kind]), 4, shuffle=True, workers=0)))
    assert all(torch.equal(batch[name], again[name]) for name in batch)
    theirs = list(DataLoader(data, batch_size=32, collate_fn=data.collate))  # torch's own loader
    for one, other in zip(theirs, tk.Loader(data, 32, workers=0), strict=True):
        assert {*one, "index"} == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_rows_that_were_chosen_and_shuffled_are_those_rows(tmp_path: Path) -> None:
    chosen = made("image").shuffle(seed=1).select(range(5, 25))
    assert chosen._indices is not None
    chosen.save_to_disk(tmp_path / "chosen")
    data = HubDataset(f"hf:{tmp_path / 'chosen'}")
    assert len(data) == 20
    for row in range(20):
        np.testing.assert_array_equal(data[row]["image"].permute(1, 2, 0).numpy(), np.asarray(chosen[row]["image"]))
        assert data[row]["label"] == chosen[row]["label"]
    for make in (HubDataset, HubStream):  # saved without splits
        with pytest.raises(DataError, match="no such split") as caught:
            make(f"hf:{tmp_path / 'chosen'}@test")
        assert "'test'" in caught.value.got


@pytest.mark.parametrize("name", ["a@b", "a:b", "a b@c:d"])
def test_a_folder_may_have_any_sign_in_its_name(tmp_path: Path, name: str) -> None:
    saved(tmp_path / name, "text")
    assert len(HubDataset(f"hf:{tmp_path / name}@test", tokenizer="bytes")) == 5
    assert len(HubDataset(f"hf:{tmp_path / name}", tokenizer="bytes")) == SIZE


def test_a_folder_of_parquet_files_is_a_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for split, count in (("train", SIZE), ("test", 5)):
        made("image", count).to_parquet(tmp_path / f"data/{split}-00000-of-00001.parquet")
    data = HubDataset(f"hf:{tmp_path / 'data'}")
    assert len(data) == SIZE
    np.testing.assert_array_equal(data[69]["image"].permute(1, 2, 0).numpy(), PIXELS[69])
    assert len(HubDataset(f"hf:{tmp_path / 'data'}@test", like=data)) == 5


def test_columns_and_kinds_can_be_named(folders: dict[str, Path], tmp_path: Path) -> None:
    frame = made("text").rename_columns({"text": "review", "label": "stars"})
    frame = frame.add_column("title", [f"t{number}" for number in range(SIZE)])
    frame.save_to_disk(tmp_path / "other")
    data = HubDataset(tmp_path / "other", kind="text", column="review", label="stars", tokenizer="bytes")
    wanted = HubDataset(folders["text"], tokenizer="bytes")
    for row in (0, 7):
        assert torch.equal(data[row]["input_ids"], wanted[row]["input_ids"])
    by_column = HubDataset(tmp_path / "other", column="title", label="stars", tokenizer="bytes")
    assert len(by_column[0]["input_ids"]) < len(data[0]["input_ids"])
    as_table = HubDataset(tmp_path / "other", kind="table", label="stars")
    assert isinstance(as_table.dataset, tk.Table)


def test_what_is_not_there_is_said(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such split") as caught:
        HubDataset(f"hf:{folders['image']}@trian")
    assert (caught.value.got, caught.value.expected) == ("'trian'", "one of train, validation, test")
    assert "'train'" in caught.value.fix
    with pytest.raises(DataError, match="no column 'lable'") as caught:
        HubDataset(folders["image"], label="lable")
    assert "label" in caught.value.fix
    assert caught.value.where == f"{folders['image']} (train)"
    (tmp_path / "empty").mkdir()
    for name in (f"hf:{tmp_path / 'empty'}", "hf:@", "hf::"):
        with pytest.raises(DataError) as caught:
            HubDataset(name)
        assert caught.value.where == name
        assert caught.value.got
        assert caught.value.expected
    with pytest.raises(DataError, match="training data are not"):
        HubDataset(folders["text"], like=HubDataset(folders["image"]), tokenizer="bytes")


# --- streams


@pytest.mark.parametrize("kind", ["image", "audio", "text"])
def test_a_stream_gives_the_samples_of_the_dataset(folders: dict[str, Path], kind: str) -> None:
    options = {name: value for name, value in OPTIONS[kind].items() if name != "augment"}
    stream, data = HubStream(folders[kind], length=SIZE, **options), HubDataset(folders[kind], **options)
    assert stream.schema == data.schema
    samples = list(stream.samples(ChanceKey()))
    for row, sample in enumerate(samples):
        for name, value in sample.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(data[row][name]))
    ours, theirs = (list(tk.Loader(part, 32, workers=0)) for part in (stream, data))
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_stream_draws_by_its_place_and_goes_on_anywhere(folders: dict[str, Path]) -> None:
    def fresh() -> tk.Loader:
        stream = HubStream(folders["image"], length=SIZE, augment=["horizontal_flip"], buffer=16)
        return tk.Loader(stream, 8, shuffle=True, seed=4)

    stream = HubStream(folders["image"], length=SIZE, augment=["horizontal_flip"])
    epochs = [torch.stack([s["image"] for s in stream.samples(ChanceKey(0, epoch))]) for epoch in (0, 1)]
    moved = (epochs[0] != epochs[1]).flatten(1).any(1)
    assert moved[:64].any()
    assert moved[64:].any()
    loader = fresh()
    first, second = list(loader), list(loader)
    assert sorted(torch.cat([batch["label"] for batch in first]).tolist()) == sorted(n % 3 for n in range(SIZE))
    for number in (0, 3, 8):
        resumed = fresh()
        resumed.load_state_dict({**resumed.state_dict(), "epoch": 1, "delivered": number})
        for one, other in zip(resumed, second[number:], strict=True):
            assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_stream_without_a_length_or_with_something_to_learn_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(DataError, match="not known"):
        HubStream(folders["image"])
    for kind, options, said in (
        ("text", {}, "nothing can be learned"),
        ("text", {"tokenizer": "words"}, "nothing can be learned"),
        ("table", {}, "nor the mean of its numbers"),
    ):
        with pytest.raises(DataError, match=said) as caught:
            HubStream(folders[kind], length=SIZE, **options)
        assert str(folders[kind]) in caught.value.where


# --- recipes


def recipe(**data: Any) -> DataSettings:
    return check(DataSettings, data, "recipe.toml")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["image", "audio", "text"])
def test_a_recipe_names_splits_of_a_folder(folders: dict[str, Path], kind: str, streaming: bool) -> None:
    base, name = folders[kind].parent, f"hf:{folders[kind].name}"
    options: dict[str, Any] = {"tokenizer": "bytes"} if kind == "text" else {}
    if streaming:
        options |= {"streaming": True, "length": 5}
    for valid in (f"{name}@validation", name):
        settings = recipe(train=f"{name}@train", valid=valid, test=f"{name}@test", **options)
        opened = open_data(settings, base, 0)
        parts = (opened.train, opened.valid, opened.test)
        sizes = [len(part) for part in parts if part is not None]
        assert sizes == ([5, 5, 5] if streaming else [SIZE, 9, 5])
        assert all(part.schema == opened.train.schema for part in parts if part is not None)
        assert isinstance(opened.train, HubStream if streaming else HubDataset)
    with pytest.raises(DataError, match="no such split"):
        open_data(recipe(train=f"{name}@trian", **options), base, 0)


def test_a_saved_folder_gives_each_role_its_split_and_blocks_for_a_language_model(folders: dict[str, Path]) -> None:
    base, name = folders["text"].parent, folders["text"].name
    opened = open_data(recipe(train=name, valid=name, test=name, tokenizer="bytes"), base, 0)
    assert [len(part) for part in (opened.train, opened.valid, opened.test) if part is not None] == [SIZE, 9, 5]
    blocks = open_data(recipe(train=name, valid=name, tokenizer="bytes", block_size=8), base, 0)
    assert isinstance(blocks.train, TextBlocks)
    assert isinstance(blocks.valid, TextBlocks)
    assert blocks.train[0]["input_ids"][1:].tolist() == blocks.train[0]["target"][:-1].tolist()


@pytest.mark.parametrize("kind", ["table", "text"])
def test_a_fraction_of_a_hub_dataset_is_not_learned_from(folders: dict[str, Path], kind: str) -> None:
    data = HubDataset(folders[kind], **({"tokenizer": "words"} if kind == "text" else {}))
    train, valid = tk.split(data, 0.2, 0, "random")
    if kind == "table":
        seen = [number**2 / 7 for number in train.indices]
        assert valid.schema["target"].mean == pytest.approx(np.mean(seen))
        assert whole(train).encoding.features[1].mean == pytest.approx(np.mean(train.indices))
    else:
        known = set(whole(train).tokenizer.words)
        repeated = {f"{number}" for number in train.indices if number % 4}  # a word is learned from its second time on
        assert known == {"sample", *repeated}
    assert sorted([*train.indices, *valid.indices]) == list(range(SIZE))
