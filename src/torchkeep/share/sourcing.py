"""Sources of this house as a script can hold them: with what they need, with short docstrings, without its errors."""

from __future__ import annotations

import ast
import builtins
import inspect
import re
import sys
from collections.abc import Iterator, Sequence
from types import FunctionType, ModuleType
from typing import Any

_NAMED_FOR_TYPE = re.compile(r"(\w+): Tensor = (.*)\n +return \1$", re.MULTILINE)
_HOUSE = __name__.partition(".")[0]
_STANDARD = ("collections", "collections.abc", "itertools", "pathlib", "typing", "zlib")
_MODULES = {
    "copy": "copy", "csv": "csv", "gzip": "gzip", "importlib": "importlib.util", "json": "json", "math": "math",
    "random": "random", "re": "re", "unicodedata": "unicodedata", "cv2": "cv2", "np": "numpy as np",
    "pq": "pyarrow.parquet as pq", "scipy": "scipy.fft", "soundfile": "soundfile", "torch": "torch",
}  # fmt: skip
_MEMBERS = {
    "Counter": "collections", "Iterable": "collections.abc", "Sequence": "collections.abc",
    "zip_longest": "itertools", "Path": "pathlib", "Any": "typing", "Literal": "typing", "crc32": "zlib",
    "load_file": "safetensors.torch", "Tensor": "torch", "nn": "torch", "functional as F": "torch.nn",
}  # fmt: skip


def written_out(wanted: Sequence[Any]) -> str:
    """Classes and functions of this house as one text: the constants that they need, then each after what it needs."""
    constants: dict[str, None] = {}
    blocks: dict[str, str] = {}
    for thing in wanted:
        _gather(thing, constants, blocks)
    return "\n\n".join(["\n".join(constants), *blocks.values()] if constants else blocks.values())


def _gather(thing: Any, constants: dict[str, None], blocks: dict[str, str]) -> None:
    module, text = sys.modules[thing.__module__], _plain(inspect.getsource(thing))
    assigned = _assigned(module)
    for name in _names(text):
        value = getattr(module, name, None)
        if isinstance(value, type | FunctionType) and value.__module__.startswith(f"{_HOUSE}."):
            if value is not thing and name not in blocks:
                _gather(value, constants, blocks)
        elif name in assigned:
            _gather_constant(name, assigned, constants)
    blocks.setdefault(thing.__name__, text)


def _gather_constant(name: str, assigned: dict[str, str], constants: dict[str, None]) -> None:
    for needed in _names(assigned[name]):
        if needed in assigned and assigned[needed] != assigned[name]:
            _gather_constant(needed, assigned, constants)
    constants[assigned[name]] = None


def _assigned(module: ModuleType) -> dict[str, str]:
    """The source of each constant of a module, by its name."""
    source = inspect.getsource(module)
    found: dict[str, str] = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign):
            text = _plain("\n".join(source.splitlines()[node.lineno - 1 : node.end_lineno]))
            found |= {name.id: text for target in node.targets for name in ast.walk(target)
                      if isinstance(name, ast.Name)}  # fmt: skip
    return found


def _plain(source: str) -> str:
    """A source with the first line of each docstring, and without what raises errors of this house."""
    lines = [line.partition("  # fmt:")[0].partition("  # type:")[0] for line in source.rstrip().splitlines()]
    for node in sorted(ast.walk(ast.parse(source)), key=lambda node: -getattr(node, "lineno", 0)):
        first, last = getattr(node, "lineno", 0) - 1, getattr(node, "end_lineno", 0)
        if isinstance(node, ast.If) and _refuses(node):
            del lines[first:last]
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and last - first > 1:
            lines[first:last] = [f'{lines[first]}"""']
    return _NAMED_FOR_TYPE.sub(r"return \2", "\n".join(lines))


def _refuses(node: ast.If) -> bool:
    end = node.body[-1]
    raised = end.exc.func if isinstance(end, ast.Raise) and isinstance(end.exc, ast.Call) else None
    return isinstance(raised, ast.Name) and raised.id not in vars(builtins)


def _names(text: str) -> Iterator[str]:
    found = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)]
    own = {node.id for node in found if isinstance(node.ctx, ast.Store)}
    return (node.id for node in found if node.id not in own)


def imports_of(text: str) -> str:
    """The imports that a script needs, in the order that is usual: its own library's, then those of others."""
    used = set(_names(text))
    modules = [module for name, module in _MODULES.items() if name in used]
    members: dict[str, list[str]] = {}
    for member, module in _MEMBERS.items():
        if member.rpartition(" ")[2] in used:
            members.setdefault(module, []).append(member)
    parts: dict[bool, list[str]] = {True: [], False: []}
    for module in sorted(modules):
        parts[module.partition(".")[0].partition(" ")[0] in sys.stdlib_module_names].append(f"import {module}")
    for module in sorted(members):
        parts[module in _STANDARD].append(f"from {module} import {', '.join(members[module])}")
    return "\n\n".join("\n".join(part) for part in (parts[True], parts[False]) if part)
