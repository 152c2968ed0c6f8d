"""How an ejected script reads its data: for each kind the functions, the constants, and the lines of ``load``."""

from __future__ import annotations

import csv
import io
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..data import sounds
from ..data.audio import Clips
from ..data.dataset import Part, whole
from ..data.frames import PARQUET
from ..data.images import IdxImages, ImageFolder, Images, ImageTable
from ..data.tables import Table
from ..data.text import TextTable
from ..data.tokens import ByteTokenizer, WordTokenizer
from ..errors import SettingsError
from ..training.recipe import Recipe
from ..training.work import Work
from ..usercode import is_reference
from . import ejected

_AUGMENTATIONS = ("horizontal_flip", "vertical_flip", "random_rotation", "random_shift", "random_resized_crop")
NUMBERED = "{{name: number for number, name in enumerate(sorted({0}){1})}}"
_TENSOR = 'torch.from_numpy(columns["{0}"][rows]).to(DEVICE)'


def refused(what: str, where: str, got: object, fix: str = "") -> SettingsError:
    """What a script would be too long for, or could not do with torch alone."""
    return SettingsError("this cannot be written as a plain script", where=where, got=got, expected=what, fix=fix)


@dataclass
class Reading:
    """What a script needs to read its data: ``columns[split]`` is an expression, ``encoded`` the columns of a split,
    ``learns`` the lines that learn from the columns of ``train``, ``sizes`` what the model is built with."""

    label: str
    constants: list[str] = field(default_factory=list)
    pieces: list[Any] = field(default_factory=list)
    columns: dict[str, str] = field(default_factory=dict)
    learns: list[str] = field(default_factory=list)
    encoded: dict[str, str] = field(default_factory=dict)
    gives: dict[str, str] = field(default_factory=dict)
    batch: list[str] = field(default_factory=list)
    sizes: dict[str, str] = field(default_factory=dict)
    beside: dict[str, bytes] = field(default_factory=dict)
    """Files that lie beside the script, by name."""
    augments: bool = False
    has_buckets: bool = False
    is_split: bool = False
    """Whether the parts of the data lie beside the script, so that it has nothing to divide."""


class Place:
    """Where the script is to lie, and how it calls other files."""

    def __init__(self, output: Path, base: Path):
        self.output, self.base = output.absolute(), base

    def named(self, source: str | Path) -> str:
        """A path as an expression: below the script's folder by its name there."""
        path = Path(os.path.normpath((self.base / Path(source).expanduser()).absolute()))
        if path.is_relative_to(self.output.parent):
            return f"HERE / {path.relative_to(self.output.parent).as_posix()!r}".replace("'", '"')
        return f"Path({quoted(path.as_posix())})"


def quoted(text: object) -> str:
    """A value as it stands in a script."""
    if isinstance(text, list | tuple):
        return f"[{', '.join(map(quoted, text))}]"
    plain = repr(text)
    return f'"{plain[1:-1]}"' if isinstance(text, str) and plain[0] == "'" and '"' not in plain else plain


def reading_of(work: Work, recipe: Recipe, place: Place) -> Reading:
    """How the script reads what the recipe names.

    Raises:  SettingsError for data of a form that it cannot read
    """
    data = whole(work.train)
    kinds: dict[type, Any] = {Table: _table, TextTable: _texts, Images: _images, Clips: _clips}
    make = next((make for kind, make in kinds.items() if isinstance(data, kind)), None)
    if make is None or work.collate is not None:
        raise refused("images, tables, texts in a table, or recordings with classes", "data.train", recipe.data.train)
    made: Reading = make(data, recipe)
    made.is_split = is_reference(recipe.data.train) and recipe.data.valid_fraction is not None
    for split, source in _sources(recipe, work).items():
        made.constants.append(f"{split.upper()} = {_path(made, getattr(work, split), split, source, place)}")
        made.columns[split] = _columns(made, whole(getattr(work, split)), split, source, recipe)
    fractions = {name: getattr(recipe.data, name) for name in ("test_fraction", "valid_fraction") if not made.is_split}
    made.constants = [f"{name.upper()} = {value}" for name, value in fractions.items() if value] + made.constants
    return made


def _sources(recipe: Recipe, work: Work) -> dict[str, str]:
    """Where each split is read; the parts of what code has given lie beside the script, each by itself."""
    names = ("train", "valid", "test")
    given = {split: getattr(recipe.data, split) for split in names}
    if is_reference(recipe.data.train):
        given = {split: given[split] or recipe.data.train for split in names if getattr(work, split) is not None}
    return {split: source for split, source in given.items() if source is not None}


def _path(made: Reading, dataset: Any, split: str, source: str, place: Place) -> str:
    if not is_reference(source):
        return place.named(source)
    name = f"{place.output.stem}.{split}.csv"
    made.beside[name] = _listed(dataset, made.label, f"data.{split}", source)
    return f"HERE / {quoted(name)}"


def _listed(dataset: Any, label: str, where: str, source: str) -> bytes:
    """What code has given, as a table: it cannot be asked again without torchkeep.

    Raises:  SettingsError where it gave neither a table nor files with classes
    """
    held: Any = whole(dataset)
    rows = dataset.indices if isinstance(dataset, Part) else np.arange(len(dataset))
    if isinstance(held, Table):
        known = held.encoding
        names = dict.fromkeys([*(f.column for f in known.features), *known.categories, known.target])
        columns = {name: [_cell(value) for value in held.column(name)[rows].tolist()] for name in names}
    else:
        file_of = getattr(getattr(held, "blobs", None), "file_of", lambda index: None)
        files: list[Any] = [file_of(index) for index in rows.tolist()]
        if None in files or held.labels is None:
            raise refused("a table, or files with classes", where, source)
        classes = held.schema["label"].classes
        columns = {"file": [str(path.resolve()) for path in files], label: [classes[n] for n in held.labels[rows]]}
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([list(columns), *zip(*columns.values(), strict=True)])
    return text.getvalue().encode()


def _cell(value: Any) -> str:
    return "" if value is None or value != value else str(value)


def _columns(made: Reading, dataset: Any, split: str, source: str, recipe: Recipe) -> str:
    """The expression that reads a split's columns."""
    name, data = split.upper(), recipe.data
    is_code, suffix = is_reference(source), Path(source).suffix.lower()
    if isinstance(dataset, Table | TextTable):
        if suffix in PARQUET and not (is_code or data.form.is_csv):
            return _with(made, ejected.read_parquet, name)
        if not is_code and suffix not in (".csv", ".tsv") and not data.form.is_csv:
            raise refused("a table in CSV, TSV or Parquet", f"data.{split}", source)
        read = ejected.read_csv if isinstance(dataset, Table) else ejected.read_texts
        if is_code:
            return _with(made, read, name)
        separated = [quoted("\t" if suffix == ".tsv" else ",")] if suffix == ".tsv" or data.columns else []
        return _with(made, read, name, *separated, *([quoted(data.columns)] if data.columns else []))
    if is_code:
        return _with(made, ejected.listed_files, name)
    if isinstance(dataset, ImageFolder) or hasattr(dataset, "listing"):
        if data.label_pattern or data.follow_links:
            raise refused("classes by folder, without links", "data", "label_pattern or follow_links")
        suffixes = f"SUFFIXES = {dataset.suffixes!r}".replace("'", '"')
        made.constants += [suffixes] if suffixes not in made.constants else []
        return _with(made, ejected.files_in, name)
    if isinstance(dataset, IdxImages):
        return _with(made, ejected.idx_images, name)
    if isinstance(dataset, ImageTable) and suffix in PARQUET:
        return _with(made, ejected.encoded_images, name, quoted(data.column_of("image")), quoted(_label(recipe)))
    raise refused("files in class folders, idx, or a Parquet table of images", f"data.{split}", source)


def _label(recipe: Recipe) -> str:
    return recipe.data.predicted or "label"


def _with(made: Reading, piece: Any, *given: str) -> str:
    if piece not in made.pieces:
        made.pieces.append(piece)
    return f"{piece.__name__}({', '.join(given)})"


def _table(data: Table, recipe: Recipe) -> Reading:
    encoding, made = data.encoding, Reading(data.encoding.target)
    if any(feature.part not in ("value", "missing") for feature in encoding.features):
        raise refused("numbers and categories", "data.train", "a column of dates", "drop = [...] leaves it out")
    numbers = [feature.column for feature in encoding.features if feature.part == "value"]
    made.batch = ["return {name: torch.from_numpy(column[rows]).to(DEVICE) for name, column in columns.items()}"]
    made.sizes = {"cardinalities": "[]", "in_features": "0"}
    if numbers:
        made.constants.append(f"NUMBERS = {quoted(numbers)}")
        made.encoded["numbers"] = _with(made, ejected.standardised, "columns", "train", "NUMBERS")
        made.sizes["in_features"] = 'data["train"]["numbers"].shape[1]'
    if encoding.categories:
        made.constants.append(f"CATEGORIES = {quoted(encoding.categories)}")
        made.encoded["categories"] = _with(made, ejected.numbered, "columns", "train", "CATEGORIES")
        made.sizes["cardinalities"] = '(data["train"]["categories"].max(0) + 1).tolist()'
    if encoding.task == "regression":
        target = quoted(encoding.target)
        made.learns.append(f"targets = {_with(made, ejected.floats, f'train[{target}]')}")
        made.encoded["target"] = f"floats(columns[{target}]).astype(np.float32)"
        made.gives |= {"mean": "float(targets.mean())", "std": "float(targets.std()) or 1.0"}
    return made


def _texts(data: TextTable, recipe: Recipe) -> Reading:
    column, made = f"columns[{quoted(recipe.data.column_of('text'))}]", Reading(_label(recipe))
    made.constants.append(f"MAX_LENGTH = {data.max_length}")
    if isinstance(data.tokenizer, WordTokenizer) and data.learns:
        learned = _with(made, ejected.learn_vocabulary, column.replace("columns", "train"))
        made.learns.append(f"vocabulary = {learned}")
        made.encoded["input_ids"] = _with(made, ejected.tokens_of, column, "vocabulary", "MAX_LENGTH")
        made.gives["num_tokens"] = "len(vocabulary) + 2"
        made.sizes["num_tokens"] = 'data["num_tokens"]'
    elif isinstance(data.tokenizer, ByteTokenizer):
        made.encoded["input_ids"] = _with(made, ejected.bytes_of, column, "MAX_LENGTH")
        made.sizes["num_tokens"] = str(data.tokenizer.num_tokens)
    else:
        raise refused('"words" or "bytes"', "data.tokenizer", recipe.data.tokenizer)
    made.encoded["length"] = f"np.array([min(len(text.encode()), 8 * MAX_LENGTH) for text in {column}])"
    made.sizes |= {"per_token": "False", "cardinalities": "[]"}
    made.has_buckets, made.augments = True, bool(data.augmentations.entries)
    made.batch = ['ids = columns["input_ids"][rows].astype(np.int64)']
    _check_named(data.augmentations)
    for number in range(len(data.augmentations.entries)):
        made.batch += [
            "if epoch is not None:  # some words are hidden",
            f"    rng = np.random.default_rng((SEED, epoch, int(rows[0]), {number}))",
            f"    ids = np.where((ids > 0) & (rng.random(ids.shape) < 0.15), {data.tokenizer.mask_id}, ids)",
        ]
    made.batch += [
        "ids = torch.from_numpy(ids[:, : (ids > 0).sum(1).max()]).to(DEVICE)",
        f'return {{"input_ids": ids, "attention_mask": (ids > 0).long(), "label": {_TENSOR.format("label")}}}',
    ]
    return made


def _check_named(augmentations: Any) -> None:
    if augmentations.has_callable:
        raise refused("augmentations by name", "augment", "a callable")


def _images(data: Images, recipe: Recipe) -> Reading:
    made, entries = Reading("label" if isinstance(data, IdxImages | ImageFolder) else _label(recipe)), []
    _check_named(data.augmentations)
    entries = [str(entry) for entry in data.augmentations.entries]
    unknown = [name for name in entries if name not in _AUGMENTATIONS]
    if unknown or data.has_masks or data.bits != 8 or (isinstance(data, IdxImages) and data.channels != 1):
        got = ", ".join(unknown) or "masks, 16 bits, or grey images in colours"
        raise refused(f"images of 8 bits, augmented by {', '.join(_AUGMENTATIONS)} or not at all", "data", got)
    made.label, made.augments = "label", bool(entries)
    seen = data.schema.preprocess
    assert seen is not None
    numbers = [f"torch.tensor({quoted(list(values))}, dtype=torch.float64).view(1, -1, 1, 1)"
               for values in (seen.mean, seen.std)]  # fmt: skip
    made.constants += [
        f"MEAN = {numbers[0]}", f"STD = {numbers[1]}",
        "SCALE, SHIFT = (1 / (255 * STD)).float().to(DEVICE), (MEAN / STD).float().to(DEVICE)",
    ]  # fmt: skip
    made.encoded["sample"] = 'columns["sample"]'
    if isinstance(data, IdxImages):
        decoded = 'columns["sample"][row][..., None]'
    else:
        decoded = _with(made, ejected.decode_grey if data.channels == 1 else ejected.decode_colours,
                        'columns["sample"][row]')  # fmt: skip
    fitted = []
    if data.image_size:
        made.constants.append(f"IMAGE_SIZE = {data.image_size}")
        fitted = ["image = " + _with(made, ejected.middle, "image", "IMAGE_SIZE", str(data.crop_fraction))]
    first = data.augmentations.sets_size
    changes = ["rng = np.random.default_rng((SEED, epoch, row))"] if entries else []
    for name in entries:
        size = ["IMAGE_SIZE"] if name == "random_resized_crop" else []
        changes.append("image = " + _with(made, getattr(ejected, name), "image", "rng", *size))
    if fitted and not first:
        decoded, fitted = fitted[0].removeprefix("image = ").replace("image,", f"{decoded},", 1), []
    made.batch = ["images = []", "for row in rows.tolist():", f"    image = {decoded}"]
    if first and fitted:
        made.batch += ["    if epoch is None:", f"        {fitted[0]}", "    else:"]
    else:
        made.batch += [f"    {line}" for line in fitted] + (["    if epoch is not None:"] if changes else [])
    made.batch += [f"        {line}" for line in changes] + [
        "    images.append(image)",
        "image = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).to(DEVICE)",
        f'return {{"image": image.float().mul_(SCALE).sub_(SHIFT), "label": {_TENSOR.format("label")}}}',
    ]
    made.sizes = {"in_channels": str(data.channels), "cardinalities": "[]",
                  "in_features": str(data.channels * data.size[0] * data.size[1])}  # fmt: skip
    if data.size[0] == data.size[1]:
        made.sizes["image_size"] = str(data.size[0])
    return made


def _clips(data: Clips, recipe: Recipe) -> Reading:
    _check_named(data.augmentations)
    if not data.seconds or data.channels != 1 or data.features != "log_mel":
        got = f"seconds {data.seconds}, {data.channels} channels, {data.features}"
        raise refused("recordings of one channel and one length, as log-mels", "data", got)
    entries, size = [str(entry) for entry in data.augmentations.entries], round(data.seconds * data.sample_rate)
    made = Reading("label", augments=bool(entries))
    made.constants.append(f"SAMPLE_RATE, NUM_SAMPLES, NUM_MELS = {data.sample_rate}, {size}, {data.num_mels}")
    made.encoded["sample"] = 'columns["sample"]'
    drawn = ["rng"] if "random_crop" in entries else []
    speed = [_changed(made, sounds.random_speed, "rng")] if "random_speed" in entries else []
    changes = [_changed(made, getattr(sounds, name), "rng", "SAMPLE_RATE") for name in entries
               if name in ("random_shift", "random_gain", "random_noise")]  # fmt: skip
    has_rng = drawn or speed or changes
    inner = [
        *(["rng = None if epoch is None else np.random.default_rng((SEED, epoch, row))"] if has_rng else []),
        "wave = " + _with(made, ejected.wave_of, 'columns["sample"][row]', "SAMPLE_RATE"),
        *speed, "wave = " + _with(made, ejected.cut, "wave", "NUM_SAMPLES", *drawn), *changes, "waves.append(wave[0])",
    ]  # fmt: skip
    made.batch = ["waves = []", "for row in rows.tolist():", *(f"    {line}" for line in inner)]
    made.batch.append("mels = " + _with(made, ejected.log_mel, "np.stack(waves)", "SAMPLE_RATE", "NUM_MELS"))
    if "spec_mask" in entries:
        masked = _with(made, sounds.spec_mask, "mel", "rng")
        made.batch += ["if epoch is not None:", "    rng = np.random.default_rng((SEED, epoch, int(rows[0])))",
                       f"    mels = np.stack([{masked} for mel in mels])"]  # fmt: skip
    audio = "torch.from_numpy(np.ascontiguousarray(mels)).to(DEVICE)"
    made.batch.append(f'return {{"audio": {audio}, "label": {_TENSOR.format("label")}}}')
    made.sizes = {"num_mels": "NUM_MELS", "cardinalities": "[]"}
    return made


def _changed(made: Reading, piece: Any, *given: str) -> str:
    return f"wave = {_with(made, piece, 'wave', *given)} if rng is not None else wave"
