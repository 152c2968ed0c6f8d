"""From a recipe's ``[data]`` section to datasets: what each name means, and what is checked before anything is read."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, field_validator, model_validator

from ..contracts import KeyedDataset
from ..errors import DataError, TorchkeepError, nearest
from ..settings import Settings
from ..usercode import CodeReference, is_reference, line_in, read_reference
from .augment import check_augmentations
from .images import ImageFolder, ImageTable
from .splits import split
from .tables import PARQUET, Table, column_names

SplitName = Literal["train", "valid", "test"]
LoadFunction = Callable[[CodeReference], Callable[..., Any]]

_TABLES = (".csv", ".tsv", *PARQUET)


class DataSettings(Settings):
    """Where the samples come from and how they are made into batches."""

    train: str
    """Training data: a folder with class folders, a .csv or .parquet file, or file.py:function."""
    valid: str | None = None
    """Validation data, named in the same way."""
    valid_fraction: float | None = Field(None, gt=0, lt=1)
    """Instead of ``valid``: the fraction of the training data that is set apart, in each class alike."""
    test: str | None = None
    """Test data, which training never sees."""
    image_size: int | None = Field(None, gt=0)
    """Side of the square images in pixels; without it all images must have one size."""
    channels: Literal[1, 3] = 3
    """3 for colour, 1 for grey."""
    mean: list[float] | None = None
    """Mean of each channel, in units where white is 1; 0.5 where nothing is said."""
    std: list[float] | None = None
    """Standard deviation of each channel, in units where white is 1; 0.5 where nothing is said."""
    augment: list[str] = Field(default_factory=list)
    """Augmentations of the training images, in order."""
    image: str = "image"
    """Column of a table that holds images or names of image files."""
    label: str | None = None
    """Column of a table of images that holds the labels; "label" where nothing is said."""
    target: str | None = None
    """Column of a table of numbers that is to be predicted."""
    drop: list[str] = Field(default_factory=list)
    """Columns of a table of numbers that are left out."""
    batch_size: int = Field(32, gt=0)
    """Samples of one step, on each rank."""
    workers: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    """Who reads the samples: 0 for the training process itself, or a number of workers."""
    last: Literal["keep", "drop"] = "keep"
    """Whether a last batch that is not full is used."""

    @field_validator("augment")
    @classmethod
    def _known_augmentations(cls, names: list[str]) -> list[str]:
        check_augmentations(names, "data.augment")
        return names

    @model_validator(mode="after")
    def _fit_together(self) -> DataSettings:
        if self.valid is not None and self.valid_fraction is not None:
            raise ValueError("data.valid or data.valid_fraction, not both")
        for name, numbers in (("mean", self.mean), ("std", self.std)):
            if numbers is not None and len(numbers) not in (1, self.channels):
                raise ValueError(f"data.{name} with 1 or {self.channels} numbers, as data.channels says")
        if self.std is not None and min(self.std) <= 0:
            raise ValueError("data.std above 0")
        return self


@dataclass(frozen=True)
class DataSplits:
    """The data of a run; ``valid`` and ``test`` are without augmentation."""

    train: KeyedDataset
    valid: KeyedDataset | None = None
    test: KeyedDataset | None = None


def open_data(settings: DataSettings, base: Path, seed: int, load: LoadFunction | None = None) -> DataSplits:
    """All data that the settings name. Names are relative to ``base``, the recipe's folder.

    ``load`` runs a file of code and returns its function; without it a source that names code is refused.
    Raises:  DataError, ModelError for code that is missing or fails
    """
    train = open_source(settings, settings.train, base, train=True, load=load)
    valid = test = None
    if settings.valid_fraction is not None:
        train, valid = split(train, settings.valid_fraction, seed)
    elif settings.valid is not None:
        valid = open_source(settings, settings.valid, base, like=train, train=False, load=load, split_name="valid")
    if settings.test is not None:
        test = open_source(settings, settings.test, base, like=train, train=False, load=load, split_name="test")
    return DataSplits(train, valid, test)


def open_source(
    settings: DataSettings,
    source: str,
    base: Path,
    *,
    like: KeyedDataset | None = None,
    train: bool,
    load: LoadFunction | None = None,
    split_name: SplitName | None = None,
) -> KeyedDataset:
    """One dataset by its name; only ``train`` is augmented, and ``like`` is the training data of the others.

    Raises:  DataError for a name that means nothing here, or a path that does not exist
    """
    if is_reference(source):
        return _open_code(source, base, load, split_name or ("train" if train else "valid"))
    path = base / Path(source).expanduser()
    if ":" in source and not path.exists():
        raise _unknown_source(source, "a name with ':'")
    if not path.exists():
        raise _missing(path, source)
    opened = _open_path(settings, path, source, like, train)
    return cast(KeyedDataset, opened)


def _open_path(settings: DataSettings, path: Path, source: str, like: KeyedDataset | None, train: bool) -> Any:
    images: dict[str, Any] = {
        "image_size": settings.image_size,
        "channels": settings.channels,
        "augment": settings.augment if train else (),
        "mean": settings.mean,
        "std": settings.std,
        "like": like,
    }
    if path.is_dir():
        return ImageFolder(path, **images)
    if path.suffix.lower() not in _TABLES:
        raise _unknown_source(source, f"a file that ends in {path.suffix!r}")
    if _has_images(path, settings.image):
        return ImageTable(path, image=settings.image, label=settings.label or "label", **images)
    if settings.target is None:
        raise _no_target(path, settings)
    return Table(path, settings.target, like=like, drop=settings.drop)


def _has_images(path: Path, name: str) -> bool:
    if name not in column_names(path):
        return False
    if path.suffix.lower() not in PARQUET:
        return True
    kind = pq.read_schema(path).field(name).type
    is_bytes = pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
    return bool(is_bytes or pa.types.is_struct(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _open_code(source: str, base: Path, load: LoadFunction | None, split_name: SplitName) -> KeyedDataset:
    from .foreign import as_dataset

    reference = read_reference(source, base)
    if load is None:
        raise DataError(
            "this source names code that may not run here",
            where=source,
            got=f"code in {reference.path}",
            expected="a folder or a table",
        )
    function = load(reference)
    try:
        made = function(split=split_name) if _takes_split(function) else function()
    except TorchkeepError:
        raise
    except Exception as error:
        raise DataError(
            "this function gives no data",
            where=f"{source}{line_in(error, reference.path)}",
            got=f"{type(error).__name__}: {error}",
            expected="a function that takes nothing, or split, and gives a dataset",
        ) from error
    return as_dataset(made)


def _takes_split(function: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a callable made in C says nothing of its parameters
        return False
    return any(found.name == "split" or found.kind is found.VAR_KEYWORD for found in parameters)


def _missing(path: Path, source: str) -> DataError:
    near = nearest(path.name, [found.name for found in path.parent.iterdir()]) if path.parent.is_dir() else ""
    return DataError(
        "the data are missing",
        where=source,
        got=f"no file or folder {path}",
        expected="a path relative to the recipe's folder",
        fix=near or "mend the path in the recipe, or give it with --set",
    )


def _unknown_source(source: str, got: str) -> DataError:
    return DataError(
        "this is no source of data",
        where=source,
        got=got,
        expected=f"a folder with class folders, a table ({', '.join(_TABLES)}), or file.py:function",
    )


def _no_target(path: Path, settings: DataSettings) -> DataError:
    names = column_names(path)
    near = nearest(settings.image, names)
    return DataError(
        "the target of this table is not named",
        where=path,
        got=f"columns {', '.join(names)}",
        expected="data.target for a table of numbers, or data.image for a table of images",
        fix=f'target = "{names[-1]}" if that is what is to be predicted' + (f"; data.image: {near}" if near else ""),
    )
