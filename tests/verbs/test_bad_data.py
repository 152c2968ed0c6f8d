"""Bad data of every kind: one message that names the place, its exit code, and nothing half-written."""

from __future__ import annotations

import gzip
import os
import struct
import sys
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from test_bad_input import only_error, refused

from torchkeep.keep.checkpoint import find_damage

RECIPE = """
[data]
train = "{train}"
batch_size = 16
workers = 0
{data}

[model]
name = "{model}"
{args}

[train]
epochs = 2
threads = 1

[monitor]
views = []
"""

ARGS = {
    "convnet": "args = {widths = [4]}",
    "audioconv": "args = {widths = [4]}",
    "textconv": "args = {width = 4, channels = 4}",
    "mlp": "args = {hidden = [4]}",
}


def recipe(desk: Any, model: str, train: str, data: str = "") -> tuple[str, str]:
    text = RECIPE.format(train=train, data=data, model=model, args=ARGS.get(model, ""))
    desk.write("bad.toml", text)
    return "train", "bad.toml"


def sound(desk: Any, name: str, wave: Any = None, **options: Any) -> Path:
    path: Path = desk.folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    times = np.arange(800) / 8000
    soundfile.write(path, 0.5 * np.sin(2 * np.pi * 440 * times) if wave is None else wave, 8000, **options)
    return path


def write_kind(desk: Any, kind: str) -> tuple[Path, tuple[str, str]]:
    """Eight good samples in two classes; the file of one, and the words that train on them."""
    for number in range(8):
        name = f"data/{'ab'[number % 2]}/{number}"
        if kind == "image":
            desk.write_image(f"{name}.png", np.random.default_rng(number).integers(0, 255, (12, 12, 3)))
        elif kind == "audio":
            sound(desk, f"{name}.wav")
        else:
            desk.write(f"{name}.txt", f"text number {number}")
    models = {"image": ("convnet", "image_size = 8"), "audio": ("audioconv", ""), "text": ("textconv", "")}
    ending = {"image": ".png", "audio": ".wav", "text": ".txt"}[kind]
    return desk.folder / f"data/b/3{ending}", recipe(desk, models[kind][0], "data", models[kind][1])


def png_head(width: int, height: int) -> bytes:
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))


def flac_of(samples: int) -> bytes:
    """A FLAC whose header says so many samples."""
    held = BytesIO()
    soundfile.write(held, np.zeros(800), 8000, format="FLAC")
    data = bytearray(held.getvalue())
    data[21] = data[21] & 0xF0 | samples >> 32
    data[22:26] = struct.pack(">I", samples & 0xFFFFFFFF)
    return bytes(data)


CUT: Callable[[bytes], bytes] = lambda data: data[: len(data) * 2 // 3]  # noqa: E731


@pytest.mark.parametrize(
    ("kind", "spoil", "fragment"),
    [
        ("image", CUT, "truncated"),
        ("image", lambda data: b"", "0 bytes"),
        ("image", lambda data: b"GIF89a but no more", "18 bytes"),
        ("image", lambda data: data[:40] + bytes(40) + data[80:], "bytes"),
        ("image", lambda data: png_head(60_000, 60_000) + data[33:], "the limit is 89,478,485 pixels"),
        ("audio", CUT, "bytes of samples"),
        ("audio", lambda data: b"", "0 bytes"),
        ("audio", lambda data: png_head(8, 8), "33 bytes"),
        ("audio", lambda data: data[:12] + bytes(30) + data[42:], "bytes"),
        ("audio", lambda data: flac_of(1 << 34), "the limit is 268,435,456"),
        ("text", lambda data: b"caf\xe9", "byte 0xe9 at place 3"),
        ("text", lambda data: b"\xff\xfe" + "text".encode("utf-16-le"), "byte 0xff at place 0"),
    ],
)
def test_a_file_that_is_damaged_misnamed_or_a_bomb(
    desk: Any, kind: str, spoil: Callable[[bytes], bytes], fragment: str
) -> None:
    bad, words = write_kind(desk, kind)
    bad.write_bytes(spoil(bad.read_bytes()))
    refused(desk, words, "BadSampleError", f"b/{bad.name}", "sample 5", fragment)


def test_bombs_of_tables_and_arrays(desk: Any) -> None:
    head = b"\0\0\x08\x03" + struct.pack(">3I", 60_000, 28_000, 28_000)
    (desk.folder / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(head + bytes(1000)))
    words = recipe(desk, "convnet", "train-images-idx3-ubyte.gz")
    refused(desk, words, "DataError", "train-images-idx3-ubyte.gz", "47,040,000,000,000 bytes of pixels")
    (desk.folder / "rows.npz").write_bytes(b"PK\x03\x04 and no more")
    refused(desk, recipe(desk, "mlp", "rows.npz"), "DataError", "rows.npz")
    np.savez(desk.folder / "objects.npz", input=np.array([{}, None], object))
    refused(desk, recipe(desk, "mlp", "objects.npz"), "DataError", "objects.npz", "without objects")


def test_an_empty_file_of_text_is_a_text(desk: Any) -> None:
    empty, words = write_kind(desk, "text")
    empty.write_bytes(b"")
    assert desk.say(*words, "--quiet").code == 0
    said = desk.say("predict", "runs/bad", "data/b/3.txt")
    assert said.code == 0
    assert said.out.splitlines()[1].startswith("data/b/3.txt,")


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights on Windows")
@pytest.mark.parametrize("kind", ["image", "audio", "text"])
def test_links_out_of_the_folder_are_followed_only_if_said_so(desk: Any, kind: str) -> None:
    inside, words = write_kind(desk, kind)
    outside = desk.folder / f"outside{inside.suffix}"
    inside.rename(outside)
    inside.symlink_to(outside)
    refused(desk, words, "DataError", "a link leads out of the data folder", f"b/{inside.name}", "follow_links = true")
    assert desk.say(*words, "--quiet", "--set", "data.follow_links=true").code == 0
    outside.unlink()
    again = (*words, "--set", "data.follow_links=true")
    refused(desk, again, "BadSampleError", f"b/{inside.name}", "No such file")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_names_that_are_no_utf_8(desk: Any) -> None:
    good, words = write_kind(desk, "image")
    odd = os.fsencode(good.parent) + b"/caf\xe9.png"
    os.rename(good, odd)
    assert desk.say(*words, "--quiet").code == 0
    (desk.folder / "new").mkdir()
    Path(os.fsdecode(os.fsencode(desk.folder) + b"/new/\xff.png")).write_bytes(b"no image")
    said = desk.say("predict", "runs/bad", "data/b", "new")
    assert said.code == 3
    assert "new/\\xff.png,,,,this image cannot be decoded" in said.out
    assert sum("caf\\xe9.png" in line for line in said.out.splitlines()) == 1
    with open(odd, "wb") as file:
        file.write(b"no image")
    refused(desk, words, "BadSampleError", "caf\\xe9.png")


def rows(**columns: list[Any]) -> str:
    lines = [",".join(map(str, row)) for row in zip(*columns.values(), strict=True)]
    return "\n".join([",".join(columns), *lines]) + "\n"


def test_cells_of_100_000_characters(desk: Any) -> None:
    long = "word " * 20_000
    desk.write("texts.csv", rows(text=[long, "short", "", '"a, b"'] * 4, label=["a", "b"] * 8))
    assert desk.say(*recipe(desk, "textconv", "texts.csv"), "--quiet").code == 0
    said = desk.say("predict", "runs/bad", "texts.csv")
    assert said.code == 0
    assert len(said.out.splitlines()) == 17
    desk.write("rows.csv", rows(x=[long, "b"] * 8, y=["a", "b"] * 8))
    assert desk.say(*recipe(desk, "mlp", "rows.csv", 'target = "y"'), "--quiet").code == 0


NUMBERS = [str(number / 4) for number in range(100)]


@pytest.mark.parametrize(
    ("text", "data", "fragments"),
    [
        (rows(x=[*NUMBERS[:50], "n/a", *NUMBERS[51:]], y=["a", "b"] * 50), 'target = "y"', ["'x', row 50", "'n/a'"]),
        (rows(x=NUMBERS, y=[*NUMBERS[:7], "none", *NUMBERS[8:]]), 'target = "y"', ["'y', row 7", "'none'"]),
        (rows(x=[1, 2, 3], y=[0.5, "NaN", 1.5]), 'target = "y"', ["a target is missing", "row 1"]),
        (rows(x=[1, 2, 3], y=["a", "", "b"]), 'target = "y"', ["a target is missing", "row 1"]),
        (rows(x=[1, 2, 3], y=[0.5, "inf", 1.5]), 'target = "y"', ["a number is infinite", "'y'"]),
        (
            rows(x=[1, 2, 3], y=["a", "b", "a"], i=[7, 8, 7]),
            'target = "y"\nid = "i"',
            ["an id does not", "7 more than"],
        ),
        (
            rows(x=[1, 2, 3], y=["a", "b", "a"], i=[7, 8, ""]),
            'target = "y"\nid = "i"',
            ["an id does not", "empty cell"],
        ),
        (rows(text=["u", "v"], label=["a", ""]), "", ["a label is missing", "row 1"]),
        (rows(text=["u", "v"], label=["a", "b"], i=["k", "k"]), 'id = "i"', ["an id does not", "'k' more than once"]),
    ],
)
def test_cells_that_cannot_be_meant(desk: Any, text: str, data: str, fragments: list[str]) -> None:
    desk.write("rows.csv", text)
    model = "textconv" if text.startswith("text") else "mlp"
    refused(desk, recipe(desk, model, "rows.csv", data), "DataError", "rows.csv", *fragments)


def test_a_csv_that_is_not_utf_8(desk: Any) -> None:
    (desk.folder / "rows.csv").write_bytes("text,label\ncafé,a\nthé,b\n".encode("latin-1"))
    refused(desk, recipe(desk, "textconv", "rows.csv"), "DataError", "rows.csv", "UTF-8")


def test_a_missing_text_in_parquet(desk: Any) -> None:
    pq.write_table(pa.table({"text": ["a", None], "label": ["x", "y"]}), desk.folder / "rows.parquet")
    refused(desk, recipe(desk, "textconv", "rows.parquet"), "DataError", "a text is missing", "row 1", "rows.parquet")


@pytest.mark.parametrize("kind", ["image", "audio", "text", "table"])
def test_a_label_that_only_validation_has(desk: Any, kind: str) -> None:
    if kind == "table":
        desk.write("rows.csv", rows(x=[1, 2, 3, 4], y=["a", "b", "a", "b"]))
        desk.write("valid.csv", rows(x=[1, 2], y=["a", "zebra"]))
        words = recipe(desk, "mlp", "rows.csv", 'target = "y"\nvalid = "valid.csv"')
    else:
        good, words = write_kind(desk, kind)
        other = desk.folder / "valid" / "zebra" / good.name
        other.parent.mkdir(parents=True)
        other.write_bytes(good.read_bytes())
        words = (*words, "--set", "data.valid=valid")  # type: ignore[assignment]
    refused(desk, words, "DataError", "not among those of the training data", "valid", "'zebra'", "a, b")


def test_recordings_of_silence_train_and_stereo_is_refused(desk: Any) -> None:
    bad, words = write_kind(desk, "audio")
    sound(desk, f"data/b/{bad.name}", np.zeros(800))
    assert desk.say(*words, "--quiet").code == 0
    sound(desk, "new/silent.wav", np.zeros(800))
    sound(desk, "new/stereo.wav", np.zeros((800, 2)))
    said = desk.say("predict", "runs/bad", "new")
    assert said.code == 3
    assert "new/stereo.wav,,,,this recording has other channels than stated: 2 channels" in said.out
    assert [line.partition(",")[0] for line in said.out.splitlines()[1:]] == ["new/silent.wav", "new/stereo.wav"]
    sound(desk, f"data/b/{bad.name}", np.zeros((800, 2)))
    refused(desk, words, "BadSampleError", "b/3.wav", "2 channels", "expected: 1", "mix", "audio_channels")
    assert desk.say(*words, "--quiet", "--set", "data.audio_channels=mix").code == 0


VANISHING = """
import pathlib
import torch

GONE = pathlib.Path({path!r})


class Net(torch.nn.Module):
    def __init__(self, num_outputs):
        super().__init__()
        self.head = torch.nn.Linear(1, num_outputs)

    def forward(self, x):
        if self.training and GONE.exists():
            GONE.unlink()
        return self.head(x.float().flatten(1).mean(1, keepdim=True))


def build(num_outputs):
    return Net(num_outputs)
"""


@pytest.mark.parametrize("kind", ["image", "audio", "text"])
def test_a_file_that_vanishes_while_the_run_goes_on(desk: Any, kind: str) -> None:
    good, _ = write_kind(desk, kind)
    data, kept = "image_size = 8" if kind == "image" else "", good.read_bytes()
    desk.write("net.py", VANISHING.format(path=str(good)))
    recipe(desk, "net.py:build", "data", data)
    words = ("train", "bad.toml", "--quiet", "--set", "data.batch_size=1", "--set", "checkpoint.every=1")
    said = desk.say(*words)
    only_error(said, "BadSampleError", f"b/{good.name}", "sample 5", "No such file")
    assert said.code in (1, 2)
    assert 0 < desk.last_step("runs/bad") < 16
    assert desk.records("runs/bad")[-1]["status"] == "failed"
    assert all(not find_damage(path) for path in desk.checkpoints("runs/bad").steps())
    desk.write("net.py", VANISHING.format(path=str(desk.folder / "nothing")))
    good.write_bytes(kept)
    trust = desk.say("resume", "runs/bad").err.split("--trust-code ")[1].split()[0]
    assert desk.say("resume", "runs/bad", "--quiet", "--trust-code", trust).code == 0
    assert desk.say(*words).code == 0
    assert desk.parameters("runs/bad") == desk.parameters("runs/bad-2")
