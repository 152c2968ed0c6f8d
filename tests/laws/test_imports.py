"""The house: imports only go down, the wings never import one another, and nothing goes in a circle."""

from __future__ import annotations

import ast
import importlib
import shutil
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from source import ROOT, Import, Module, imports_of, read_house

# The reading order of the root: each may import only what stands before it.
READING_ORDER = [
    "errors",
    "packages",
    "contracts",
    "chance",
    "generators",
    "gradients",
    "files",
    "tensors",
    "archive",
    "folder",
    "settings",
    "usercode",
    "store",
]
WINGS = ["data", "model", "keep", "watch"]
ROOMS_BELOW = {
    **{wing: {"root", wing} for wing in WINGS},
    "training": {"root", *WINGS, "training"},
    "share": {"root", *WINGS, "training", "share"},
    "history": {"root", "watch"},
    "running": {"root", *WINGS, "training", "share"},
    "transfer": {"root", *WINGS, "training", "share", "running"},
    "api": {"root", *WINGS, "training", "share", "running"},
    "handing": {"root", *WINGS, "training", "share", "running", "api"},
}
TOP = {"cli", "cli_handing", "__init__", "__main__"}  # may import everything


def room_of(name: str) -> str:
    first = name.split(".")[0]
    return "root" if first in READING_ORDER else first


def is_allowed(found: Import) -> bool:
    importer, target = room_of(found.importer), room_of(found.target)
    if importer in TOP:
        return True
    if importer == "root":
        if found.only_for_types and found.importer == "contracts":
            return target == "root"
        return target == "root" and READING_ORDER.index(found.target) < READING_ORDER.index(found.importer)
    return target in ROOMS_BELOW.get(importer, set())


def is_placed(module: Module) -> bool:
    """Whether the house has a room for this file: the lists above, or a folder among them."""
    if module.path == f"{module.name}.py":
        return module.name in READING_ORDER or module.name in TOP or module.name in ROOMS_BELOW
    return room_of(module.name) in ROOMS_BELOW


def cycle_of(edges: list[Import]) -> list[str]:
    """One circle among the imports, empty where there is none."""
    sorter: TopologicalSorter[str] = TopologicalSorter()
    for edge in edges:
        sorter.add(edge.importer, edge.target)
    try:
        sorter.prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def re_exports(module: Module) -> list[str]:
    """Imports in the ``__init__`` of a room: only the top one hands names on."""
    if not module.is_package or module.name == "__init__":
        return []
    imports = [node for node in ast.walk(module.tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    return [f"{module.path}:{node.lineno} hands names on" for node in imports]


def violations(root: Path) -> list[str]:
    """Every breach of the house's order in the source under ``root``, as lines to read."""
    modules = read_house(root)
    known = {module.name for module in modules}
    edges = [edge for module in modules for edge in imports_of(module, known)]
    found = [f"{module.path} stands in no room" for module in modules if not is_placed(module)]
    found += [line for module in modules for line in re_exports(module)]
    found += [f"{edge.where} {edge.importer} imports {edge.target}" for edge in edges if not is_allowed(edge)]
    circle = cycle_of([edge for edge in edges if edge.importer not in TOP and not _is_exempt(edge)])
    return found + ([f"circle: {' → '.join(circle)}"] if circle else [])


def _is_exempt(edge: Import) -> bool:
    return edge.only_for_types and edge.importer == "contracts"


def test_imports_only_go_down() -> None:
    assert violations(ROOT) == []


def plant(folder: Path, files: dict[str, str]) -> list[str]:
    """What is found in a copy of the house after some lines were added, beyond what is found in it now."""
    copy = folder / "torchkeep"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns("__pycache__"))
    before = violations(copy)
    for name, text in files.items():
        path = copy / name
        path.parent.mkdir(parents=True, exist_ok=True)
        old = path.read_text(encoding="utf-8") if path.exists() else '"""Planted."""\n'
        path.write_text(f"{old}\n{text}\n", encoding="utf-8")
    return [line for line in violations(copy) if line not in before]


PLANTED = {
    "root upwards": ({"errors.py": "from .files import checksum"}, "errors imports files"),
    "root into a wing": ({"usercode.py": "from .data import loader"}, "usercode imports data"),
    "wing to wing, relative": ({"data/planted.py": "from ..watch.planted import x"}, "data.planted imports watch"),
    "wing to wing, absolute": ({"keep/planted.py": "import torchkeep.model.build"}, "keep.planted imports model"),
    "wing to wing, from the top": ({"watch/planted.py": "from .. import keep"}, "watch.planted imports keep"),
    "wing to wing, in a function": (
        {"model/planted.py": "def f():\n    from torchkeep.data import loader"},
        "model.planted imports data",
    ),
    "wing to wing, for types": (
        {"data/planted.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..model.build import x"},
        "data.planted imports model",
    ),
    "wing to wing, by a string": (
        {"data/planted.py": "import importlib\nimportlib.import_module('torchkeep.keep.checkpoint')"},
        "data.planted imports keep",
    ),
    "wing to wing, by a relative string": (
        {"data/planted.py": "import importlib\nimportlib.import_module('..keep.checkpoint', __package__)"},
        "data.planted imports keep",
    ),
    "wing to train": ({"keep/planted.py": "from ..training import recipe"}, "keep.planted imports training"),
    "train to share": ({"training/planted.py": "from ..share.package import x"}, "training.planted imports share"),
    "share to api": ({"api.py": "", "share/planted.py": "from .. import api"}, "share.planted imports api"),
    "api to cli": ({"cli.py": "", "api.py": "from . import cli"}, "api imports cli"),
    "wing to the top's names": ({"keep/planted.py": "from torchkeep import fit"}, "keep.planted imports __init__"),
    "contracts at run time": ({"contracts.py": "from .chance import ChanceKey"}, "contracts imports chance"),
    "a module in no list": ({"planted.py": "x = 1"}, "planted.py stands in no room"),
    "a folder in no list": ({"planted/__init__.py": ""}, "planted/__init__.py stands in no room"),
    "a wing that hands names on": ({"data/__init__.py": "from .loader import Loader"}, "data/__init__.py"),
    "a circle within a wing": (
        {"data/planted_a.py": "from .planted_b import x", "data/planted_b.py": "from . import planted_a"},
        "circle: ",
    ),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_breach_is_found(name: str, tmp_path: Path) -> None:
    files, expected = PLANTED[name]
    assert any(expected in line for line in plant(tmp_path, files))


HARMLESS = {
    "down": {"data/planted.py": "from ..errors import DataError\nfrom torchkeep import chance\nimport torchkeep.files"},
    "train brings the wings together": {
        "training/planted.py": "from ..errors import nearest\nfrom .. import data, keep"
    },
    "contracts for types": {
        "contracts.py": "if TYPE_CHECKING:\n    from .usercode import CodeReference",
    },
    "the version": {"watch/planted.py": "from .. import __version__"},
    "others' packages": {"data/planted.py": "import json, torch.utils.data\nfrom model import keep"},
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_is_allowed_is_not_found(name: str, tmp_path: Path) -> None:
    assert plant(tmp_path, HARMLESS[name]) == []


def test_no_room_hides_a_public_name() -> None:
    # importing a.b sets the attribute b of a: a room called as a verb would take the verb's place
    import pkgutil
    from types import ModuleType

    import torchkeep

    for found in pkgutil.walk_packages(torchkeep.__path__, "torchkeep."):
        if not found.name.endswith("__main__"):
            importlib.import_module(found.name)
    hidden = [name for name in torchkeep.__all__ if isinstance(getattr(torchkeep, name), ModuleType)]
    assert hidden == []
