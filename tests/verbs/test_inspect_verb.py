"""``torchkeep inspect`` on a recipe, a run, a package and a function in a file."""

from __future__ import annotations

import json
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

import torchkeep as tk

NETS = """
from torch import nn


def build(num_classes, width=4):
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(inplace=True), nn.Dropout(),
                         nn.Flatten(), nn.Linear(width * 36, num_classes))


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.out = nn.Embedding(7, 4), nn.Linear(4, 2)

    def forward(self, ids, mask):
        return {"logits": self.out(self.table(ids) * mask.unsqueeze(-1)), "ids": ids}
"""


def rows_of(desk: Any, *words: str) -> dict[str, dict[str, Any]]:
    said = desk.say("inspect", *words, "--json")
    assert (said.code, said.err) == (0, "")
    return {row["name"]: row for row in map(json.loads, said.out.splitlines())}


def refused(desk: Any, words: tuple[str, ...], message: str) -> None:
    said = desk.say("inspect", *words)
    assert (said.code, said.out) == (2, "")
    assert message in said.err
    assert "Traceback" not in said.err


def test_a_recipe_and_a_run_are_shown_as_they_are_trained(images: Any) -> None:
    drawn, trained = rows_of(images, "images.toml"), rows_of(images, "runs/images")
    assert drawn.keys() == trained.keys()
    for rows in (drawn, trained):
        whole = rows["(model)"]
        assert whole["inputs"] == "image (4, 3, 8, 8) float32"
        assert whole["outputs"] == "(4, 2) float32"
        assert whole["forward_flops"] > 0
        assert whole["backward_flops"] > whole["forward_flops"]
        assert whole["gradient_norm"] > 0
        assert whole["num_without_gradient"] == 0
    assert drawn["(model)"]["gradient_norm"] != trained["(model)"]["gradient_norm"]  # of the best checkpoint
    said = images.say("inspect", "runs/images")
    assert "parameters, " in said.out
    assert "backward" in said.out.splitlines()[0]


def test_a_frozen_part_gets_no_gradient(images: Any) -> None:
    edits = ("--set", 'freeze.modules=["features"]')
    rows = rows_of(images, "images.toml", *edits)
    assert rows["features"]["num_learning"] == 0
    assert rows["features"]["gradient_norm"] is None
    assert rows["head"]["gradient_norm"] > 0
    assert images.say("train", "images.toml", "--quiet", *edits, "--run-dir", "runs/frozen").code == 0
    said = images.say("inspect", "runs/frozen", "--trainable-svg", "frozen.svg")
    assert said.out == "runs/frozen is drawn in frozen.svg\n"
    assert "What learns" in (images.folder / "frozen.svg").read_text(encoding="utf-8")


def test_a_package_is_shown_unbuilt_and_with_its_modules(packaged: Any) -> None:
    assert packaged.say("inspect", "images.tkp").out.startswith("package")
    rows = rows_of(packaged, "images.tkp", "--modules")
    assert rows["(model)"]["inputs"].startswith("image (2, 3, 8, 8)")
    assert rows["head"]["gradient_norm"] > 0
    loaded = tk.load_package(packaged.folder / "images.tkp")
    found = tk.inspect(loaded)
    assert [row.name for row in found] == list(rows)
    assert len(tk.inspect(packaged.folder / "images.tkp")) == len(rows)
    assert not loaded.model.training
    assert all(p.grad is None for p in loaded.model.parameters())


def test_a_function_in_a_file(desk: Any) -> None:
    desk.write("nets.py", NETS)
    held = rows_of(desk, "nets.py:build")
    assert held["(model)"]["num_parameters"] == 112 + 8 + 144 * 10 + 10
    assert held["(model)"]["time_fraction"] is None
    edits = ("--set", "model.args={num_classes=3, width=2}")
    words = ("nets.py:build", *edits, "--input", "2x3x8x8")
    one, two = rows_of(desk, *words), rows_of(desk, *words)
    assert one["5"]["outputs"] == "(2, 3) float32"
    assert one["(model)"]["gradient_norm"] == two["(model)"]["gradient_norm"]
    tokens = rows_of(desk, "nets.py:Tokens", "--input", "ids=2x5:int64", "--input", "mask=2x5")
    assert tokens["(model)"]["inputs"] == "ids (2, 5) int64, mask (2, 5) float32"
    assert tokens["(model)"]["outputs"] == "logits (2, 5, 2) float32, ids (2, 5) int64"
    assert tokens["table"]["gradient_zeros"] >= 5 / 7  # of 0 and 1 alone


def test_pictures_and_pages(desk: Any) -> None:
    desk.write("nets.py", NETS)
    said = desk.say("inspect", "nets.py:build", "--input", "2x3x8x8", "--svg", "a.svg", "--html", "a.html")
    assert said.out == "nets.py:build is drawn in a.svg\nnets.py:build is drawn in a.html\n"
    ElementTree.fromstring((desk.folder / "a.svg").read_text(encoding="utf-8"))
    page = (desk.folder / "a.html").read_text(encoding="utf-8")
    assert page.count("<details") == 7
    assert "http" not in page.replace("http-equiv", "")


def test_bad_input_is_said(packaged: Any) -> None:
    packaged.write("nets.py", NETS)
    for words, message in [
        (("nets.py:bild",), "did you mean 'build'?"),
        (("nets.py:build", "--input", "2x3xa"), "this states no input"),
        (("nets.py:build", "--input", "2x3:int3"), "this states no input"),
        (("nets.py:Tokens", "--input", "ids=2x5:int64", "--input", "2x5"), "a name of its own"),
        (("nets.py:build", "--input", "2x3x9x9"), "where:    5 (Linear)"),
        (("nets.py:build", "--input", "999999999x999999999"), "there is no room"),
        (("images.toml", "--input", "2x3x8x8"), "only a model without data"),
        (("images.toml", "--svg", "gone/a.svg"), "the folder of the picture is missing"),
        (("nets.py:build", "--set", "model.args.depth=3"), "no such argument"),
        (("runs/images", "--trainable-svg", "a.svg"), "nothing was frozen in this run"),
    ]:
        refused(packaged, words, message)
    assert not (packaged.folder / "a.svg").exists()


def test_what_python_gets_prints_as_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    found = tk.inspect(model, torch.randn(3, 4), loss=lambda output: output.square().mean())
    lines = str(found).splitlines()
    assert lines[0].split()[:3] == ["module", "kind", "input"]
    assert max(map(len, lines[:5])) <= 100
    assert len(found) == 4
    assert found[0].backward_order == 1
    assert found.html().startswith("<!doctype html>")
    assert found.svg().startswith("<svg")
    assert [row.num_parameters for row in tk.inspect(model)] == [30, 20, 0, 10]
