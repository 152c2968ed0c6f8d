"""What the rooms hand to one another.

Axes: B batch, C channels, H height, W width, T time or tokens, N samples, F features, K classes.
Units end a name where there is one: ``_s`` seconds, ``_bytes``, ``_fraction``; a step is one optimiser update.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from .chance import ChanceKey

Sample = dict[str, Any]
"""One sample: ``{"image": uint8 (C, H, W), "label": int, "id": "train/ants/x.jpg"}``."""

Batch = dict[str, Any]
"""Tensors by name, each with B first; ``index`` int64 (B,); ``valid`` bool (B,) where the last batch is padded."""

Json = Any
"""What JSON can hold: None, bool, int, float, str, list, dict with string keys."""

Kind = Literal[
    "image", "mask", "audio", "tokens", "text", "number", "vector", "tensor", "label", "multilabel", "object"
]

INDEX = "index"
VALID = "valid"


@dataclass(frozen=True)
class Field:
    """One key of a sample: its kind, the shape of one sample, the classes of a label, the number of different tokens.

    A None in ``shape`` is an axis of several lengths. ``mean`` and ``std`` are those of a target of numbers over the
    training data: models speak in its own units, and the loss is divided by its variance.
    """

    kind: Kind
    shape: tuple[int | None, ...] | None = None
    classes: tuple[str, ...] = ()
    is_target: bool = False
    num_tokens: int = 0
    mean: float = 0.0
    std: float = 1.0

    @property
    def num_classes(self) -> int:
        return len(self.classes)


@dataclass(frozen=True)
class Preprocess:
    """What turns a stored image into the model's input, once, on the device: x / 255, minus mean, over std.

    Where ``bits`` is 16 the images are uint16, and it is x / 65535. What is not augmented is the middle square of
    ``crop_fraction`` of the short side.
    """

    image_size: int | None = None
    channels: int = 3
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    bits: int = 8
    crop_fraction: float = 1.0


@dataclass(frozen=True)
class Schema(Mapping[str, Field]):
    """The keys of a dataset's samples, in order."""

    fields: dict[str, Field] = field(default_factory=dict)
    preprocess: Preprocess | None = None

    def __getitem__(self, key: str) -> Field:
        return self.fields[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.fields)

    def __len__(self) -> int:
        return len(self.fields)

    @property
    def targets(self) -> list[str]:
        return [name for name, kept in self.fields.items() if kept.is_target]

    @property
    def inputs(self) -> list[str]:
        return [name for name, kept in self.fields.items() if not kept.is_target and kept.kind != "object"]

    def to_json(self) -> Json:
        return {
            "fields": {name: asdict(kept) for name, kept in self.fields.items()},
            "preprocess": asdict(self.preprocess) if self.preprocess else None,
        }

    @staticmethod
    def from_json(data: Json) -> Schema:
        def of(row: Json) -> Field:
            shape = None if row["shape"] is None else tuple(row["shape"])
            return Field(**{**row, "shape": shape, "classes": tuple(row["classes"])})

        seen = data["preprocess"]
        preprocess = Preprocess(**{**seen, "mean": tuple(seen["mean"]), "std": tuple(seen["std"])}) if seen else None
        return Schema({name: of(row) for name, row in data["fields"].items()}, preprocess)


class KeyedDataset(Protocol):
    """What the loader asks of a dataset; every dataset of ``data/`` is also a ``torch.utils.data.Dataset``.

    ``read(i, key)`` gives the sample whose chance is drawn from ``key``. ``read_batch(indices, key)`` gives whole
    tensors at once where the dataset can, without ``index``, and None where it cannot.
    """

    schema: Schema

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...

    def read(self, index: int, key: ChanceKey) -> Any: ...

    def read_batch(self, indices: np.ndarray[Any, Any], key: ChanceKey) -> Batch | None: ...

    def fingerprint(self) -> str: ...


@dataclass(frozen=True)
class Decision:
    """One automatic choice (law 6): what was decided, why, and the setting that overrides it."""

    name: str
    value: Json
    reason: str
    override: str


@dataclass
class Clock:
    """The one place where steps, samples and epochs are counted (law 9). A step is one optimiser update."""

    step: int = 0
    samples: int = 0
    epoch: int = 0

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step, "samples": self.samples, "epoch": self.epoch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step, self.samples, self.epoch = state["step"], state["samples"], state["epoch"]


TensorTree = dict[str, "Tensor"]
