"""Ejected scripts are run, in a process that cannot import torchkeep, beside the runs that they stand for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import torchkeep as tk
from conftest import Desk

ROOT = Path(__file__).parents[2]
DATA = ROOT / "../shared/data"

ALONE = """
import runpy
import sys


class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torchkeep":
            raise ImportError(f"{name} is not to be had here")


sys.meta_path.insert(0, Refuse())
runpy.run_path(sys.argv[1], run_name="__main__")
"""

OWN_MODEL = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2))
        self.middle = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Linear(8, num_classes)

    def forward(self, image):
        return self.head(self.middle(self.trunk(image)).mean((2, 3)))


def build(num_classes):
    return Net(num_classes)
"""


def run_alone(script: Path) -> list[dict[str, Any]]:
    """What a script prints, where torchkeep cannot be imported."""
    done = subprocess.run(
        [sys.executable, "-I", "-W", "error", "-c", ALONE, script], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def both(recipe: Any, folder: Path, *sets: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What the script of a recipe prints, and what the record of its run says, an epoch each and then the test."""
    threads = torch.get_num_threads()
    # log points at the ends of epochs alone: their train/loss is the epoch's
    settings = [*sets, "monitor.views=[]", "monitor.log_every=1000000", "train.threads=1", 'features.cache="off"']
    try:
        script = tk.eject(recipe, folder / "train.py", set=settings)
        run = tk.train(recipe, set=settings, run_dir=folder / "run", quiet=True, preflight="off")
    finally:
        torch.set_num_threads(threads)
    rows = [json.loads(line) for line in (run.dir / "records.jsonl").read_text(encoding="utf-8").splitlines()]
    scalars = [row for row in rows if row["kind"] == "scalars"]
    names = ("train/loss", "valid/", "test/")
    by_epoch: list[dict[str, Any]] = []
    for row in scalars:
        values = {name: value for name, value in row["values"].items() if name.startswith(names)}
        if "train/loss" in values or any(name.startswith("test/") for name in values):
            by_epoch.append({"epoch": len(by_epoch) + 1} if "train/loss" in values else {})
        kept = {name: v for name, v in values.items() if name in ("train/loss",) or not name.startswith("train/")}
        by_epoch[-1] |= kept
    return run_alone(script), by_epoch


def test_a_table(tmp_path: Path) -> None:
    found, expected = both(ROOT / "examples/table/recipe.toml", tmp_path, "train.epochs=12", "train.clip_norm=1.0")
    assert found == expected
    assert len(found) >= 10


def test_images(tmp_path: Path) -> None:
    found, expected = both(ROOT / "examples/digits/recipe.toml", tmp_path, "data.augment=[]", "train.epochs=3")
    assert found == expected
    assert len(found) == 4  # the test split too


def test_images_with_an_average_of_the_parameters(tmp_path: Path) -> None:
    sets = ["data.augment=[]", "train.epochs=2", "train.ema=0.9", "train.accumulate=3", 'data.last="drop"']
    found, expected = both(ROOT / "examples/digits/recipe.toml", tmp_path, *sets)
    assert found == expected
    sets = ["data.augment=[]", "train.epochs=3", "train.swa=2", 'optimizer.name="sgd"', "optimizer.warmup=0.1"]
    (tmp_path / "swa").mkdir()
    found, expected = both(ROOT / "examples/digits/recipe.toml", tmp_path / "swa", *sets, 'optimizer.schedule="cosine"')
    assert found == expected


FROZEN = [
    'freeze = {modules = ["trunk"]}',
    'freeze = {modules = ["trunk", "middle"], unfreeze_at_epoch = 1, rate_scale = 0.1}',
    "freeze = {lp_ft = 1}",
    'freeze = {modules = ["trunk"], unfreeze_at_step = 2}',
]


@pytest.mark.parametrize("freeze", FROZEN)
def test_a_frozen_backbone(freeze: str, desk: Desk) -> None:
    desk.write_images()
    desk.write("net.py", OWN_MODEL)
    recipe = (desk.folder / "images.toml").read_text(encoding="utf-8")
    own = recipe.replace('"convnet"\nargs = {widths = [4]}', '"net.py:build"').replace("epochs = 2", "epochs = 3")
    desk.write("frozen.toml", f"{freeze}\n{own}")
    found, expected = both(desk.folder / "frozen.toml", desk.folder, 'optimizer.schedule="linear"')
    assert found == expected


def test_a_pretrained_backbone(tmp_path: Path) -> None:
    if not (DATA / "weights/mobilenet_v2.pth").is_file():
        pytest.skip("shared/data/weights/mobilenet_v2.pth beside the repository is missing")
    sets = ["data.augment=[]", "train.epochs=2", "data.image_size=64"]
    found, expected = both(ROOT / "examples/transfer/recipe.toml", tmp_path, *sets)
    assert found == expected


TEXTS = """
[data]
train = "texts.csv"
valid_fraction = 0.25
text = "text"
label = "label"
tokenizer = "words"
batch_size = 8
workers = 0

[model]
name = "textconv"
args = {width = 8, channels = 8}

[optimizer]
schedule = "one_cycle"

[train]
epochs = 3
label_smoothing = 0.1
class_weights = [1.0, 3.0]
metrics = ["accuracy", "top2"]
"""


@pytest.mark.parametrize("tokenizer", ["words", "bytes"])
def test_texts(tokenizer: str, desk: Desk) -> None:
    words = ["the", "film", "was", "good", "and", "bad,", "or", "so", "it", "seems;", "we", "shall", "see"]
    lines = [f'"{" ".join(words[i % 5 : 5 + i % 8])}",{"praise" if i % 3 else "blame"}' for i in range(60)]
    desk.write("texts.csv", "text,label\n" + "\n".join(lines) + "\n")
    desk.write("texts.toml", TEXTS.replace('"words"', f'"{tokenizer}"'))
    found, expected = both(desk.folder / "texts.toml", desk.folder)
    assert found == expected


def test_numbers_of_a_table(desk: Desk) -> None:
    rows = [
        f"{i % 7},{'' if i % 9 == 4 else i * 0.5},{'red' if i % 3 else 'blue'},{i * 1.7 + i % 5}" for i in range(80)
    ]
    desk.write("rows.csv", "\n".join(["a,b,colour,price", *rows]) + "\n")
    desk.write_table(80)
    desk.write("rows.csv", "\n".join(["a,b,colour,price", *rows]) + "\n")
    recipe = (desk.folder / "table.toml").read_text(encoding="utf-8").replace('"kind"', '"price"')
    desk.write("table.toml", recipe.replace('["accuracy"]', '["r2", "mean_absolute_error"]'))
    found, expected = both(desk.folder / "table.toml", desk.folder, "data.test_fraction=0.2")
    assert found == expected


def test_augmented_images_learn_as_well(tmp_path: Path) -> None:
    found, expected = both(ROOT / "examples/digits/recipe.toml", tmp_path, "train.epochs=6")
    best, then = (max(row["valid/accuracy"] for row in rows if "epoch" in row) for rows in (found, expected))
    assert best > 0.93
    assert abs(best - then) < 0.03


def test_recordings_that_code_has_listed(tmp_path: Path) -> None:
    if not (DATA / "spoken-digits").is_dir():
        pytest.skip("shared/data/spoken-digits beside the repository is missing")
    pytest.importorskip("scipy")
    found, _ = both(ROOT / "examples/spoken-digits/recipe.toml", tmp_path, "train.epochs=2")
    assert {path.name for path in tmp_path.glob("*.csv")} == {"train.train.csv", "train.valid.csv", "train.test.csv"}
    assert found[1]["train/loss"] < found[0]["train/loss"]


def test_the_command(desk: Desk) -> None:
    desk.write_table()
    said = desk.say("eject", "table.toml", "-o", "train.py", "--set", "train.epochs=1")
    assert (said.code, said.out) == (0, "train.py\n")
    assert "EPOCHS" in (desk.folder / "train.py").read_text(encoding="utf-8")
    before = desk.files()
    taken = desk.say("eject", "table.toml", "-o", "train.py")
    assert taken.code == 2
    assert "--force" in taken.err
    assert desk.say("eject", "table.toml", "-o", "train.py", "--force").code == 0
    refused = desk.say("eject", "table.toml", "-o", "other.py", "--set", 'data.weights="balanced"')
    assert refused.code == 2
    assert "data.weights" in refused.err
    assert desk.say("eject", "table.toml", "-o", "missing/train.py").code == 2
    assert desk.files() == before
