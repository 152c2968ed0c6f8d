"""From a recipe's ``[data]`` section to datasets: what each name means, and what is checked before anything is read."""

from __future__ import annotations

import inspect
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, field_validator, model_validator

from ..contracts import KeyedDataset
from ..errors import DataError, SettingsError, TorchkeepError, nearest
from ..settings import Settings
from ..usercode import CodeReference, is_reference, line_in, read_reference
from . import sounds
from .arrays import open_arrays
from .audio import AudioFolder, Clips
from .augment import NAMES as IMAGE_AUGMENTATIONS
from .dataset import whole
from .frames import PARQUET, TABLE_SUFFIXES, Form, column_names, is_table
from .hub import HubDataset, HubStream, is_hub_name, is_saved
from .images import IdxImages, ImageFolder
from .index import near_name
from .kinds import ENCODED, Kind, table_of
from .masking import NAMES as TEXT_AUGMENTATIONS
from .splits import split
from .tables import Table
from .text import TextBlocks, TextFolder, Texts

SplitName = Literal["train", "valid", "test"]
LoadFunction = Callable[[CodeReference], Callable[..., Any]]

_HUB_SPLITS = {"train": "train", "valid": "validation", "test": "test"}
_IDX = ("-ubyte", "-ubyte.gz", ".idx", ".idx.gz")
_NAMED_AT_MOST = 6
_LOOK_AT = 1000  # names of a folder, to see what it holds


class DataSettings(Settings):
    """Where the samples come from and how they are made into batches."""

    train: str
    """Training data: a folder, a table (.csv, .tsv, .parquet, .arrow, .jsonl), .npz, idx, hf:NAME, file.py:function."""
    valid: str | None = None
    """Validation data, named in the same way."""
    valid_fraction: float | None = Field(None, gt=0, lt=1)
    """Instead of ``valid``: the fraction of the training data that is set apart."""
    test: str | None = None
    """Test data, which training never sees."""
    test_fraction: float | None = Field(None, gt=0, lt=1)
    """Instead of ``test``: the fraction of all samples that is set apart, before ``valid_fraction``."""
    split_by: str = "label"
    """How fractions are set apart: "label" (each class alike), "random", "group:COLUMN", "time:COLUMN" (the latest)."""
    kind: Literal["auto", "image", "audio", "text", "table"] = "auto"
    """What the data are; "auto": by the files' endings, or by columns called image, audio or text."""
    format: Literal["auto", "csv"] = "auto"
    """"csv" for a table whose ending does not say so."""
    columns: list[str] = Field(default_factory=list)
    """Names of the columns of a .csv or .tsv that has no header."""
    image: str = "image"
    """Column of a table that holds images or names of image files."""
    audio: str | None = None
    """Column of a table that holds recordings or names of their files; "audio" where nothing is said."""
    text: str | None = None
    """Column of a table that holds texts; "text" where nothing is said."""
    label: str | None = None
    """Column that is to be predicted; "label" where nothing is said."""
    target: str | None = None
    """The same; a table of numbers needs it."""
    id: str | None = None
    """Column that names the samples; each name once."""
    separator: str | None = None
    """What stands between several labels in one cell, such as "|"; lists need none."""
    label_pattern: str | None = None
    """Regular expression whose group "label" finds the class in each file's name, in place of class folders."""
    follow_links: bool = False
    """Whether links may lead out of a data folder."""
    drop: list[str] = Field(default_factory=list)
    """Columns of a table of numbers that are left out."""
    categories: list[str] = Field(default_factory=list)
    """Columns of numbers that are names of something, such as a postal code."""
    masks: str | None = None
    """Segmentation: name of the folder of masks that stands beside a folder of images."""
    mask: str | None = None
    """Segmentation: column of a table that holds masks or names of their files."""
    mask_classes: list[str] = Field(default_factory=list)
    """Names of the classes in the masks, beginning with 0; 255 is no class."""
    image_size: int | None = Field(None, gt=0)
    """Side of the square images in pixels; without it all images must have one size."""
    crop_fraction: float | None = Field(None, gt=0, le=1)
    """How much of the short side the middle square has, where nothing crops at random; 0.875 is 224 of 256."""
    channels: Literal[1, 3] = 3
    """3 for colour, 1 for grey."""
    bits: Literal[8, 16] = 8
    """16 keeps images of 16 bits as they are."""
    mean: list[float] | None = None
    """Mean of each channel, in units where white is 1; 0.5 where nothing is said."""
    std: list[float] | None = None
    """Standard deviation of each channel, in units where white is 1; 0.5 where nothing is said."""
    sample_rate: int | None = Field(None, gt=0)
    """Rate of recordings in Hz, to which others are resampled; that of the first one where nothing is said."""
    audio_channels: Literal[1, 2, "mix"] = 1
    """Channels of recordings; "mix" averages several into one."""
    seconds: float | None = Field(None, gt=0)
    """Length that recordings are cut or filled up to; without it batches are padded to their longest."""
    features: Literal["log_mel", "waveform"] = "log_mel"
    """What a model gets of a recording."""
    num_mels: int = Field(64, gt=0)
    """Bands of a log-mel."""
    tokenizer: str = "words"
    """"words" (learned from the training texts), "bytes", a tokenizer.json, or hf:NAME."""
    max_length: int = Field(512, gt=1)
    """Tokens at which a text is cut."""
    block_size: int | None = Field(None, gt=1)
    """Tokens of a block, for a language model: texts are joined and cut into blocks."""
    streaming: bool = False
    """Read hf:NAME as a stream, without an order by number."""
    length: int | None = Field(None, gt=0)
    """Samples of an epoch of a stream."""
    augment: list[str] = Field(default_factory=list)
    """Augmentations of the training images, recordings or texts, in order."""
    weights: Literal["balanced"] | None = None
    """"balanced": samples are drawn so that each class comes as often."""
    batch_size: int = Field(32, gt=0)
    """Samples of one step, on each rank."""
    workers: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    """Who reads the samples: 0 for the training process itself, or a number of workers."""
    last: Literal["keep", "drop"] = "keep"
    """Whether a last batch that is not full is used."""
    cache: Literal["off", "ram", "disk", "auto"] = "off"
    """Where decoded images are kept; with random_resized_crop at 8/7 of image_size, so that pixels may differ."""
    on_bad: Literal["raise", "substitute", "mask"] = "raise"
    """A sample that cannot be read: an error, another one in its place, or none in its place."""
    bad_fraction: float = Field(0.01, ge=0, le=1)
    """The fraction of all samples that may be bad before the run ends; one may always be."""

    @field_validator("augment")
    @classmethod
    def _known_augmentations(cls, names: list[str]) -> list[str]:
        known = list(dict.fromkeys([*IMAGE_AUGMENTATIONS, *sounds.NAMES, *TEXT_AUGMENTATIONS]))
        for name in names:
            if name not in known:
                hint = nearest(name, known)
                raise ValueError(f"one of {', '.join(known)}; not {name!r}{' - ' + hint if hint else ''}")
        return names

    @model_validator(mode="after")
    def _fit_together(self) -> DataSettings:
        for given, fraction in (("valid", "valid_fraction"), ("test", "test_fraction")):
            if getattr(self, given) is not None and getattr(self, fraction) is not None:
                raise ValueError(f"data.{given} or data.{fraction}, not both")
        if self.test_fraction and not self.valid_fraction:
            raise ValueError("data.valid_fraction beside data.test_fraction")
        for name, numbers in (("mean", self.mean), ("std", self.std)):
            if numbers is not None and len(numbers) not in (1, self.channels):
                raise ValueError(f"data.{name} with 1 or {self.channels} numbers, as data.channels says")
        if self.std is not None and min(self.std) <= 0:
            raise ValueError("data.std above 0")
        return self

    @property
    def form(self) -> Form:
        return Form(self.format == "csv", tuple(self.columns), (self.text or "text",) if self.kind == "text" else ())

    def options_of(self, kind: Kind, base: Path, like: Any, train: bool) -> dict[str, Any]:
        """What a dataset of this kind is made with; texts take the tokenizer of the training data, ``like``."""
        if kind == "table":
            if self.augment:
                what, got = "tables of numbers have no augmentations", ", ".join(self.augment)
                raise SettingsError(what, where="data.augment", got=got, expected="none")
            return {"drop": self.drop, "categories": self.categories}
        augment = self.augment if train else ()
        if kind == "image":
            return {
                "image_size": self.image_size, "channels": self.channels, "bits": self.bits, "mean": self.mean,
                "std": self.std, "mask_classes": self.mask_classes, "augment": augment,
                "crop_fraction": self.crop_fraction,
            }  # fmt: skip
        if kind == "audio":
            return {
                "sample_rate": self.sample_rate, "channels": self.audio_channels, "seconds": self.seconds,
                "features": self.features, "num_mels": self.num_mels, "augment": augment,
            }  # fmt: skip
        tokenizer = self.tokenizer if like is None else None
        return {"tokenizer": tokenizer, "max_length": self.max_length, "base": base, "augment": augment}

    def row_options(self, kind: Kind, base: Path, like: Any, train: bool) -> dict[str, Any]:
        """What a dataset of a table's rows is made with."""
        rows = {} if kind == "table" else {"separator": self.separator}
        masks = {"mask": self.mask} if kind == "image" else {}
        return {"id": self.id, **rows, **masks, **self.options_of(kind, base, like, train)}

    @property
    def named_kind(self) -> Kind | Literal["auto"]:
        """What the data are, where ``kind`` or the name of a column says it."""
        if self.kind != "auto":
            return self.kind
        if self.audio is not None or self.text is not None:
            return "audio" if self.audio is not None else "text"
        return "image" if self.image != "image" else "auto"  # said: where it is missing, that is a slip

    def column_of(self, kind: str) -> str:
        """Where the images, recordings or texts stand in a table."""
        return {"image": self.image, "audio": self.audio or "audio", "text": self.text or "text"}.get(kind, "")

    @property
    def predicted(self) -> str | None:
        return self.target or self.label


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
    valid: KeyedDataset | None = None
    test: KeyedDataset | None = None
    if settings.valid_fraction is not None:
        parts = split(train, settings.valid_fraction, seed, settings.split_by, settings.test_fraction)
        train, valid, test = parts[0], parts[1], parts[2] if len(parts) > 2 else None
    elif settings.valid is not None:
        valid = open_source(settings, settings.valid, base, like=train, train=False, load=load, split_name="valid")
    if settings.test is not None:
        test = open_source(settings, settings.test, base, like=train, train=False, load=load, split_name="test")
    return DataSplits(train, valid, test)


def open_source(
    settings: DataSettings, source: str, base: Path, *, like: KeyedDataset | None = None, train: bool,
    load: LoadFunction | None = None, split_name: SplitName | None = None,
) -> KeyedDataset:  # fmt: skip
    """One dataset by its name; only ``train`` is augmented, and ``like`` is the training data of the others.

    Raises:  DataError for a name that means nothing here, or a path that does not exist
    """
    role: SplitName = split_name or ("train" if train else "valid")
    if is_hub_name(source):
        return _open_hub(settings, source, base, like, role)
    if is_reference(source):
        return _open_code(source, base, load, role, like)
    path = base / Path(source).expanduser()
    if ":" in source and not path.exists():
        raise _unknown_source(source, "a name with ':'")
    if not path.exists():
        raise _missing(path, source)
    opened = _open_folder(settings, path, base, like, role) if path.is_dir() else None
    return cast(KeyedDataset, opened or _open_file(settings, path, source, base, like, train))


def _open_folder(settings: DataSettings, path: Path, base: Path, like: Any, role: SplitName) -> Any:
    if is_saved(path):
        return _open_hub(settings, f"hf:{path}", base, like, role)
    kind = _kind_of_folder(settings, path)
    options = settings.options_of(kind, base, like, role == "train") | {
        "label_pattern": settings.label_pattern, "follow_links": settings.follow_links, "like": like,
    }  # fmt: skip
    if kind == "audio":
        return AudioFolder(path, **options)
    if kind == "text":
        return _in_blocks(TextFolder(path, has_classes=settings.block_size is None, **options), settings)
    return ImageFolder(path, masks=path.parent / settings.masks if settings.masks else None, **options)


def _in_blocks(opened: Any, settings: DataSettings) -> Any:
    """Texts cut into blocks where the settings say so; anything else as it is."""
    is_cut = settings.block_size is not None and isinstance(whole(opened), Texts)
    return TextBlocks(whole(opened), settings.block_size or 0) if is_cut else opened


def _kind_of_folder(settings: DataSettings, path: Path) -> Kind:
    """What most of its first files are; images where nothing tells."""
    if settings.kind in ENCODED:
        return settings.kind
    found = (name.lower() for _, _, files in os.walk(path, followlinks=settings.follow_links) for name in files)
    names = list(itertools.islice(found, _LOOK_AT))
    return max(ENCODED, key=lambda kind: sum(name.endswith(ENCODED[kind].suffixes) for name in names))


def _open_file(settings: DataSettings, path: Path, source: str, base: Path, like: Any, train: bool) -> Any:
    if path.name.endswith(_IDX):
        options = {**settings.options_of("image", base, like, train), "channels": None}
        return IdxImages(path, like=like, **options)
    if path.suffix.lower() in (".npz", ".npy"):
        return open_arrays(path)
    if not is_table(path, settings.form):
        raise _unknown_source(source, f"a file that ends in {path.suffix!r}")
    return open_table(settings, path, base, like, train)


def open_table(
    settings: DataSettings, path: Path, base: Path, like: Any = None, train: bool = False, frame: Any = None
) -> Any:
    """The dataset that a table holds; ``frame`` is what was read of it already.

    Raises:  DataError where it is not what the settings say
    """
    kind = kind_of_table(settings, path)
    if kind == "table" and settings.predicted is None:
        raise _no_target(path, settings)
    options = settings.row_options(kind, base, like, train) | {"form": settings.form, "like": like}
    if kind in ("image", "audio"):
        options["root"] = path.parent
    label = None if kind == "text" and settings.block_size else settings.predicted or "label"
    held = path if frame is None else frame
    return _in_blocks(table_of(kind, held, settings.column_of(kind), label, **options), settings)


def kind_of_table(settings: DataSettings, path: Path) -> Kind:
    """What a table's rows are, by the settings, else by its columns."""
    if settings.named_kind != "auto":
        return settings.named_kind
    names = column_names(path, settings.form)
    for kind in ("image", "audio"):
        if _has_bytes(path, kind, names):
            return kind
    return "text" if "text" in names else "table"


def _has_bytes(path: Path, name: str, names: list[str]) -> bool:
    """Whether a column holds files, or their names; a CSV's columns can only be names."""
    if name not in names or path.suffix.lower() not in PARQUET:
        return name in names
    kind = pq.read_schema(path).field(name).type
    is_bytes = pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
    return bool(is_bytes or pa.types.is_struct(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _open_hub(settings: DataSettings, source: str, base: Path, like: Any, role: SplitName) -> KeyedDataset:
    name, train = source, role == "train"
    folder = Path(source.removeprefix("hf:").partition("@")[0])
    if (base / folder).exists():  # names of folders are relative to the recipe, as all others
        name = f"hf:{base / folder}" + source.partition("@")[1] + source.partition("@")[2]
    if settings.masks:
        raise DataError(
            "a dataset of the hub has no folder of masks", where="data.masks", fix="data.mask names a column"
        )
    like = getattr(whole(like), "reader", like)
    kind, image = settings.named_kind, settings.image if settings.image != "image" else None
    said: dict[str, Any] = {
        "kind": kind, "column": {"text": settings.text, "audio": settings.audio}.get(kind, image),
        "label": settings.predicted, "by_kind": partial(settings.row_options, base=base, like=like, train=train),
    }  # fmt: skip
    if like is not None:
        said["like"] = like
    if settings.streaming:
        return cast(KeyedDataset, HubStream(name, _HUB_SPLITS[role], length=settings.length, **said))
    return cast(KeyedDataset, _in_blocks(HubDataset(name, _HUB_SPLITS[role], **said), settings))


def _open_code(source: str, base: Path, load: LoadFunction | None, split_name: SplitName, like: Any) -> KeyedDataset:
    from .foreign import as_dataset

    reference = read_reference(source, base)
    if load is None:
        raise DataError(
            "this source names code that may not run here", where=source, got=f"code in {reference.path}",
            expected="a folder or a table",
        )  # fmt: skip
    function = load(reference)
    try:
        offered = {"split": split_name, "like": like}
        made = function(**{name: value for name, value in offered.items() if _takes(function, name)})
    except TorchkeepError:
        raise
    except Exception as error:
        raise DataError(
            "this function gives no data",
            where=f"{source}{line_in(error, reference.path)}",
            got=f"{type(error).__name__}: {error}",
            expected="a function that takes nothing, or any of split and like, and gives a dataset",
        ) from error
    return as_dataset(made)


def _takes(function: Callable[..., Any], name: str) -> bool:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a callable made in C says nothing of its parameters
        return False
    return any(found.name == name or found.kind is found.VAR_KEYWORD for found in parameters)


def described(dataset: KeyedDataset) -> Iterator[tuple[str, str, str, str]]:
    """What was found or decided about the data: rows of (what, value, reason, setting that overrides it)."""
    held = whole(dataset)
    held = getattr(held, "reader", held)
    seen = held.schema.preprocess
    if seen is not None:
        bits = " of 16 bits" if seen.bits == 16 else ""
        yield "images", f"mean {seen.mean[0]:g}, std {seen.std[0]:g}{bits}", "x / white, then these", "data.mean"
    if isinstance(held, Table):
        known = held.encoding
        numbered = zip(known.categories, known.vocabularies, strict=True)
        categories = [f"{name} ({len(words):,})" for name, words in numbered]
        yield "numbers", _some(known.numbers), "columns of numbers and dates", "data.drop"
        yield "categories", _some(categories), "all other columns, with their values", "data.categories"
        yield "task", known.task, f"column {known.target!r}: {len(known.classes) or 'no'} classes", "data.target"
    texts = held.texts if isinstance(held, TextBlocks) else held
    if isinstance(texts, Texts):
        said = f"{texts.tokenizer.name}, {texts.tokenizer.num_tokens:,} tokens"
        if isinstance(held, TextBlocks):
            yield "texts", f"{said}, blocks of {held.block_size}", "joined to one stream", "data.tokenizer"
        else:
            kept = "" if texts.keeps_tokens else ", made anew in each epoch"
            reason = f"padded to the batch, cut at {texts.max_length} tokens{kept}"
            yield "texts", said, reason, "data.tokenizer, data.max_length"
    if isinstance(held, Clips):
        made = f"{held.num_mels} log-mels" if held.features == "log_mel" else "waveform"
        length = f"{held.seconds:g} s, cut or filled up" if held.seconds else "padded to the batch"
        yield "recordings", f"{made} at {held.sample_rate:,} Hz", length, "data.sample_rate, data.seconds"


def _some(names: Sequence[str]) -> str:
    """Names for a line of a table."""
    more = len(names) - _NAMED_AT_MOST
    return ", ".join(names[:_NAMED_AT_MOST]) + (f" and {more} more" if more > 0 else "") or "none"


def _missing(path: Path, source: str) -> DataError:
    return DataError(
        "the data are missing", where=source, got=f"no file or folder {path}",
        expected="a path relative to the recipe's folder",
        fix=near_name(path) or "mend the path in the recipe, or give it with --set",
    )  # fmt: skip


def _unknown_source(source: str, got: str) -> DataError:
    return DataError(
        "this is no source of data", where=source, got=got,
        expected=f"a folder, a table ({', '.join(TABLE_SUFFIXES)}), .npz, idx, hf:NAME, or file.py:function",
        fix='format = "csv" if it is a table',
    )  # fmt: skip


def _no_target(path: Path, settings: DataSettings) -> DataError:
    names = column_names(path, settings.form)
    near = nearest(settings.image, names)
    return DataError(
        "the target of this table is not named", where=path, got=f"columns {', '.join(names)}",
        expected="data.target for a table of numbers, or data.image, data.text, data.audio for their column",
        fix=f'target = "{names[-1]}" if that is what is to be predicted' + (f"; data.image: {near}" if near else ""),
    )  # fmt: skip
