"""Images in class folders, in tables or in idx files: decoded when a sample is needed, never before."""

from __future__ import annotations

import copy
import gzip
import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from ..chance import ChanceKey
from ..contracts import Batch, Field, Preprocess, Sample, Schema
from ..errors import BadSampleError, DataError
from .arrays import gathered
from .augment import Augmentation, Augmentations, check_augmentations
from .blobs import Blobs, Cells, FolderRows, FrameRows, ListedFiles, folder_of, read_file
from .cache import PictureCache, to_short_side
from .dataset import Filling, Indices, target_of, whole_of
from .decode import (
    IGNORED_PIXEL,
    Pixels,
    decode_image,
    decode_mask,
    in_bits,
    resize_short_side_and_center_crop,
)
from .frames import Form, Source, read_frame, where_of
from .index import Layout, Listing, bytes_of_array, list_folder
from .labels import LabelledData, Labels, labels_of_classes, labels_of_column

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
IGNORED_CLASS = -100  # torch's own label for "no target here"

_SIZE_TRIES = 16
_BYTES_IDX = 0x08
_MOST_DEFLATED = 1032  # deflate makes nothing smaller than by this: what says more is damaged, or a bomb


class Images(LabelledData):
    """What the sources of images share. ``blobs`` are the encoded images, ``masks`` those of segmentation.

    Options that all of them take: ``image_size``, the side of the square images (without it all must have one size);
    ``crop_fraction``, how much of the short side the middle square has that becomes one;
    ``channels`` 3 or 1; ``bits`` 8, or 16 to keep more; ``augment``; ``mean`` and ``std`` of each channel in units
    where white is 1; ``like``, a dataset whose classes, size and statistics are taken over; ``size``, the height and
    width of all images where neither ``image_size`` nor a first image tells them.
    """

    threads = True  # decoding and resizing release the GIL
    suffixes = IMAGE_SUFFIXES
    input_column = "image"
    image_size: int | None
    size: tuple[int, int]  # height and width of every image that leaves here
    cache: PictureCache | None = None

    def __init__(
        self, blobs: Blobs, labels: Labels | None, where: str, *, image_size: int | None = None,
        channels: int | None = None, bits: Literal[8, 16] | None = None, augment: Sequence[Augmentation] = (),
        mean: Sequence[float] | None = None, std: Sequence[float] | None = None, like: Any = None,
        masks: Blobs | None = None, mask_classes: Sequence[str] = (), crop_fraction: float | None = None,
        size: tuple[int, int] | None = None,
    ):  # fmt: skip
        known = whole_of(like, Images, "a dataset of images", where)
        self.blobs = self._held = blobs
        self._labels, self.where, self._masks = labels, where, masks
        self.augmentations = Augmentations(check_augmentations(augment))
        # a callable of the user's may hold the GIL, or may not bear several threads
        self.threads = not self.augmentations.has_callable
        before = known.schema.preprocess if known is not None else None
        self.channels = channels or (before.channels if before else 3)
        self.bits = bits or (before.bits if before else 8)
        self.crop_fraction = crop_fraction or (before.crop_fraction if before else 1.0)
        self.image_size = image_size or (known.image_size if known is not None else None)
        if self.image_size:
            self.size = (self.image_size, self.image_size)
        else:
            self.size = size or (known.size if known is not None else self._first_size())
        preprocess = self._preprocess(mean, std, before)
        masks_before = known.schema.get("mask") if known is not None else None
        names = tuple(mask_classes) or (masks_before.classes if masks_before else ())
        self.schema = self._schema_with(preprocess, names)

    def _preprocess(
        self, mean: Sequence[float] | None, std: Sequence[float] | None, known: Preprocess | None
    ) -> Preprocess:
        height, width = self.size
        kept = known if known and known.channels == self.channels else None
        return Preprocess(
            image_size=height if height == width else None,
            channels=self.channels,
            bits=self.bits,
            crop_fraction=self.crop_fraction,
            mean=_per_channel("mean", mean, kept.mean if kept else None, self.channels),
            std=_per_channel("std", std, kept.std if kept else None, self.channels),
        )

    def _schema_with(self, preprocess: Preprocess, mask_classes: tuple[str, ...]) -> Schema:
        fields = {"image": Field("image", (preprocess.channels, *self.size))}
        if self._masks is not None:
            if not mask_classes:
                raise DataError(
                    "the classes of the masks are not named",
                    where=self.where,
                    expected="a name for each class number, beginning with 0",
                    fix='mask_classes = ["background", "thing"]',
                )
            fields["mask"] = Field("mask", self.size, mask_classes, is_target=True)
        return self._schema_of(fields, preprocess)

    def read(self, index: int, key: ChanceKey) -> Sample:
        """One sample: {"image": uint8 or uint16 (C, H, W), "label": …, "mask": int64 (H, W), "id": str}.

        Raises:  BadSampleError where the image cannot be decoded, or is of another size and ``image_size`` is not set
        """
        pictures, is_kept = self.pictures(index, key)
        if is_kept:  # what is done to a sample must not change the cache
            pictures = {name: held.copy() for name, held in pictures.items()}
        rest = self._label_of(index) | {"id": self.id_of(index)}
        sample = self.augmentations.apply_all(rest, pictures, key, index, self.size)
        for name in pictures:
            self._check_augmented(name, sample[name].shape[1:], index)
        if "mask" in pictures:
            sample["mask"] = torch.from_numpy(self.classes_of(sample["mask"].numpy()[0], index))
        return sample

    def read_batch(self, indices: Indices, key: ChanceKey) -> Batch | None:
        """A batch written in place; None where a user's callable may add keys, so that samples are read one by one.

        Shapes:  indices (B,) → "image" (B, C, H, W), channels last in memory; "label" (B,); "mask" int64 (B, H, W)
        Raises:  BadSampleError as ``read`` does
        """
        if self.augmentations.has_callable:
            return None
        return super().read_batch(indices, key)

    def begin(self, indices: Indices, key: ChanceKey) -> Filling | None:
        """A batch written in place; sample by sample where a user's callable may add keys."""
        return Filling(self, indices, key) if self.augmentations.has_callable else _InPlace(self, indices, key)

    @property
    def has_masks(self) -> bool:
        return self._masks is not None

    def decoded(self, index: int, where: str = "") -> Pixels:
        """The stored image, (H, W, C), before any resizing.

        Raises:  BadSampleError where it cannot be decoded
        """
        where = where or self._where(index)
        return decode_image(self.blobs.read(index, where), where, self.channels, self.bits)

    def pictures(self, index: int, key: ChanceKey) -> tuple[dict[str, Pixels], bool]:
        """The image, and its mask where there is one, as they are before any chance; and whether a cache had them.

        Raises:  BadSampleError where one cannot be decoded, or is of another size than it must have
        """
        held = self.cache.get(index) if self.cache is not None else None
        if held is not None:
            return held, True
        pictures = self._read_pictures(index, self._where(index, key))
        if self.cache is not None:
            self.cache.put(index, pictures)
        return pictures, False

    def _read_pictures(self, index: int, where: str) -> dict[str, Pixels]:
        pictures = {"image": self.decoded(index, where)}
        if self._masks is not None:
            pictures["mask"] = decode_mask(self._masks.read(index, where), f"{where}, its mask")
            self._check_size(pictures["mask"], pictures["image"].shape[:2], f"{where}, its mask", "mask_size")
        if self.image_size is None:
            self._check_size(pictures["image"], self.size, where, "image_size")
            return pictures
        side = self.cache.side if self.cache is not None else None
        if self.augmentations.sets_size and side is None:
            return pictures
        size = self.image_size
        return {
            name: to_short_side(held, side, name == "mask") if self.augmentations.sets_size and side
            else resize_short_side_and_center_crop(held, size, name == "mask", self.crop_fraction)
            for name, held in pictures.items()
        }  # fmt: skip

    def files_of(self, index: int) -> list[Path]:
        """The files that hold the image and its mask; none where a table or memory does."""
        held = [blobs.file_of(index) for blobs in (self.blobs, self._masks) if blobs is not None]
        return [file for file in held if file is not None]

    def with_cache(self, cache: PictureCache) -> Images:
        """A copy that keeps what it decodes, and looks there first."""
        kept = copy.copy(self)
        kept.cache = cache
        return kept

    def _check_size(self, image: Pixels, size: tuple[int, ...], where: str, setting: str) -> None:
        if image.shape[:2] != size:
            is_image = setting == "image_size"
            raise BadSampleError(
                "this image is of another size than the others" if is_image else "a mask is of another size",
                where=where,
                got=f"{image.shape[1]} × {image.shape[0]} pixels",
                expected=f"{size[1]} × {size[0]} pixels" + ("" if is_image else ", as its image"),
                fix="image_size = 224 brings all images to one size" if is_image else "",
            )

    def classes_of(self, mask: Pixels, index: int) -> np.ndarray[Any, Any]:
        """Shapes:  (H, W) uint8 → (H, W) int64, IGNORED_CLASS where the mask says 255"""
        classes = mask.astype(np.int64)
        classes[classes == IGNORED_PIXEL] = IGNORED_CLASS
        count = self.schema["mask"].num_classes
        if classes.max(initial=0) >= count:
            raise BadSampleError(
                "a mask holds a class that has no name", where=f"{self._where(index)}, its mask",
                got=f"class {classes.max()}", expected=f"0 to {count - 1}, or 255 for no class",
                fix="name all classes in mask_classes",
            )  # fmt: skip
        return classes

    def _check_augmented(self, name: str, shape: Sequence[int], index: int) -> None:
        if tuple(shape) != self.size:
            raise DataError(
                f"an augmentation changed the size of the {name}", where=self.id_of(index),
                got=f"(H, W) = {tuple(shape)}", expected=f"(H, W) = {self.size}",
            )  # fmt: skip

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
        plain.augmentations, plain.cache = Augmentations(), None
        plain.threads = True
        return plain

    def fingerprint(self) -> str:
        """xxh3 of the images' names, sizes or bytes, of the masks', and of the labels."""
        return self._digest("", self._masks)


class _InPlace(Filling):
    """A batch of images, channels last in memory, and their masks."""

    def __init__(self, images: Images, indices: Indices, key: ChanceKey):
        self.dataset, self.key, self.indices = images, key, indices.copy()
        kind = np.uint16 if images.bits == 16 else np.uint8
        self._images = np.empty((len(indices), *images.size, images.channels), kind)
        self._masks = np.empty((len(indices), *images.size), np.int64) if images.has_masks else None
        self._draws = images.augmentations.draw(key, indices)
        self._is_hit = np.zeros(len(indices), bool)

    def fill(self, start: int, indices: Indices) -> None:
        self._take_substitutes(start, indices)
        images, draws = self.dataset, self._draws
        for row, index in enumerate(indices.tolist(), start):
            pictures, self._is_hit[row] = images.pictures(index, self.key)
            apply = images.augmentations.apply_named
            self._images[row] = apply(pictures["image"], draws, row, images.size)
            if self._masks is not None:
                moved = apply(pictures["mask"], draws, row, images.size, is_mask=True)
                self._masks[row] = images.classes_of(moved[..., 0], index)

    def _take_substitutes(self, start: int, indices: Indices) -> None:
        rows = slice(start, start + len(indices))
        if (self.indices[rows] != indices).any():
            self.indices[rows] = indices
            for drawn, anew in zip(self._draws, self.dataset.augmentations.draw(self.key, indices), strict=True):
                drawn[rows] = anew

    def finish(self) -> Batch:
        self.hits = int(self._is_hit.sum())
        batch: Batch = {"image": torch.from_numpy(self._images).permute(0, 3, 1, 2)}
        batch |= self.dataset.labels_of(self.indices)
        return batch if self._masks is None else batch | {"mask": torch.from_numpy(self._masks)}


class ImageFolder(FolderRows, Images):
    """``root/CLASS/any/where/name.jpg``: the classes are the folders that hold images, in sorted order.

    Hidden files and files of other kinds are passed over; a link that leads out of ``root`` is an error unless
    ``follow_links``. A sample's id is its name relative to ``root``. With ``label_pattern``, a regular expression, the
    class is its group "label" in each name. With ``masks``, a folder of PNG masks of the same names, the target is the
    mask, and there are no classes but ``mask_classes``. Further options are those of ``Images``.

    Raises:  DataError for a missing or empty root, no class folders, a class that ``like`` does not know
    """

    def __init__(
        self, root: str | Path, *, label_pattern: str | None = None, follow_links: bool = False,
        masks: str | Path | None = None, **options: Any,
    ):  # fmt: skip
        self.root = Path(root)
        layout = Layout(IMAGE_SUFFIXES, "images", masks is None, label_pattern, follow_links)
        self.listing = list_folder(self.root, layout)
        known = whole_of(options.get("like"), Images, "a dataset of images", str(root))
        labels = None
        if masks is None:
            labels = labels_of_classes(self.listing.labels, self.listing.classes, target_of(known), str(root))
        else:
            options["masks"] = _MasksOf(self.listing, Path(masks))
        super().__init__(ListedFiles(self.listing), labels, str(root), **options)


class ImageTable(FrameRows, Images):
    """A table whose ``image`` column holds encoded images or names of files, and ``label`` what is to be predicted.

    An image is bytes, a struct {bytes, path} as Hugging Face writes it, or a name relative to ``root``, which is the
    table's folder where nothing is said. Labels are texts or whole numbers (classes), lists or texts with a
    ``separator`` (several classes each), or floats (numbers); None for none. ``mask`` names a column of masks.

    Raises:  DataError for a missing table or column, a row without a label, a class that ``like`` does not know
    """

    def __init__(
        self, source: Source, *, image: str = "image", label: str | None = "label", mask: str | None = None,
        id: str | None = None, root: str | Path | None = None, separator: str | None = None, form: Form | None = None,
        identity: str = "", **options: Any,
    ):  # fmt: skip
        where, folder = where_of(source), folder_of(source, root)
        frame = read_frame(source, form or Form())
        known = whole_of(options.get("like"), Images, "a dataset of images", where)
        blobs = Cells(frame, image, folder, where, identity=identity)
        labels = None
        if mask is not None:
            options["masks"] = Cells(frame, mask, folder, where, "masks", identity)
        if label is not None and mask is None:
            labels = labels_of_column(frame, label, where, target_of(known), separator)
        self._keep(frame, [image, mask or image], id, where)
        super().__init__(blobs, labels, where, **options)


class IdxImages(Images):
    """Images of one size in an idx file (LeCun's format, also .gz), held in memory; labels in the file beside it.

    The labels' file is found by name: train-images-idx3-ubyte.gz → train-labels-idx1-ubyte.gz.
    Raises:  DataError for a file that is missing, cut, or of another form
    """

    def __init__(self, path: str | Path, labels: str | Path | None = None, **options: Any):
        path = Path(path)
        numbers = read_idx(path)
        if numbers.ndim != 3 or not numbers.size:
            raise DataError(
                "this idx file holds no images", where=path, got=f"shape {numbers.shape}",
                expected="(N, H, W), all above 0",
            )  # fmt: skip
        beside = Path(labels) if labels is not None else _labels_beside(path)
        values = read_idx(beside) if beside is not None else None
        if values is not None and values.shape != numbers.shape[:1]:
            raise DataError(
                "images and labels are not as many", where=beside, got=f"{values.shape}", expected=f"({len(numbers)},)"
            )
        self.pixels = numbers[..., None]
        known = whole_of(options.get("like"), Images, "a dataset of images", str(path))
        held = None
        if values is not None:
            classes = [str(number) for number in range(int(values.max(initial=0)) + 1)]
            held = labels_of_classes(values, classes, target_of(known), str(beside))
        options["channels"] = options.get("channels") or (known.channels if known is not None else 1)
        super().__init__(_Rows(self.pixels), held, str(path), **options)
        self.threads = self.threads and bool(self.augmentations.entries)

    def decoded(self, index: int, where: str = "") -> Pixels:
        # a copy in any case: what is done to a sample must not change the data
        return np.repeat(in_bits(self.pixels[index], self.bits), self.channels, axis=2)

    def begin(self, indices: Indices, key: ChanceKey) -> Filling | None:
        is_changed = self.augmentations.entries or self.image_size is not None or self.channels > 1 or self.bits > 8
        return super().begin(indices, key) if is_changed else None

    def read_batch(self, indices: Indices, key: ChanceKey) -> Batch | None:
        """One gather where nothing is changed on the way."""
        if self.begin(indices[:0], key) is not None:
            return super().read_batch(indices, key)
        images = gathered(torch.from_numpy(self.pixels), indices)
        return {"image": images.permute(0, 3, 1, 2), **self.labels_of(indices)}

    def without_augmentation(self) -> Images:
        plain = super().without_augmentation()
        plain.threads = False
        return plain


class _Rows:
    """Pixels in memory, where encoded ones stand elsewhere."""

    def __init__(self, pixels: Pixels):
        self._pixels = pixels

    def __len__(self) -> int:
        return len(self._pixels)

    def read(self, index: int, where: str) -> bytes:
        return bytes_of_array(self._pixels[index]).tobytes()

    def file_of(self, index: int) -> None:
        return None

    def id_of(self, index: int) -> str:
        return str(index)

    def absorb(self, digest: Any) -> None:
        digest.update(bytes_of_array(self._pixels))


class _MasksOf:
    """For each image of a listing the mask of the same name, ending in .png, in another folder."""

    def __init__(self, listing: Listing, root: Path):
        self._masks = list_folder(root, Layout((".png",), "masks", has_classes=False))
        self._files, self._root = ListedFiles(listing), root

    def __len__(self) -> int:
        return len(self._files)

    def read(self, index: int, where: str) -> bytes:
        return read_file(self.file_of(index), f"{where}, its mask")

    def file_of(self, index: int) -> Path:
        return self._root / Path(self._files.listing.names[index]).with_suffix(".png")

    def id_of(self, index: int) -> str:
        return self._files.id_of(index)

    def absorb(self, digest: Any) -> None:
        digest.update(self._masks.fingerprint().encode())


def read_idx(path: Path) -> np.ndarray[Any, Any]:
    """An idx file of bytes as an array.

    Raises:  DataError for a file that is missing, cut, too large for what it says, or of another type
    Source:  LeCun, Cortes, Burges, "The MNIST database", section "FILE FORMATS"
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            start = file.read(4)
            if len(start) < 4 or start[:2] != b"\0\0" or start[2] != _BYTES_IDX:
                raise DataError("this is no idx file of bytes", where=path, got=start.hex(" ") or "an empty file",
                                expected="00 00 08 …")  # fmt: skip
            shape = tuple(np.frombuffer(file.read(4 * start[3]), ">u4").tolist())
            size = math.prod(shape)
            if size > _MOST_DEFLATED * path.stat().st_size:
                raise ValueError(f"{size:,} bytes of pixels in a file of {path.stat().st_size:,} bytes")
            data = file.read(size + 1)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise DataError("this idx file cannot be read", where=path, got=error, expected="a whole idx file") from None
    if len(data) != size:
        got = f"{len(data):,} bytes" + (" or more" if len(data) > size else "")
        raise DataError("this idx file is cut, or longer than it says", where=path, got=got, expected=f"{size:,} bytes")
    return np.frombuffer(bytearray(data), np.uint8).reshape(shape)  # torch wants memory that can be written to


def _labels_beside(path: Path) -> Path | None:
    for of_images, of_labels in (("images-idx3", "labels-idx1"), ("images.idx3", "labels.idx1")):
        beside = path.with_name(path.name.replace(of_images, of_labels))
        if beside != path and beside.exists():
            return beside
    return None


def _per_channel(
    name: str, given: Sequence[float] | None, known: tuple[float, ...] | None, channels: int
) -> tuple[float, ...]:
    if given is None:
        return known or (0.5,) * channels
    if len(given) not in (1, channels):
        raise DataError(
            f"{name} does not fit the channels", where=name, got=f"{len(given)} numbers",
            expected=f"1 or {channels} numbers", fix=f"{name} = {[0.5] * channels}",
        )  # fmt: skip
    return tuple(float(number) for number in given) * (channels if len(given) == 1 else 1)
