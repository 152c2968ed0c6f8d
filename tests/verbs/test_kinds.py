"""Every kind of data trained end to end by the command line, each on a few samples made here."""

from __future__ import annotations

import gzip
import json
import math
import os
import signal
import struct
from collections.abc import Callable
from datetime import date, timedelta
from io import BytesIO
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from PIL import Image

from torchkeep.training.step import Stepper

RECIPE = """
[data]
batch_size = 8
workers = 0
{data}

[model]
{model}

[train]
epochs = {epochs}
threads = 1
{train}

[monitor]
views = []
"""

TEXTCONV = 'name = "textconv"\nargs = {width = 8, channels = 8}'
TRANSFORMER = 'name = "transformer"\nargs = {width = 16, depth = 1, heads = 2}'
AUDIOCONV = 'name = "audioconv"\nargs = {widths = [4]}'
CONVNET = 'name = "convnet"\nargs = {widths = [4]}'
MLP = 'name = "mlp"\nargs = {hidden = [8]}'

PIXEL_NET = """
from torch import nn


def build(in_channels, num_outputs):
    return nn.Sequential(nn.Conv2d(in_channels, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, num_outputs, 1))
"""

SIZE = 32


def png(pixels: np.ndarray) -> bytes:
    held = BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(held, "PNG")
    return held.getvalue()


def picture(number: int) -> bytes:
    """Noise that is brighter for odd numbers."""
    draws = np.random.default_rng(number)
    return png(draws.integers(0, 128, (10, 10, 3)) + 127 * (number % 2))


def label(number: int) -> str:
    return ("dark", "light")[number % 2]


def write_texts(desk: Any) -> None:
    rows = [
        f"{'a fine' if i % 2 else 'a dull'} film number {i} {'or so ' * (i % 5)},{label(i)},{i // 4},{100 + i % 2}.5"
        for i in range(SIZE)
    ]
    desk.write("texts.csv", "\n".join(["text,label,who,stars", *rows]) + "\n")


def write_books(desk: Any) -> None:
    for number in range(4):
        desk.write(f"books/{number}.txt", "to be or not to be that is the question " * 10)


def write_sounds(desk: Any) -> None:
    for number in range(SIZE):
        path = desk.folder / "sounds" / f"{label(number)}_{'xyzw'[number // 2 % 4]}_{number}.wav"
        path.parent.mkdir(exist_ok=True)
        times = np.arange(800 + 40 * (number % 5)) / 8000
        soundfile.write(path, 0.5 * np.sin(2 * np.pi * (400 + 800 * (number % 2)) * times), 8000)


def write_images(desk: Any, **columns: Any) -> None:
    pq.write_table(pa.table({"image": [picture(i) for i in range(SIZE)], **columns}), desk.folder / "images.parquet")


def write_folders(desk: Any) -> None:
    for number in range(SIZE):
        path = desk.folder / "images" / label(number) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number))


def write_damaged(desk: Any) -> None:
    write_folders(desk)
    for number in (4, 11):
        path = desk.folder / "images" / label(number) / f"{number}.png"
        path.write_bytes(path.read_bytes()[:60])


def write_masks(desk: Any) -> None:
    desk.write("net.py", PIXEL_NET)
    for number in range(SIZE):
        mask = np.zeros((10, 10), np.uint8)
        mask[: number % 10] = 1
        mask[9] = 255
        for folder, pixels in (("images", np.repeat(mask[..., None] * 100, 3, 2)), ("masks", mask)):
            desk.write_image(f"{folder}/{number}.png", pixels)


def write_numbers(desk: Any) -> None:
    start = date(2024, 1, 1)
    rows = [f"{i / 7},{start + timedelta(3 * i)},{label(i)},{20 + 3 * i}.5,{i // 4}" for i in range(SIZE)]
    desk.write("numbers.csv", "\n".join(["x,when,kind,price,who", *rows]) + "\n")


def write_idx(desk: Any) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (SIZE, 10, 10)).astype(np.uint8)
    for name, values in (("images-idx3", pixels), ("labels-idx1", np.arange(SIZE, dtype=np.uint8) % 2)):
        head = b"\0\0\x08" + bytes([values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
        (desk.folder / f"train-{name}-ubyte.gz").write_bytes(gzip.compress(head + values.tobytes()))


def write_arrays(desk: Any) -> None:
    x = np.random.default_rng(0).normal(size=(SIZE, 3)).astype(np.float32)
    np.savez(desk.folder / "rows.npz", input=x, label=(x[:, 0] > 0).astype(np.int64))


def write_arrow(desk: Any) -> None:
    frame = pa.table({"text": [f"film {label(i)} {i}" for i in range(SIZE)], "label": [label(i) for i in range(SIZE)]})
    with pa.OSFile(str(desk.folder / "texts.arrow"), "wb") as file, pa.ipc.new_file(file, frame.schema) as writer:
        writer.write_table(frame)


def write_hub(desk: Any) -> None:
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["dark", "light"])})
    rows = {"image": [{"bytes": picture(i), "path": None} for i in range(SIZE)], "label": [i % 2 for i in range(SIZE)]}
    whole = datasets.Dataset.from_dict(rows, features=features)
    ends = {"train": (0, 20), "validation": (20, 26), "test": (26, SIZE)}
    parts = {name: whole.select(range(*places)) for name, places in ends.items()}
    datasets.disable_progress_bars()
    datasets.DatasetDict(parts).save_to_disk(str(desk.folder / "saved"))


FRACTION = "valid_fraction = 0.25"
CASES: dict[str, tuple[Callable[[Any], None], str, str, list[str]]] = {
    "texts": (write_texts, f'train = "texts.csv"\n{FRACTION}', TEXTCONV, ["accuracy", "f1"]),
    "transformer": (write_texts, f'train = "texts.csv"\nmax_length = 6\n{FRACTION}', TRANSFORMER, ["accuracy"]),
    "bytes": (write_texts, f'train = "texts.csv"\ntokenizer = "bytes"\n{FRACTION}', TEXTCONV, ["accuracy"]),
    "a number of each text": (
        write_texts,
        f'train = "texts.csv"\ntarget = "stars"\n{FRACTION}',
        TEXTCONV,
        ["r2", "mean_absolute_error"],
    ),
    "blocks": (write_books, f'train = "books"\nblock_size = 8\n{FRACTION}', TRANSFORMER, ["accuracy"]),
    "blocks beside blocks": (
        write_books,
        'train = "books"\nvalid = "books"\nblock_size = 8\ntokenizer = "bytes"',
        TRANSFORMER,
        ["accuracy"],
    ),
    "sounds": (
        write_sounds,
        f'train = "sounds"\nlabel_pattern = "^(?P<label>[a-z]+)_"\naugment = ["random_gain", "spec_mask"]\n{FRACTION}',
        AUDIOCONV,
        ["accuracy"],
    ),
    "sounds of one length": (
        write_sounds,
        f'train = "sounds"\nlabel_pattern = "^(?P<label>[a-z]+)_"\nseconds = 0.1\nfeatures = "waveform"\n{FRACTION}',
        MLP,
        ["accuracy"],
    ),
    "sounds by speaker": (
        write_sounds,
        'train = "sounds"\nlabel_pattern = "^(?P<label>[a-z]+)_(?P<who>[a-z])"\nsplit_by = "group:who"\n' + FRACTION,
        AUDIOCONV,
        ["accuracy"],
    ),
    "a number of each image": (
        lambda desk: write_images(desk, age=[30 + 40.0 * (i % 2) for i in range(SIZE)]),
        f'train = "images.parquet"\nlabel = "age"\nimage_size = 8\n{FRACTION}',
        CONVNET,
        ["mean_absolute_error", "r2"],
    ),
    "several labels of each image": (
        lambda desk: write_images(desk, tags=["dark|x" if i % 2 else "x" * (i % 4) for i in range(SIZE)]),
        f'train = "images.parquet"\nlabel = "tags"\nseparator = "|"\nimage_size = 8\n{FRACTION}',
        CONVNET,
        ["accuracy", "f1"],
    ),
    "segmentation": (
        write_masks,
        f'train = "images"\nmasks = "masks"\nmask_classes = ["no", "yes"]\naugment = ["horizontal_flip"]\n{FRACTION}',
        'name = "net.py:build"',
        ["accuracy"],
    ),
    "a number of each row": (
        write_numbers,
        f'train = "numbers.csv"\ntarget = "price"\nid = "x"\n{FRACTION}',
        MLP,
        ["r2", "mean_absolute_error"],
    ),
    "the latest rows": (
        write_numbers,
        'train = "numbers.csv"\ntarget = "kind"\ncategories = ["who"]\nsplit_by = "time:when"\n' + FRACTION,
        MLP,
        ["accuracy"],
    ),
    "whole groups": (write_texts, f'train = "texts.csv"\nsplit_by = "group:who"\n{FRACTION}', TEXTCONV, ["accuracy"]),
    "each class as often": (
        write_folders,
        f'train = "images"\nimage_size = 8\nweights = "balanced"\naugment = ["random_shift"]\n{FRACTION}',
        CONVNET,
        ["accuracy"],
    ),
    "others for bad images, in memory": (
        write_damaged,
        'train = "images"\nimage_size = 8\naugment = ["random_resized_crop"]\ncache = "ram"\n'
        f'on_bad = "substitute"\nbad_fraction = 0.2\n{FRACTION}',
        CONVNET,
        ["accuracy"],
    ),
    "bad images left out": (
        write_damaged,
        f'train = "images"\nimage_size = 8\non_bad = "mask"\nbad_fraction = 0.2\n{FRACTION}',
        CONVNET,
        ["accuracy"],
    ),
    "idx": (write_idx, f'train = "train-images-idx3-ubyte.gz"\n{FRACTION}', CONVNET, ["accuracy"]),
    "npz": (write_arrays, f'train = "rows.npz"\n{FRACTION}', MLP, ["accuracy"]),
    "arrow": (write_arrow, f'train = "texts.arrow"\n{FRACTION}', TEXTCONV, ["accuracy"]),
    "hub": (write_hub, 'train = "hf:saved"\nvalid = "hf:saved"\nimage_size = 8', CONVNET, ["accuracy"]),
}


def write_recipe(desk: Any, case: str, epochs: int = 2, more: str = "") -> None:
    write, data, model, metrics = CASES[case]
    write(desk)
    train = f"metrics = {metrics}\n".replace("'", '"')
    desk.write("kind.toml", RECIPE.format(data=data, model=model, train=train, epochs=epochs) + more)


@pytest.mark.parametrize("case", CASES)
def test_every_kind_trains_and_is_measured(desk: Any, case: str) -> None:
    write_recipe(desk, case)
    said = desk.say("train", "kind.toml", "--quiet")
    assert said.code == 0, said.err
    end = desk.records("runs/kind")[-1]
    assert (end["kind"], end["status"]) == ("run_end", "finished")
    wanted = {f"valid/{name}" for name in ("loss", *CASES[case][3])}
    assert wanted <= set(end["metrics"])
    assert all(math.isfinite(value) for value in end["metrics"].values()), end["metrics"]
    source = CASES[case][1].split('"')[1]
    for words in ((), (source,)):  # the validation split, and all of the data by their name
        measured = desk.say("evaluate", "runs/kind", *words, "--json")
        assert measured.code == 0, measured.err
        found = json.loads(measured.out)
        assert all(math.isfinite(end) for ends in found.pop("intervals").values() for end in ends)
        assert all(math.isfinite(value) for value in found.values())


RESUMED = ["texts", "blocks", "sounds", "others for bad images, in memory", "bad images left out"]


@pytest.mark.parametrize("case", RESUMED)
def test_an_interrupted_run_ends_the_same(desk: Any, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_recipe(desk, case, epochs=3, more="\n[checkpoint]\nevery = 2\n")
    assert desk.say("train", "kind.toml", "--quiet").code == 0
    wanted, steps = desk.parameters("runs/kind"), desk.last_step("runs/kind")
    assert steps >= 9
    calls = 0
    real = Stepper.__call__

    def interrupted(self: Stepper, *given: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, *given, **named)

    monkeypatch.setattr(Stepper, "__call__", interrupted)
    said = desk.say("train", "kind.toml", "--quiet")
    assert said.code == 130, said.err
    assert 4 <= desk.last_step("runs/kind-2") < steps
    assert desk.say("resume", "runs/kind-2", "--quiet").code == 0
    assert desk.last_step("runs/kind-2") == steps
    assert desk.parameters("runs/kind-2") == wanted
