"""What is to be trained, as the verbs hand it over: settings and objects, before anything is made or tried."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import nn

from ..contracts import Json, KeyedDataset
from ..data.cache import Wanted
from ..data.reading import OnBad
from ..model.build import Built
from .binding import Inputs, Keys
from .recipe import RunSettings
from .step import UserStep


@dataclass(frozen=True)
class Feeding:
    """How the samples are read: what ``Loader`` is told beside the data and their order."""

    workers: int | Literal["auto"] = "auto"
    last: Literal["keep", "drop"] = "keep"
    cache: Wanted = "off"
    on_bad: OnBad = "raise"
    bad_fraction: float = 0.01


@dataclass
class Work:
    """What is to be trained: settings, a model, data, and a program's own objects in place of names."""

    settings: RunSettings
    model: nn.Module
    train: KeyedDataset
    valid: KeyedDataset | None = None
    test: KeyedDataset | None = None
    batch_size: int = 32
    feeding: Feeding = Feeding()
    loss: Any = None
    metrics: Any = None
    optimizer: Any = None
    schedule: Any = None
    schedule_every: Literal["step", "epoch"] = "step"
    step: UserStep | None = None
    inputs: Inputs | None = None
    targets: Keys | None = None
    collate: Callable[[list[Any]], Any] | None = None
    load: Callable[[str], Any] = field(default=lambda name: None)
    is_recipe: bool = False
    weights: Any = None
    resolved: Json = None
    built: Built | None = None
    notes: list[tuple[str, str, str, str]] = field(default_factory=list)
    on_record: Sequence[Callable[[Json], Any]] = ()

    def fingerprints(self) -> dict[str, str]:
        """What names each split's content."""
        splits = {"train": self.train, "valid": self.valid, "test": self.test}
        return {name: data.fingerprint() for name, data in splits.items() if data is not None}


def describe_object(value: Any) -> Json:
    """A program's own object in words, for the record."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    name = getattr(value, "__qualname__", None) or type(value).__qualname__
    module = getattr(value, "__module__", None) or type(value).__module__
    return f"{module}.{name}"


def source_folder() -> Path:
    """Where the running program lies: its repository's commit belongs to the run."""
    import sys

    main = getattr(sys.modules.get("__main__"), "__file__", None)
    return Path(main).resolve().parent if main else Path.cwd()
