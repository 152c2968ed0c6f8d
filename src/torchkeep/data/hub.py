"""Hugging Face datasets, by name or from a local folder, read by the datasets of this wing.

What they hold is an Arrow table that is mapped from the disk: it goes to the same classes as any other table, so that
decoding, tokens, augmentation, labels and the loader are the ones that all data have. With ``streaming`` samples come
one after another; such a stream cannot promise what an order by number can.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..chance import ChanceKey, keyed_seed
from ..contracts import KeyedDataset, Sample
from ..errors import DataError, nearest
from ..packages import package_of
from .dataset import Part
from .frames import Frame, is_text, where_of
from .kinds import Kind, table_of
from .labels import hub_features, hub_names
from .streams import Stream
from .tables import Table
from .text import Texts

ByKind = Callable[[Kind], dict[str, Any]]

_NAME = re.compile(r"(?P<name>[^:@]+)(?::(?P<config>[^@]+))?(?:@(?P<split>.+))?")
_TEXT_COLUMNS = ("text", "sentence", "content")
_LABEL_COLUMNS = ("label", "labels", "target", "category")
_AT_ONCE = 64  # examples of a stream that are made into one small table


@dataclass(frozen=True)
class HubFrame:
    """One split: its table, what to call it, what names its content, and whether it can be read by number."""

    frame: Frame
    where: str
    identity: str


def is_hub_name(name: str) -> bool:
    return name.startswith("hf:")


class HubDataset(Part):
    """A dataset of Hugging Face: "hf:NAME", "hf:NAME:CONFIG@SPLIT", or a folder that ``save_to_disk`` wrote.

    The kind ("image", "audio", "text" or "table") and the columns are found by their features, or named: ``column``
    is the one with the images, recordings or texts, ``label`` what is to be predicted. Other options go to the dataset
    of that kind, which is ``dataset``; ``by_kind`` gives further ones, once the kind is known.

    Raises:  DataError for a name that is not there, a split it does not have, or columns that are not what is needed
    """

    def __init__(self, name: str | Path, split: str | None = None, **options: Any):
        opened = open_hub_frame(open_hub(str(name), split or "train"), **options)
        super().__init__(opened, np.arange(len(opened)))


def open_hub(name: str, split: str) -> HubFrame:
    """The table of one split; ``split`` is taken where the name has none.

    Raises:  DataError where the library, the dataset or the split is missing
    """
    loaded, where = _loaded(name, split, streaming=False)
    if loaded._indices is not None:
        loaded = loaded.flatten_indices()
    described = loaded.features.arrow_schema.metadata
    # of files on this disk the library's name follows times and places, not content: then the cells are hashed
    folder = Path(_parsed(name)[0]).expanduser()
    identity = "" if folder.exists() and not is_saved(folder) else str(loaded._fingerprint)
    return HubFrame(loaded.data.table.replace_schema_metadata(described), where, identity)


def is_saved(folder: Path) -> bool:
    """Whether ``save_to_disk`` wrote a folder."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def open_hub_frame(
    held: HubFrame, *, kind: Kind | Literal["auto"] = "auto", column: str | None = None, label: str | None = None,
    by_kind: ByKind | None = None, **options: Any,
) -> KeyedDataset:  # fmt: skip
    """The dataset of this wing that reads a table of Hugging Face's.

    Raises:  DataError where a column is missing
    """
    found, name = _kind_of(held.frame, kind, column)
    if label is None:
        without = None if found == "text" else "label"  # texts alone are what a language model learns from
        label = next((known for known in _LABEL_COLUMNS if known in held.frame.column_names), without)
    options |= by_kind(found) if by_kind else {}
    if found != "table":
        options["identity"] = held.identity
    try:
        made = table_of(found, held.frame, name, label, **options)
    except DataError as error:
        error.where = error.where.replace(where_of(held.frame), held.where)
        raise
    made.where = held.where
    return cast(KeyedDataset, made)


def _kind_of(frame: Frame, kind: Kind | Literal["auto"], column: str | None) -> tuple[Kind, str]:
    """What the table holds, and the column that holds it."""
    features = hub_features(frame)
    for wanted, feature in (("image", "Image"), ("audio", "Audio")):
        names = [name for name, described in features.items() if described.get("_type") == feature]
        if names and kind in ("auto", wanted):
            return cast(Kind, wanted), column or (wanted if wanted in names else names[0])
    texts = [name for name in frame.column_names if is_text(frame[name].type)]
    known = [name for name in _TEXT_COLUMNS if name in texts]
    if kind == "text" or (kind == "auto" and (known or column in texts)):
        return "text", column or (known or texts or ["text"])[0]
    return (kind if kind != "auto" else "table"), column or (kind if kind != "auto" else "")


def _loaded(name: str, split: str, streaming: bool) -> tuple[Any, str]:
    called, config, said = _parsed(name)
    datasets = package_of("datasets", "hf")
    datasets.disable_progress_bars()
    wanted, folder = said or split, Path(called).expanduser()
    try:
        if is_saved(folder):
            loaded = datasets.load_from_disk(str(folder))
        else:
            path = str(folder) if folder.exists() else called
            loaded = datasets.load_dataset(path, config, streaming=streaming)
    except Exception as error:
        line = (str(error).strip().splitlines() or [""])[0]
        raise DataError(
            "this dataset cannot be opened", where=name, got=f"{type(error).__name__}: {line}"[:300],
            expected="a dataset of the hub or of this disk, as hf:NAME, hf:NAME:CONFIG or hf:FOLDER",
        ) from None  # fmt: skip
    chosen = _split_of(loaded, wanted, name) if isinstance(loaded, dict) or said else loaded
    return chosen.to_iterable_dataset() if streaming and is_saved(folder) else chosen, f"{name} ({wanted})"


def _parsed(name: str) -> tuple[str, str | None, str | None]:
    """The name or folder, the configuration and the split; a folder that exists may have any sign in its name."""
    plain = name.removeprefix("hf:")
    folder, _, split = plain.rpartition("@")
    for place, said in ((plain, None), (folder, split)):
        if place and Path(place).expanduser().is_dir():
            return place, None, said
    found = _NAME.fullmatch(plain)
    if found is None:
        raise DataError(
            "this is no name of a dataset", where=name, got=repr(plain), expected="hf:NAME, hf:NAME:CONFIG@SPLIT"
        )
    return found["name"], found["config"], found["split"]


def _split_of(loaded: Any, wanted: str, name: str) -> Any:
    """The split of a dataset, which may have been saved without splits, as one of them alone."""
    held = loaded if isinstance(loaded, dict) else {str(loaded.split): loaded}
    if wanted not in held:
        near = nearest(wanted, list(held))
        raise DataError(
            "this dataset has no such split", where=name, got=repr(wanted), expected=f"one of {', '.join(held)}",
            fix=near or f"{name.partition('@')[0]}@{next(iter(held))}",
        )  # fmt: skip
    return held[wanted]


class HubStream(Stream):
    """A dataset of Hugging Face as a stream: "hf:NAME" with ``streaming``. One epoch is ``length`` samples.

    The samples and the options are those of ``HubDataset``. Nothing can be learned from a stream: texts need tokenizer
    "bytes" or one of Hugging Face, and tables of numbers cannot be read as one.

    Raises:  DataError as ``HubDataset``, where ``length`` is not known, and where something would have to be learned
    """

    def __init__(
        self, name: str | Path, split: str | None = None, *, length: int | None = None, buffer: int = 1024,
        **options: Any,
    ):  # fmt: skip
        source, self._name = _loaded(str(name), split or "train", streaming=True)
        self._arrow = source.features.arrow_schema if source.features is not None else None
        first = list(islice(iter(_undecoded(source)), _AT_ONCE))
        if not first:
            raise DataError("the stream is empty", where=self._name, got="0 samples")
        self._options = options
        self.reader = self._read(first)
        if options.get("like") is None:
            named = hub_names(self._table(first), options.get("label") or next(iter(self.reader.schema.targets), ""))
            _check_learns_nothing(self.reader, bool(named), self._name)
        super().__init__(_undecoded(source), None, length, buffer)
        self.schema = self.reader.schema

    def _read(self, rows: list[dict[str, Any]], **like: Any) -> KeyedDataset:
        return open_hub_frame(HubFrame(self._table(rows), self._name, ""), **self._options | like)

    def _table(self, rows: list[dict[str, Any]]) -> Frame:
        table = pa.Table.from_pylist(rows)
        if self._arrow is None:
            return table
        named = {name: table[name] for name in self._arrow.names}
        columns = [pc.cast(column, self._arrow.field(name).type) for name, column in named.items()]
        return pa.table(dict(zip(named, columns, strict=True))).replace_schema_metadata(self._arrow.metadata)

    def _named(self, key: ChanceKey) -> Iterator[Sample]:
        source = self._raw(key)
        for number, rows in enumerate(iter(lambda: list(islice(source, _AT_ONCE)), [])):
            held = self._read(rows, like=self.reader)
            # a sample's chance is that of its place in the stream: each stretch has a key of its own
            chance = ChanceKey(keyed_seed(key, "stream/augment", number), key.epoch)
            for place in range(len(held)):
                sample = held.read(place, chance)
                yield {name: value for name, value in sample.items() if name != "id"}

    def collate(self, samples: list[Sample]) -> Any:
        """A batch of samples, as the dataset of its kind makes it."""
        return self.reader.collate(samples)  # type: ignore[attr-defined]


def _check_learns_nothing(reader: KeyedDataset, has_names: bool, name: str) -> None:
    targets = [reader.schema[key].kind for key in reader.schema.targets]
    if not has_names and any(kind in ("label", "multilabel", "number") for kind in targets):
        raise DataError(
            "a stream does not tell its classes, nor the mean of its numbers", where=name,
            got=f"a target of kind {targets[0]!r} in the first {_AT_ONCE} rows", expected="a ClassLabel, or like=",
            fix="streaming = false",
        )  # fmt: skip
    is_words = isinstance(reader, Texts) and reader.learns
    if is_words or isinstance(reader, Table):
        raise DataError(
            "a stream is not read before its training, so that nothing can be learned from it",
            where=name,
            got='tokenizer "words"' if is_words else "a table, whose statistics are those of all its rows",
            expected='tokenizer = "bytes", or one of Hugging Face' if is_words else "images, recordings or texts",
            fix="streaming = false",
        )


def _undecoded(source: Any) -> Any:
    """Images and recordings as their bytes: they are decoded here, as all others are."""
    import datasets

    for name, feature in (source.features or {}).items():
        if isinstance(feature, datasets.Image | datasets.Audio):
            source = source.cast_column(name, type(feature)(decode=False))
    return source
