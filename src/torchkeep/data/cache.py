"""Decoded images that are kept, in memory or on the disk: whether that pays, where they lie, and what names them."""

from __future__ import annotations

import contextlib
import copy
import mmap
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import PIL
import simplejpeg
import xxhash

from .. import store
from ..chance import ChanceKey
from ..errors import BadSampleError, SettingsError
from ..files import cache_root, sync_file
from ..store import Store, evict
from .dataset import Part, in_whole, whole
from .decode import Pixels, resize
from .reading import Bad

Wanted = Literal["off", "ram", "disk", "auto"]
FilesOf = Callable[[int], Sequence[Path]]

_RULES = 1  # counted up where decode.py or this file make other pixels of the same bytes
_SIDE_PER_SIZE = 8 / 7  # 256 for crops to 224, as evaluations on ImageNet resize
_PROBED = 16
_PROBE_BYTES = 1 << 26
_BLOCK_BYTES = 4096  # of a read past the system's memory
_MEMORY_SHARE = 0.5
_DISK_SHARE = 0.9
_DISK_GAIN = 2.0
_ESTIMATE_SLACK = 1.25
_AT_ONCE = 256
_CONTROL_GROUP = Path("/sys/fs/cgroup")

_in_memory: weakref.WeakSet[Store] = weakref.WeakSet()


@dataclass(frozen=True)
class CachePlan:
    """Where decoded images are kept, and why. ``side`` is their short side, None where they are kept as they leave."""

    kind: Literal["off", "ram", "disk"]
    side: int | None
    is_exact: bool
    num_bytes: int
    reason: str

    @property
    def said(self) -> str:
        """What a run records: the kind, and what pixels depend on."""
        is_as_without = self.is_exact or self.kind == "off"
        return self.kind if is_as_without else f"{self.kind}, short side {self.side}, pixels may differ"


class PictureCache:
    """The decoded pictures of a dataset's samples by number. ``hits`` and ``misses`` are those of this process.

    A sample's identity is the size and time of its files, looked at once in each process; 0 where a table holds it.
    """

    def __init__(self, held: Store, side: int | None, files_of: FilesOf | None = None):
        self.store, self.side, self._files_of = held, side, files_of
        self.hits = self.misses = 0
        self._counting = threading.Lock()
        self._identities = np.zeros(held.num if files_of else 0, np.uint64)

    def get(self, index: int) -> dict[str, Pixels] | None:
        """The pictures, read-only; None where they are not held."""
        packed = self.store.get(index, self._identity(index))
        with self._counting:
            if packed is None:
                self.misses += 1
                return None
            self.hits += 1
        return _unpacked(packed)

    def put(self, index: int, pictures: dict[str, Pixels]) -> bool:
        """Keep {"image": (H, W, C)}, or with "mask": uint8 (H, W, 1) too; whether there was room."""
        return self.store.put(index, _packed(pictures), self._identity(index))

    def _identity(self, index: int) -> int:
        if self._files_of is None:
            return 0
        known = int(self._identities[index])
        if not known:
            known = self._identities[index] = file_identity(self._files_of(index))
        return known

    def fileno(self) -> int | None:
        """What another process attaches; None where it finds the file by its path, and on Windows, which cannot."""
        is_handed = self.store.path is None and self.store.fileno() >= 0 and os.name != "nt"
        return self.store.fileno() if is_handed else None

    def attach(self, handle: int) -> None:
        """Share the pictures in memory of the process that ``handle`` came from."""
        self.store.attach(handle)

    def __reduce__(self) -> Any:
        return PictureCache, (self.store, self.side, self._files_of)


def file_identity(files: Sequence[Path]) -> int:
    """A number that changes with the size or time of a sample's files; 0 where there are none, or no longer."""
    try:
        found = [path.stat() for path in files]
    except OSError:  # reading it says so
        return 0
    text = repr([(file.st_size, file.st_mtime_ns) for file in found])
    return (xxhash.xxh3_64_intdigest(text.encode()) or 1) if found else 0


def _packed(pictures: dict[str, Pixels]) -> Pixels:
    """One array of both: an image alone as it is; with a mask (1, H, W, bytes), all of the image and then the mask."""
    image, mask = pictures["image"], pictures.get("mask")
    if mask is None:
        return image
    assert mask.shape[:2] == image.shape[:2], "a mask has its image's size"
    parts = [np.ascontiguousarray(held).reshape(-1).view(np.uint8) for held in (image, mask)]
    return np.concatenate(parts).reshape(1, *image.shape[:2], -1)


def _unpacked(packed: Pixels) -> dict[str, Pixels]:
    if packed.ndim == 3:
        return {"image": packed}
    _, height, width, depth = packed.shape
    image, mask = np.split(packed.reshape(-1), [height * width * (depth - 1)])
    kind = np.uint16 if depth in (1 + 2, 1 + 6) else np.uint8  # 1 or 3 channels of two bytes
    return {"image": image.view(kind).reshape(height, width, -1), "mask": mask.reshape(height, width, 1)}


def to_short_side(image: Pixels, side: int, is_mask: bool = False) -> Pixels:
    """The image with ``side`` pixels along its shorter axis; the same array where it has no more.

    Shapes:  (H, W, C) → (side, W', C) or (H', side, C)
    """
    height, width = image.shape[:2]
    short = min(height, width)
    if short <= side:
        return image
    return resize(image, round(height * side / short), round(width * side / short), is_mask)


def with_cache(dataset: Any, wanted: Wanted, budget_bytes: int | None = None) -> tuple[Any, CachePlan]:
    """The dataset, or the part of one, with its decoded images kept where the plan says.

    Raises:  SettingsError where "ram" or "disk" is asked for, and there are no images
    """
    plan = plan_cache(wanted, dataset, budget_bytes)
    if plan.kind == "off":
        return dataset, plan
    images = whole(dataset)
    return _on(dataset, images.with_cache(open_cache(plan, images, budget_bytes, len(dataset)))), plan


def _on(dataset: Any, images: Any) -> Any:
    """The same part of other data."""
    if not isinstance(dataset, Part):
        return images
    part = copy.copy(dataset)
    part.dataset = _on(dataset.dataset, images)
    return part


def open_cache(
    plan: CachePlan, images: Any, budget_bytes: int | None = None, num_samples: int | None = None
) -> PictureCache:
    """The store that a plan for so many samples of the images asks for; without a folder one that keeps nothing."""
    num, held = len(images), Store(len(images))
    most = round(_ESTIMATE_SLACK * plan.num_bytes)
    if plan.kind == "ram":
        room = room_bytes("ram", budget_bytes)
        held = Store.in_memory(num, min(room, most or room))
        _in_memory.add(held)
    elif plan.kind == "disk" and (path := store_path(images.fingerprint(), recipe_of(images, plan.side))):
        # other parts of the same images may share the file
        held = Store.on_disk(path, num, room_bytes("disk", budget_bytes), most * num // (num_samples or num) or None)
    return PictureCache(held, plan.side, getattr(images, "files_of", None))


def store_path(fingerprint: str, recipe: str) -> Path | None:
    """The store file of some data: named by all that its pixels follow from. None where there is no folder for it."""
    folder = cache_folder()
    made_by = (simplejpeg.__version__, cv2.__version__, PIL.__version__, _RULES, store.VERSION)
    key = xxhash.xxh3_128_hexdigest(repr((fingerprint, recipe, made_by)).encode())
    return folder / f"{key}{store.SUFFIX}" if folder else None


def recipe_of(images: Any, side: int | None) -> str:
    """What is done to an image before it is kept, in words."""
    size = f"short side {side}" if side else _square_text(images) if images.image_size else "as stored"
    masks = ", with masks" if images.has_masks else ""
    return f"{size}, {images.channels} channels, {images.bits} bits{masks}"


def _square_text(images: Any) -> str:
    part = f" of {images.crop_fraction:g}" if images.crop_fraction != 1 else ""
    return f"centre square {images.image_size}{part}"


def plan_cache(wanted: Wanted, dataset: Any, budget_bytes: int | None = None) -> CachePlan:
    """Where to keep decoded images; "auto" goes by measured memory, disk and decoding.

    Raises:  SettingsError where "ram" or "disk" is asked for, and there are no images
    """
    images = whole(dataset)
    is_possible = hasattr(images, "with_cache")
    if wanted in ("ram", "disk") and not is_possible:
        raise SettingsError(
            "only decoded images are kept in a cache", where="cache", got=f"{wanted!r}, {type(images).__name__}",
            expected='"off" or "auto"',
        )  # fmt: skip
    side = round(images.image_size * _SIDE_PER_SIZE) if is_possible and images.image_size else None
    side = side if side and images.augmentations.sets_size else None

    def plan(kind: Literal["off", "ram", "disk"], num_bytes: int, reason: str) -> CachePlan:
        return CachePlan(kind, side, side is None, num_bytes, reason)

    if wanted == "off" or not is_possible:
        return plan("off", 0, "as set" if wanted == "off" else "these data are no images")
    if wanted == "auto" and images.begin(np.empty(0, np.int64), ChanceKey()) is None:
        return plan("off", 0, "these data lie in memory as they are")
    sample_bytes, decode_s = _probed(dataset, side)
    num_bytes = sample_bytes * len(dataset)
    decoded = f"{_size(num_bytes)} of decoded images"
    if wanted != "auto":
        return plan(wanted, num_bytes, f"as set; {decoded}")
    if not num_bytes:
        return plan("off", 0, f"none of the {_PROBED} images that were tried can be decoded")
    room = room_bytes("ram", budget_bytes)
    limit = f"{_size(room)}, {'the budget' if room == budget_bytes else 'half of the free memory'}"
    if num_bytes <= room:
        return plan("ram", num_bytes, f"{decoded} fit into {limit}")
    kind, reason = _plan_disk(sample_bytes, num_bytes, decode_s, budget_bytes)
    return plan(kind, num_bytes, f"{decoded} exceed {limit}; {reason}")


def _plan_disk(
    sample_bytes: int, num_bytes: int, decode_s: float, budget_bytes: int | None
) -> tuple[Literal["off", "disk"], str]:
    room = room_bytes("disk", budget_bytes)
    if num_bytes > room:
        return "off", f"the disk has {_size(room)} for them"
    try:
        read_s, is_direct = _read_seconds(sample_bytes)
    except OSError as error:
        return "off", f"the disk refuses: {error.strerror or error}"
    how = "" if is_direct else " at best, for the system's memory had a part in it"
    reason = f"reading one takes {read_s * 1e3:.2f} ms{how}, decoding it {decode_s * 1e3:.2f} ms"
    return "disk" if read_s * _DISK_GAIN <= decode_s else "off", reason


def _probed(dataset: Any, side: int | None) -> tuple[int, float]:
    """Bytes of a decoded sample, and seconds to decode it: mean and median of a few; zeros where none can be."""
    few = np.linspace(0, len(dataset) - 1, min(_PROBED, len(dataset))).astype(np.int64)
    images, places = whole(dataset), in_whole(dataset, few)
    images = images.with_cache(PictureCache(Store(len(images)), side))  # it keeps nothing
    sizes, seconds = [], []
    for index in places.tolist():
        begun = time.perf_counter()
        with contextlib.suppress(BadSampleError):
            pictures, _ = images.pictures(index, ChanceKey())
            seconds.append(time.perf_counter() - begun)
            sizes.append(sum(picture.nbytes for picture in pictures.values()))
    return (round(statistics.mean(sizes)), statistics.median(seconds)) if sizes else (0, 0.0)


def room_bytes(kind: Literal["ram", "disk"], budget_bytes: int | None = None, folder: str = "pictures") -> int:
    """What a cache may take: half of the free memory; nine tenths of what is free on the disk or held by caches."""
    if kind == "ram":
        others = sum(held.budget_bytes - held.used_bytes for held in list(_in_memory) if held.fileno() >= 0)
        room = int(_MEMORY_SHARE * max(0, free_memory_bytes() - others))  # they have not taken it yet
    else:
        place, room = cache_folder(folder), 0
        with contextlib.suppress(OSError):
            if place is not None:
                place.mkdir(parents=True, exist_ok=True)
                room = int(_DISK_SHARE * (shutil.disk_usage(place).free + evict(place, sys.maxsize)))
    return room if budget_bytes is None else min(room, budget_bytes)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.1f} MB"


def free_memory_bytes() -> int:
    """Memory that can be had without swapping, in a container what its limit leaves.

    Raises:  SettingsError where psutil is missing
    """
    try:
        import psutil
    except ImportError as error:
        raise SettingsError(
            "the free memory cannot be measured", where="cache", got=error, expected="the package psutil",
            fix="pip install psutil",
        ) from error  # fmt: skip
    free = int(psutil.virtual_memory().available)
    with contextlib.suppress(OSError, ValueError, KeyError):  # no control groups of version 2, or no limit
        limit, used = (int((_CONTROL_GROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        kept = dict(line.split() for line in (_CONTROL_GROUP / "memory.stat").read_text().splitlines())
        free = min(free, limit - used + int(kept["inactive_file"]))
    return max(free, 0)


def cache_folder(name: str = "pictures") -> Path | None:
    """Where stores of one kind lie; None where the user has no home."""
    root = cache_root()
    return root / name if root else None


def _read_seconds(num_bytes: int) -> tuple[float, bool]:
    """What it takes to read so much in one piece from the cache's disk, and whether past the system's memory.

    Raises:  OSError where the disk refuses
    """
    size = -(-num_bytes // _BLOCK_BYTES) * _BLOCK_BYTES
    tries = min(max(_PROBE_BYTES // size, 3), _PROBED)
    seconds = []
    with tempfile.TemporaryFile(dir=cache_folder()) as file, mmap.mmap(-1, size) as block:
        for _ in range(tries):
            file.write(os.urandom(size))  # some disks store what repeats for nothing
        sync_file(file)
        with contextlib.ExitStack() as opened:
            source = _opened_direct(file.fileno(), opened)
            for number in range(tries):
                begun = time.perf_counter()
                (source or file).seek(number * size)
                (source or file).readinto(block)
                seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds), source is not None


def _opened_direct(handle: int, opened: contextlib.ExitStack) -> Any:
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # not every file system can
            direct = os.open(f"/proc/self/fd/{handle}", os.O_RDONLY | os.O_DIRECT)
            return opened.enter_context(os.fdopen(direct, "rb", buffering=0))
    return None


def fill(dataset: Any, threads: int, progress: Callable[[int, int], None] | None = None) -> list[Bad]:
    """Read every sample of a dataset with a cache once, until that takes no more; those that cannot be read."""
    images, places = whole(dataset), in_whole(dataset, np.arange(len(dataset)))

    def read(index: int) -> Bad | None:
        try:
            if not images.cache.store.refused:
                images.pictures(index, ChanceKey())
        except BadSampleError as error:
            return Bad(index, images.id_of(index), str(error.got or error.what))
        return None

    bad: list[Bad] = []
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(places), _AT_ONCE):
            found = pool.map(read, places[start : start + _AT_ONCE].tolist())
            bad += [sample for sample in found if sample is not None]
            if progress is not None:
                progress(min(start + _AT_ONCE, len(places)), len(places))
    return bad
