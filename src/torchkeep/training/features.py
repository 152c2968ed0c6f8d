"""What the frozen part makes of each sample, computed once and kept: a dataset in place of the one it was made from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field as Setting
from torch import Tensor

from ..chance import ChanceKey
from ..contracts import INDEX, Batch, KeyedDataset, Sample
from ..data.cache import file_identity
from ..data.dataset import Indices, KeyedData, Part, id_of, in_whole, whole
from ..data.geometry import FLIPPED_BELOW
from ..data.loader import Loader
from ..data.reading import foreign_of
from ..errors import DataError
from ..settings import Settings
from ..store import Store

CHUNK = 32
"""Samples that the frozen part is computed for at once, in their order: so no bit depends on the training's batches."""

_FLIPS = ("horizontal_flip", "vertical_flip")
_MOST_EPOCHS = 256  # among which a sample shows each of its flips
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Compute = Callable[[Batch], dict[str, Tensor]]


class FeatureSettings(Settings):
    """[features]: what a frozen part makes of each sample, computed once."""

    cache: Literal["auto", "on", "off"] = "auto"
    """"auto": where it is expected to save time; "on": wherever it can be; "off": each epoch computes it anew."""
    views: int = Setting(default=4, gt=0)
    """How many draws of random augmentations are kept of a sample, and shown in turn; flips alone are kept exactly."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """How they are kept; "auto": as the frozen part gives them."""
    verify: int = Setting(default=0, ge=0)
    """Of so many samples that were kept before, compute again what is kept, and compare every bit."""


@dataclass(frozen=True)
class Views:
    """How many draws of a sample's augmentation are kept. Where only flips are drawn, all that there can be."""

    count: int
    is_exact: bool
    reason: str
    augmentations: Any = None

    def shown(self, key: ChanceKey, ids: Indices) -> Indices:
        """The view that an epoch shows of each sample. Shapes: ids (B,) → (B,) int64"""
        if self.augmentations is None:
            return np.full(len(ids), key.epoch % self.count, np.int64)
        bits = [draws[:, 0] < FLIPPED_BELOW for draws in self.augmentations.draw(key, ids)]
        return np.asarray(sum(bit.astype(np.int64) << place for place, bit in enumerate(bits)), np.int64)

    def epochs(self, seed: int, view: int, ids: Indices) -> Indices:
        """An epoch that shows this view of each sample. Shapes: ids (B,) → (B,) int64"""
        if self.augmentations is None:
            return np.full(len(ids), view, np.int64)
        found = np.full(len(ids), -1, np.int64)
        for epoch in range(_MOST_EPOCHS):
            found[(found < 0) & (self.shown(ChanceKey(seed, epoch), ids) == view)] = epoch
        assert (found >= 0).all(), "a fair coin falls on each side in 256 throws"
        return found


def plan_views(dataset: KeyedDataset, wanted: int) -> Views:
    """The views of a dataset's samples.

    Raises:  DataError where what is drawn cannot be drawn again
    """
    foreign, augmentations = foreign_of(dataset), getattr(whole(dataset), "augmentations", None)
    entries = tuple(getattr(augmentations, "entries", ()))
    if foreign is not None and not foreign.probe.repeatable:
        raise DataError("the dataset draws from a generator of its own, which nobody can rewind")
    if foreign is None and not entries:
        return Views(1, True, "a sample is the same in each epoch")
    if foreign is not None and not foreign.draws:
        return Views(1, True, "a sample is the same in each epoch, as two looks at one found")
    if entries and set(entries) <= set(_FLIPS) and 2 ** len(entries) <= max(2, wanted):
        return Views(2 ** len(entries), True, "each sample as it is and flipped is all there is", augmentations)
    return Views(wanted, False, f"an approximation: {wanted} draws of the augmentation are shown in turn")


class _Seen(KeyedData):
    """A dataset as one view of it: each sample under the draws of an epoch of its own."""

    def __init__(self, dataset: KeyedDataset, epochs: Indices):
        self.dataset, self.epochs, self.schema = dataset, epochs, dataset.schema
        self.threads = bool(getattr(dataset, "threads", False))

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, index: int, key: ChanceKey) -> Any:
        return self.dataset.read(index, ChanceKey(key.seed, int(self.epochs[index])))

    def collate(self, samples: list[Any]) -> Batch:
        return dict(getattr(self.dataset, "collate", super().collate)(samples))

    def fingerprint(self) -> str:
        return self.dataset.fingerprint()


class Features(KeyedData):
    """Rows of what ``compute`` makes of a dataset's batches, one for each sample and view, made when first shown.

    ``example`` has a row of each column. The rows lie in ``store``, a record for each, and in memory too where
    ``in_memory``; what the store has of another run is not made again.

    Shapes:  compute: a batch → for each column (B, …)
    Raises:  DataError where two samples' rows have different shapes, BadSampleError where one cannot be read
    """

    def __init__(
        self, dataset: KeyedDataset, views: Views, seed: int, compute: Compute, store: Store,
        example: dict[str, Tensor], *, workers: int | Literal["auto"] = "auto", in_memory: bool = True,
        say: Callable[[str], None] = lambda _: None,
    ):  # fmt: skip
        self.dataset, self.views, self.seed, self.schema = dataset, views, seed, dataset.schema
        self.store, self.example, self.made = store, example, 0
        self._compute, self._workers, self._in_memory, self._say = compute, workers, in_memory, say
        self._ids = in_whole(dataset, np.arange(len(dataset)))
        self._held: dict[int, dict[str, Tensor]] = {}
        self._identities: list[int] = []

    def __len__(self) -> int:
        return len(self.dataset)

    def begin(self, indices: Indices, key: ChanceKey) -> None:
        """A batch is one gather."""
        return

    def read(self, index: int, key: ChanceKey) -> Sample:
        return {name: rows[0] for name, rows in self.read_batch(np.array([index]), key).items()}

    def read_batch(self, indices: Indices, key: ChanceKey) -> Batch:
        """Shapes:  indices (B,) → for each column (B, …)"""
        shown = self.views.shown(key, self._ids[indices])
        views = np.unique(shown)
        if len(views) == 1:
            return self._rows(int(views[0]), indices)
        batch = {name: torch.empty((len(indices), *row.shape), dtype=row.dtype) for name, row in self.example.items()}
        for view in views.tolist():
            places = np.flatnonzero(shown == view)
            for name, rows in self._rows(view, indices[places]).items():
                batch[name][torch.from_numpy(places)] = rows
        return batch

    def all_rows(self, view: int = 0) -> Batch:
        """What one view has of every sample. Shapes: for each column (N, …)"""
        return self._rows(view, np.arange(len(self)))

    def _rows(self, view: int, indices: Indices) -> Batch:
        self.ensure(view)
        if self._in_memory:
            places = torch.from_numpy(indices)
            return {name: rows.index_select(0, places) for name, rows in self._held[view].items()}
        found = [self._stored(view, index) for index in indices.tolist()]
        if any(row is None for row in found):
            raise DataError("kept features are damaged", where=self.store.path, fix='features.cache = "off"')
        return _unpacked(torch.from_numpy(np.stack([row for row in found if row is not None])), self.example)

    def share_found(self) -> float:
        """Which share of all rows is there already."""
        found = [
            self._stored(view, index) is not None for view in range(self.views.count) for index in range(len(self))
        ]
        return sum(found) / max(1, len(found))

    def ensure(self, view: int) -> None:
        """Make what is lacking of a view, in chunks of the samples' order."""
        if view in self._held:
            return
        packed = torch.empty((len(self) if self._in_memory else 0, row_bytes(self.example)), dtype=torch.uint8)
        lacking = []
        for index in range(len(self)):
            row = self._stored(view, index)
            if row is None:
                lacking.append(index // CHUNK)
            elif self._in_memory:
                packed[index] = torch.from_numpy(row)
        chunks = np.unique(np.array(lacking, np.int64))
        if len(chunks):
            self._say(f"the frozen part of {min(len(chunks) * CHUNK, len(self)):,} samples, view {view + 1} of "
                      f"{self.views.count}, is computed")  # fmt: skip
        for indices, made in self._make(view, chunks):
            self._keep(view, indices, made)
            if self._in_memory:
                packed[torch.from_numpy(indices)] = made
        self._held[view] = _unpacked(packed, self.example) if self._in_memory else {}

    def _make(self, view: int, chunks: Indices) -> Iterator[tuple[Indices, Tensor]]:
        """The packed rows of some chunks, computed now."""
        if not len(chunks):
            return
        indices = np.concatenate([np.arange(c * CHUNK, min((c + 1) * CHUNK, len(self))) for c in chunks.tolist()])
        epochs = self.views.epochs(self.seed, view, self._ids)
        dataset: Any = self.dataset if self.views.augmentations is None else _Seen(self.dataset, epochs)
        loader = Loader(Part(dataset, indices), CHUNK, seed=self.seed, buckets=False, workers=self._workers)
        loader.load_state_dict({**loader.state_dict(), "epoch": int(epochs[0])})
        try:
            for batch in loader:
                places = indices[batch[INDEX].numpy()]
                yield places, self._packed(self._compute(batch), int(places[0]))
        finally:
            loader.close()

    def _packed(self, made: dict[str, Tensor], index: int) -> Tensor:
        """Shapes:  for each column (B, …) → (B, bytes) uint8"""
        for name, row in self.example.items():
            if made[name].shape[1:] != row.shape:
                raise DataError(
                    "the frozen part makes results of several sizes", where=id_of(self.dataset, index),
                    got=f"{name} {tuple(made[name].shape[1:])}", expected=str(tuple(row.shape)),
                    fix='features.cache = "off"',
                )  # fmt: skip
        columns = [made[name].to("cpu", row.dtype).contiguous() for name, row in self.example.items()]
        return torch.cat([column.reshape(len(column), -1).view(torch.uint8) for column in columns], 1)

    def _keep(self, view: int, indices: Indices, packed: Tensor) -> None:
        self.made += len(indices)
        for row, index in zip(packed.numpy(), indices.tolist(), strict=True):
            is_kept = self.store.put(view * len(self) + index, row, self._identity(index))
            if not is_kept and not self._in_memory:
                raise DataError(
                    "the features cannot be kept", where=self.store.path, got=self.store.refused,
                    expected="room for all", fix='features.cache = "off"',
                )  # fmt: skip

    def _stored(self, view: int, index: int) -> np.ndarray[Any, Any] | None:
        found = self.store.get(view * len(self) + index, self._identity(index))
        return found.copy() if found is not None and found.shape == (row_bytes(self.example),) else None

    def _identity(self, index: int) -> int:
        if not self._identities:
            files_of = getattr(whole(self.dataset), "files_of", None)
            self._identities = [file_identity(files_of(id)) if files_of else 0 for id in self._ids.tolist()]
        return self._identities[index]

    def differing(self, num_samples: int) -> list[str]:
        """Of the samples that are kept, so many computed again: the names of those with other bits."""
        found = [index for index in range(len(self)) if self._stored(0, index) is not None]
        few = found[:: max(1, len(found) // max(1, num_samples))][:num_samples]
        chunks = np.unique(np.array(few, np.int64) // CHUNK)
        differ = []
        for indices, packed in self._make(0, chunks):
            for row, index in zip(packed.numpy(), indices.tolist(), strict=True):
                kept = self._stored(0, index)
                if kept is not None and not np.array_equal(row, kept):
                    differ.append(id_of(self.dataset, index))
        return differ

    def fingerprint(self) -> str:
        return self.dataset.fingerprint()

    def id_of(self, index: int) -> str:
        return id_of(self.dataset, index)

    @property
    def labels(self) -> Indices | None:
        labels: Indices | None = getattr(self.dataset, "labels", None)
        return labels

    @property
    def lengths(self) -> np.ndarray[Any, Any] | None:
        lengths: np.ndarray[Any, Any] | None = getattr(self.dataset, "lengths", None)
        return lengths


def row_bytes(example: dict[str, Tensor]) -> int:
    """What the columns of one sample take together."""
    return sum(row.nbytes for row in example.values())


def _unpacked(packed: Tensor, example: dict[str, Tensor]) -> Batch:
    """Shapes:  (B, bytes) uint8 → for each column (B, …)"""
    parts = torch.split(packed, [row.nbytes for row in example.values()], 1)
    return {
        name: part.contiguous().view(row.dtype).reshape(len(packed), *row.shape)
        for part, (name, row) in zip(parts, example.items(), strict=True)
    }


def example_of(made: dict[str, Tensor], dtype: str) -> dict[str, Tensor]:
    """A row of each column, floating ones as they are to be kept. Shapes: for each column (B, …) → (…)"""
    kept = _DTYPES.get(dtype)
    return {name: rows[0].cpu().to(kept) if kept and rows.is_floating_point() else rows[0].cpu()
            for name, rows in made.items()}  # fmt: skip
