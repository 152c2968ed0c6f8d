"""A package gives back the model that went into it, bit for bit, to whoever has nothing but the package."""

from __future__ import annotations

import copy
import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from packaged import (
    Own,
    contents_of,
    image_contents,
    image_files,
    members_of,
    number_table,
    sounds,
    tensors_of,
    text_contents,
    text_table,
    write_good,
)
from torch import nn
from torch.nn import functional as F

import torchkeep as tk
from torchkeep.archive import Archive
from torchkeep.errors import ModelError, PackageError, StorageError
from torchkeep.model.build import BUILT_IN
from torchkeep.share.contract import Asked
from torchkeep.share.package import load_package, save_package, write_package
from torchkeep.tensors import tensor_sha256

BUILT: dict[str, tuple[Callable[[Path], dict[str, Any]], dict[str, Any]]] = {
    "convnet": (image_files, {"widths": [4, 6]}),
    "resnet18": (image_files, {"stem": "small"}),
    "mobilenet_v2": (image_files, {}),
    "vit": (image_files, {"width": 12, "depth": 2, "heads": 3}),
    "mlp": (number_table, {"hidden": [5], "waves": 2}),
    "textconv": (text_table, {"width": 6, "channels": 4}),
    "transformer": (text_table, {"width": 8, "depth": 2, "heads": 2}),
    "audioconv": (sounds, {"widths": [4, 6]}),
}


def assert_same(model: nn.Module, again: nn.Module) -> None:
    assert tensor_sha256(dict(model.state_dict())) == tensor_sha256(dict(again.state_dict()))
    assert not again.training


@pytest.mark.parametrize("name", BUILT)
def test_a_model_that_is_known_by_name_comes_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    assert BUILT.keys() == BUILT_IN.keys()
    data, args = BUILT[name]
    contents = contents_of(tmp_path, data(tmp_path), name, args=args)
    found = load_package(write_package(contents, tmp_path / "a.tkp").path)
    assert (found.name, found.architecture["kind"], found.architecture["name"]) == (name, "built-in", name)
    assert type(found.model) is type(contents.model)
    assert_same(contents.model, found.model)
    assert found.contract.schema == contents.contract.schema
    assert found.contract.classes == ("ants", "bees")
    batch, expected = found.selftest
    assert torch.equal(Asked(contents.model, contents.contract, "cpu")(batch), expected)
    assert torch.equal(found.asked(batch), expected)
    again = write_package(contents, tmp_path / "b.tkp")
    assert again.path.read_bytes() == found.path.read_bytes()


SAVE = """
import sys
from pathlib import Path
from packaged import write_good
for form in ("image", "text", "graph", "hub"):
    write_good(form, Path(sys.argv[1]), Path(sys.argv[1]) / f"{form}-again.tkp")
"""
ASK = """
import sys, torch, torchkeep as tk
assert "packaged" not in sys.modules
found = tk.load_package(sys.argv[1])
assert "packaged" not in sys.modules and "transformers" not in sys.modules
torch.save(found.model(torch.load(sys.argv[2])), sys.argv[3])
"""


def child(program: str, *words: object, place: Path | None = None) -> None:
    environment = {**os.environ, "PYTHONPATH": str(place or ""), "OMP_NUM_THREADS": "1"}
    words = (sys.executable, "-W", "ignore", "-c", program, *map(str, words))
    subprocess.run(words, check=True, env=environment, stdout=subprocess.DEVNULL)


def test_the_same_model_is_the_same_bytes_in_another_process(tmp_path: Path) -> None:
    child(SAVE, tmp_path, place=Path(__file__).parent)
    for form in ("image", "text", "graph", "hub"):
        good = write_good(form, tmp_path, tmp_path / f"{form}.tkp")
        renamed = members_of(tmp_path / f"{form}-again.tkp")
        assert {name: bytes(data) for name, data in members_of(good).items() if name != "README.md"} == {
            name: bytes(data)
            for name, data in renamed.items()
            if name != "README.md"  # it has the package's name
        }


def test_a_model_of_ones_own_loads_without_its_class(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model, x = Own(), torch.randn(5, 4)
    path = save_package(model, tmp_path / "a.tkp", x[:2], classes=("ants", "bees"))
    torch.save(x, tmp_path / "x.pt")
    child(ASK, path, tmp_path / "x.pt", tmp_path / "y.pt")
    assert torch.equal(torch.load(tmp_path / "y.pt"), model(x))
    assert load_package(path).contract.classes == ("ants", "bees")


TIED = """
from torch import nn


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.out = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, ids):
        return self.out(self.embedding(ids))


class Fickle(Tied):
    def forward(self, ids):
        return super().forward(ids) if ids.sum() > 0 else super().forward(ids + 1)
"""


@pytest.mark.parametrize("kind", ["graph", "code"])
def test_a_parameter_of_two_names_stays_one(kind: str, tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(TIED)
    space: dict[str, Any] = {}
    exec(TIED, space)
    name = "Tied" if kind == "graph" else "Fickle"
    model, ids = space[name](), torch.arange(6).view(2, 3)
    path = save_package(model, tmp_path / "a.tkp", ids, code=f"{tmp_path / 'net.py'}:{name}")
    assert len(tensors_of(path)) == 1
    found = load_package(path, trust_code=hashlib.sha256(TIED.encode()).hexdigest())
    assert found.architecture["kind"] == kind
    assert len(list(found.model.parameters())) == 1
    assert torch.equal(found.model(ids), model(ids))
    if kind == "code":  # a graph has every tensor under one name
        assert found.model.get_parameter("embedding.weight") is found.model.get_parameter("out.weight")


def test_half_precision_stays_half(tmp_path: Path) -> None:
    model = Own().bfloat16()
    found = load_package(save_package(model, tmp_path / "a.tkp", torch.randn(2, 4).bfloat16()))
    assert_same(model, found.model)
    contents = text_contents(tmp_path)
    contents.model.bfloat16()
    assert contents.form is not None
    contents.form[0]["dtype"] = "bfloat16"
    again = load_package(write_package(contents, tmp_path / "b.tkp").path)
    assert again.architecture["kind"] == "built-in"
    assert_same(contents.model, again.model)
    for kept in (found, again):
        assert {tensor.dtype for tensor in kept.model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("form", ["image", "graph"])
def test_a_model_can_be_trained_further(form: str, tmp_path: Path) -> None:
    path = write_good(form, tmp_path, tmp_path / "a.tkp")
    found, before = load_package(path), path.read_bytes()
    (x,) = found.selftest[0].values()
    optimizer = torch.optim.SGD(found.model.parameters(), 0.1)
    old = tensor_sha256(dict(found.model.state_dict()))
    assert all(parameter.requires_grad for parameter in found.model.parameters())
    F.cross_entropy(found.model.train()(x.float()), torch.zeros(len(x), dtype=torch.int64)).backward()
    optimizer.step()
    assert tensor_sha256(dict(found.model.state_dict())) != old
    assert path.read_bytes() == before
    assert_same(load_package(path).model, load_package(path).model)


def test_a_folder_is_the_same_package_and_others_read_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    contents = image_contents(tmp_path)
    file = write_package(contents, tmp_path / "a.tkp")
    folder = write_package(contents, tmp_path / "a", folder=True)
    assert load_package(file.path).identity == load_package(folder.path).identity == folder.identity
    held = safetensors.torch.load_file(tmp_path / "a" / "parameters.safetensors")
    assert tensor_sha256(held) == tensor_sha256(dict(contents.model.state_dict()))
    fresh = copy.deepcopy(contents.model)
    fresh.load_state_dict(held)


# --- what only a base has


def trained(model: nn.Module) -> nn.Module:
    """The same with another head."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.get_parameter("second.bias").add_(1)
    return model


@pytest.mark.parametrize("kind", ["pth", "dict", "package"])
def test_a_delta_is_small_and_gives_the_same_bits(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    first = Own()
    first.first, first.second = nn.Linear(4, 20_000), nn.Linear(20_000, 2)
    last, x = trained(first), torch.randn(2, 4)
    torch.save(first.state_dict(), tmp_path / "base.pth")
    whole = save_package(first, tmp_path / "base.tkp", x)
    delta = save_package(last, tmp_path / "delta.tkp", x, base=tmp_path / "base.pth")
    assert delta.stat().st_size < whole.stat().st_size / 50
    assert list(tensors_of(delta)) == ["second.bias"]
    bases: dict[str, Any] = {"pth": tmp_path / "base.pth", "dict": first.state_dict(), "package": whole}
    found = load_package(delta, base=bases[kind])
    assert_same(last, found.model)
    assert torch.equal(found.model(x), last(x))
    with pytest.raises(PackageError, match="needs its base"):
        load_package(delta)
    other = {name: tensor + 1 for name, tensor in first.state_dict().items()}
    with pytest.raises(PackageError, match="not the base"):
        load_package(delta, base=other)
    torch.save(other, tmp_path / "other.pth")
    with pytest.raises(PackageError, match="nothing in this model"):
        save_package(first, tmp_path / "no.tkp", x, base=tmp_path / "other.pth")
    assert not (tmp_path / "no.tkp").exists()


# --- code, and what differs where it is loaded


def test_code_is_carried_and_runs_by_its_hash(tmp_path: Path) -> None:
    path = write_good("code", tmp_path, tmp_path / "a.tkp")
    trusted = hashlib.sha256((tmp_path / "net.py").read_bytes()).hexdigest()
    kept = Archive.open(path)
    assert bytes(kept.read("code/net.py")) == (tmp_path / "net.py").read_bytes()
    (tmp_path / "net.py").unlink()
    found = load_package(path, trust_code=trusted)
    assert found.architecture["sha256"] == trusted
    assert tensor_sha256(dict(found.model.state_dict())) == tensor_sha256(tensors_of(path))


def test_a_torchkeep_that_computes_otherwise_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_good("text", tmp_path, tmp_path / "a.tkp")
    load_package(path)
    monkeypatch.setattr("torchkeep.model.text.F.relu", F.tanh)
    with pytest.raises(PackageError, match="answers otherwise"):
        load_package(path)


@pytest.mark.skipif(sys.platform == "win32", reason="has no limit of a file's size")
def test_nothing_is_written_where_it_cannot_be(tmp_path: Path) -> None:
    import resource

    model, x, path = Own(), torch.randn(2, 4), tmp_path / "there" / "a.tkp"
    path.parent.mkdir()
    good = save_package(model, path, x).read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for folder in (False, True):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # no file beyond: as a disk that is full
        try:
            with pytest.raises(StorageError):
                save_package(trained(model), path.with_name("b") if folder else path, x, folder=folder)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert path.read_bytes() == good
        assert [file.name for file in path.parent.iterdir()] == ["a.tkp"]
    with torch.no_grad():
        model.second.bias[0] = torch.nan
    with pytest.raises(ModelError, match="NaN"):
        save_package(model, path.with_name("b.tkp"), x)
    for metrics in ({"accuracy": "high"}, {"accuracy": None}):
        with pytest.raises(PackageError, match="no metrics"):
            save_package(Own(), path.with_name("b.tkp"), x, metrics=metrics)  # type: ignore[arg-type]
    assert [file.name for file in path.parent.iterdir()] == ["a.tkp"]


def test_what_is_said_of_it_is_kept(tmp_path: Path) -> None:
    path = tk.save_package(Own(), tmp_path / "a.tkp", torch.randn(2, 4), metrics={"accuracy": 0.5}, name="insects",
                           classes=("ants", "bees"), loss="cross_entropy")  # fmt: skip
    found = tk.load_package(str(path))
    assert (found.name, found.metrics, found.provenance) == ("insects", {"accuracy": 0.5}, {})
    assert (found.contract.loss, found.contract.classes) == ("cross_entropy", ("ants", "bees"))
    assert "insects" in found.card
    (batch,) = found.contract.reader.batches(torch.randn(3, 4), 4)
    assert batch.batch is not None
    assert found.asked(batch.batch).shape == (3, 2)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.out = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
        self.out.weight = self.words.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.out(self.words(ids).mean(1))
        return found


def test_a_tied_parameter_of_a_graph_is_one_and_has_each_of_its_names(tmp_path: Path) -> None:
    model = Tied()
    path = save_package(model, tmp_path / "tied.tkp", torch.randint(0, 9, (2, 5)))
    held = load_package(path).model
    assert set(held.state_dict()) == set(model.state_dict())
    assert len(list(held.parameters())) == 1
    model.load_state_dict(held.state_dict())
    assert held.get_parameter("out.weight") is held.get_parameter("words.weight")
