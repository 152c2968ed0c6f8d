"""Augmentations of texts, once they are tokens. Every draw is a function of (seed, epoch, sample id, operation)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..chance import ChanceKey, keyed_generator, keyed_uniform
from ..contracts import Sample
from ..errors import DataError, SettingsError
from .dataset import Indices
from .samples import called
from .tokens import Tokenizer

Augmentation = str | Callable[[Sample, np.random.Generator], Sample]
Rows = list[np.ndarray[Any, Any]]

_MASK = "token_mask"
NAMES = (_MASK,)
_MASKED_FRACTION = 0.15


def token_mask(rows: Rows, indices: Indices, key: ChanceKey, operation: str, tokenizer: Tokenizer) -> Rows:
    """Hide each token with probability 0.15, drawn by (seed, epoch, sample, place in it); special tokens never.

    Shapes:  indices (B,), B rows (T_i,) int32 → the same
    Source:  Devlin et al. 2019 (arXiv 1810.04805), section 3.1, of which this has the rate
    """
    tokens, lengths = np.concatenate(rows), np.array([len(row) for row in rows])
    ends = np.cumsum(lengths)
    places = np.arange(len(tokens)) - np.repeat(ends - lengths, lengths)
    draws = keyed_uniform(key, operation, (np.repeat(indices, lengths) << 32) + places)[:, 0]
    is_hidden = (draws < _MASKED_FRACTION) & ~np.isin(tokens, tokenizer.special_ids)
    return np.split(np.where(is_hidden, tokenizer.mask_id, tokens), ends[:-1])


@dataclass(frozen=True)
class TextAugmentations:
    """Masks first, then callables ``(sample, rng)`` in the order of the list.

    Raises:  SettingsError for an unknown name
    """

    entries: tuple[Augmentation, ...] = ()

    def __post_init__(self) -> None:
        for entry in self.entries:
            if not callable(entry) and entry not in NAMES:
                raise SettingsError(
                    "texts have no augmentations of this name", where="augment", got=repr(entry),
                    expected=f"{', '.join(NAMES)}, or in Python a callable (sample, rng)",
                )  # fmt: skip

    @property
    def has_callable(self) -> bool:
        return any(callable(entry) for entry in self.entries)

    def mask(self, rows: Rows, indices: Indices, key: ChanceKey, tokenizer: Tokenizer) -> Rows:
        """The tokens as training sees them, in memory of their own where one is hidden; a second mask draws apart."""
        for number in range(self.entries.count(_MASK)):
            rows = token_mask(rows, indices, key, f"text/{_MASK}/{number}", tokenizer)
        return rows

    def apply_callables(self, sample: Sample, key: ChanceKey, index: int, where: str) -> Sample:
        """A user's own, each with its generator.

        Raises:  BadSampleError where one fails, DataError where it returns something else than a sample with tokens
        """
        for place, entry in enumerate(self.entries):
            if callable(entry):
                sample = called(entry, sample, keyed_generator(key, f"text/callable/{place}", index), where)
                _check_sample(sample, entry)
        return sample


def _check_sample(sample: Any, entry: Any) -> None:
    tokens = sample.get("input_ids") if isinstance(sample, dict) else None
    if isinstance(tokens, torch.Tensor) and tokens.dtype == torch.int64 and tokens.ndim == 1 and len(tokens):
        return
    raise DataError(
        "an augmentation returns something else than a sample", where=getattr(entry, "__qualname__", repr(entry)),
        got=type(sample).__name__ if tokens is None else f"'input_ids' of {type(tokens).__name__}",
        expected="a dict whose 'input_ids' is an int64 tensor (T,) of one token or more",
    )  # fmt: skip
