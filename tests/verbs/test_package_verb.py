"""A run handed on as one file, and what the commands say of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import torchkeep as tk
from torchkeep.errors import PackageError, UntrustedCodeError

FLOW = """
from torch import nn


class Flow(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.layer = nn.Linear(2, num_classes)

    def forward(self, numbers, categories):
        found = self.layer(numbers)
        return found if found.sum() > 0 else -found


def build(num_classes):
    return Flow(num_classes)
"""


def test_a_run_becomes_one_file_that_gives_the_same_answers(images: Any) -> None:
    said = images.say("package", "runs/images", "-o", "images.tkp")
    assert said.code == 0, said.err
    assert "built-in convnet" in said.out
    assert "ants, bees" in said.out
    held = tk.load_package(images.folder / "images.tkp")
    run = tk.open_run(images.folder / "runs" / "images")
    image = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8)
    assert torch.equal(held.asked({"image": image}), run.asked()({"image": image}))
    assert held.metrics["values"]["valid/accuracy"] == run.best.metrics["valid/accuracy"]
    assert held.contract.classes == ("ants", "bees")
    assert images.say("verify", "images.tkp").code == 0
    assert "images" in held.card


def test_the_same_run_gives_the_same_bytes_as_a_file_and_as_a_folder(images: Any) -> None:
    for name in ("one.tkp", "two.tkp"):
        assert images.say("package", "runs/images", "-o", name).code == 0
    assert (images.folder / "one.tkp").read_bytes() == (images.folder / "two.tkp").read_bytes()
    assert images.say("package", "runs/images", "-o", "folder", "--folder").code == 0
    one, folder = (json.loads(images.say("inspect", name, "--json").out) for name in ("one.tkp", "folder"))
    assert one["identity"] == folder["identity"]


def test_each_checkpoint_can_be_handed_on(images: Any) -> None:
    listed = [json.loads(line) for line in images.say("checkpoints", "runs/images", "--json").out.splitlines()]
    steps = [row["step"] for row in listed]
    assert images.say("package", "runs/images", "-o", "a.tkp", "--checkpoint", steps[-1]).code == 0
    assert images.say("package", "runs/images", "-o", "b.tkp", "--checkpoint", "last").code == 0
    assert (images.folder / "a.tkp").read_bytes() == (images.folder / "b.tkp").read_bytes()
    said = images.say("package", "runs/images", "-o", "c.tkp", "--checkpoint", 99999)
    assert said.code == 2
    assert str(steps[-1]) in said.err
    assert images.say("package", "runs/images", "--checkpoint", "newest").code == 2
    assert not (images.folder / "c.tkp").exists()


def test_a_delta_holds_what_was_trained_and_names_its_base(images: Any) -> None:
    again = ("--set", "model.weights='runs/images'", "--set", "freeze={all_but_head=true}", "--set", "train.epochs=1")
    assert images.say("train", "images.toml", "--quiet", "--run-dir", "runs/head", *again).code == 0
    assert images.say("train", "images.toml", "--quiet", "--run-dir", "runs/other", "--set", "seed=9").code == 0
    assert images.say("package", "runs/head", "-o", "whole.tkp").code == 0
    said = images.say("package", "runs/head", "-o", "delta.tkp", "--delta")
    assert said.code == 0, said.err
    whole, delta = (tk.load_package(images.folder / name, base=images.folder / "runs" / "images")
                    for name in ("whole.tkp", "delta.tkp"))  # fmt: skip
    named = delta._archive.json("base.json")["tensors"]
    assert named
    assert set(delta._archive.tensors("parameters.safetensors")) == set(whole.model.state_dict()) - set(named)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, delta.model.state_dict()[name])
    said = images.say("verify", "delta.tkp")
    assert said.code == 2
    assert "--base" in said.err
    assert images.say("verify", "delta.tkp", "--base", "runs/images").code == 0
    with pytest.raises(PackageError, match="not the base"):
        tk.load_package(images.folder / "delta.tkp", base=images.folder / "runs" / "other")
    assert images.say("package", "runs/images", "--delta").code == 2, "it began with no weights"


def test_a_model_of_the_users_own_loads_where_its_class_is_not(slow: Any) -> None:
    desk = slow
    assert desk.say("train", "slow.toml", "--quiet", "--set", "train.epochs=1").code == 0
    assert desk.say("package", "runs/slow", "-o", "own.tkp").code == 0
    (desk.folder / "slow.py").unlink()
    program = ("import torchkeep as tk; p = tk.load_package('own.tkp');"
               "print(p.architecture['kind'], [x.label for x in tk.Predictor(p)('rows.csv')][:3])")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", program], cwd=desk.folder, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("graph [")


def test_code_that_no_graph_can_hold_is_carried_and_runs_by_its_hash_alone(desk: Any) -> None:
    desk.write_table()
    (desk.folder / "flow.py").write_text(FLOW)
    set_model = ("--set", "model.name=flow.py:build", "--set", "model.args={}")
    assert desk.say("train", "table.toml", "--quiet", *set_model).code == 0
    said = desk.say("package", "runs/table", "-o", "flow.tkp")
    assert said.code == 0, said.err
    assert "runs only by its hash" in said.out
    sha256 = json.loads(desk.say("inspect", "flow.tkp", "--json").out)["architecture"]["sha256"]
    said = desk.say("verify", "flow.tkp")
    assert said.code == 2
    assert sha256 in said.err
    with pytest.raises(UntrustedCodeError):
        tk.load_package(desk.folder / "flow.tkp", trust_code="0" * 64)
    assert desk.say("verify", "flow.tkp", "--trust-code", sha256).code == 0


def test_bad_input_is_said_in_one_form(images: Any) -> None:
    (images.folder / "broken.tkp").write_bytes(b"PK\x03\x04 no package")
    (images.folder / "taken").mkdir()
    (images.folder / "taken" / "file").write_text("mine")
    for words in (("package", "runs/none"), ("inspect", "broken.tkp"), ("verify", "broken.tkp"),
                  ("inspect", "missing.tkp"), ("predict", "broken.tkp", "x.png"),
                  ("package", "runs/images", "-o", "taken")):  # fmt: skip
        said = images.say(*words)
        assert said.code == 2, words
        assert "Traceback" not in said.err
        assert "where:" in said.err
    assert (images.folder / "taken" / "file").read_text() == "mine"


def test_weights_of_a_package_begin_another_training(images: Any) -> None:
    assert images.say("package", "runs/images", "-o", "images.tkp").code == 0
    said = images.say("train", "images.toml", "--run-dir", "runs/on", "--set", "model.weights='images.tkp'")
    assert said.code == 0, said.err
    assert "100.0% of the parameters" in said.out
    assert Path(images.folder / "runs" / "on").is_dir()
