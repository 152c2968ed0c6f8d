"""How new inputs are read, as JSON: what the training data taught, and what was set, without the training data.

It is a part of the settings under their own names, the schema with its classes, and what was learned: a table's
encoding, a tokenizer. Reading builds from it the dataset of training, without samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field as Setting
from torch import Tensor

from ..contracts import Json, KeyedDataset, Schema
from ..errors import DataError, PackageError, SettingsError
from ..packages import package_of
from ..settings import S, Settings, check
from ..tensors import parse_json, to_json
from ..usercode import is_reference
from .arrays import Columns
from .audio import MAX_SAMPLES, Clips
from .decode import MAX_PIXELS
from .foreign import as_dataset
from .images import Images
from .inputs import (
    FoundPaths,
    InputBatch,
    NamedFiles,
    Read,
    column_batches,
    found_paths,
    given_lines,
    held_by,
    path_batches,
    read_ahead,
    tensor_batches,
)
from .kinds import Kind, kind_of
from .labels import LabelledData
from .sources import DataSettings, LoadFunction, open_source
from .tables import PARTS, Table, TableEncoding
from .text import TextBlocks, TextFiles, Texts
from .tokens import Tokenizer, tokenizer_from_json

TOKENIZER = "tokenizer.json"
"""The blob of a Hugging Face tokenizer, as its own library reads it."""

_WHERE = "how inputs are read"
_MAX_SIDE = 1 << 16
_MAX_RATE = 1 << 20  # Hz
_MAX_MELS = 1 << 10
_MAX_AXES = 8
_INT32 = (1 << 31) - 1
_ARRAYS = (".npz", ".npy")
_LABELLED = ("format", "columns", "label", "target", "separator")
_KEPT: dict[str, tuple[str, ...]] = {
    "image": (*_LABELLED, "image", "mask", "image_size"),
    "audio": (*_LABELLED, "audio", "sample_rate", "audio_channels", "seconds", "features", "num_mels"),
    "text": (*_LABELLED, "text", "max_length", "block_size"),
    "table": ("format", "columns", "target"),
    "tensors": (),
}
_TARGETS = {"label", "target", "mask"}


@dataclass(frozen=True)
class Reader:
    """How new inputs become batches: ``like`` is the training data, or stands for them without samples."""

    like: KeyedDataset
    settings: DataSettings

    @property
    def schema(self) -> Schema:
        """What the training samples hold, with the classes."""
        return self.like.schema

    def found(self, paths: Iterable[Path]) -> FoundPaths:
        """All that paths name, folders in place of which stand their files: they are not looked for again.

        Raises:  DataError for a path that is not there
        """
        return found_paths(paths, self.like, self.settings)

    def given(self, data: bytes) -> list[Path] | list[str] | dict[str, Any]:
        """The inputs that standard input names or holds.

        Raises:  DataError for what the model does not take
        """
        return given_lines(data, self.like, self.settings)

    def batches(self, inputs: Any, batch_size: int, *, first: int = 0, workers: int = 0) -> Iterator[InputBatch]:
        """Batches of inputs in order, as in training: of one or several paths, of a tensor or an array, of columns by
        name, of texts.

        A Path is a file, a folder or a table; so is a str, but where the model takes texts it is a text. Values of a
        dict that have more than one axis, or are tensors, are the model's inputs themselves; others are columns. Those
        before batch ``first`` are passed over unread; with ``workers`` the next ones are read meanwhile, by so many
        threads.

        Raises:  DataError for inputs that are not there, or are not what the model takes
        """
        reads, is_slow = self._reads(inputs, batch_size)
        return read_ahead(islice(reads, first, None), workers if is_slow else 0)

    def opened(self, data: Any, load: LoadFunction | None = None) -> KeyedDataset:
        """Labelled data of the same form with the classes of training, as a recipe's data.test would name them; a
        dataset as it is. ``load`` decides which code may run that the name leads to.

        Raises:  DataError for data that are not there, or have a class that training did not know
        """
        if not isinstance(data, str | Path):
            return as_dataset(data)
        is_plain = isinstance(self.like, Columns) and not isinstance(self.like, LabelledData | Table)
        if is_plain and not (Path(data).suffix.lower() in _ARRAYS or is_reference(str(data))):
            raise DataError(
                "this model's data were arrays, or a program's own", where=data, got="another form of data",
                expected=f"{' or '.join(_ARRAYS)}, FILE.py:FUNCTION, or a dataset in Python",
            )  # fmt: skip
        return open_source(
            self.settings, str(data), Path.cwd(), like=self.like, train=False, load=load, split_name="test"
        )

    def _reads(self, inputs: Any, batch_size: int) -> tuple[Iterator[Read], bool]:
        """The batches, and whether reading them takes time."""
        held = held_by(self.like)
        takes_texts = isinstance(held, Texts)
        if isinstance(inputs, Tensor | np.ndarray):
            inputs = {next(iter(self.schema.inputs), "input"): inputs}
        if isinstance(inputs, Mapping):
            if not isinstance(held, LabelledData | Table) or any(map(_is_tensor, inputs.values())):
                return tensor_batches(inputs, self.schema, batch_size), False
            return column_batches(inputs, held, batch_size), isinstance(held, LabelledData)
        items = [inputs] if isinstance(inputs, str | Path) else inputs
        if takes_texts and _are_all(items, str):
            return column_batches({held.input_column: list(items)}, held, batch_size), True
        if not _are_all(items, Path if takes_texts else (str, Path)):
            raise DataError(
                "these are no inputs", where="inputs", got=type(inputs).__name__,
                expected="paths, texts, a tensor, or a dict of columns",
            )  # fmt: skip
        paths = items if isinstance(items, FoundPaths) else [Path(item) for item in items]
        return path_batches(paths, self.like, self.settings, batch_size), True


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) or getattr(value, "ndim", 1) > 1


def _are_all(items: Any, kinds: Any) -> bool:
    return isinstance(items, Sequence) and len(items) > 0 and all(isinstance(item, kinds) for item in items)


def reader_to_json(dataset: KeyedDataset, settings: DataSettings | None) -> tuple[Json, dict[str, bytes]]:
    """All that ``reader_from_json`` needs to read new inputs as those of a dataset: JSON, and files by name.

    Of a dataset that is not of this house there is the schema alone: tensors can be given, files cannot.

    Raises:  DataError where that cannot be kept, such as a tokenizer of the user's own
    """
    held = held_by(dataset)
    blobs: dict[str, bytes] = {}
    data: dict[str, Any] = {"kind": _kind_of(held), "schema": dataset.schema.to_json()}
    data["settings"] = _settings_of(data["kind"], held, settings or _checked(DataSettings, {"train": ""}))
    if isinstance(held, Table):
        data["encoding"] = held.encoding.to_json()
    if isinstance(held, Texts | TextBlocks):
        data["tokenizer"] = dict(held.tokenizer.to_json())
        text = data["tokenizer"].pop("tokenizer", None)
        if text is not None:
            blobs[TOKENIZER] = text.encode()
    try:
        kept = parse_json(to_json(data))
        reader_from_json(kept, blobs)  # what could not be read again is never written
    except (TypeError, ValueError, RecursionError, PackageError) as error:
        raise DataError(
            "how these inputs are read cannot be kept", where=getattr(error, "where", "") or _WHERE,
            got=getattr(error, "got", "") or error, expected=getattr(error, "expected", ""),
        ) from None  # fmt: skip
    return kept, blobs


def _kind_of(held: Any) -> str:
    if isinstance(held, TextBlocks):
        return "text"
    if isinstance(held, LabelledData):
        return kind_of(held)
    return "table" if isinstance(held, Table) else "tensors"


def _settings_of(kind: str, held: Any, settings: DataSettings) -> dict[str, Json]:
    """The settings that are kept, as the dataset has them."""
    said = {name: getattr(settings, name) for name in _KEPT[kind]}
    if isinstance(held, Table):
        return said | {"target": held.encoding.target}
    texts = held.texts if isinstance(held, TextBlocks) else held
    own = {name: getattr(texts, name) for name in said if hasattr(texts, name) and name not in _LABELLED}
    if kind == "audio":
        own["audio_channels"] = held.channels
    if kind == "text":
        own["block_size"] = getattr(held, "block_size", None)
    return said | own | ({kind: texts.input_column} if kind != "tensors" else {})


class _Tokenizer(Settings):
    kind: Literal["bytes", "words", "hub"]
    pattern: str | None = None
    words: list[str] | None = None
    name: str | None = None
    pad_id: Annotated[int, Setting(ge=0, le=_INT32)] | None = None


class _Written(Settings):
    kind: Kind | Literal["tensors"]
    held: Schema = Setting(alias="schema")
    settings: dict[str, Any]
    encoding: TableEncoding | None = None
    tokenizer: _Tokenizer | None = None


def reader_from_json(data: Json, blobs: Mapping[str, bytes]) -> Reader:
    """The reader that ``reader_to_json`` wrote. Nothing that it names is opened or run.

    Raises:  PackageError for anything else; SettingsError without the package that a tokenizer needs
    """
    written = _checked(_Written, data)
    schema, kind = written.held, written.kind
    _check_schema(schema)
    if set(written.settings) != set(_KEPT[kind]):
        raise _refused("settings", ", ".join(written.settings), ", ".join(_KEPT[kind]) or "none")
    if (written.encoding is None) == (kind == "table") or (written.tokenizer is None) == (kind == "text"):
        raise _refused("kind", f"{kind!r}", "an encoding for a table, a tokenizer for texts, and no other")
    given: dict[str, Any] = {"train": "", **written.settings}
    if kind == "image" and schema.preprocess is not None:
        names = ("channels", "bits", "mean", "std", "crop_fraction")
        given |= {name: getattr(schema.preprocess, name) for name in names}
    settings = _checked(DataSettings, given if kind == "tensors" else given | {"kind": kind})
    tokenizer = None if written.tokenizer is None else _tokenizer_of(written.tokenizer, blobs, settings.max_length)
    try:
        like = _made(written, settings, tokenizer)
    except (DataError, SettingsError) as error:
        raise _refused(error.where, f"{error.what}: {error.got}", error.expected) from None
    _check_fits(like, schema)
    like.schema = schema
    return Reader(like, settings)


def _made(written: _Written, settings: DataSettings, tokenizer: Tokenizer | None) -> Any:
    """The dataset of training, without samples."""
    files, kind = NamedFiles([]), written.kind
    if kind == "tensors":
        none = Columns()
        none.columns, none.schema, none.where = {"": torch.empty(0)}, written.held, _WHERE
        return none
    if written.encoding is not None:
        _check_encoding(written.encoding)
        return Table.without_rows(written.encoding, _WHERE)
    options: dict[str, Any] = settings.options_of(kind, Path(), None, False)
    made: LabelledData
    if kind == "image":
        made = Images(files, None, _WHERE, size=_size_of(written.held, settings), **options)
    elif kind == "audio":
        _check_recordings(settings)
        made = Clips(files, None, _WHERE, **options)
    else:
        made = Texts(TextFiles(files, _WHERE), None, _WHERE, **options | {"tokenizer": tokenizer})
    made.input_column = settings.column_of(kind)
    return TextBlocks(made, settings.block_size) if isinstance(made, Texts) and settings.block_size else made


def _tokenizer_of(written: _Tokenizer, blobs: Mapping[str, bytes], max_length: int) -> Tokenizer:
    data = written.model_dump(exclude_none=True)
    if written.kind == "hub":
        package_of("tokenizers", "hf", TOKENIZER)
        data["tokenizer"] = blobs.get(TOKENIZER, b"").decode("utf-8", "replace")
    try:
        made = tokenizer_from_json(data)
        made.encode_batch(["", "a"], max_length)
    except BaseException as error:  # the Rust side has no exception of its own, and its panics are no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        got, expected = getattr(error, "got", "") or error, getattr(error, "expected", "")
        raise _refused("tokenizer", got, expected or "a tokenizer as it was saved") from None
    return made


def _check_encoding(encoding: TableEncoding) -> None:
    wrong = [f.name for f in encoding.features if f.part not in PARTS or f.deviation <= 0]
    if wrong or len(encoding.categories) != len(encoding.vocabularies):
        got = wrong[:3] or f"{len(encoding.categories)} categories, {len(encoding.vocabularies)} vocabularies"
        raise _refused("encoding", got, f"parts {', '.join(PARTS)}, deviations above 0, a vocabulary for each category")
    if not (encoding.features or encoding.categories) or (encoding.task == "classification") != bool(encoding.classes):
        raise _refused("encoding", encoding.task, "inputs, and classes where they are to be told apart")


def _size_of(schema: Schema, settings: DataSettings) -> tuple[int, int]:
    """Height and width of the images, which must be what a decoder may give."""
    shape = schema["image"].shape if "image" in schema else None
    sides = [size or 0 for size in (shape or ())[1:]]
    if len(sides) != 2 or not 0 < min(sides) <= max(sides) <= _MAX_SIDE or sides[0] * sides[1] > MAX_PIXELS:
        raise _refused("schema.image", f"shape {shape}", f"(C, H, W) of at most {MAX_PIXELS:,} pixels")
    if settings.image_size not in (None, sides[0]) or schema.preprocess is None:
        raise _refused("settings.image_size", settings.image_size, f"{sides[0]}, as the schema says, with a preprocess")
    return sides[0], sides[1]


def _check_recordings(settings: DataSettings) -> None:
    rate, seconds = settings.sample_rate or 0, settings.seconds
    is_bounded = 0 < rate <= _MAX_RATE and settings.num_mels <= _MAX_MELS
    if not is_bounded or (seconds is not None and not 1 <= seconds * rate <= MAX_SAMPLES):
        raise _refused(
            "settings", f"{rate:,} Hz, {seconds} s, {settings.num_mels:,} bands",
            f"at most {_MAX_RATE:,} Hz, {MAX_SAMPLES:,} samples, {_MAX_MELS:,} bands",
        )  # fmt: skip


def _check_schema(schema: Schema) -> None:
    for name, field in schema.items():
        sizes = [size for size in field.shape or () if size is not None]
        is_bounded = all(0 <= size <= _INT32 for size in (*sizes, field.num_tokens))
        if not is_bounded or len(sizes) > _MAX_AXES or field.std <= 0:
            got = f"std {field.std}, {field.num_tokens} tokens, shape {field.shape}"
            raise _refused(f"schema.{name}", got, f"sizes up to {_INT32:,}, a std above 0")
    if schema.preprocess is not None and min(schema.preprocess.std, default=0) <= 0:
        raise _refused("schema.preprocess", schema.preprocess.std, "a std above 0")


def _check_fits(like: KeyedDataset, schema: Schema) -> None:
    """The schema must be that of the dataset which was made from it, but for what is to be predicted."""
    made = like.schema
    more = set(schema) - set(made)
    is_target = isinstance(like, LabelledData) and more <= _TARGETS and all(schema[name].is_target for name in more)
    odd = [name for name, field in made.items() if schema.get(name) != field]
    if odd or (more and not is_target) or made.preprocess != schema.preprocess:
        got = ", ".join(sorted({*odd, *more})) or f"{schema.preprocess}"
        raise _refused("schema", got, "what the settings, the encoding and the tokenizer say")


def _checked(model: type[S], data: Any) -> S:
    try:
        return check(model, data, _WHERE)
    except SettingsError as error:
        raise _refused(error.where, f"{error.what}: {error.got}", error.expected) from None


def _refused(where: str, got: Any, expected: str) -> PackageError:
    place = where if where.startswith(_WHERE) else f"{_WHERE}: {where}"
    what = "how inputs are read is not what was written"
    return PackageError(what, where=place[:200], got=str(got)[:200], expected=expected[:400])
