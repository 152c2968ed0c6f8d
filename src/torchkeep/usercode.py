"""The only place that runs a file which the user names as ``file.py:function`` (law 10).

A recipe that the user gives may name code. Each file that ran is remembered by path and sha256 in this machine's list;
what a run's folder names runs again only if it is on that list unchanged, or if the caller gives its hash.
"""

from __future__ import annotations

import hashlib
import os
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from .errors import ModelError, UntrustedCodeError, nearest
from .files import write_durable


@dataclass(frozen=True)
class CodeReference:
    """A function within a file, and what the file's content was."""

    path: Path
    function: str
    sha256: str

    def to_json(self) -> dict[str, str]:
        return {"path": str(self.path), "function": self.function, "sha256": self.sha256}


def is_reference(name: str) -> bool:
    """Whether ``name`` has the form ``file.py:function``."""
    return ".py:" in name


def read_reference(name: str, base: Path) -> CodeReference:
    """Find what ``file.py:function`` names, relative to ``base``.

    Raises:  ModelError if there is no such file
    """
    file, _, function = name.rpartition(":")
    path = (base / file).resolve()
    if not path.is_file():
        raise ModelError(
            "this file of code is missing", where=name, got=f"no file {path}",
            expected="file.py:function, relative to the recipe",
            fix="mend the path in the recipe, or give it with --set",
        )  # fmt: skip
    return CodeReference(path, function, hashlib.sha256(path.read_bytes()).hexdigest())


def load_function(reference: CodeReference, *, remembers: bool = True) -> Callable[..., Any]:
    """Run the file and return the function. The caller has decided that it may run.

    Without ``remembers`` the file does not come onto this machine's list: where it lies has no meaning.

    Raises:  ModelError if the file fails, or has no such function
    """
    # the path too: a copy in another folder reads other files beside it
    identity = hashlib.sha256(f"{reference.path}|{reference.sha256}".encode("utf-8", "surrogateescape")).hexdigest()
    module_name = f"torchkeep_user_{reference.path.stem}_{identity[:12]}"
    if module_name not in sys.modules:
        module = types.ModuleType(module_name)
        module.__file__ = str(reference.path)
        sys.modules[module_name] = module
        try:
            # the bytes that were hashed, not what Python may have cached of them
            exec(compile(_bytes_of(reference), reference.path, "exec"), module.__dict__)  # noqa: S102
        except (Exception, SystemExit) as error:  # a script without a main guard may call sys.exit
            del sys.modules[module_name]
            line = line_in(error, reference.path)
            raise ModelError(
                "this file of code fails when it is run", where=f"{reference.path}{line}",
                got=f"{type(error).__name__}: {error}", expected="a file that can be imported",
            ) from error  # fmt: skip
    function = getattr(sys.modules[module_name], reference.function, None)
    if not callable(function):
        names = [name for name, value in vars(sys.modules[module_name]).items() if callable(value)]
        raise ModelError(
            "this file has no such function", where=reference.path, got=repr(reference.function),
            expected=f"one of {', '.join(n for n in names if not n.startswith('_')) or 'none that can be called'}",
            fix=nearest(reference.function, names),
        )  # fmt: skip
    if remembers:
        remember(reference)
    return function  # type: ignore[no-any-return]


def _bytes_of(reference: CodeReference) -> bytes:
    data = reference.path.read_bytes()
    if hashlib.sha256(data).hexdigest() != reference.sha256:
        raise UntrustedCodeError("this file changed while it was read", where=reference.path, fix="try again")
    return data


def remember(reference: CodeReference) -> None:
    """Put a file on this machine's list of code that its user has run."""
    known = _known()
    if known.get(str(reference.path)) == reference.sha256:
        return
    path = _list_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durable(path, orjson.dumps({**known, str(reference.path): reference.sha256}, option=orjson.OPT_INDENT_2))
    except Exception:
        # a read-only home costs a --trust-code later, not the training now
        return


def check_trusted(recorded: dict[str, str], trust: str | None) -> CodeReference:
    """Allow code that a run's folder names.

    Raises:  UntrustedCodeError unless this machine ran the same file before, or ``trust`` is its hash
    """
    path = Path(recorded["path"])
    name = f"{path.name}:{recorded['function']}"
    if not path.is_file():
        raise ModelError(
            "the run's code is missing", where=name, got=f"no file {path}", expected="the file it began with"
        )
    current = read_reference(f"{path}:{recorded['function']}", Path("/"))
    if trust == current.sha256:
        return current
    if current.sha256 == recorded["sha256"] and _known().get(str(path)) == current.sha256:
        return current
    changed = current.sha256 != recorded["sha256"]
    raise UntrustedCodeError(
        "this run names code that has changed since"
        if changed
        else "this run names code that never ran on this machine",
        where=path,
        got=f"sha256 {current.sha256}",
        expected=f"sha256 {recorded['sha256']}, run here before",
        fix=f"read the file; if you trust it: --trust-code {current.sha256}",
    )


def line_in(error: BaseException, path: Path) -> str:
    """ ", line 12": where in a file of code the error arose; empty where it arose elsewhere."""
    trace, line = error.__traceback__, ""
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(path):
            line = f", line {trace.tb_lineno}"
        trace = trace.tb_next
    if isinstance(error, SyntaxError) and error.lineno:
        line = f", line {error.lineno}"
    return line


def _list_path() -> Path:
    state = os.environ.get("XDG_STATE_HOME") or os.environ.get("LOCALAPPDATA") or Path.home() / ".local" / "state"
    return Path(state) / "torchkeep" / "code.json"


def _known() -> dict[str, str]:
    try:
        known = orjson.loads(_list_path().read_bytes())
    except (OSError, orjson.JSONDecodeError):
        return {}
    return known if isinstance(known, dict) else {}
