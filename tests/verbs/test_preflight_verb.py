"""``torchkeep preflight`` and ``train --preflight`` as they are typed, on small recipes and on real photographs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from conftest import Desk

SHARED = Path(__file__).resolve().parents[3] / "shared"
SOFTMAX = """
from torch import nn


def build(in_features, num_classes):
    return Twice(num_classes)


class Twice(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, num_classes), nn.Softmax(-1))

    def forward(self, numbers, categories):
        return self.layers(numbers)
"""
DETACHED = SOFTMAX.replace("self.layers(numbers)", "self.layers(numbers).detach()")


def with_model(desk: Desk, source: str) -> None:
    desk.write_table()
    desk.write("net.py", source)
    text = (desk.folder / "table.toml").read_text(encoding="utf-8")
    desk.write("net.toml", text.replace('"mlp"\nargs = {hidden = [8]}', '"net.py:build"'))


def test_what_is_in_order_is_said_and_nothing_is_written(desk: Desk) -> None:
    desk.write_images()
    before = desk.files()
    said = desk.say("preflight", "images.toml")
    assert said.code == 0
    assert "first loss" in said.out
    assert "augmentation" in said.out
    assert "warning" not in said.out
    assert desk.files() == before


def test_each_check_is_a_line_of_json(desk: Desk) -> None:
    desk.write_images()
    rows = [json.loads(line) for line in desk.say("preflight", "images.toml", "--quick", "--json").out.splitlines()]
    assert {row["check"] for row in rows} >= {"first loss", "gradients", "optimiser", "disk"}
    assert {row["check"] for row in rows if row["verdict"] != "passed"} == {"direction", "sequence"}


def test_a_mistake_is_shown_with_what_to_do(desk: Desk) -> None:
    with_model(desk, SOFTMAX)
    said = desk.say("preflight", "net.toml", "--quick")
    assert said.code == 1
    assert "warning: probabilities twice: the loss takes the softmax of what has been through softmax" in said.out
    assert "fix: leave out the model's last softmax" in said.out


@pytest.mark.parametrize("level", ["quick", "full"])
def test_a_training_that_could_learn_nothing_is_not_begun(desk: Desk, level: str) -> None:
    with_model(desk, DETACHED)
    said = desk.say("train", "net.toml", "--preflight", level)
    assert said.code == 2
    assert said.err.startswith("PreflightError: this training would come to nothing")
    assert desk.runs() == []


def test_who_insists_trains_all_the_same(desk: Desk) -> None:
    with_model(desk, SOFTMAX)
    said = desk.say("train", "net.toml", "--preflight", "full")
    assert said.code == 0
    assert "probabilities twice" in said.out
    assert desk.runs() == ["net"]
    assert desk.say("train", "net.toml", "--preflight", "off", "--run-dir", "runs/off").out.count("preflight") == 0
    assert desk.parameters("runs/net") == desk.parameters("runs/off")


def test_a_disk_without_room_is_said_before_the_training(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.write_images()
    monkeypatch.setattr("torchkeep.training.checks.shutil.disk_usage", lambda path: type("Usage", (), {"free": 100})())
    said = desk.say("train", "images.toml")
    assert said.code == 2
    assert "preflight: disk" in said.err
    assert desk.runs() == []


@pytest.mark.skipif(not (SHARED / "models").is_dir(), reason="the model and photographs of ../shared are missing")
def test_a_users_model_on_photographs_is_in_order(desk: Desk) -> None:
    desk.write(
        "ants.toml",
        f"""
[data]
train = "{SHARED}/data/hymenoptera/train"
valid = "{SHARED}/data/hymenoptera/val"
image_size = 64
mean = [0.485, 0.456, 0.406]
std = [0.229, 0.224, 0.225]
augment = ["random_resized_crop", "horizontal_flip"]
batch_size = 16

[model]
name = "{SHARED}/models/mobilenet_v2.py:build"
weights = "{SHARED}/data/weights/mobilenet_v2.pth"
head = "classifier.1"
""",
    )
    said = desk.say("preflight", "ants.toml")
    assert said.code == 0, said.out
