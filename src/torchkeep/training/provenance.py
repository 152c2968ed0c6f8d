"""Where a run comes from: code, environment, hardware, command."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from pathlib import Path

import torch

from ..contracts import Json

_MAX_DIFF_BYTES = 1 << 20
_MAX_FILE_BYTES, _MAX_FILES_BYTES = 1 << 18, 1 << 22
_PACKAGES = ("torchkeep", "torch", "numpy", "safetensors", "pyarrow", "opencv-python-headless", "simplejpeg", "pillow",
             "transformers", "torchmetrics")  # fmt: skip


def code_state(folder: Path, runs: Path) -> Json:
    """The commit of the repository around ``folder``, its diff, and its untracked files by hash; None outside one.

    What lies in the folder of runs is no code.
    """
    commit = _git(folder, "rev-parse", "HEAD")
    top = _git(folder, "rev-parse", "--show-toplevel")
    if not top:
        return None
    diff = _git(folder, "diff", "HEAD", "--no-color") if commit else ""
    untracked = _git(folder, "ls-files", "--others", "--exclude-standard", "-z", str(top))
    inside = runs.absolute()
    names = [name for name in untracked.split("\0") if name and not (folder / name).absolute().is_relative_to(inside)]
    names = names[:1000]
    return {
        "commit": commit or None,
        "diff": diff if len(diff) <= _MAX_DIFF_BYTES else diff[:_MAX_DIFF_BYTES],
        "diff_is_whole": len(diff) <= _MAX_DIFF_BYTES,
        "untracked": {name: _sha256(folder / name) for name in names},
    }


def _git(folder: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.decode("utf-8", "replace").strip() if done.returncode == 0 else ""


def _sha256(path: Path) -> str | None:
    try:
        if path.stat().st_size > _MAX_DIFF_BYTES:
            return None
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None


def untracked_files(folder: Path, code: Json) -> Iterator[tuple[str, bytes]]:
    """What no commit holds of the code: the small untracked files that are text, by name."""
    left = _MAX_FILES_BYTES
    for name, digest in (code or {}).get("untracked", {}).items():
        path = folder / name
        try:
            if digest is None or path.stat().st_size > min(left, _MAX_FILE_BYTES):
                continue
            data = path.read_bytes()
            data.decode()
        except (OSError, UnicodeDecodeError):
            continue
        left -= len(data)
        yield name, data


class EnvironmentLock:
    """Every installed package, looked up on the thread that asks for it."""

    def settle(self, media: object) -> dict[str, Json]:
        return {"environment": {**environment(), "lock": list(_installed())}}


@cache
def _installed() -> tuple[str, ...]:
    # by the names of their folders: to read 200 descriptions takes importlib two thirds of a second
    found: dict[str, str] = {}
    for place in sys.path:
        with contextlib.suppress(OSError):
            for folder in sorted(Path(place).glob("*.dist-info")):
                name, _, version = folder.name.removesuffix(".dist-info").rpartition("-")
                found.setdefault(name, version)
    return tuple(f"{name}=={version}" for name, version in sorted(found.items()) if name)


def environment() -> Json:
    """Versions and hardware: what a person compares when two runs differ."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _cpu_name(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cuda": torch.version.cuda,
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
    }


@cache
def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def command() -> list[str]:
    """The command that began the run."""
    return list(sys.argv)
