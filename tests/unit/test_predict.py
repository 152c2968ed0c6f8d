"""Predictions: a row for each input in order, whatever its kind; what cannot be read has a row that says why."""

from __future__ import annotations

import math
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
from PIL import Image

import torchkeep as tk
from torchkeep.contracts import Field
from torchkeep.errors import DataError, ModelError
from torchkeep.share.predict import said_of


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path


def trained(data: dict[str, Any], model: dict[str, Any], **train: Any) -> tk.Run:
    recipe = {"data": {"workers": 0, "batch_size": 4, **data}, "model": model, "monitor": {"views": []},
              "train": {"epochs": 1, "threads": 1, **train}}  # fmt: skip
    return tk.train(recipe, run_dir="run", quiet=True)


def rows(run: tk.Run, *paths: str) -> list[dict[str, Any]]:
    return [said.row() for said in run.predict(list(map(Path, paths)))]


def same(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> bool:
    """The same answers to rounding, whatever the inputs are called."""
    pairs = zip(first, second, strict=True)
    keys = ("label", "probability", "value")
    return all(a.get(key) == (pytest.approx(b[key], rel=1e-4) if key != "label" and key in b else b.get(key))
               for a, b in pairs for key in keys)  # fmt: skip


def png(seed: int) -> bytes:
    held = BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(held, "PNG")
    return held.getvalue()


def wav(seed: int, seconds: float = 0.1) -> bytes:
    held = BytesIO()
    wave = np.random.default_rng(seed).normal(0, 0.1, round(8000 * seconds))
    soundfile.write(held, wave, 8000, format="WAV")
    return held.getvalue()


def folders(place: Path, make: Any, ending: str) -> None:
    for number in range(8):
        path = place / "train" / "ab"[number % 2] / f"{number}{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(make(number))


def test_images_in_files_and_folders(place: Path) -> None:
    folders(place, png, ".png")
    (place / "train/a/.hidden.png").write_bytes(b"what another system left")
    run = trained({"train": "train", "image_size": 8}, {"name": "convnet", "args": {"widths": [4]}})
    whole = rows(run, "train")
    assert [row["input"] for row in whole] == [f"train/{'ab'[i // 4]}/{2 * (i % 4) + i // 4}.png" for i in range(8)]
    assert all(row["label"] in "ab" and 0.5 <= row["probability"] <= 1 for row in whole)
    (place / "bad.png").write_bytes(png(0)[:50])
    (place / "empty.png").write_bytes(b"")
    mixed = rows(run, "bad.png", "train/b/1.png", "empty.png", "train/a/0.png")
    assert ["error" in row for row in mixed] == [True, False, True, False]
    assert "cannot be decoded" in mixed[0]["error"]
    assert "0 bytes" in mixed[2]["error"]
    assert same([mixed[1], mixed[3]], [whole[4], whole[0]])
    with pytest.raises(DataError, match="there is no such input"):
        rows(run, "train/a/0.png", "lost.png")
    pixels = torch.from_numpy(np.stack([np.asarray(Image.open(place / "train/a/0.png"))] * 2)).permute(0, 3, 1, 2)
    assert same([said.row() for said in run.predict(pixels)], [whole[0], whole[0]])


def test_images_in_tables(place: Path) -> None:
    folders(place, png, ".png")
    names = [f"train/{'ab'[i % 2]}/{i}.png" for i in range(8)]
    (place / "rows.data").write_text("image,label\n" + "".join(f"{n},{n[6]}\n" for n in names))
    data = {"train": "rows.data", "format": "csv", "image_size": 8}
    run = trained(data, {"name": "convnet", "args": {"widths": [4]}})
    by_file = rows(run, *names)  # an image is an image, although other endings are tables here
    assert same(rows(run, "rows.data"), by_file)
    cells = pa.table({"image": pa.array([png(0), None, b"no image"], pa.binary())})
    pq.write_table(cells, place / "new.parquet")
    said = rows(run, "new.parquet")
    assert same(said[:1], by_file[:1])
    assert said[0]["input"] == "new.parquet, row 0"
    assert "no images" in said[1]["error"]
    assert "cannot be decoded" in said[2]["error"]


def test_recordings(place: Path) -> None:
    folders(place, lambda number: wav(number, 0.1 + number / 50), ".wav")
    run = trained({"train": "train"}, {"name": "audioconv", "args": {"widths": [4]}})
    whole = rows(run, "train")
    assert len(whole) == 8
    assert same([rows(run, row["input"])[0] for row in whole], whole)  # alone as beside longer ones
    stereo = BytesIO()
    soundfile.write(stereo, np.zeros((800, 2)), 8000, format="WAV")
    (place / "stereo.wav").write_bytes(stereo.getvalue())
    (place / "cut.wav").write_bytes(wav(0)[:-1])
    mixed = rows(run, "stereo.wav", "train/a/0.wav", "cut.wav")
    assert "other channels than stated: 2 channels" in mixed[0]["error"]
    assert same(mixed[1:2], whole[:1])
    assert "1,599 of 1,600 bytes" in mixed[2]["error"]
    pq.write_table(pa.table({"audio": [wav(0), b""]}), place / "new.parquet")
    table = rows(run, "new.parquet")
    assert same(table[:1], whole[:1])
    assert "cannot be decoded: 0 bytes" in table[1]["error"]
    (place / "none").mkdir()
    with pytest.raises(DataError, match="nothing in this folder"):
        rows(run, "none")


def test_texts(place: Path) -> None:
    texts = [f"{'good' if i % 2 else 'bad'} film {i}" for i in range(12)]
    (place / "texts.csv").write_text("text,label\n" + "".join(f"{t},{'np'[i % 2]}\n" for i, t in enumerate(texts)))
    run = trained({"train": "texts.csv"}, {"name": "textconv", "args": {"width": 4, "channels": 4}})
    table = rows(run, "texts.csv")
    assert [row["input"] for row in table] == [f"texts.csv, row {i}" for i in range(12)]
    for number, text in enumerate(texts[:3]):
        (place / f"{number}.txt").write_text(text)
    (place / "bytes.txt").write_bytes(b"\xff\xfe")
    mixed = rows(run, "0.txt", "bytes.txt", "1.txt", "texts.csv", "2.txt")
    assert len(mixed) == 16
    assert "not UTF-8: byte 0xff at place 0" in mixed[1]["error"]
    assert same([mixed[0], mixed[2], mixed[15]], table[:3])
    assert same(mixed[3:15], table)
    (place / "other.csv").write_text("words\nhello\n")
    with pytest.raises(DataError, match="does not take this table") as caught:
        rows(run, "other.csv")
    assert "'text'" in caught.value.expected


def test_texts_of_the_hub_keep_their_columns_name(place: Path) -> None:
    import datasets

    datasets.disable_progress_bars()
    columns = {"sentence": [f"film {i % 3}" for i in range(12)], "label": [i % 2 for i in range(12)]}
    datasets.DatasetDict({"train": datasets.Dataset.from_dict(columns)}).save_to_disk("saved")
    run = trained({"train": "hf:saved"}, {"name": "textconv", "args": {"width": 4, "channels": 4}})
    pq.write_table(pa.table({"sentence": columns["sentence"]}), place / "new.parquet")
    assert len(rows(run, "new.parquet")) == 12


def test_tables_in_the_targets_own_units(place: Path) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=200)
    frame = pa.table({"x": x, "c": [["u", "v"][i % 2] for i in range(200)], "price": 5000 + 300 * x})
    pq.write_table(frame, place / "rows.parquet")
    data = {"train": "rows.parquet", "target": "price", "batch_size": 20}
    run = trained(data, {"name": "mlp", "args": {"hidden": [16]}}, epochs=10, metrics=["r2"])
    (place / "inputs").mkdir()
    pq.write_table(frame.slice(0, 50).drop_columns(["price"]), place / "inputs" / "new.parquet")
    said = rows(run, "inputs")  # a folder of tables
    values = np.array([row["value"] for row in said])
    assert len(values) == 50
    assert "label" not in said[0]
    assert np.corrcoef(values, x[:50])[0, 1] > 0.9
    assert 4000 < values.mean() < 6000
    assert same(rows(run, "rows.parquet")[:50], said)
    (place / "x.png").write_bytes(png(0))
    with pytest.raises(DataError, match="does not take files") as caught:
        rows(run, "x.png")
    assert ".csv" in caught.value.expected


def test_several_labels_of_each_image(place: Path) -> None:
    labels = [["x"], ["x", "y"], [], ["z"]] * 3
    pq.write_table(pa.table({"image": [png(i) for i in range(12)], "label": labels}), place / "rows.parquet")
    run = trained({"train": "rows.parquet", "image_size": 8}, {"name": "convnet", "args": {"widths": [4]}})
    said = rows(run, "rows.parquet")
    assert len(said) == 12
    for row in said:
        assert set(filter(None, row["label"].split("|"))) <= {"x", "y", "z"}
        assert 0.5 <= row["probability"] <= 1


def test_several_labels_are_those_above_one_half() -> None:
    field = Field("multilabel", (3,), ("x", "y", "z"), is_target=True)
    said = said_of(torch.tensor([[2.0, -1.0, 3.0], [-4.0, -3.0, -5.0]]), field, "binary_cross_entropy")
    assert [row["label"] for row in said] == ["x|z", ""]
    assert said[0]["probability"] == pytest.approx(1 / (1 + np.exp(-1)))  # that of the least sure decision
    assert said_of(torch.tensor([[0.1, -0.1, -9.0]]), field, "binary_cross_entropy")[0]["label"] == "x"
    one = Field("multilabel", (1,), ("x",), is_target=True)
    assert [row["label"] for row in said_of(torch.tensor([[2.0], [-2.0]]), one, "binary_cross_entropy")] == ["x", ""]


def test_outputs_are_labels_numbers_or_refused() -> None:
    two = Field("label", (), ("no", "yes"), is_target=True)
    assert said_of(torch.tensor([[0.0, 0.0], [0.0, 3.0]]), two, "cross_entropy")[1]["label"] == "yes"
    binary = said_of(torch.tensor([[2.0], [-2.0]]), two, "binary_cross_entropy")
    assert [row["label"] for row in binary] == ["yes", "no"]
    assert binary[0]["probability"] == pytest.approx(1 / (1 + np.exp(-2)))
    assert said_of(torch.tensor([[1.5], [2.5]]), None, "mse") == [{"value": 1.5}, {"value": 2.5}]
    assert said_of(torch.tensor([1.5]), None, "mse") == [{"value": 1.5}]
    three = Field("vector", (3,), is_target=True)
    assert said_of(torch.tensor([[1.5, 2.5, -1.0]]), three, "mse") == [{"values": (1.5, 2.5, -1.0)}]
    with pytest.raises(ModelError, match="more than one thing"):
        said_of(torch.zeros(2, 3, 4), three, "mse")
    assert [list(row) for row in said_of(torch.tensor([[math.nan, 1.0], [-math.inf, 1.0]]), two)] == [
        ["error"], ["label", "probability"]]  # fmt: skip
    assert said_of(torch.tensor([math.inf, 1.0]), None, "mse")[0] == {"error": "the model's output is no number"}


def test_a_temperature_makes_probabilities_less_sure_and_top_says_the_likeliest() -> None:
    three = Field("label", (), ("a", "b", "c"), is_target=True)
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    wanted = (logits / 2).softmax(1)[0].tolist()
    [said] = said_of(logits, three, "cross_entropy", 2.0, 5)
    assert said["top"] == (("b", pytest.approx(wanted[1])), ("c", pytest.approx(wanted[2])),
                           ("a", pytest.approx(wanted[0])))  # fmt: skip
    assert (said["label"], said["probability"]) == said["top"][0]
    two = Field("label", (), ("no", "yes"), is_target=True)
    [binary] = said_of(torch.tensor([3.0]), two, "binary_cross_entropy", 3.0)
    assert binary["probability"] == pytest.approx(1 / (1 + math.exp(-1)))
    several = Field("multilabel", (3,), ("a", "b", "c"), is_target=True)
    [said] = said_of(logits * -1 + 2, several, "binary_cross_entropy", 0.5, 2)
    assert (said["label"], [name for name, _ in said["top"]]) == ("a", ["a", "c"])
    assert said["probability"] == pytest.approx(0.5)


NET = """
import torch
def build(in_channels, num_outputs):
    return torch.nn.Conv2d(in_channels, num_outputs, 3, padding=1)
"""


def test_a_segmentation_model_says_that_it_says_more(place: Path) -> None:
    for number in range(4):
        for folder, mode in (("images", "RGB"), ("masks", "L")):
            (place / folder).mkdir(exist_ok=True)
            Image.new(mode, (8, 8), 1 if mode == "L" else "red").save(place / folder / f"{number}.png")
    (place / "net.py").write_text(NET)
    data = {"train": "images", "masks": "masks", "mask_classes": ["no", "yes"], "image_size": 8}
    run = trained(data, {"name": "net.py:build"})
    with pytest.raises(ModelError, match="more than one thing") as caught:
        rows(run, "images/0.png")
    assert "class for each pixel" in caught.value.got
    assert "run.model()" in caught.value.fix


def test_a_language_model_says_that_it_says_more(place: Path) -> None:
    (place / "texts").mkdir()
    (place / "texts/one.txt").write_text("to be or not to be " * 20)
    data = {"train": "texts", "block_size": 8, "tokenizer": "bytes"}
    run = trained(data, {"name": "transformer", "args": {"width": 16, "depth": 1, "heads": 2}})
    for path in ("texts/one.txt", "texts"):
        with pytest.raises(ModelError, match="more than one thing") as caught:
            rows(run, path)
        assert "next token" in caught.value.got


def test_a_model_of_arrays_takes_datasets_and_tensors_only(place: Path) -> None:
    x = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    np.savez(place / "rows.npz", input=x, label=(x[:, 0] > 0).astype(np.int64))
    run = trained({"train": "rows.npz"}, {"name": "mlp", "args": {"hidden": [4]}})
    assert same([s.row() for s in run.predict(x)], [s.row() for s in run.predict(tk.Arrays(input=x))])
    (place / "rows.csv").write_text("input\n1\n")
    for path in ("rows.csv", "rows.npz", "."):
        with pytest.raises(DataError) as caught:
            rows(run, path)
        assert "run.predict(dataset)" in caught.value.expected
