"""What leaves in the forms of others answers as the model does: read here by onnxruntime, torch and transformers."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from packaged import (
    contents_of,
    hub_contents,
    image_contents,
    image_files,
    number_table,
    text_contents,
    text_table,
    write_good,
)
from torch import Tensor, nn

from torchkeep.archive import Archive
from torchkeep.contracts import Batch
from torchkeep.errors import ModelError, PackageError, SettingsError, StorageError
from torchkeep.share.contract import Asked
from torchkeep.share.export import (
    export_onnx,
    export_program,
    export_transformers,
    unpack,
    write_tensors,
)
from torchkeep.share.package import Contents, Package, load_package, save_package, write_package
from torchkeep.usercode import load_function, read_reference

SHARED = Path(__file__).parents[3] / "../shared"
HAS_ONNX = all(map(importlib.util.find_spec, ("onnx", "onnxscript", "onnxruntime")))
needs_onnx = pytest.mark.skipif(not HAS_ONNX, reason="onnx, onnxscript or onnxruntime is not installed")


def tiny_vit(root: Path) -> Contents:
    return contents_of(root, image_files(root), "vit", args={"width": 12, "depth": 1, "heads": 3})


def mobilenet(root: Path) -> Contents:
    return contents_of(root, image_files(root) | {"image_size": 32}, "mobilenet_v2")


def transformer(root: Path) -> Contents:
    return contents_of(root, text_table(root), "transformer", args={"width": 8, "depth": 1, "heads": 2})


def mlp(root: Path) -> Contents:
    return contents_of(root, number_table(root), "mlp", args={"hidden": [5]})


MAKERS: dict[str, Callable[[Path], Contents]] = {
    "convnet": image_contents, "vit": tiny_vit, "textconv": text_contents, "transformer": transformer, "mlp": mlp,
    "bert": hub_contents,
}  # fmt: skip
if not (SHARED / "models/mobilenet_v2.py").is_file():  # which is the same network as a graph
    MAKERS["mobilenet_v2"] = mobilenet


def packaged(name: str, root: Path) -> Package:
    if name == "graph":
        return load_package(write_good("graph", root, root / "a.tkp"), device="cpu")
    if name == "shared":
        if not (SHARED / "models/mobilenet_v2.py").is_file():
            pytest.skip("the folder shared/models beside the repository is missing")
        torch.manual_seed(0)
        model = load_function(read_reference("models/mobilenet_v2.py:build", SHARED))()
        return load_package(save_package(model.eval(), root / "a.tkp", torch.randn(2, 3, 64, 64)), device="cpu")
    return load_package(write_package(MAKERS[name](root), root / "a.tkp").path, device="cpu")


def onnx_of(path: Path) -> tuple[Any, Callable[[Batch], Tensor]]:
    """A stranger's reading of the file."""
    runtime: Any = importlib.import_module("onnxruntime")
    session = runtime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    return session, lambda batch: torch.from_numpy(session.run(None, {k: v.numpy() for k, v in batch.items()})[0])


def other_sizes(batch: Batch, has_length: bool) -> Batch:
    """Five samples, and texts of another length."""
    rows = {name: value[torch.arange(5) % len(value)] for name, value in batch.items()}
    return {name: value[:, :3] if has_length else value for name, value in rows.items()}


@needs_onnx
@pytest.mark.parametrize("name", [*MAKERS, "graph", "shared"])
def test_onnx_and_the_program_answer_as_the_model_for_any_size(name: str, tmp_path: Path) -> None:
    held = packaged(name, tmp_path)
    made = export_onnx(held.asked, held.selftest[0], tmp_path / "a.onnx", identity=held.identity)
    assert made.size_bytes == (tmp_path / "a.onnx").stat().st_size
    assert made.largest_difference < 1e-4
    assert made.opset is not None
    session, run = onnx_of(tmp_path / "a.onnx")
    assert [row.name for row in session.get_inputs()] == list(made.inputs)
    assert [row.name for row in session.get_outputs()] == list(made.outputs)
    has_length = all("length" in text for text in made.inputs.values())
    assert has_length == (name in ("textconv", "transformer", "bert"))
    batch = other_sizes(held.selftest[0], has_length)
    given = {name: held.asked.mover(batch)[name] for name in made.inputs}
    torch.testing.assert_close(run(given), held.asked(batch), atol=1e-4, rtol=1e-4)

    program = export_program(held.asked, held.selftest[0], tmp_path / "a.pt2", identity=held.identity)
    assert (program.inputs, program.outputs) == (made.inputs, made.outputs)
    facts = {"torchkeep.json": ""}
    again = torch.export.load(tmp_path / "a.pt2", extra_files=facts).module()
    with torch.no_grad():
        torch.testing.assert_close(again(given), held.asked(batch), atol=1e-5, rtol=1e-5)
    assert json.loads(facts["torchkeep.json"])["identity"] == held.identity


@needs_onnx
def test_a_stranger_learns_what_the_numbers_mean(tmp_path: Path) -> None:
    contents = image_contents(tmp_path)
    object.__setattr__(contents.contract, "calibration", {"temperature": 2.5})
    held = load_package(write_package(contents, tmp_path / "a.tkp").path, device="cpu")
    made = export_onnx(held.asked, held.selftest[0], tmp_path / "a.onnx", preprocess=True, probabilities=True,
                       identity=held.identity)  # fmt: skip
    assert made.inputs == {"image": "uint8 (batch, 3, 8, 8)"}
    assert made.outputs == {"probabilities": "float32 (batch, 2)"}
    session, run = onnx_of(tmp_path / "a.onnx")
    facts, meta = session.get_modelmeta().custom_metadata_map, session.get_modelmeta()
    assert meta.producer_name == "torchkeep"
    assert facts["identity"] == held.identity
    assert json.loads(facts["classes"]) == ["ants", "bees"]
    assert float(facts["temperature"]) == 2.5
    image = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    expected = held.asked({"image": image}).div(2.5).softmax(1)
    torch.testing.assert_close(run({"image": image}), expected, atol=1e-5, rtol=1e-5)
    numbers = export_program(held.asked, held.selftest[0], tmp_path / "a.pt2", preprocess=True)
    assert (numbers.inputs, list(numbers.outputs)) == (made.inputs, ["logits"])
    with torch.no_grad():
        found = torch.export.load(tmp_path / "a.pt2").module()({"image": image})
    assert torch.equal(found, held.asked({"image": image}))


class Chancy(nn.Module):
    """Never answers the same."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layer(x) + torch.rand(x.shape[0], 2)
        return found


class Flowing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layer(x if x.sum() > 0 else -x)
        return found


class Fixed(nn.Module):
    """Takes the number of samples for a number of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.randn(2, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.rows


def asked_of(model: nn.Module, root: Path) -> tuple[Asked, Batch]:
    """As a package's, but for the model."""
    held = packaged("graph", root)
    return Asked(model.eval(), held.contract, "cpu"), held.selftest[0]


@needs_onnx
def test_what_answers_otherwise_is_not_written(tmp_path: Path) -> None:
    for model, said in ((Chancy(), "answers otherwise"), (Flowing(), "cannot be had in this form")):
        asked, batch = asked_of(model, tmp_path)
        before = sorted(tmp_path.iterdir())
        for export, ending in ((export_onnx, "onnx"), (export_program, "pt2")):
            with pytest.raises(ModelError, match=said):
                export(asked, batch, tmp_path / f"b.{ending}")
        assert sorted(tmp_path.iterdir()) == before


@needs_onnx
def test_a_size_that_the_code_fixes_is_stated(tmp_path: Path) -> None:
    asked, batch = asked_of(Fixed(), tmp_path)
    made = export_onnx(asked, batch, tmp_path / "b.onnx")
    assert made.inputs == {"x": "float32 (2, 4)"}
    onnx_of(tmp_path / "b.onnx")


@needs_onnx
def test_what_cannot_be_is_said_before_anything_is_written(tmp_path: Path) -> None:
    images, numbers = packaged("convnet", tmp_path), tmp_path / "numbers"
    numbers.mkdir()
    table = packaged("mlp", numbers)
    (tmp_path / "b.onnx").mkdir()
    before = sorted(tmp_path.rglob("*"))
    batch, path = images.selftest[0], tmp_path / "a.onnx"
    for opset in (1, 99):
        with pytest.raises((SettingsError, ModelError)):
            export_onnx(images.asked, batch, path, opset=opset)
    assert export_onnx(images.asked, batch, path, opset=18).opset == 18
    path.unlink()
    for wrong in (tmp_path / "a.tflite", tmp_path / "a", tmp_path / "lost" / "a.onnx", tmp_path / "b.onnx"):
        with pytest.raises(SettingsError):
            export_onnx(images.asked, batch, wrong)
        with pytest.raises(SettingsError):
            export_program(images.asked, batch, wrong)
    with pytest.raises(SettingsError, match="nothing here that a graph could prepare"):
        export_onnx(table.asked, table.selftest[0], path, preprocess=True)
    object.__setattr__(table.contract, "loss", "mse")
    with pytest.raises(SettingsError, match="no probabilities"):
        export_onnx(table.asked, table.selftest[0], path, probabilities=True)
    with pytest.raises(ModelError, match="transformers does not know"):
        export_transformers(images, tmp_path / "folder")
    assert sorted(tmp_path.rglob("*")) == before


def test_without_the_packages_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = packaged("graph", tmp_path)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(SettingsError) as error:
        export_onnx(held.asked, held.selftest[0], tmp_path / "a.onnx")
    assert 'pip install "torchkeep[onnx]"' in error.value.fix
    export_program(held.asked, held.selftest[0], tmp_path / "a.pt2")


@pytest.mark.skipif(sys.platform == "win32", reason="has no limit of a file's size")
def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    import resource

    held = packaged("graph", tmp_path)
    before = sorted(tmp_path.iterdir())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))  # no file beyond: as a disk that is full
    try:
        for write in (lambda: export_program(held.asked, held.selftest[0], tmp_path / "a.pt2"),
                      lambda: write_tensors(held.model, tmp_path / "a.pt", "state-dict"),
                      lambda: write_tensors(held.model, tmp_path / "a.safetensors", "safetensors"),
                      lambda: unpack(tmp_path / "a.tkp", tmp_path / "folder")):  # fmt: skip
            with pytest.raises(StorageError):
                write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(tmp_path.iterdir()) == before


def test_transformers_loads_its_own_model_from_the_folder(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    held = packaged("bert", tmp_path)
    made = export_transformers(held, tmp_path / "folder")
    assert {"config.json", "model.safetensors"} <= {file.name for file in made.path.iterdir()}
    auto = transformers.AutoModelForSequenceClassification
    again, info = auto.from_pretrained(made.path, output_loading_info=True)
    assert (len(info["missing_keys"]), len(info["unexpected_keys"])) == (0, 0)
    batch, expected = held.selftest
    with torch.no_grad():
        found = again.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"].long()).logits
    torch.testing.assert_close(found, expected)
    assert again.config.id2label == {0: "ants", 1: "bees"}
    with pytest.raises(SettingsError, match="something else"):
        export_transformers(held, made.path)


def hub_images(root: Path) -> Contents:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=8, patch_size=4
    )  # fmt: skip
    config.save_pretrained(root / "vit")
    (root / "vit" / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5], "size": {"height": 8}}')
    return contents_of(root, image_files(root), f"hf:{root / 'vit'}")


def test_how_images_are_prepared_goes_with_a_model_of_transformers(tmp_path: Path) -> None:
    held = load_package(write_package(hub_images(tmp_path), tmp_path / "a.tkp").path, device="cpu")
    made = export_transformers(held, tmp_path / "folder")
    assert made.largest_difference < 1e-5
    stated = (tmp_path / "vit" / "preprocessor_config.json").read_bytes()
    assert (made.path / "preprocessor_config.json").read_bytes() == stated
    assert export_program(held.asked, held.selftest[0], tmp_path / "a.pt2").inputs == {
        "image": "float32 (batch, 3, 8, 8)"
    }


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.second(self.first(x))
        return found


def test_plain_tensors_are_read_by_torch_and_safetensors(tmp_path: Path) -> None:
    model = Tied().eval()
    expected = model.state_dict()
    write_tensors(model, tmp_path / "a.pt", "state-dict")
    write_tensors(model, tmp_path / "a.safetensors", "safetensors")
    read = torch.load(tmp_path / "a.pt", weights_only=True)
    for found in (read, safetensors.torch.load_file(tmp_path / "a.safetensors")):
        assert found.keys() == expected.keys()
        Tied().load_state_dict(found)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert read["second.weight"].data_ptr() == read["first.weight"].data_ptr()


def test_a_package_becomes_a_folder_with_the_same_identity(tmp_path: Path) -> None:
    for form in ("image", "code"):
        (root := tmp_path / form).mkdir()
        path = write_good(form, root, root / "a.tkp")
        folder = unpack(path, root / "folder")
        assert Archive.open(folder).identity == Archive.open(path).identity
        assert safetensors.torch.load_file(folder / "parameters.safetensors")
        assert not (root / "canary").exists()
        (root / "mine").mkdir()
        with pytest.raises(PackageError, match="something else"):
            unpack(path, root / "mine")
        damaged = bytearray(path.read_bytes())
        damaged[-2000] ^= 1
        (root / "b.tkp").write_bytes(damaged)
        with pytest.raises(PackageError):
            unpack(root / "b.tkp", root / "other")
        assert not (root / "other").exists()
    assert isinstance(load_package(tmp_path / "image" / "folder").model, nn.Module)
