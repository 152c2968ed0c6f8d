"""Images in class folders, or named or held by a table: decoded when a sample is needed, never before."""

from __future__ import annotations

import copy
import os
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc
import torch
import xxhash
from torch.utils.data import Dataset

from ..chance import ChanceKey
from ..contracts import Batch, Field, Preprocess, Sample, Schema
from ..errors import BadSampleError, DataError, nearest
from .augment import Augmentation, Augmentations, check_augmentations
from .decode import U8, decode_image, resize_short_side_and_center_crop
from .tables import number_words, read_frame, require_column

Indices = np.ndarray[Any, np.dtype[np.int64]]

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")

_SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "test"}
_SIZE_TRIES = 16


class Names:
    """Many texts as one blob and int64 offsets: workers that fork share it, since no Python object is counted."""

    def __init__(self, names: Sequence[str]):
        encoded = [os.fsencode(name) for name in names]
        self.blob = b"".join(encoded)
        self.offsets = np.concatenate([[0], np.cumsum([len(name) for name in encoded], dtype=np.int64)])

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> str:
        return os.fsdecode(self.raw(index))

    def raw(self, index: int) -> bytes:
        return self.blob[self.offsets[index] : self.offsets[index + 1]]


class Images(Dataset[Sample]):
    """What the two sources of images share. They say how a sample's bytes are found and what it is called."""

    threads = True  # decoding and resizing release the GIL
    where: str
    labels: Indices
    image_size: int | None
    size: tuple[int, int]  # height and width of every image that leaves here
    schema: Schema

    def _prepare(
        self,
        classes: Sequence[str],
        image_size: int | None,
        channels: int | None,
        augment: Sequence[Augmentation],
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
        like: Any,
    ) -> None:
        self.augmentations = Augmentations(check_augmentations(augment))
        # a callable of the user's may hold the GIL, or may not bear several threads
        self.threads = not self.augmentations.has_callable
        known = _images_of(like, self.where)
        known_preprocess = known.schema.preprocess if known else None
        self.channels = channels or (known_preprocess.channels if known_preprocess else 3)
        self.image_size = image_size or (known.image_size if known else None)
        if self.image_size:
            self.size = (self.image_size, self.image_size)
        else:
            self.size = known.size if known else self._first_size()
        self.schema = _schema(classes, self.size, self._preprocess(mean, std, known_preprocess))

    def _preprocess(
        self, mean: Sequence[float] | None, std: Sequence[float] | None, known: Preprocess | None
    ) -> Preprocess:
        height, width = self.size
        kept = known if known and known.channels == self.channels else None
        return Preprocess(
            image_size=height if height == width else None,
            channels=self.channels,
            mean=_per_channel("mean", mean, kept.mean if kept else None, self.channels),
            std=_per_channel("std", std, kept.std if kept else None, self.channels),
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Sample:
        """The sample under the chance of seed 0, epoch 0; torchkeep's Loader draws anew in each epoch."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return self.read(index % len(self), ChanceKey())

    def read(self, index: int, key: ChanceKey) -> Sample:
        """One sample: {"image": uint8 (C, H, W), "label": int, "id": str}.

        Raises:  BadSampleError where the image cannot be decoded, or is of another size and ``image_size`` is not set
        """
        image = self._sized(index, key)
        rest = {"label": int(self.labels[index]), "id": self.id_of(index)}
        sample = self.augmentations.apply_all(rest, image, key, index, self.size)
        self._check_augmented(sample["image"].shape[1:], index)
        return sample

    def read_batch(self, indices: Indices, key: ChanceKey) -> Batch | None:
        """A batch written in place; None where a user's callable may add keys, so that samples are read one by one.

        Shapes:  indices (B,) → "image" uint8 (B, C, H, W), channels last in memory; "label" int64 (B,)
        Raises:  BadSampleError as ``read`` does
        """
        if self.augmentations.has_callable:
            return None
        height, width = self.size
        images = np.empty((len(indices), height, width, self.channels), np.uint8)
        draws = self.augmentations.draw(key, indices)
        for row, index in enumerate(indices.tolist()):
            images[row] = self.augmentations.apply_named(self._sized(index, key), draws, row, height, width)
        return {
            "image": torch.from_numpy(images).permute(0, 3, 1, 2),
            "label": torch.from_numpy(self.labels[indices]),
        }

    def decoded(self, index: int, where: str = "") -> U8:
        """The stored image, (H, W, C), before any resizing.

        Raises:  BadSampleError where it cannot be decoded
        """
        where = where or f"{self.where}: {self.id_of(index)} (sample {index})"
        return decode_image(self._encoded(index, where), where, self.channels)

    def _sized(self, index: int, key: ChanceKey) -> U8:
        where = f"{self.where}: {self.id_of(index)} (sample {index}, epoch {key.epoch + 1})"
        image = self.decoded(index, where)
        if self.image_size is None:
            self._check_size(image, where)
        elif not self.augmentations.sets_size:
            image = resize_short_side_and_center_crop(image, self.image_size)
        return image

    def _check_size(self, image: U8, where: str) -> None:
        if image.shape[:2] != self.size:
            raise BadSampleError(
                "this image is of another size than the others",
                where=where,
                got=f"{image.shape[1]} × {image.shape[0]} pixels",
                expected=f"{self.size[1]} × {self.size[0]} pixels",
                fix="image_size = 224 brings all images to one size",
            )

    def _check_augmented(self, shape: Sequence[int], index: int) -> None:
        if tuple(shape) != self.size:
            raise DataError(
                "an augmentation changed the size of an image",
                where=self.id_of(index),
                got=f"(H, W) = {tuple(shape)}",
                expected=f"(H, W) = {self.size}",
            )

    def _first_size(self) -> tuple[int, int]:
        """Height and width of the first image that can be decoded."""
        tries = min(len(self), _SIZE_TRIES)
        for index in range(tries):
            try:
                height, width = self.decoded(index).shape[:2]
            except BadSampleError:
                if index == tries - 1:
                    raise
                continue
            return height, width
        raise AssertionError("a dataset has a sample")

    def without_augmentation(self) -> Images:
        """A copy that shares everything but the augmentations."""
        plain = copy.copy(self)
        plain.augmentations = Augmentations()
        plain.threads = True
        return plain

    @abstractmethod
    def id_of(self, index: int) -> str: ...

    @abstractmethod
    def fingerprint(self) -> str: ...

    @abstractmethod
    def _encoded(self, index: int, where: str) -> bytes: ...


class ImageFolder(Images):
    """``root/CLASS/any/where/name.jpg``: the classes are the folders that hold images, in sorted order.

    Hidden files and files of other kinds are passed over. A sample's id is its name relative to ``root``. With
    ``image_size=None`` all images must have one size. ``like`` takes over another dataset's classes, and its channels,
    size, mean and std where they are not given.

    Raises:  DataError for a missing or empty root, no class folders, a class that ``like`` does not know
    """

    def __init__(
        self,
        root: str | Path,
        *,
        image_size: int | None = None,
        channels: int | None = None,
        augment: Sequence[Augmentation] = (),
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        like: Any = None,
    ):
        self.root = Path(root)
        self.where = str(root)
        names = _scan(self.root)
        found = sorted({name.split("/", 1)[0] for name in names})
        known = _images_of(like, self.where)
        classes = known.schema["label"].classes if known else tuple(found)
        _check_classes(found, classes, self.where)
        number_of = {name: number for number, name in enumerate(classes)}
        self.names = Names(names)
        self.labels = np.array([number_of[name.split("/", 1)[0]] for name in names], np.int64)
        self._prepare(classes, image_size, channels, augment, mean, std, like)

    def id_of(self, index: int) -> str:
        """The name relative to the root, with "/" between its parts on every system."""
        return self.names.raw(index).decode("utf-8", "backslashreplace")

    def fingerprint(self) -> str:
        """xxh3 of the sorted relative names, the sizes of the files, and the labels."""
        sizes = [self._size_bytes(index) for index in range(len(self))]
        digest = xxhash.xxh3_128(self.names.blob)
        for numbers in (self.names.offsets, np.array(sizes, np.int64), self.labels):
            digest.update(numbers.tobytes())
        digest.update("\0".join(self.schema["label"].classes).encode("utf-8", "surrogateescape"))
        return str(digest.hexdigest())

    def _size_bytes(self, index: int) -> int:
        try:
            return os.stat(self.root / self.names[index]).st_size
        except OSError:
            return -1  # gone since the folder was listed: other data

    def _encoded(self, index: int, where: str) -> bytes:
        return read_image_file(self.root / self.names[index], where)


class ImageTable(Images):
    """A CSV or Parquet file whose ``image`` column holds encoded images or names of files, and ``label`` their class.

    An image is bytes, a struct {bytes, path} as Hugging Face writes it, or a name relative to the table's folder.
    Labels are texts or whole numbers; their names are read from a Hugging Face file's description where it has one.

    Raises:  DataError for a missing table or column, a row without a label, a class that ``like`` does not know
    """

    def __init__(
        self,
        path: str | Path,
        *,
        image: str = "image",
        label: str = "label",
        image_size: int | None = None,
        channels: int | None = None,
        augment: Sequence[Augmentation] = (),
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        like: Any = None,
    ):
        self.path = Path(path)
        self.where = str(path)
        frame = read_frame(self.path)
        column = require_column(frame, image, self.where, "image")
        self._bytes, paths = _image_cells(column, f"{self.where}: column {image!r}")
        self._paths = Names([name or "" for name in paths]) if paths is not None else None
        texts = _label_texts(frame, label, self.where)
        known = _images_of(like, self.where)
        classes = known.schema["label"].classes if known else _classes_in_order(texts, frame, label)
        _check_classes(pc.unique(texts).to_pylist(), classes, f"{self.where}: column {label!r}")
        self.labels = number_words(texts, classes)
        self._prepare(classes, image_size, channels, augment, mean, std, like)

    def id_of(self, index: int) -> str:
        """The image's path where the table has one, else the row, counted from 0."""
        path = self._paths.raw(index).decode("utf-8", "backslashreplace") if self._paths else ""
        return path or f"row {index}"

    def fingerprint(self) -> str:
        """xxh3 of the images' bytes or names, and of the labels."""
        digest = xxhash.xxh3_128(self.labels.tobytes())
        if self._bytes is not None:
            for cell in self._bytes:
                digest.update(cell.as_buffer() or b"" if cell.is_valid else b"")
                digest.update(b"|")
        if self._paths is not None:
            digest.update(self._paths.blob)
            digest.update(self._paths.offsets.tobytes())
        digest.update("\0".join(self.schema["label"].classes).encode())
        return str(digest.hexdigest())

    def _encoded(self, index: int, where: str) -> bytes:
        held = self._bytes[index].as_py() if self._bytes is not None else None
        if held is not None:
            return bytes(held)
        if self._paths is not None and self._paths.raw(index):
            return read_image_file(self.path.parent / self._paths[index], where)
        raise BadSampleError(
            "this row has no image", where=where, got="an empty cell", expected="an image's bytes or a file's name"
        )


def encoded_images(path: Path, image: str) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """The name of each image of a table that need not have labels, and what reads its bytes.

    Raises:  DataError for a missing column or one that holds no images; reading raises BadSampleError
    """
    column = require_column(read_frame(path), image, path, "data.image")
    held, paths = _image_cells(column, f"{path}: column {image!r}")
    for row in range(len(column)):
        name = (paths[row] if paths is not None else None) or f"{path}, row {row}"
        data = held[row].as_py() if held is not None else None
        if data is None and paths is not None and paths[row]:
            yield name, partial(read_image_file, path.parent / str(paths[row]), name)
        else:
            yield name, partial(bytes, data or b"")


def read_image_file(path: Path, where: str) -> bytes:
    """The bytes of an image file.

    Raises:  BadSampleError where it cannot be read
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadSampleError(
            "this image cannot be read", where=where, got=error.strerror or error, expected=f"a file {path}"
        ) from None


def _images_of(like: Any, where: str) -> Images | None:
    """The images behind ``like``, which may be a part of them."""
    whole = getattr(like, "dataset", like)
    if whole is None or isinstance(whole, Images):
        return whole
    raise DataError(
        "these are images, and the training data are not",
        where=where,
        got="a dataset of images",
        expected=f"data as in training, a {type(whole).__name__}",
    )


def _schema(classes: Sequence[str], size: tuple[int, int], preprocess: Preprocess) -> Schema:
    fields = {
        "image": Field("image", (preprocess.channels, *size)),
        "label": Field("label", (), tuple(classes), is_target=True),
        "id": Field("object"),
    }
    return Schema(fields, preprocess)


def _per_channel(
    name: str, given: Sequence[float] | None, known: tuple[float, ...] | None, channels: int
) -> tuple[float, ...]:
    if given is None:
        return known or (0.5,) * channels
    if len(given) not in (1, channels):
        raise DataError(
            f"{name} does not fit the channels",
            where=name,
            got=f"{len(given)} numbers",
            expected=f"1 or {channels} numbers",
            fix=f"{name} = {[0.5] * channels}",
        )
    return tuple(float(number) for number in given) * (channels if len(given) == 1 else 1)


def _check_classes(found: Sequence[str], classes: Sequence[str], where: str) -> None:
    unknown = sorted(set(found) - set(classes))
    if unknown:
        raise DataError(
            "a class is not among those of the training data",
            where=where,
            got=", ".join(repr(name) for name in unknown[:5]),
            expected=f"one of {', '.join(classes[:20])}",
            fix=nearest(unknown[0], list(classes)),
        )


def _scan(root: Path) -> list[str]:
    """Sorted names of all images below the class folders of ``root``, with "/" between their parts."""
    if not root.is_dir():
        near = nearest(root.name, [found.name for found in root.parent.iterdir()]) if root.parent.is_dir() else ""
        got = "a file" if root.exists() else "no such folder"
        raise DataError("the folder of images is missing", where=root, got=got, expected="a folder", fix=near)
    entries = [entry for entry in os.scandir(root) if not entry.name.startswith(".")]
    folders = sorted(entry.name for entry in entries if entry.is_dir())
    if not folders:
        loose = sum(_is_image(entry.name) for entry in entries)
        raise DataError(
            "this folder has no class folders" if entries else "this folder is empty",
            where=root,
            got=f"{loose:,} images and {len(entries) - loose:,} other files",
            expected="a folder for each class, with its images",
        )
    names = sorted(name for folder in folders for name in _images_below(root, folder))
    if not names:
        raise DataError(
            "there are no images in these class folders",
            where=root,
            got=f"folders {', '.join(folders[:10])}",
            expected=f"files that end in {', '.join(IMAGE_SUFFIXES)}",
        )
    if set(folders) <= _SPLIT_NAMES:
        raise DataError(
            "these are splits, not classes",
            where=root,
            got=f"folders {', '.join(folders)}",
            expected="a folder for each class",
            fix=f'train = "{root.name}/{next((name for name in folders if name.startswith("train")), folders[0])}"',
        )
    return names


def _is_image(name: str) -> bool:
    return not name.startswith(".") and name.lower().endswith(IMAGE_SUFFIXES)


def _images_below(root: Path, folder: str) -> list[str]:
    names: list[str] = []
    seen: set[str] = set()
    for place, folders, files in os.walk(root / folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:  # a link to a folder above
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        relative = Path(place).relative_to(root).as_posix()
        names.extend(f"{relative}/{name}" for name in files if _is_image(name))
    return names


def _image_cells(column: Any, where: str) -> tuple[Any, list[str | None] | None]:
    """The column's bytes as one large_binary array, and its paths; either may be None."""
    kind = column.type
    if pa.types.is_struct(kind):
        names = [kind.field(number).name for number in range(kind.num_fields)]
        held = pc.struct_field(column, "bytes") if "bytes" in names else None
        paths = pc.struct_field(column, "path").to_pylist() if "path" in names else None
        if held is not None or paths is not None:
            return _one_array(held), paths
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return _one_array(column), None
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return None, column.to_pylist()
    raise DataError(
        "this column holds no images",
        where=where,
        got=f"type {kind}",
        expected="bytes, a struct {bytes, path}, or names of files",
    )


def _one_array(column: Any) -> Any:
    # int32 offsets would overflow at 2 GiB
    return None if column is None else pc.cast(column, pa.large_binary()).combine_chunks()


def _label_texts(frame: Any, label: str, where: str) -> Any:
    column = require_column(frame, label, where, "label")
    if pa.types.is_dictionary(column.type):
        column = pc.cast(column, column.type.value_type)
    if not (pa.types.is_integer(column.type) or pa.types.is_boolean(column.type) or _is_text(column.type)):
        raise DataError(
            "this column holds no labels",
            where=f"{where}: column {label!r}",
            got=f"type {column.type}",
            expected="texts or whole numbers",
        )
    row = pc.index(pc.is_null(column), True).as_py()
    if row >= 0:
        raise DataError(
            "a label is missing", where=f"{where}: column {label!r}, row {row} (counted from 0)", got="an empty cell"
        )
    names = _hub_names(frame, label)
    if names and pa.types.is_integer(column.type):
        named = pc.take(pa.array(names), _within(column, len(names), where))
        return named.combine_chunks() if isinstance(named, pa.ChunkedArray) else named
    return pc.cast(column, pa.string()).combine_chunks()


def _within(column: Any, num_classes: int, where: str) -> Any:
    lowest, highest = pc.min(column).as_py(), pc.max(column).as_py()
    if lowest < 0 or highest >= num_classes:
        raise DataError(
            "a label has no name",
            where=where,
            got=f"labels from {lowest} to {highest}",
            expected=f"0 to {num_classes - 1}",
        )
    return column


def _is_text(kind: Any) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _classes_in_order(texts: Any, frame: Any, label: str) -> tuple[str, ...]:
    names = _hub_names(frame, label)
    if names and pa.types.is_integer(frame[label].type):
        return tuple(names)
    found = pc.unique(texts).to_pylist()
    return tuple(sorted(found, key=int) if pa.types.is_integer(frame[label].type) else sorted(found))


def _hub_names(frame: Any, label: str) -> list[str]:
    """The class names that Hugging Face's datasets writes into a Parquet file; empty where there are none."""
    described = (frame.schema.metadata or {}).get(b"huggingface")
    try:
        names = orjson.loads(described)["info"]["features"][label]["names"] if described else []
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return []
    return [str(name) for name in names]
