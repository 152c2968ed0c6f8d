"""Slips that would pass in silence: words that look like numbers, another listing, metrics of another kind."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import datasets
import torchkeep as tk
from torchkeep.chance import ChanceKey
from torchkeep.data import index
from torchkeep.data.frames import Form, as_texts, read_frame
from torchkeep.data.index import Layout, list_folder
from torchkeep.data.sources import DataSettings, open_data
from torchkeep.data.tables import encode_inputs
from torchkeep.data.travel import as_arrays, as_batch
from torchkeep.errors import DataError, SettingsError
from torchkeep.settings import check


def csv(path: Path, *rows: str) -> Path:
    path.write_text("\n".join(rows) + "\n")
    return path


@pytest.mark.parametrize("codes", [("007", "042"), ("1.10", "1.1"), ("True", "False"), ("2024-01-01", "2024-02-01")])
def test_words_stay_words_in_a_file_where_they_look_like_something_else(tmp_path: Path, codes: tuple[str, str]) -> None:
    rows = [f"{code},{kind}" for code, kind in [*zip(codes, "ab", strict=True), ("letters", "a")] * 3]
    train = tk.Table(csv(tmp_path / "train.csv", "code,kind", *rows), "kind")
    wanted = {code: int(train[row]["categories"][0]) for row, code in enumerate([*codes, "letters"])}
    alone = csv(tmp_path / "alone.csv", "code,kind", *(f"{code},a" for code in codes))
    assert [int(tk.Table(alone, "kind", like=train)[i]["categories"][0]) for i in (0, 1)] == [wanted[c] for c in codes]
    asked = read_frame(alone, Form(words=train.encoding.words))
    assert encode_inputs(asked, train.encoding, "asked")["categories"].flatten().tolist() == [wanted[c] for c in codes]
    assert 0 not in wanted.values()


def test_a_file_without_a_single_date_has_them_all_missing(tmp_path: Path) -> None:
    train = tk.Table(csv(tmp_path / "a.csv", "day,y", *(f"2024-01-0{i},{i % 2}" for i in range(1, 9))), "y")
    asked = read_frame(csv(tmp_path / "b.csv", "day,y", ",1", ",0"))
    assert encode_inputs(asked, train.encoding, "b")["numbers"].abs().sum() == 0


def test_a_float_is_the_same_word_whatever_stands_beside_it() -> None:
    words = as_texts(pa.chunked_array([[1e15, 3.0, 0.5, float("inf"), None]])).to_pylist()
    assert words[:2] == as_texts(pa.chunked_array([[1e15, 3.0]])).to_pylist() == ["1000000000000000", "3"]
    assert words[2:] == ["0.5", "inf", None]


def test_a_process_is_not_given_another_listing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(index, "_SAVED_FROM", 1)
    monkeypatch.setattr(index, "_SETTLED_S", -10.0)
    for name in ("ants/1.txt", "bees/1.txt"):
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / name).write_text(name)
    layout = Layout((".txt",), "texts")
    first = list_folder(tmp_path / "root", layout)
    sent = pickle.dumps(first)
    assert pickle.loads(sent).fingerprint() == first.fingerprint()
    (tmp_path / "root/ants/0.txt").write_text("new")
    assert len(list_folder(tmp_path / "root", layout)) == 3
    with pytest.raises(DataError, match="has changed"):
        pickle.loads(sent)


@pytest.mark.parametrize("shape", [(4, 1, 5, 6), (4, 3, 5, 6), (1, 1, 1, 1)])
def test_a_layout_in_memory_survives_the_way_to_another_process(shape: tuple[int, ...]) -> None:
    last = torch.rand(shape).to(memory_format=torch.channels_last)
    if shape[1] == 1:
        last = torch.rand(shape[0], *shape[2:], 1).permute(0, 3, 1, 2)
    for value in (last, last.contiguous(), last.transpose(2, 3)):
        again = as_batch(pickle.loads(pickle.dumps(as_arrays(value))))
        assert torch.equal(again, value)
        assert again.stride() == value.stride()
    view = torch.arange(12).reshape(3, 4)[:, :-1]
    assert torch.equal(as_batch(as_arrays(view)), view)


def test_an_error_keeps_its_words_on_the_way_from_a_plain_dataloader(tmp_path: Path) -> None:
    for name in ("a/0.png", "b/0.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / name)
    (tmp_path / "b/1.png").write_bytes(b"no image")
    with pytest.raises(Exception, match="cannot be decoded") as caught:
        list(DataLoader(tk.ImageFolder(tmp_path, image_size=8), num_workers=1))
    assert "b/1.png" in str(caught.value)


def test_blocks_are_made_of_a_list_or_a_folder_too(tmp_path: Path) -> None:
    texts = ["the cat sat", "on the mat"] * 4
    (tmp_path / "books").mkdir()
    for number, text in enumerate(texts):
        (tmp_path / "books" / f"{number}.txt").write_text(text)
    one = tk.TextBlocks(texts, 8, tokenizer="bytes")
    other = tk.TextBlocks(tmp_path / "books", 8, tokenizer="bytes")
    assert len(one) == len(other) > 2
    assert torch.equal(one[1]["input_ids"], other[1]["input_ids"])
    batch = one.read_batch(np.array([0, 1]), ChanceKey())
    assert all(value.is_contiguous() for value in batch.values())


def test_a_metric_of_classes_is_refused_where_a_number_is_predicted(tmp_path: Path) -> None:
    rows = [f"{i / 7},{i * 1.5}" for i in range(40)]
    recipe: dict[str, Any] = {
        "data": {"train": str(csv(tmp_path / "t.csv", "x,y", *rows)), "target": "y", "valid_fraction": 0.2},
        "model": {"name": "mlp"}, "train": {"metrics": ["accuracy"], "epochs": 1},
    }  # fmt: skip
    with pytest.raises(SettingsError, match="of classes") as caught:
        tk.train(recipe, run_dir=tmp_path / "run", quiet=True)
    assert "r2" in caught.value.expected


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"train": "t.csv", "text": "text", "augment": ["horizontal_flip"]}, "no augmentations"),
        ({"train": "t.csv", "target": "label", "kind": "table", "augment": ["horizontal_flip"]}, "no augmentations"),
        ({"train": "t.csv", "image": "path", "label": "label"}, "no column 'path'"),
        ({"train": "t.csv", "text": "text", "label": "label", "separator": ","}, "in no cell"),
        ({"train": "hf:t.csv", "masks": "masks"}, "no folder of masks"),
    ],
)
def test_a_key_that_means_nothing_here_is_said(tmp_path: Path, data: dict[str, Any], said: str) -> None:
    csv(tmp_path / "t.csv", "text,label", "one,a", "two,b")
    with pytest.raises((DataError, SettingsError), match=said):
        open_data(check(DataSettings, data, "recipe"), tmp_path, 0)


def test_features_and_channels_are_among_the_known(tmp_path: Path) -> None:
    frame = pa.table({"audio": [b""], "label": ["a"]})
    for options in ({"features": "logmel"}, {"channels": 3}):
        with pytest.raises(SettingsError, match="cannot be read so"):
            tk.AudioTable(frame, sample_rate=8000, **options)


def test_a_split_leaves_no_class_to_be_learned_from_nothing() -> None:
    frame = pa.table({"text": [f"text {i}" for i in range(20)], "time": range(20), "label": ["a", "b"] * 9 + ["c"] * 2})
    with pytest.raises(DataError, match="not among those of the training data") as caught:
        tk.split(tk.TextTable(frame, tokenizer="bytes"), 0.1, by="time:time")
    assert "'c'" in caught.value.got


def test_a_local_hub_dataset_is_named_by_its_content_and_its_run_predicts(tmp_path: Path) -> None:
    rows = {"image_name": ["x"] * 24, "text": [f"{'good' if i % 2 else 'bad'} {i}" for i in range(24)],
            "label": [i % 2 for i in range(24)]}  # fmt: skip
    (tmp_path / "files").mkdir()
    prints = []
    for number in range(2):  # the same content at two times and places
        place = tmp_path / "files" / f"{number}"
        place.mkdir()
        datasets.Dataset.from_dict(rows).to_parquet(place / "train.parquet")
        prints.append(tk.HubDataset(place, tokenizer="bytes").fingerprint())
    assert prints[0] == prints[1]
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "saved")
    recipe = {
        "data": {"train": f"hf:{tmp_path / 'saved'}", "tokenizer": "bytes", "valid_fraction": 0.25},
        "model": {"name": "textconv", "args": {"channels": 4, "width": 4}}, "train": {"epochs": 1},
    }  # fmt: skip
    tk.train(recipe, run_dir=tmp_path / "run", quiet=True)
    (tmp_path / "one.txt").write_text("good 7")
    assert next(iter(tk.predict(tmp_path / "run", [tmp_path / "one.txt"]))).label in ("0", "1")
