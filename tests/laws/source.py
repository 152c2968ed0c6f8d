"""The source of the house as trees, for the laws that are checked by reading it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PACKAGE = "torchkeep"
ROOT = Path(__file__).resolve().parents[2] / "src" / PACKAGE


@dataclass(frozen=True)
class Module:
    """One file: its dotted name within the package ("data.loader", "__init__" for the top), its path, text and tree."""

    name: str
    path: str
    text: str
    tree: ast.Module

    @property
    def is_package(self) -> bool:
        return self.path.endswith("__init__.py")


@dataclass(frozen=True)
class Import:
    """That one module needs another of the house; ``only_for_types`` if it stands under ``if TYPE_CHECKING``."""

    importer: str
    target: str
    where: str
    only_for_types: bool


@cache
def _parse(text: str, path: str) -> ast.Module:
    return ast.parse(text, filename=path)


def read_module(root: Path, path: Path) -> Module:
    relative = path.relative_to(root)
    parts = relative.with_suffix("").parts
    name = ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
    text = path.read_text(encoding="utf-8")
    return Module(name, relative.as_posix(), text, _parse(text, relative.as_posix()))


def read_house(root: Path = ROOT) -> list[Module]:
    """Every module under ``root``, the folder that holds the top ``__init__.py``."""
    return [read_module(root, path) for path in sorted(root.rglob("*.py"))]


def imports_of(module: Module, known: set[str]) -> Iterator[Import]:
    """What one module needs of the house, wherever in the file it says so: at the top, in a function, by name."""
    for node, only_for_types in _walk(module.tree, False):
        for target in _targets(node, module, known):
            yield Import(module.name, target, f"{module.path}:{getattr(node, 'lineno', 0)}", only_for_types)


def _walk(node: ast.AST, only_for_types: bool) -> Iterator[tuple[ast.AST, bool]]:
    yield node, only_for_types
    if isinstance(node, ast.If) and is_type_checking(node.test):
        for child in node.body:
            yield from _walk(child, True)
        for child in node.orelse:
            yield from _walk(child, only_for_types)
        return
    for child in ast.iter_child_nodes(node):
        yield from _walk(child, only_for_types)


def is_type_checking(test: ast.expr) -> bool:
    return dotted(test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}


def _targets(node: ast.AST, module: Module, known: set[str]) -> list[str]:
    if isinstance(node, ast.Import):
        return [_owner(alias.name.split("."), known) for alias in node.names if alias.name.split(".")[0] == PACKAGE]
    if isinstance(node, ast.ImportFrom):
        base = _base(node, module)
        return [] if base is None else [target for alias in node.names if (target := _named(base, alias.name, known))]
    if isinstance(node, ast.Call) and dotted(node.func).split(".")[-1] in {"import_module", "__import__"}:
        name = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else None
        return _by_name(name, module, known) if isinstance(name, str) else []
    return []


def _base(node: ast.ImportFrom, module: Module) -> list[str] | None:
    """The absolute name that ``from … import`` starts from, None where it is not of the house."""
    tail = node.module.split(".") if node.module else []
    if node.level == 0:
        return tail if tail[:1] == [PACKAGE] else None
    return [*_parent(module, node.level), *tail]


def _parent(module: Module, level: int) -> list[str]:
    parts = [PACKAGE] if module.name == "__init__" else [PACKAGE, *module.name.split(".")]
    drop = level - 1 if module.is_package else level
    return parts[: len(parts) - drop]


def _named(base: list[str], name: str, known: set[str]) -> str | None:
    if ".".join([*base, name][1:]) in known:
        return ".".join([*base, name][1:])
    if base == [PACKAGE] and name == "__version__":
        return None  # a fact that stands at the top and needs nothing
    return _owner(base, known)


def _by_name(name: str, module: Module, known: set[str]) -> list[str]:
    level = len(name) - len(name.lstrip("."))
    parts = [*_parent(module, level), *filter(None, name[level:].split("."))] if level else name.split(".")
    return [_owner(parts, known)] if parts[:1] == [PACKAGE] else []


def _owner(parts: list[str], known: set[str]) -> str:
    """The longest known module that an absolute name begins with; a name that no file has stays as it is."""
    name = ".".join(parts[1:])
    while name and name not in known and "." in name:
        name = name.rpartition(".")[0]
    return name or "__init__"


def dotted(node: ast.AST) -> str:
    """``a.b.c`` of a chain of attributes; what is no name at its start becomes "?"."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return "?"
