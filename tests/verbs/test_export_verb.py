"""A run handed on in the forms of others, by the commands alone."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import torchkeep as tk

HAS_ONNX = all(map(importlib.util.find_spec, ("onnx", "onnxscript", "onnxruntime")))


@pytest.mark.skipif(not HAS_ONNX, reason="onnx, onnxscript or onnxruntime is not installed")
def test_a_run_and_its_package_become_the_same_onnx(packaged: Any) -> None:
    import onnxruntime

    for source, name in (("runs/images", "run.onnx"), ("images.tkp", "package.onnx")):
        said = packaged.say("export", source, "--to", "onnx", "-o", name, "--preprocess", "--opset", "18")
        assert said.code == 0, said.err
        assert "onnx, opset 18" in said.out
        assert "uint8 (batch, 3, 8, 8)" in said.out
        assert "from the model's own outputs" in said.out
        assert said.err == ""
    identity = json.loads(packaged.say("inspect", "images.tkp", "--json").out)["identity"]
    run, package = (onnxruntime.InferenceSession(str(packaged.folder / name)) for name in ("run.onnx", "package.onnx"))
    for session in (run, package):
        assert session.get_modelmeta().custom_metadata_map["identity"] == identity
    image = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8)
    (found,) = package.run(None, {"image": image.numpy()})
    assert (found == run.run(None, {"image": image.numpy()})[0]).all()
    expected = tk.load_package(packaged.folder / "images.tkp").asked({"image": image})
    torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-4, rtol=1e-4)


def test_a_table_becomes_a_program(desk: Any) -> None:
    desk.write_table()
    assert desk.say("train", "table.toml", "--quiet").code == 0
    said = desk.say("export", "runs/table", "--to", "torch-export", "-o", "table.pt2", "--probabilities")
    assert said.code == 0, said.err
    assert "probabilities: float32 (batch, 2)" in said.out
    program = torch.export.load(desk.folder / "table.pt2").module()
    found = program({"numbers": torch.randn(7, 2), "categories": torch.zeros(7, 1, dtype=torch.int64)})
    torch.testing.assert_close(found.sum(1), torch.ones(7))


def test_a_package_is_unpacked(packaged: Any) -> None:
    words = ("--state-dict", "a.pt", "--safetensors", "a.safetensors")
    said = packaged.say("unpack", "images.tkp", "folder", *words)
    assert said.code == 0, said.err
    assert said.out.splitlines() == ["folder", "a.pt", "a.safetensors"]
    one, folder = (json.loads(packaged.say("inspect", name, "--json").out) for name in ("images.tkp", "folder"))
    assert one["identity"] == folder["identity"]
    tensors = torch.load(packaged.folder / "a.pt", weights_only=True)
    model = tk.load_package(packaged.folder / "folder").model
    assert tensors.keys() == model.state_dict().keys()
    model.load_state_dict(tensors)


def test_what_cannot_be_written_is_said_in_one_form(packaged: Any) -> None:
    packaged.write("taken/file", "mine")
    before = packaged.files()
    bad = [
        ("export", "images.tkp", "--to", "onnx", "-o", "a.tflite"),
        ("export", "images.tkp", "--to", "onnx", "-o", "lost/a.onnx"),
        ("export", "images.tkp", "--to", "torch-export", "-o", "a.pt2", "--opset", "18"),
        ("export", "images.tkp", "--to", "transformers", "-o", "folder"),
        ("export", "images.tkp", "--to", "transformers", "-o", "taken"),
        ("export", "lost.tkp", "--to", "torch-export", "-o", "a.pt2"),
        ("export", "taken", "--to", "torch-export", "-o", "a.pt2"),
        ("unpack", "images.tkp"),
        ("unpack", "images.tkp", "taken"),
        ("unpack", "lost.tkp", "folder"),
        ("unpack", "images.tkp", "--state-dict", "a.zip"),
        ("unpack", "images.tkp", "folder", "--safetensors", "lost/a.safetensors"),
    ]
    for words in bad:
        said = packaged.say(*words)
        assert (said.code, said.out) == (2, ""), words
        assert "where:" in said.err
        assert "Traceback" not in said.err
    for words in (("export", "images.tkp", "--to", "keras", "-o", "a.h5"), ("export", "images.tkp", "--to", "onnx")):
        assert packaged.say(*words).code == 2
    assert packaged.files() == before
    assert Path(packaged.folder / "taken" / "file").read_text() == "mine"
