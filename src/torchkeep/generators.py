"""The global generators of torch, NumPy and Python, lent to foreign code and put back as they were."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor


@contextlib.contextmanager
def kept_generators() -> Iterator[None]:
    """Leave torch's, NumPy's and Python's global generators as they were, those of GPUs in use too."""
    before = generator_states()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        restore(before)
        for number, state in enumerate(devices):
            torch.cuda.set_rng_state(state, number)


def borrowed_generators(seed: int) -> Callable[[], contextlib.AbstractContextManager[None]]:
    """A context to enter again and again, in which the global generators are others, that begin with ``seed``."""
    own: tuple[Any, Any, Tensor] | None = None

    @contextlib.contextmanager
    def borrowed() -> Iterator[None]:
        nonlocal own
        with kept_generators():
            seed_all(seed) if own is None else restore(own)
            try:
                yield
            finally:
                own = generator_states()

    return borrowed


@contextlib.contextmanager
def keyed_generators(seed: int) -> Iterator[None]:
    """Seed the global generators for foreign code, and put them back afterwards."""
    with kept_generators():
        seed_all(seed)
        yield


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.default_generator.manual_seed(seed)


def generator_states() -> tuple[Any, Any, Tensor]:
    return random.getstate(), np.random.get_state(), torch.default_generator.get_state()


def restore(states: tuple[Any, Any, Tensor]) -> None:
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.default_generator.set_state(states[2])


def same_states(one: tuple[Any, Any, Tensor], other: tuple[Any, Any, Tensor]) -> bool:
    numpy_same = one[1][2:] == other[1][2:] and np.array_equal(one[1][1], other[1][1])
    return one[0] == other[0] and numpy_same and torch.equal(one[2], other[2])
