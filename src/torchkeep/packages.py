"""Packages that only some data or models need."""

from __future__ import annotations

import importlib
from typing import Any

from .errors import SettingsError


def package_of(name: str, extra: str, where: str = "") -> Any:
    """A package that an extra brings.

    Raises:  SettingsError naming the extra
    """
    try:
        return importlib.import_module(name)
    # soundfile brings a library of the system's, and says OSError; a torchvision of another torch says RuntimeError
    except (ImportError, OSError, RuntimeError) as error:
        raise SettingsError(
            f"this needs the package {name}", where=where or name, got=error, fix=f'pip install "torchkeep[{extra}]"'
        ) from error
